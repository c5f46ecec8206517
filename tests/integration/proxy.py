"""A TCP proxy before a real peer that misbehaves as a test says, PDU by PDU (PS3.8 9.3).

What it lets through the peer stores; what the peer holds in the end is asked of the peer.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue

from dicom_node.storage_scu import classify_status
from dicom_node.upper_layer import CommandSet, read_command, response_pdu

RELEASE_RQ, P_DATA = 0x05, 0x04
ABORT = bytes((0x07, 0, 0, 0, 0, 4, 0, 0, 0, 0))
# PS3.7 E.1: (0000,0900) in a response, before its two bytes.
_STATUS = b"\x00\x00\x00\x09\x02\x00\x00\x00"
# PS3.8 E.2: the two bits of a message control header, which is the last byte of a PDV's header.
_COMMAND, _LAST, _PDV_HEADER = 0x01, 0x02, 6


@dataclass
class Proxy:
    """What came through; *fault* is asked for each PDU of the calling side, by its running number.

    It answers "pass", "drop" (the peer never sees it), "cut" (both connections end) or "trickle"
    (a byte a second from here on, until the caller has had enough).

    *status* is asked for each C-STORE, by its running number: what the caller is answered, or None
    for an A-ABORT in its midst. The peer gets what is answered as stored, and never sees the rest.
    *lost* says whether the answer to it is lost, and the connection with it. Both take it that a
    PDU holds one PDV, and a command set is in one PDU, as pynetdicom writes them.
    """

    upstream: int
    fault: Callable[[int, int], str] = lambda number, kind: "pass"
    status: Callable[[int], int | None] = lambda number: 0x0000
    lost: Callable[[int], bool] = lambda number: False
    port: int = 0
    associations: int = 0
    asked: int = 0
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
            stores = _Stores()
            back = threading.Thread(target=self._return, args=(caller, peer, stores), daemon=True)
            back.start()
            self._forward(caller, peer, stores)
            back.join()

    def _return(self, caller: socket.socket, peer: socket.socket, stores: _Stores) -> None:
        with suppress(OSError, EOFError):
            while True:
                header, body = _pdu(peer)
                if header[0] == P_DATA:
                    number, status = stores.forwarded.get(timeout=10)
                    if self.lost(number):
                        break
                    body = _with_status(body, status)
                caller.sendall(header + body)
        _end(caller)

    def _forward(self, caller: socket.socket, peer: socket.socket, stores: _Stores) -> None:
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
                if kind == P_DATA and what == "pass":
                    what = self._of_store(body, stores)
                if what == "abort":
                    caller.sendall(ABORT)
                    peer.sendall(ABORT)
                    break
                if what == "answer":
                    caller.sendall(response_pdu(body[4], stores.command, stores.status or 0))
                if what == "pass":
                    peer.sendall(header + body)
        _end(peer)

    def _of_store(self, body: bytes, stores: _Stores) -> str:
        """What becomes of a P-DATA-TF of the caller."""
        control = body[_PDV_HEADER - 1]
        if control & _COMMAND:
            self.asked += 1
            stores.command = read_command(body[_PDV_HEADER:])
            stores.status = self.status(self.asked)
            if stores.is_refused:
                return "drop"
            stores.forwarded.put((self.asked, stores.status or 0x0000))
        elif stores.status is None:
            return "abort"
        elif stores.is_refused:
            return "answer" if control & _LAST else "drop"
        return "pass"


@dataclass
class _Stores:
    """The C-STORE in hand of one association, and those that the peer has to answer."""

    command: CommandSet = field(default_factory=lambda: CommandSet(0, None, "", "", False))
    status: int | None = 0x0000
    forwarded: SimpleQueue[tuple[int, int]] = field(default_factory=SimpleQueue)

    @property
    def is_refused(self) -> bool:
        """Whether the caller is to be told that the instance is not stored."""
        return self.status is not None and classify_status(self.status) != "delivered"


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


def _pdu(connection: socket.socket) -> tuple[bytes, bytes]:
    header = _exactly(connection, 6)
    return header, _exactly(connection, struct.unpack(">L", header[2:])[0])


def _with_status(body: bytes, status: int) -> bytes:
    """The response of a peer that has stored, with another status that says so."""
    if status == 0x0000:
        return body
    at = body.index(_STATUS) + len(_STATUS)
    assert body[at : at + 2] == b"\0\0", "the peer has not stored it"
    return body[:at] + struct.pack("<H", status) + body[at + 2 :]


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
