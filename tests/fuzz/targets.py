"""What is fuzzed: functions of one input that raise when the node has done what it must not.

Each target states what must hold for every input; anything else that it raises is a finding.
`tests/fuzz/seeds.py` makes the first inputs, `tests/fuzz/run.py` mutates them under coverage, and
`tests/fuzz/test_corpus.py` replays what was found worth keeping.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from io import BytesIO
from typing import NamedTuple

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
)
from pynetdicom.dsutils import decode
from pynetdicom.pdu import A_ASSOCIATE_RQ

from dicom_node.association import configure_protocol
from dicom_node.dicom import identity
from dicom_node.dicom.header import instance_summary, read_header, valid_uid
from dicom_node.dicom.stream import Contents, Scanner, Tag, check_whole
from dicom_node.errors import PermanentError, UnreadableInstanceError
from dicom_node.receiver import NOTED, Request, check_instance
from dicom_node.request import (
    INVALID_PARAMETER,
    UNEXPECTED_PDU,
    UNRECOGNIZED_PDU,
    NotARequestError,
    read_request,
)
from dicom_node.request import read_header as read_request_header
from dicom_node.upper_layer import (
    C_STORE_RQ,
    Command,
    CommandSet,
    Data,
    Limits,
    OtherPDU,
    Parser,
    ProtocolError,
    read_command,
    response_pdu,
)
from tests.integration.peers import CT, ROOT

# The first byte of an input chooses among these.
SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    JPEGLSLossless,
)
# What the command set of a fuzzed instance names; the seeds carry the same.
INSTANCE = f"{ROOT}.9.1"
_UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_WANTED = ((0x0008, 0x0016), (0x0008, 0x0018), (0x0008, 0x0060), (0x0008, 0x9215))
_LIMITS = Limits(pdu=1 << 16, command=1 << 12)
# PS3.8 Table 9-26: what an A-ABORT of the service provider may give as its reason.
_REASONS = ("not specified", "unrecognized PDU", "unexpected PDU", None, "parameter", "unexpected")
_REASONS += ("invalid parameter",)


class _Piece(NamedTuple):
    context_id: int
    octets: bytes
    last: bool


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """The data in pieces of *size* bytes."""
    return (data[at : at + size] for at in range(0, len(data), size))


def fuzz_pdu(data: bytes) -> None:
    """The octets of an association give the same events in one piece and in many."""
    if len(data) < 2:
        return
    whole = _events(data[1:], len(data))
    assert _events(data[1:], 1 + data[0] % 64) == whole


def _events(octets: bytes, size: int) -> list[object]:
    """The events of octets that come in pieces; neighbouring pieces of data are one."""
    parser, events = Parser(_LIMITS), list[object]()
    try:
        for piece in pieces(octets, size):
            parser.push(piece)
            while (event := parser.next()) is not None:
                if isinstance(event, OtherPDU):
                    return [*events, event]
                _join(events, event)
    except ProtocolError as error:
        return [*events, _REASONS[error.reason], str(error)]
    return events


def _join(events: list[object], event: Command | Data) -> None:
    if isinstance(event, Command):
        _check_command(event.command)
        events.append(event)
        return
    last = events[-1] if events else None
    if (
        isinstance(last, tuple)
        and last[0] == "data"
        and last[1] == event.context_id
        and not last[3]
    ):
        events[-1] = ("data", event.context_id, last[2] + bytes(event.view), event.last)
    else:
        events.append(("data", event.context_id, bytes(event.view), event.last))


def fuzz_command(data: bytes) -> None:
    """A command set is refused, or its response is one that pynetdicom reads."""
    try:
        command = read_command(data)
    except ProtocolError:
        return
    _check_command(command)


def _check_command(command: CommandSet) -> None:
    encoded = response_pdu(1, command, 0xC000, "refused")
    response = decode(BytesIO(encoded[12:]), True, True)
    assert response.Status == 0xC000
    assert response.CommandField == command.field | 0x8000
    assert response.MessageIDBeingRespondedTo == (command.message_id or 0)
    assert ("AffectedSOPInstanceUID" in response) == (command.field == C_STORE_RQ)


def fuzz_stream(data: bytes) -> None:
    """A data set is whole or it is not, in one piece as in many."""
    if len(data) < 3:
        return
    syntax, size, rest = SYNTAXES[data[0] % len(SYNTAXES)], 1 + data[1], data[2:]
    whole, cut = _walked(rest, syntax, len(rest)), _walked(rest, syntax, size)
    assert whole == cut, (whole, cut)
    quick = _walked(rest, syntax, size, NOTED)
    assert (quick is None) == (whole is None), (quick, whole)
    if quick is not None and whole is not None:
        assert quick.values == whole.values
        assert quick.tags & NOTED == whole.tags & NOTED
    try:
        tags = check_whole(rest, syntax)
    except UnreadableInstanceError:
        assert whole is None
    else:
        if whole is None:
            # Without wanted tags it does not look for one that stands twice.
            assert _why_not(rest, syntax) == "an element stands twice in the data set"
        else:
            assert whole.tags == tags


def _walked(
    data: bytes, syntax: str, size: int, noted: Collection[Tag] | None = None
) -> Contents | None:
    scanner = _scanner(syntax, noted)
    try:
        for piece in pieces(data, size):
            scanner.feed(piece)
        return scanner.finish()
    except UnreadableInstanceError:
        return None


def _why_not(data: bytes, syntax: str) -> str | None:
    """Why a data set is not taken; None when it is."""
    scanner = _scanner(syntax, None)
    try:
        scanner.feed(data)
        scanner.finish()
    except UnreadableInstanceError as error:
        return error.message
    return None


def _scanner(syntax: str, noted: Collection[Tag] | None) -> Scanner:
    return Scanner(syntax, _WANTED, noted=noted, max_elements=10_000, max_inflated=1 << 20)


def fuzz_instance(data: bytes) -> None:
    """An instance is refused with words, or its identity is what pydicom reads in it."""
    if not data:
        return
    request = Request(CT, INSTANCE, str(SYNTAXES[data[0] % len(SYNTAXES)]))
    syntax = request.transfer_syntax_uid
    scanner = Scanner(syntax, identity.WANTED, noted=NOTED, max_inflated=1 << 22)
    try:
        scanner.feed(data[1:])
        summary, _ = check_instance(request, scanner.finish())
    except PermanentError as error:
        _check_words(error.message)
        return
    assert (summary.sop_class_uid, summary.sop_instance_uid) == (CT, INSTANCE)
    try:
        header = read_header(request.file_head() + data[1:])
        read = instance_summary(header)
    except UnreadableInstanceError:
        return
    if any(keyword not in header or header[keyword].VR != "UI" for keyword in _UIDS):
        return  # pydicom converts by the VR that stands there, whatever it does to a UID
    # The modality is picked up whatever value representation it claims; it decides a waiting time.
    assert replace(read, modality="") == replace(summary, modality=""), (read, summary)


def fuzz_file(data: bytes) -> None:
    """A file of any bytes is no DICOM file, or its UIDs are such."""
    try:
        summary = instance_summary(read_header(data))
    except UnreadableInstanceError as error:
        _check_words(error.message)
        return
    assert valid_uid(summary.sop_instance_uid)


def _check_words(message: str) -> None:
    """A reason is short, printable, and none of the input's bytes."""
    assert 0 < len(message) < 200
    assert message.isascii()
    assert message.isprintable()


def fuzz_request(data: bytes) -> None:
    """An A-ASSOCIATE-RQ is refused with a reason, or one that pynetdicom can take over."""
    fixed, items = data[:36], data[36:]
    if len(fixed) < 36:
        return
    # Protocol version, reserved, and both titles; the rest of the fixed part is reserved (9.3.2).
    pdu = struct.pack(">BxL", 1, 68 + len(items)) + fixed + bytes(32) + items
    configure_protocol()
    try:
        assert read_request_header(pdu[:6]) == len(pdu) - 6
        request = read_request(pdu)
    except NotARequestError as error:
        if error.reason not in (UNEXPECTED_PDU, UNRECOGNIZED_PDU, INVALID_PARAMETER):
            raise
        return
    assert len(request.pdu) == 6 + int.from_bytes(request.pdu[2:6], "big")
    if request.fault() is None and request.calling_ae and request.called_ae:
        decoded = A_ASSOCIATE_RQ()
        decoded.decode(request.pdu)
        assert decoded.to_primitive().maximum_length_received is not None


TARGETS: dict[str, Callable[[bytes], None]] = {
    "request": fuzz_request,
    "pdu": fuzz_pdu,
    "command": fuzz_command,
    "stream": fuzz_stream,
    "instance": fuzz_instance,
    "file": fuzz_file,
}
