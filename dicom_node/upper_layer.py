"""PDUs and DIMSE commands as pure functions: bytes in, events out (PS3.8 9.3, PS3.7 6.3, 9.3).

What an acceptor with an established association reads and answers when it stores: P-DATA-TF,
C-STORE and C-ECHO; and what a requestor writes and reads.  Nothing here knows a socket, a file or a
clock.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

# PS3.8 9.3: PDU types.
P_DATA_TF = 0x04
A_RELEASE_RQ = 0x05
A_ABORT = 0x07
_KNOWN_TYPES = frozenset(range(0x01, 0x08))

# PS3.8 Table 9-26: the reasons of an A-ABORT whose source is the service provider.
NOT_SPECIFIED = 0
UNRECOGNIZED_PDU = 1
UNEXPECTED_PDU = 2
INVALID_PARAMETER = 6

# PS3.7 E.1: command fields.
C_STORE_RQ = 0x0001
C_ECHO_RQ = 0x0030
_RESPONSE = 0x8000
_NO_DATA_SET = 0x0101
_DATA_SET_FOLLOWS = 0x0001  # PS3.7 9.3.1.1: any other

# PS3.8 E.2: the two bits of a message control header.
_COMMAND, _LAST = 0x01, 0x02

_PDU_HEADER = struct.Struct(">BxL")
_PDV_HEADER = struct.Struct(">LBB")
_BOTH_HEADERS = struct.Struct(">BxLLBB")
_ELEMENT = struct.Struct("<HHL")

# PS3.7 6.3.1: (0000,eeee) of the elements that are looked at.
_SOP_CLASS, _FIELD, _MESSAGE_ID, _DATA_SET_TYPE, _SOP_INSTANCE = 0x02, 0x100, 0x110, 0x800, 0x1000
_ANSWERED, _PRIORITY, _STATUS, _COMMENT = 0x120, 0x700, 0x900, 0x902


@dataclass(frozen=True)
class Limits:
    """What one peer may ask of us; all but `elements` in bytes.

    *pdu* stands above the length that we announce: a PDU is never held whole, so a sloppy sender
    costs nothing.  *inflated* is the size of a deflated data set once inflated.
    """

    pdu: int = 1 << 24
    command: int = 1 << 16
    data_set: int = 1 << 32
    elements: int = 1_000_000
    inflated: int = 1 << 30


class ProtocolError(Exception):
    """The peer broke PS3.7 or PS3.8; *reason* is the A-ABORT's reason (PS3.8 Table 9-26)."""

    def __init__(self, reason: int, why: str) -> None:
        super().__init__(why)
        self.reason = reason


@dataclass(frozen=True)
class CommandSet:
    """The command set of a request, as far as storing needs it (PS3.7 9.3)."""

    field: int
    message_id: int | None
    sop_class_uid: str
    sop_instance_uid: str
    has_data_set: bool


class StoreAnswer(NamedTuple):
    """What a peer answers to a C-STORE request (PS3.7 9.3.1.2)."""

    message_id: int  #: of the request
    status: int
    comment: str


class Command(NamedTuple):
    """A message begins: its command set is complete."""

    context_id: int
    command: CommandSet


class Data(NamedTuple):
    """A piece of the data set; *view* is valid until the next `push`, and may be empty."""

    context_id: int
    view: memoryview
    last: bool


class OtherPDU(NamedTuple):
    """A PDU that is not P-DATA-TF begins; it is left unread."""

    kind: int
    length: int


Event = Command | Data | OtherPDU


class Parser:
    """The octets that a requestor sends on an established association, as events.

    Push octets as they come, in pieces of any size, then ask for events until None::

        parser = Parser(Limits())
        parser.push(octets)
        while (event := parser.next()) is not None: ...

    `next` raises ProtocolError for a PDU, PDV or command set that the standard forbids; the parser
    is then of no further use.  After `Command` or `OtherPDU` the message may be given to somebody
    else: `unread` has the octets from it on.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._octets = memoryview(b"")
        self._at = 0
        self._cut = bytearray()  # of a PDU or PDV header
        self._pdu_left = 0
        self._pdv_left = -1  # -1: between PDVs
        self._context_id = 0
        self._control = 0
        self._command = bytearray()
        self._message: int | None = None  # context of the message whose data set is awaited
        self._given: bytes | None = None  # what `next` gave last and `unread` gives again

    @property
    def within_message(self) -> bool:
        """Whether a message, or a PDU of one, has begun and not ended."""
        return bool(
            self._pdu_left or self._cut or self._command or self._message is not None
        ) or self._at < len(self._octets)

    def push(self, octets: bytes | bytearray | memoryview) -> None:
        """Take octets; all events of those before must have been asked for."""
        self._octets, self._at = memoryview(octets), 0

    def next(self) -> Event | None:
        """The next event, or None where more octets are needed."""
        self._given = None
        while True:
            if self._pdv_left >= 0:
                taken = self._take_piece()
                if taken is None:
                    return None
                event = self._fragment(*taken)
                if event is not None:
                    return event
            elif self._pdu_left:
                if not self._begin_pdv():
                    return None
            elif not self._begin_both():
                header = self._header()
                if header is None:
                    return None
                kind, length = _PDU_HEADER.unpack(header)
                if kind != P_DATA_TF:
                    return self._other(kind, length, header)
                if length > self._limits.pdu:
                    raise ProtocolError(INVALID_PARAMETER, "a PDU is larger than we allow")
                self._pdu_left = length

    def _begin_both(self) -> bool:
        """Begin a P-DATA-TF and its PDV at once, where both are sound and all there."""
        at = self._at
        if self._cut or len(self._octets) - at < 12:
            return False
        kind, pdu, pdv, context_id, control = _BOTH_HEADERS.unpack_from(self._octets, at)
        if kind != P_DATA_TF or not 6 <= pdv + 4 <= pdu <= self._limits.pdu or not context_id & 1:
            return False
        self._at = at + 12
        self._pdu_left, self._pdv_left = pdu - 6, pdv - 2
        self._context_id, self._control = context_id, control
        return True

    def unread(self) -> bytes:
        """The octets from the last `Command` or `OtherPDU` on, as a peer might have sent them."""
        rest = bytes(self._octets[self._at :])
        if self._pdu_left:
            # The rest of a P-DATA-TF whose beginning is used up, under a header of its own.
            rest = _PDU_HEADER.pack(P_DATA_TF, self._pdu_left) + rest
        return (self._given or b"") + rest

    def _header(self) -> bytes | None:
        """The next six octets; None where they have not all come."""
        at = self._at
        if not self._cut and len(self._octets) - at >= 6:
            self._at = at + 6
            return bytes(self._octets[at : at + 6])
        piece = self._octets[at : at + 6 - len(self._cut)]
        self._cut += piece
        self._at = at + len(piece)
        if len(self._cut) < 6:
            return None
        header = bytes(self._cut)
        self._cut.clear()
        return header

    def _begin_pdv(self) -> bool:
        if self._pdu_left < 6:
            raise ProtocolError(INVALID_PARAMETER, "a PDU ends within the header of a PDV")
        header = self._header()
        if header is None:
            return False
        length, context_id, control = _PDV_HEADER.unpack(header)
        if length < 2 or length + 4 > self._pdu_left:
            raise ProtocolError(INVALID_PARAMETER, "a PDV does not fit into its PDU")
        if not context_id & 1:
            raise ProtocolError(INVALID_PARAMETER, "a presentation context ID is even")
        self._pdu_left -= 6
        self._pdv_left = length - 2
        self._context_id, self._control = context_id, control
        return True

    def _take_piece(self) -> tuple[memoryview, bool] | None:
        """As much of the PDV as there is, and whether it ends the PDV."""
        left, at = self._pdv_left, self._at
        piece = self._octets[at : at + left]
        if left and not piece:
            return None
        self._at = at + len(piece)
        self._pdu_left -= len(piece)
        ended = len(piece) == left
        self._pdv_left = -1 if ended else left - len(piece)
        return piece, ended

    def _fragment(self, piece: memoryview, ended: bool) -> Event | None:
        last = ended and bool(self._control & _LAST)
        if not self._control & _COMMAND:
            return self._data(piece, last)
        if self._message is not None:
            raise ProtocolError(INVALID_PARAMETER, "a command within a data set")
        self._command += piece
        if len(self._command) > self._limits.command:
            raise ProtocolError(INVALID_PARAMETER, "a command set is larger than we allow")
        if not last:
            return None
        command = read_command(bytes(self._command))
        self._given = command_pdu(self._context_id, bytes(self._command))
        self._command.clear()
        self._message = self._context_id if command.has_data_set else None
        return Command(self._context_id, command)

    def _data(self, piece: memoryview, last: bool) -> Data:
        if self._message != self._context_id:
            raise ProtocolError(INVALID_PARAMETER, "a data set without its command")
        if last:
            self._message = None
        return Data(self._context_id, piece, last)

    def _other(self, kind: int, length: int, header: bytes) -> OtherPDU:
        if kind not in _KNOWN_TYPES:
            raise ProtocolError(UNRECOGNIZED_PDU, "an unknown PDU type")
        between = self._message is None and not self._command
        if kind != A_ABORT and not (kind == A_RELEASE_RQ and between):
            raise ProtocolError(UNEXPECTED_PDU, "a PDU that does not belong here")
        if length != 4:
            # PS3.8 9.3.6, 9.3.8: both have a fixed length.
            raise ProtocolError(INVALID_PARAMETER, "a PDU of a wrong length")
        self._given = header
        return OtherPDU(kind, length)


def lacking(octets: bytes) -> int:
    """How many octets follow before the last PDU of these is whole; 0: it is."""
    at = 0
    while at < len(octets):
        if len(octets) - at < 6:
            return 6 - (len(octets) - at)
        at += 6 + int.from_bytes(octets[at + 2 : at + 6], "big")
    return at - len(octets)


def read_command(encoded: bytes) -> CommandSet:
    """Decode a command set, implicit VR little endian (PS3.7 6.3.1); raises ProtocolError."""
    found = _elements(encoded)
    field = _number(found, _FIELD)
    if field is None:
        raise ProtocolError(INVALID_PARAMETER, "a command set without Command Field")
    return CommandSet(
        field=field,
        message_id=_number(found, _MESSAGE_ID),
        sop_class_uid=_uid(found, _SOP_CLASS),
        sop_instance_uid=_uid(found, _SOP_INSTANCE),
        has_data_set=_number(found, _DATA_SET_TYPE) not in (None, _NO_DATA_SET),
    )


def read_store_answer(encoded: bytes) -> StoreAnswer:
    """Decode the command set of a C-STORE response (PS3.7 9.3.1.2); raises ProtocolError."""
    found = _elements(encoded)
    message_id, status = _number(found, _ANSWERED), _number(found, _STATUS)
    if _number(found, _FIELD) != C_STORE_RQ | _RESPONSE or message_id is None or status is None:
        raise ProtocolError(UNEXPECTED_PDU, "a message that is no answer to C-STORE")
    if _number(found, _DATA_SET_TYPE) not in (None, _NO_DATA_SET):
        raise ProtocolError(UNEXPECTED_PDU, "an answer to C-STORE with a data set")
    comment = found.get(_COMMENT, b"").decode("utf-8", "replace").strip("\0 ")
    return StoreAnswer(message_id, status, comment)


def _elements(encoded: bytes) -> dict[int, bytes]:
    """The values of a command set by element number."""
    found: dict[int, bytes] = {}
    at, end = 0, len(encoded)
    while at < end:
        if end - at < 8:
            raise ProtocolError(INVALID_PARAMETER, "a command set ends early")
        group, element, length = _ELEMENT.unpack_from(encoded, at)
        at += 8
        if group != 0 or length > end - at:
            raise ProtocolError(INVALID_PARAMETER, "a command set does not parse")
        found[element] = encoded[at : at + length]
        at += length
    return found


def _number(found: dict[int, bytes], element: int) -> int | None:
    value = found.get(element)
    if value is None:
        return None
    if len(value) != 2:
        raise ProtocolError(INVALID_PARAMETER, "a command set does not parse")
    return int.from_bytes(value, "little")


def _uid(found: dict[int, bytes], element: int) -> str:
    try:
        return found.get(element, b"").decode("ascii").rstrip("\0 ")
    except UnicodeDecodeError:
        raise ProtocolError(INVALID_PARAMETER, "a UID is not of ASCII characters") from None


def response_pdu(context_id: int, request: CommandSet, status: int, comment: str = "") -> bytes:
    """The P-DATA-TF that answers a C-STORE or C-ECHO request (PS3.7 9.3.1.2, 9.3.5.2).

    *comment* is the Error Comment, at most 64 characters (PS3.7 C).
    """
    elements = [
        _element(_SOP_CLASS, _padded(request.sop_class_uid, b"\0")),
        _element(_FIELD, _short(request.field | _RESPONSE)),
        _element(_ANSWERED, _short(request.message_id or 0)),
        _element(_DATA_SET_TYPE, _short(_NO_DATA_SET)),
        _element(_STATUS, _short(status)),
    ]
    if comment:
        elements.append(_element(_COMMENT, _padded(comment, b" ")))
    if request.field == C_STORE_RQ:
        elements.append(_element(_SOP_INSTANCE, _padded(request.sop_instance_uid, b"\0")))
    return command_pdu(context_id, _command_set(elements))


def store_request_pdu(
    context_id: int, message_id: int, sop_class_uid: str, sop_instance_uid: str
) -> bytes:
    """The P-DATA-TF that begins a C-STORE request of medium priority (PS3.7 9.3.1.1)."""
    elements = [
        _element(_SOP_CLASS, _padded(sop_class_uid, b"\0")),
        _element(_FIELD, _short(C_STORE_RQ)),
        _element(_MESSAGE_ID, _short(message_id)),
        _element(_PRIORITY, _short(0)),
        _element(_DATA_SET_TYPE, _short(_DATA_SET_FOLLOWS)),
        _element(_SOP_INSTANCE, _padded(sop_instance_uid, b"\0")),
    ]
    return command_pdu(context_id, _command_set(elements))


def data_pdus(context_id: int, piece: memoryview, most: int, *, last: bool) -> bytes:
    """A piece of a data set as P-DATA-TF PDUs of at most *most* octets; *last*: it ends there."""
    size = most - _PDV_HEADER.size
    parts: list[bytes | memoryview] = []
    for start in range(0, len(piece), size):
        part = piece[start : start + size]
        control = _LAST if last and start + size >= len(piece) else 0
        parts.append(_PDU_HEADER.pack(P_DATA_TF, len(part) + _PDV_HEADER.size))
        parts.append(_PDV_HEADER.pack(len(part) + 2, context_id, control))
        parts.append(part)
    return b"".join(parts)


def answer_in(pdu: bytes, command: bytearray) -> bool:
    """Add to *command* what a P-DATA-TF, without its header, holds of one; whether it is whole.

    Raises ProtocolError for one that the standard forbids, or that holds a data set.
    """
    at, whole = 0, False
    while at < len(pdu):
        if len(pdu) - at < _PDV_HEADER.size or whole:
            raise ProtocolError(INVALID_PARAMETER, "a PDU ends within the header of a PDV")
        length, _, control = _PDV_HEADER.unpack_from(pdu, at)
        end = at + 4 + length
        if length < 2 or end > len(pdu) or not control & _COMMAND:
            raise ProtocolError(INVALID_PARAMETER, "a PDV that is no part of an answer")
        command += pdu[at + _PDV_HEADER.size : end]
        whole, at = bool(control & _LAST), end
    return whole


def _command_set(elements: list[bytes]) -> bytes:
    """A command set with its group length (PS3.7 6.3.1)."""
    body = b"".join(elements)
    return _element(0, struct.pack("<L", len(body))) + body


def command_pdu(context_id: int, encoded: bytes) -> bytes:
    """One P-DATA-TF with one PDV: a whole command set."""
    pdv = _PDV_HEADER.pack(len(encoded) + 2, context_id, _COMMAND | _LAST) + encoded
    return _PDU_HEADER.pack(P_DATA_TF, len(pdv)) + pdv


def abort_pdu(reason: int) -> bytes:
    """The A-ABORT of the service provider (PS3.8 9.3.8)."""
    return bytes((A_ABORT, 0, 0, 0, 0, 4, 0, 0, 2, reason))


def _element(element: int, value: bytes) -> bytes:
    return _ELEMENT.pack(0, element, len(value)) + value


def _short(value: int) -> bytes:
    return value.to_bytes(2, "little")


def _padded(value: str, filler: bytes) -> bytes:
    encoded = value.encode("ascii", "replace")
    return encoded + filler * (len(encoded) % 2)
