"""A TCP proxy before a real peer that misbehaves as a test says, PDU by PDU (PS3.8 9.3)."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

RELEASE_RQ, P_DATA = 0x05, 0x04


@dataclass
class Proxy:
    """What came through; *fault* is asked for each PDU of the calling side, by its running number.

    It answers "pass", "drop" (the peer never sees it), "cut" (both connections end) or "trickle"
    (a byte a second from here on, until the caller has had enough).
    """

    upstream: int
    fault: Callable[[int, int], str] = lambda number, kind: "pass"
    port: int = 0
    associations: int = 0
    pdus: list[int] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def serve(self, listener: socket.socket) -> None:
        """Take connections until the listener is closed."""
        with suppress(OSError):
            while True:
                caller, _ = listener.accept()
                self.associations += 1
                thread = threading.Thread(target=self._pair, args=(caller,), daemon=True)
                self.threads.append(thread)
                thread.start()

    def _pair(self, caller: socket.socket) -> None:
        with caller, socket.create_connection(("127.0.0.1", self.upstream), 10) as peer:
            back = threading.Thread(target=self._return, args=(caller, peer), daemon=True)
            back.start()
            self._forward(caller, peer)
            back.join()

    def _return(self, caller: socket.socket, peer: socket.socket) -> None:
        with suppress(OSError):
            while piece := peer.recv(65536):
                caller.sendall(piece)
        _end(caller)

    def _forward(self, caller: socket.socket, peer: socket.socket) -> None:
        with suppress(OSError, EOFError):
            while True:
                header = _exactly(caller, 6)
                (length,) = struct.unpack(">L", header[2:])
                kind = header[0]
                self.pdus.append(kind)
                what = self.fault(len(self.pdus), kind)
                if what == "cut":
                    _end(caller)
                    break
                if what == "trickle":
                    peer.sendall(header)
                    while not self.stop.wait(1.0):
                        peer.sendall(_exactly(caller, 1))
                    break
                body = _exactly(caller, length)
                if what == "pass":
                    peer.sendall(header + body)
        _end(peer)


@contextmanager
def proxying(proxy: Proxy, *, port: int = 0) -> Generator[Proxy]:
    """Run a proxy on loopback."""
    listener = socket.create_server(("127.0.0.1", port))
    # What a caller sends is to wait in its own buffers, not in ours.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    proxy.port = int(listener.getsockname()[1])
    thread = threading.Thread(target=proxy.serve, args=(listener,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stop.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for each in (thread, *proxy.threads):
            each.join(10)


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
