"""C-STORE requests on the connection of an association that is established (PS3.7 9.1.1).

pynetdicom negotiates and releases.  In between its two threads rest, and requests are written and
answers read here: without polling, without a hop between threads, and without decoding what lies
encoded on disk.  Whatever a peer sends in place of an answer, a release or an abort, is given back
to pynetdicom with the octets that were read.

What is used of pynetdicom beyond its documentation is `Loan`'s alone, and held by
`tests/integration/test_store_requests.py`: that the DUL's thread asks ``AssociationSocket.ready``
before it reads, and asks again and again; ``DULServiceProvider._idle_timer``; and that the
association's thread rests at ``Association._reactor_checkpoint``.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from typing import BinaryIO, cast

from pynetdicom.association import Association
from pynetdicom.transport import AssociationSocket

from dicom_node.association import Rewound, connection_of
from dicom_node.requestor import hang_up_after
from dicom_node.upper_layer import (
    P_DATA_TF,
    ProtocolError,
    StoreAnswer,
    answer_in,
    data_pdus,
    read_store_answer,
    store_request_pdu,
)

# Of a data set, held at once.
_PIECE = 1 << 20
# An answer is a few hundred octets; a peer that announces more speaks another protocol.
_ANSWER = 1 << 16
# PS3.8 D.1: a peer that sets no limit.
_UNLIMITED_PDU = 1 << 18
# For the threads of pynetdicom to rest, to notice an end, and to send an abort.
_REST_S, _END_S, _ABORT_S = 2.0, 1.0, 1.0

_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)


@dataclass(frozen=True)
class StoreRequest:
    """What a request says of one instance beside its data set."""

    context_id: int
    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    deadline: float  #: of its answer, transfer included; monotonic seconds


class Loan:
    """The connection of an association while its own threads rest; use it on one thread."""

    def __init__(self, association: Association) -> None:
        """Take the connection; what is found to have ended gives no answer to any request."""
        self._association = association
        self._most = association.acceptor.maximum_length or _UNLIMITED_PDU
        self._shared = _shared(association)
        self._connection: socket.socket | None = connection_of(association)
        association._reactor_checkpoint.clear()
        if self._shared is not None and not self._shared.lend(association.dul):
            self._connection = None

    def give_back(self, unread: bytes = b"") -> None:
        """Let pynetdicom have the connection, *unread* octets first; again is no error."""
        if self._shared is not None and self._shared.is_lent:
            if self._connection is not None and self._connection.fileno() >= 0:
                self._connection.settimeout(self._association.network_timeout)
            # It has run all the while; were it not set anew, a long series would be idle.
            self._association.dul._idle_timer.restart()
            self._shared.end(unread)
        self._connection = None
        self._association._reactor_checkpoint.set()

    def begin(self, request: StoreRequest, data: BinaryIO, size: int) -> None:
        """Send one instance whose encoded data set of *size* octets is read from *data*.

        What goes wrong is told by `answer`, which is to be asked for before another is sent.
        """
        if self._connection is None:
            return
        try:
            self._write(request, data, size, request.deadline)
        except (TimeoutError, ProtocolError):
            self._abort()
        except OSError:
            self._ended(b"")

    def answer(self, request: StoreRequest) -> StoreAnswer | None:
        """The answer to the request that was sent last.

        None where there is none by its deadline, or where the association ends: it has then ended
        for us too, and the loan with it.
        """
        if self._connection is None:
            return None
        try:
            answer = self._answer(request.deadline)
        except (TimeoutError, ProtocolError):
            self._abort()
            return None
        except OSError:
            self._ended(b"")
            return None
        if answer is not None and answer.message_id != request.message_id:
            self._abort()
            return None
        return answer

    def _write(self, request: StoreRequest, data: BinaryIO, size: int, deadline: float) -> None:
        head = store_request_pdu(
            request.context_id, request.message_id, request.sop_class_uid, request.sop_instance_uid
        )
        # A peer that does not read at all is left earlier than one that is slow.
        stalled = self._association.network_timeout or float("inf")
        left = size
        while left or head:
            piece = data.read(min(left, _PIECE))
            if len(piece) < min(left, _PIECE):
                raise TimeoutError  # cut short meanwhile: a request that has begun cannot end well
            left -= len(piece)
            pdus = data_pdus(request.context_id, memoryview(piece), self._most, last=not left)
            self._within(min(deadline, time.monotonic() + stalled)).sendall(head + pdus)
            head = b""

    def _answer(self, deadline: float) -> StoreAnswer | None:
        """The answer; None where something else came, which pynetdicom then has."""
        command = bytearray()
        while True:
            pdu = self._pdu(deadline)
            if pdu[:1] != bytes((P_DATA_TF,)):
                self._ended(pdu)
                return None
            if answer_in(pdu[6:], command):
                return read_store_answer(bytes(command))

    def _pdu(self, deadline: float) -> bytes:
        """The next PDU; what there is of it where the peer has closed."""
        octets = bytearray()
        missing = 6
        while missing > 0:
            connection = self._within(deadline)
            piece = connection.recv(missing)
            if not piece:
                raise ConnectionResetError
            if _QUICKACK is not None:
                # Linux takes the flag back by itself. Without it a peer that leaves Nagle's
                # algorithm on, as DCMTK does, holds the rest of each answer back for 40 ms, until
                # our delayed acknowledgement of its beginning.
                connection.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
            octets += piece
            missing = 6 - len(octets)
            if missing <= 0:
                length = int.from_bytes(octets[2:6], "big")
                if length > _ANSWER:
                    raise ProtocolError(0, "a PDU that is too long for an answer")
                missing = 6 + length - len(octets)
        return bytes(octets)

    def _within(self, deadline: float) -> socket.socket:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        assert self._connection is not None
        self._connection.settimeout(left)
        return self._connection

    def _abort(self) -> None:
        """End an association on which nothing more can be said."""
        self.give_back()
        # A peer that does not read would keep pynetdicom waiting.
        with hang_up_after(self._association, _ABORT_S):
            self._association.abort()

    def _ended(self, unread: bytes) -> None:
        """Let pynetdicom find out that, and how, the peer has ended the association."""
        self.give_back(unread)
        deadline = time.monotonic() + _END_S
        while self._association.is_established and time.monotonic() < deadline:
            time.sleep(0.002)
        if self._association.is_established:
            self._abort()


class _Shared(Rewound):
    """An association's socket that pynetdicom does not read while it is lent."""

    def __init__(self, wrapper: AssociationSocket) -> None:
        super().__init__(wrapper)
        self._resting = threading.Event()
        self.is_lent = False

    def lend(self, reader: threading.Thread) -> bool:
        """Wait until the thread that reads has seen that it is lent; False where it has ended."""
        self._resting.clear()
        self.is_lent = True
        deadline = time.monotonic() + _REST_S
        while not self._resting.wait(0.01):
            if not reader.is_alive() or time.monotonic() > deadline:
                return False
        # What it had begun to read before was not ours.
        return not self._unread

    def end(self, unread: bytes) -> None:
        """Let it be read again, these octets first."""
        self._unread += unread
        self.is_lent = False

    @property
    def ready(self) -> bool:
        """Whether there is something for pynetdicom to read."""
        if self.is_lent:
            self._resting.set()
            return False
        return super().ready


def _shared(association: Association) -> _Shared | None:
    """The socket of an association as one that can be lent; None where it is closed."""
    wrapper = association.dul.socket
    if wrapper is None or wrapper.socket is None:
        return None
    if not isinstance(wrapper, _Shared):
        association.dul.socket = cast(AssociationSocket, _Shared(wrapper))
    return cast(_Shared, association.dul.socket)
