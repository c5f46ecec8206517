"""The storage loop of an established association (PS3.7 9.3, PS3.8 9.3).

pynetdicom negotiates; then its two threads rest, and this loop reads the connection itself: into
one buffer that is used again and again, without polling, without a hop between threads, and
without a copy of the data set.  It serves C-STORE and C-ECHO.  Whatever else comes, a release, an
abort, another message, is given back to pynetdicom together with the octets that were read ahead,
and pynetdicom serves the association from there on.

What is used of pynetdicom beyond its documentation is `Handover`'s alone, and held by
`tests/integration/test_storage_loop.py`: ``DULServiceProvider._idle_timer``, that the DUL's
thread calls the handlers of ``EVT_PDU_SENT``, and the association's thread those of
``EVT_ESTABLISHED``; and that the DUL reads by ``AssociationSocket.ready`` and ``recv``.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event as Flag
from typing import Protocol, cast

from pynetdicom.association import Association
from pynetdicom.transport import AssociationSocket

from dicom_node.association import STORAGE_COMMITMENT, VERIFICATION, Rewound
from dicom_node.observability import get_logger
from dicom_node.upper_layer import (
    C_ECHO_RQ,
    C_STORE_RQ,
    INVALID_PARAMETER,
    NOT_SPECIFIED,
    Command,
    CommandSet,
    Data,
    Limits,
    OtherPDU,
    Parser,
    ProtocolError,
    abort_pdu,
    lacking,
    response_pdu,
)

# Most images whole: each further round through kernel and parser costs more than the memory, of
# which only what is used is taken.
BUFFER = 1 << 20
# A message, or a PDU, that has begun must come on at this rate after its time-out.
SLOWEST_BYTES_S = 1000
# PS3.8 9.1.5: after our A-ABORT we wait so long for the peer to close.
_CLOSING_S = 2.0
_SUCCESS = 0x0000

_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)

_log = get_logger(__name__)


class Answered(Protocol):
    """What one instance was answered with."""

    @property
    def status(self) -> int:
        """DIMSE status."""

    @property
    def comment(self) -> str:
        """Error Comment, or nothing."""


class Receiving(Protocol):
    """One instance being received."""

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Take the next octets of the data set, before they change."""

    def finish(self) -> Answered:
        """Answer for the whole data set."""

    def close(self) -> None:
        """Remove what has not been stored."""


@dataclass(frozen=True)
class Context:
    """An accepted presentation context."""

    abstract_syntax: str
    transfer_syntax: str

    @property
    def is_storage(self) -> bool:
        """Whether C-STORE is served on it."""
        return self.abstract_syntax not in (VERIFICATION, STORAGE_COMMITMENT)


#: Begins an instance: context and command set.
Begin = Callable[[Context, CommandSet], Receiving]


@dataclass(frozen=True)
class Timeouts:
    """In seconds: without a message, and within one."""

    idle: float | None
    message: float | None


class StorageLoop:
    """Serves C-STORE and C-ECHO on a connected socket until something else comes."""

    def __init__(
        self,
        connection: socket.socket,
        contexts: Mapping[int, Context],
        begin: Begin,
        *,
        limits: Limits,
        timeouts: Timeouts,
    ) -> None:
        self._connection = connection
        self._contexts = contexts
        self._begin = begin
        self._timeouts = timeouts
        self._limits = limits
        self._parser = Parser(limits)
        self._buffer = memoryview(bytearray(BUFFER))
        self._context = Context("", "")
        self._command: tuple[int, CommandSet] | None = None
        self._instance: Receiving | None = None
        self._pieces: list[memoryview] = []
        self._within = False
        self._started = 0.0
        self._received = 0

    def run(self) -> bytes:
        """Serve; the octets that were read and are for somebody else.

        The connection has ended, or was aborted by us, where they are none.
        """
        self._connection.settimeout(self._timeouts.idle)
        try:
            while count := self._read():
                self._parser.push(self._buffer[:count])
                unread = self._serve()
                if unread is not None:
                    return unread + self._read_exactly(lacking(unread))
                self._pace(count)
        except ProtocolError as error:
            self._abort(error.reason, str(error))
        except TimeoutError:
            self._abort(NOT_SPECIFIED, "the peer has gone silent")
        except OSError as error:
            _log.info("connection lost", action="connection_lost", error=type(error).__name__)
        finally:
            self._drop()
        return b""

    def _read(self) -> int:
        count = self._connection.recv_into(self._buffer)
        if _QUICKACK is not None:
            # Linux takes the flag back by itself.  Without it a sender that leaves Nagle's
            # algorithm on waits 40 ms for our delayed acknowledgement, once an instance.
            self._connection.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        return count

    def _read_exactly(self, count: int) -> bytes:
        """The rest of a PDU that has begun."""
        if count > self._limits.pdu:
            raise ProtocolError(INVALID_PARAMETER, "a PDU is larger than we allow")
        rest = bytearray()
        while len(rest) < count and (piece := self._connection.recv(count - len(rest))):
            rest += piece
        return bytes(rest)

    def _serve(self) -> bytes | None:
        """Serve what the buffer holds; the unread octets where it holds something else."""
        while (event := self._parser.next()) is not None:
            if isinstance(event, Data):
                self._take(event)
            elif isinstance(event, OtherPDU) or not self._start(event):
                return self._parser.unread()
        self._write()
        return None

    def _start(self, event: Command) -> bool:
        """Begin or answer a message; False for one that is not ours."""
        command, context = event.command, self._contexts.get(event.context_id)
        if context is None or command.message_id is None:
            return False
        if command.field == C_ECHO_RQ and not command.has_data_set and command.sop_class_uid:
            self._answer(event.context_id, command, _SUCCESS, "")
            return True
        # A request that names no instance is taken, and answered: pynetdicom would stay silent,
        # and the sender wait for its time-out.
        if command.field != C_STORE_RQ or not context.is_storage or not command.has_data_set:
            return False
        self._command = event.context_id, command
        self._instance = self._begin(context, command)
        return True

    def _take(self, event: Data) -> None:
        if event.view:
            self._pieces.append(event.view)
        if not event.last or self._command is None or self._instance is None:
            return
        self._write()
        answer = self._instance.finish()
        context_id, command = self._command
        self._answer(context_id, command, answer.status, answer.comment)
        # The peer need not wait for the temporary name to go.
        self._drop()

    def _write(self) -> None:
        if self._pieces and self._instance is not None:
            self._instance.write(self._pieces)
        self._pieces = []

    def _answer(self, context_id: int, request: CommandSet, status: int, comment: str) -> None:
        self._connection.sendall(response_pdu(context_id, request, status, comment))

    def _pace(self, count: int) -> None:
        """Change between the two time-outs; TimeoutError for a peer that trickles."""
        if not self._parser.within_message:
            if self._within:
                self._within = False
                self._connection.settimeout(self._timeouts.idle)
            return
        now = time.monotonic()
        if not self._within:
            self._within, self._started, self._received = True, now, 0
            self._connection.settimeout(self._timeouts.message)
        self._received += count
        if self._timeouts.message is None:
            return
        if now - self._started > self._timeouts.message + self._received / SLOWEST_BYTES_S:
            raise TimeoutError

    def _drop(self) -> None:
        instance, self._instance, self._command = self._instance, None, None
        if instance is not None:
            instance.close()

    def _abort(self, reason: int, why: str) -> None:
        """Send A-ABORT, then wait a little for the peer to close (PS3.8 Sta13)."""
        _log.warning("association aborted", action="association_aborted", why=why)
        with suppress(OSError):
            self._connection.settimeout(_CLOSING_S)
            self._connection.sendall(abort_pdu(reason))
            half_close(self._connection, socket.SHUT_WR)
            deadline = time.monotonic() + _CLOSING_S
            # Closing with octets unread would reset the connection before the A-ABORT is read.
            while time.monotonic() < deadline and self._connection.recv_into(self._buffer):
                pass


def half_close(connection: socket.socket, how: int) -> None:
    """Shut one direction of a socket; of a TLS socket the TCP connection below it."""
    with suppress(OSError):
        # ssl.SSLSocket.shutdown would forget TLS, and send in the clear from then on.
        socket.socket.shutdown(connection, how)


class Handover:
    """Lends the connection of an association to a loop, and gives it back to pynetdicom.

    The two threads of the association meet here: the DUL's rests in `lend` once it has sent
    A-ASSOCIATE-AC, while the association's own runs the loop in `use`.
    """

    def __init__(self) -> None:
        self._lent, self._back = Flag(), Flag()
        self._connection: socket.socket | None = None

    def lend(self) -> None:
        """Rest until the connection is back; for the thread that reads it otherwise."""
        self._lent.set()
        self._back.wait()

    def use(self, association: Association, run: Callable[[socket.socket], bytes]) -> None:
        """Run a loop on the connection; the octets that it leaves are read next."""
        try:
            # The A-ASSOCIATE-AC goes out now, or nobody waits for it any more.
            while not self._lent.wait(1.0):
                if not association.dul.is_alive():
                    return
            wrapper = association.dul.socket
            if wrapper is None or wrapper.socket is None:
                return
            self._connection = wrapper.socket
            unread = run(self._connection)
            self._connection.settimeout(association.network_timeout)
            association.dul.socket = cast(AssociationSocket, Rewound(wrapper, unread))
            # It has run all the while; were it not set anew, a long association would be idle.
            association.dul._idle_timer.restart()
        finally:
            self._back.set()

    def end(self) -> None:
        """Let the loop end before its next read; for whoever aborts the association."""
        if self._connection is not None and not self._back.is_set():
            half_close(self._connection, socket.SHUT_RD)


def contexts_of(association: Association) -> dict[int, Context]:
    """The accepted presentation contexts of an association by their identifiers."""
    return {
        int(context.context_id): Context(
            str(context.abstract_syntax), str(context.transfer_syntax[0])
        )
        for context in association.accepted_contexts
        if context.context_id is not None
    }
