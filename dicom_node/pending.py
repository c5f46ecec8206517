"""One connection until its association request has come, and until its last word has gone out.

A state machine on a non-blocking socket: TLS handshake, A-ASSOCIATE-RQ, and for a peer that is
turned away State 13 of PS3.8 Table 9-5.  It never waits and decides nothing: whom to serve, how
many and how long is :mod:`dicom_node.listener`'s, which calls :meth:`Pending.advance` whenever
there is something to read.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from dicom_node import tls
from dicom_node.access import Requestor, origin, plain_address
from dicom_node.request import (
    HEADER_LENGTH,
    AssociateRequest,
    NotARequestError,
    read_header,
    read_request,
)

Connection = socket.socket

_PIECE: Final = 1 << 16
_DISCARDED: Final = 1 << 18


class Stage(Enum):
    """What a connection is at; the value says what did not come where its time runs out."""

    HANDSHAKE = "the TLS handshake"
    REQUEST = "its association request"
    CLOSING = "closing the connection"
    GONE = "gone: handed over or closed"


@dataclass(frozen=True)
class Over:
    """The connection has come to nothing.

    why: in words, for people; empty where the peer merely left.  abort: the reason of an A-ABORT
    (PS3.8 Table 9-26) that it should still hear; None: nothing can be said to it.
    """

    why: str = ""
    abort: int | None = None
    #: The peer could not be authenticated: a failed TLS handshake.
    authentication: bool = False


@dataclass(eq=False)
class Pending:
    """A connection that has not become an association."""

    socket: Connection
    address: tuple[str, int]
    local: tuple[str, int]
    #: Until when the present stage may last, by the monotonic clock.
    deadline: float
    #: How long the request may take once TLS stands (seconds).
    artim_s: float
    stage: Stage
    #: What to wait for, in the selector's terms.
    events: int = selectors.EVENT_READ
    _received: bytearray = field(default_factory=bytearray)
    _wanted: int = HEADER_LENGTH
    _discarded: int = 0

    @classmethod
    def accepted(
        cls,
        connection: Connection,
        address: tuple[str, int],
        credentials: tls.ServerCredentials | None,
        *,
        artim_s: float,
        handshake_s: float,
    ) -> Pending:
        """A connection that has just been accepted; with *credentials* TLS comes first.

        Raises OSError or ValueError where the peer has left in the meantime.
        """
        connection.setblocking(False)
        # Nagle's algorithm and a delayed ACK would cost 40 ms an instance.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        local = name(connection.getsockname())
        wait, stage = artim_s, Stage.REQUEST
        if credentials is not None:
            connection = credentials.context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
            wait, stage = handshake_s, Stage.HANDSHAKE
        return cls(connection, address, local, time.monotonic() + wait, artim_s, stage)

    @property
    def peer(self) -> str:
        """The peer's address as people write it."""
        return plain_address(self.address[0])

    @property
    def who(self) -> str:
        """What caps count as one peer."""
        return origin(self.address[0])

    def requestor(self, request: AssociateRequest) -> Requestor:
        """Who asks, by the request, the address and the certificate."""
        names = None
        if isinstance(self.socket, ssl.SSLSocket):
            names = tls.certificate_names(self.socket.getpeercert())
        return Requestor(request.calling_ae, request.called_ae, self.address[0], names)

    def advance(self) -> AssociateRequest | Over | None:
        """Go on as far as what has come allows: the whole request, the end, or None to wait."""
        if self.stage is Stage.HANDSHAKE:
            over = self._shake_hands()
            if over is not None or self.stage is Stage.HANDSHAKE:
                return over
            # What came with the last flight raises no event.
        if self.stage is Stage.REQUEST:
            return self._read()
        return self._discard()

    def answer(self, pdu: bytes, linger_s: float) -> None:
        """Send the last PDU and wait for the peer to close, for *linger_s* at most.

        Closing at once, with bytes of the peer unread, would reset the connection and could take
        the answer with it.
        """
        with suppress(OSError):
            self.socket.send(pdu)
        self.stage = Stage.CLOSING
        self.deadline = time.monotonic() + linger_s
        self._received.clear()

    def _shake_hands(self) -> Over | None:
        assert isinstance(self.socket, ssl.SSLSocket)
        self.events = selectors.EVENT_READ
        try:
            self.socket.do_handshake()
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLWantWriteError:
            self.events = selectors.EVENT_WRITE
            return None
        except OSError as error:
            return _tls_failed(error)
        self.stage = Stage.REQUEST
        self.deadline = time.monotonic() + self.artim_s
        return None

    def _read(self) -> AssociateRequest | Over | None:
        """Read no further than the end of the request: what follows is the association's."""
        while True:
            try:
                piece = self.socket.recv(min(_PIECE, self._wanted - len(self._received)))
            except (BlockingIOError, ssl.SSLWantReadError):
                return None
            except OSError as error:
                # In TLS 1.3 a client hears of our certificate request, and we of its alert, only
                # now.
                return _tls_failed(error) if isinstance(error, ssl.SSLError) else Over()
            if not piece:
                return Over()
            self._received += piece
            if len(self._received) < self._wanted:
                continue
            try:
                if self._wanted > HEADER_LENGTH:
                    return read_request(bytes(self._received))
                self._wanted += read_header(bytes(self._received))
            except NotARequestError as error:
                return Over(error.why, error.reason)

    def _discard(self) -> Over | None:
        try:
            piece = self.socket.recv(_PIECE)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        except OSError:
            piece = b""
        self._discarded += len(piece)
        return Over() if not piece or self._discarded > _DISCARDED else None


def _tls_failed(error: OSError) -> Over:
    # A peer that closes without a word probes the port: no failure to tell of.
    if isinstance(error, ssl.SSLEOFError | ConnectionError):
        return Over()
    return Over(f"TLS: {tls.failure_words(error)}", authentication=True)


def hang_up(connection: Connection) -> None:
    """Close a connection, whatever state it is in."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        connection.close()


def name(address: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """Host and port of a socket's name, of either family."""
    return str(address[0]), int(address[1])
