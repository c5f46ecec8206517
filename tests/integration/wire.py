"""PDUs as octets, and a peer that sends whatever it likes over a socket of its own.

Requests are encoded by pynetdicom's own primitives, so nothing here shares code with what reads
them; the rest is bytes that no well-behaved library would send.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from types import TracebackType
from typing import Self

from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.dimse_messages import C_ECHO_RQ, C_STORE_RQ, DIMSEMessage
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.dsutils import decode
from pynetdicom.pdu import A_ASSOCIATE_RQ, P_DATA_TF
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
)

from tests.integration.peers import CT

VERIFICATION = "1.2.840.10008.1.1"
# PS3.8 9.3: PDU types.
ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)

RELEASE = bytes((RELEASE_RQ, 0, 0, 0, 0, 4, 0, 0, 0, 0))
ABORT_BY_USER = bytes((ABORT, 0, 0, 0, 0, 4, 0, 0, 0, 0))


def association_request(
    contexts: Sequence[tuple[str, str]] = ((CT, ExplicitVRLittleEndian),),
    *,
    calling: str = "RUDE",
    called: str = "DIFFCODE",
    maximum_length: int = 16_382,
) -> bytes:
    """An A-ASSOCIATE-RQ; the contexts, pairs of SOP Class and transfer syntax, are 1, 3, 5 …"""
    request = A_ASSOCIATE()
    request.application_context_name = UID("1.2.840.10008.3.1.1.1")
    request.calling_ae_title, request.called_ae_title = calling, called
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = maximum_length
    implementation.implementation_class_uid = UID("1.2.3.4")
    request.user_information = [length, implementation]
    proposed = [build_context(abstract, syntax) for abstract, syntax in contexts]
    for number, context in enumerate(proposed):
        context.context_id = 2 * number + 1
    request.presentation_context_definition_list = proposed
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(request)
    return bytes(pdu.encode())


def store_request(
    data_set: bytes,
    sop_instance_uid: str,
    *,
    sop_class_uid: str = CT,
    message_id: int = 1,
    context_id: int = 1,
    maximum_length: int = 16_382,
) -> list[bytes]:
    """A C-STORE-RQ with its data set, as the P-DATA-TF PDUs that carry it."""
    request = C_STORE()
    request.MessageID, request.Priority = message_id, 2
    request.AffectedSOPClassUID = UID(sop_class_uid)
    request.AffectedSOPInstanceUID = UID(sop_instance_uid)
    request.DataSet = BytesIO(data_set)
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    return _pdus(message, context_id, maximum_length)


def echo_request(*, message_id: int = 1, context_id: int = 1) -> bytes:
    """A C-ECHO-RQ."""
    request = C_ECHO()
    request.MessageID, request.AffectedSOPClassUID = message_id, UID(VERIFICATION)
    message = C_ECHO_RQ()
    message.primitive_to_message(request)
    return b"".join(_pdus(message, context_id, 16_382))


def p_data(context_id: int, control: int, body: bytes) -> bytes:
    """One P-DATA-TF with one PDV; *control* is its message control header (PS3.8 E.2)."""
    pdv = struct.pack(">LBB", len(body) + 2, context_id, control) + body
    return pdu(P_DATA, pdv)


def pdu(kind: int, body: bytes) -> bytes:
    """A PDU of any type."""
    return struct.pack(">BxL", kind, len(body)) + body


def _pdus(message: DIMSEMessage, context_id: int, maximum_length: int) -> list[bytes]:
    encoded = []
    for primitive in message.encode_msg(context_id, maximum_length):
        one = P_DATA_TF()
        one.from_primitive(primitive)
        encoded.append(bytes(one.encode()))
    return encoded


@dataclass(frozen=True)
class Answer:
    """What came back: a PDU's type and what stands behind its header."""

    kind: int
    body: bytes

    @property
    def response(self) -> Dataset:
        """The command set of a response that fits into one PDV."""
        assert self.kind == P_DATA, self
        return decode(BytesIO(self.body[6:]), True, True)

    @property
    def status(self) -> int:
        """The status of a response."""
        return int(self.response.Status)


class Wire:
    """A TCP connection to the node, in the hands of a peer without manners."""

    def __init__(self, port: int, *, limit_s: float = 20.0) -> None:
        """Connect; each wait for an answer is limited."""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=limit_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def send(self, *octets: bytes) -> None:
        """Send as it is."""
        self.socket.sendall(b"".join(octets))

    def answer(self) -> Answer | None:
        """The next PDU; None where the connection has ended."""
        header = self._exactly(6)
        if header is None:
            return None
        kind, length = struct.unpack(">BxL", header)
        body = self._exactly(length)
        return None if body is None else Answer(kind, body)

    def answers(self) -> Iterator[Answer]:
        """Every PDU until the connection ends."""
        while (answer := self.answer()) is not None:
            yield answer

    def associate(
        self, contexts: Sequence[tuple[str, str]] = ((CT, ExplicitVRLittleEndian),)
    ) -> None:
        """Open an association; AssertionError when it is not accepted."""
        self.send(association_request(contexts))
        answer = self.answer()
        assert answer is not None
        assert answer.kind == ASSOCIATE_AC, answer

    def store(self, pdus: Iterable[bytes]) -> int:
        """Send a request and read the status of its response."""
        self.send(*pdus)
        answer = self.answer()
        assert answer is not None, "the association ended"
        return answer.status

    def release(self) -> None:
        """End as the standard wants it."""
        self.send(RELEASE)
        answer = self.answer()
        assert answer is not None
        assert answer.kind == RELEASE_RP, answer

    def closed_within(self, seconds: float) -> bool:
        """Whether the other end has closed, or answered, before so long has passed."""
        readable, _, _ = select.select([self.socket], [], [], seconds)
        return bool(readable)

    def _exactly(self, count: int) -> bytes | None:
        found = bytearray()
        while len(found) < count:
            try:
                piece = self.socket.recv(count - len(found))
            except ConnectionError:
                return None
            if not piece:
                return None
            found += piece
        return bytes(found)
