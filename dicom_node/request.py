"""The A-ASSOCIATE-RQ as bytes: what must be known of it before anyone is served (PS3.8 9.3).

What the answer depends on is read here, and that all of it is well formed is made sure of: the
presentation contexts and the user information are pynetdicom's to negotiate, and a request that it
cannot decode would hold a place until the ACSE time-out.  Answers to those who are turned away are
made here too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pynetdicom.pdu import A_ASSOCIATE_RQ

from dicom_node.access import Admission, normal_title, refuse

#: PS3.8 9.3.1: type, reserved, length of the rest.
HEADER_LENGTH: Final = 6
#: PS3.8 sets none.  128 contexts with 40 transfer syntaxes each and a user identity of 64 KiB fit.
MAX_REQUEST: Final = 1 << 19
#: PS3.7 A.2.1: the only application context there is.
APPLICATION_CONTEXT: Final = "1.2.840.10008.3.1.1.1"

# PS3.8 Table 9-26: reasons of an A-ABORT whose source is the service provider.
UNRECOGNIZED_PDU: Final = 1
UNEXPECTED_PDU: Final = 2
INVALID_PARAMETER: Final = 6

_ASSOCIATE_RQ, _ASSOCIATE_RJ, _ABORT = 0x01, 0x03, 0x07
# As much of each method as fits into the six octets of a PDU header.
_METHODS = (b"GET ", b"POST ", b"HEAD ", b"PUT ", b"OPTIONS", b"CONNECT")
_HTTP = tuple(method[:6] for method in _METHODS)
_KNOWN_TYPES = range(0x01, 0x08)
_FIXED = struct.Struct(">BxLH2x16s16s32x")
_ITEM = struct.Struct(">BxH")
_APPLICATION_CONTEXT_ITEM, _PRESENTATION_CONTEXT_ITEM, _USER_INFORMATION_ITEM = 0x10, 0x20, 0x50
_ABSTRACT_SYNTAX, _TRANSFER_SYNTAX = 0x30, 0x40
# PS3.8 D.1, PS3.7 D.3.3: those that an A-ASSOCIATE-RQ may hold.
_USER_SUB_ITEMS = range(0x51, 0x59)
_MAXIMUM_LENGTH, _VERSION_NAME = 0x51, 0x55
_LONGEST_NAME = 64  # PS3.8 F.1
_LONGEST_VERSION = 16  # PS3.7 D.3.3.2
_TLS_HANDSHAKE = 0x16


class NotARequestError(Exception):
    """What came is no A-ASSOCIATE-RQ; *reason* is that of the A-ABORT, *why* is for people."""

    def __init__(self, reason: int, why: str) -> None:
        super().__init__(why)
        self.reason = reason
        self.why = why


@dataclass(frozen=True)
class AssociateRequest:
    """A whole A-ASSOCIATE-RQ; *pdu* is fit for pynetdicom: see :func:`read_request`."""

    version: int
    called_ae: str
    calling_ae: str
    application_context: str
    pdu: bytes

    def fault(self) -> Admission | None:
        """The rejection of a request that no peer may make (PS3.8 Table 9-21); None: none."""
        # PS3.8 9.3.2: only bit 0 is tested.
        if not self.version & 1:
            why = f"protocol version 0x{self.version:04X}: it does not speak version 1"
            return refuse(why, 1, 2, 2)
        if self.application_context != APPLICATION_CONTEXT:
            return refuse("its application context is not that of DICOM", 1, 1, 2)
        return None


def read_header(header: bytes) -> int:
    """The length of what follows a PDU's first six bytes.

    Raises NotARequestError where it is not an A-ASSOCIATE-RQ or its length is out of reason.
    """
    kind, length = struct.unpack(">BxL", header)
    if kind != _ASSOCIATE_RQ:
        reason = UNEXPECTED_PDU if kind in _KNOWN_TYPES else UNRECOGNIZED_PDU
        raise NotARequestError(reason, _what_came(header, kind))
    if length > MAX_REQUEST:
        why = f"its association request of {length} bytes is longer than {MAX_REQUEST}"
        raise NotARequestError(INVALID_PARAMETER, why)
    if length < _FIXED.size - HEADER_LENGTH:
        raise NotARequestError(INVALID_PARAMETER, "its association request is cut short")
    return int(length)


def _what_came(header: bytes, kind: int) -> str:
    if kind == _TLS_HANDSHAKE:
        return "it spoke TLS on the port without TLS"
    if header.startswith(_HTTP):
        return "it spoke HTTP, not DICOM"
    if kind in _KNOWN_TYPES:
        return f"it sent a PDU of type {kind} before an association request"
    return f"it did not speak DICOM: its first byte was 0x{kind:02X}"


def read_request(pdu: bytes) -> AssociateRequest:
    """The request in a whole PDU, repaired where a peer is careless and its meaning is plain.

    NUL as padding of AE titles becomes space, bytes that no AE title may hold become ``?``, bits
    of the protocol version that are not ours are cleared, and items of unrecognized types are
    skipped (PS3.8 9.3.1).
    Raises NotARequestError where the request is not well formed.
    """
    _, _, version, called, calling = _FIXED.unpack_from(pdu)
    application, user, contexts, parts = list[bytes](), list[bytes](), list[bytes](), []
    for kind, value in _items(pdu[_FIXED.size :]):
        if kind == _APPLICATION_CONTEXT_ITEM:
            part = _item(kind, value)
            application.append(value)
        elif kind == _PRESENTATION_CONTEXT_ITEM:
            part = _item(kind, _presentation_context(value))
            contexts.append(part)
        elif kind == _USER_INFORMATION_ITEM:
            part = _item(kind, _user_information(value))
            user.append(part)
        else:
            continue
        parts.append(part)
    if len(application) > 1 or len(user) != 1:
        raise _malformed("one application context and one user information are wanted")
    _check(contexts, user[0])
    titles = _title(called), _title(calling)
    body = b"".join(parts)
    head = _head(version & 1, titles, len(body))
    # The reserved fields are sent back as they came (PS3.8 9.3.3), so all else is left alone.
    repaired = head[:42] + pdu[42 : _FIXED.size] + body
    name = b"".join(application).decode("ascii", "replace").strip(" \0")
    return AssociateRequest(version, *titles, name, repaired)


def _malformed(what: str = "") -> NotARequestError:
    why = "its association request is malformed" + (f": {what}" if what else "")
    return NotARequestError(INVALID_PARAMETER, why)


def _item(kind: int, value: bytes) -> bytes:
    return _ITEM.pack(kind, len(value)) + value


def _head(version: int, titles: tuple[str, str], length: int) -> bytes:
    padded = (title.ljust(16).encode("ascii") for title in titles)
    return _FIXED.pack(_ASSOCIATE_RQ, _FIXED.size - HEADER_LENGTH + length, version, *padded)


def _presentation_context(value: bytes) -> bytes:
    """A presentation context (PS3.8 9.3.2.2) without sub-items of unrecognized types."""
    if len(value) < 4 or not value[0] & 1:
        raise _malformed("a presentation context has no odd identifier")
    names = [
        (kind, _name(name))
        for kind, name in _items(value[4:])
        if kind in (_ABSTRACT_SYNTAX, _TRANSFER_SYNTAX)
    ]
    abstract = sum(kind == _ABSTRACT_SYNTAX for kind, _ in names)
    if abstract != 1 or len(names) < 2:
        raise _malformed("a presentation context without an abstract and a transfer syntax")
    return value[:4] + b"".join(_item(kind, name) for kind, name in names)


def _name(name: bytes) -> bytes:
    # PS3.8 F.1: no padding; some pad all the same.
    stripped = name.rstrip(b"\0 ")
    if not 1 <= len(stripped) <= _LONGEST_NAME or not stripped.isascii():
        raise _malformed("the name of a syntax")
    return stripped


def _user_information(value: bytes) -> bytes:
    """The user information (PS3.8 9.3.2.3) without sub-items of unrecognized types.

    What a peer calls its software means nothing to us, so an odd name does not turn it away.
    """
    found = [(kind, each) for kind, each in _items(value) if kind in _USER_SUB_ITEMS]
    if _MAXIMUM_LENGTH not in (kind for kind, _ in found):
        raise _malformed("it states no maximum length")
    return b"".join(
        _item(kind, _title(each)[:_LONGEST_VERSION].encode() if kind == _VERSION_NAME else each)
        for kind, each in found
    )


def _check(contexts: list[bytes], user: bytes) -> None:
    """Make sure that pynetdicom can take the request over.

    It is asked itself, for a request with one context: of the others, of which there may be 128,
    everything that could trouble it has been looked at.
    """
    if not contexts:
        why = "its association request proposes no presentation context"
        raise NotARequestError(INVALID_PARAMETER, why)
    if len({part[_ITEM.size] for part in contexts}) < len(contexts):
        raise _malformed("two presentation contexts have one identifier")
    body = _item(_APPLICATION_CONTEXT_ITEM, APPLICATION_CONTEXT.encode()) + contexts[0] + user
    decoded = A_ASSOCIATE_RQ()
    try:
        decoded.decode(_head(1, ("ANY", "ANY"), len(body)) + body)
        decoded.to_primitive()
    except Exception:  # it names no errors of its own, and their text may quote a user's identity
        raise _malformed("the user information") from None


def _items(rest: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(rest):
        if at + _ITEM.size > len(rest):
            raise _malformed()
        kind, length = _ITEM.unpack_from(rest, at)
        at += _ITEM.size
        if at + length > len(rest):
            raise _malformed()
        yield kind, rest[at : at + length]
        at += length


def _title(field: bytes) -> str:
    # PS3.5 6.2, VR AE: the default repertoire without backslash and control characters.
    text = normal_title(field.decode("ascii", "replace"))
    return "".join(c if " " <= c <= "~" and c != "\\" else "?" for c in text)


def reject_pdu(admission: Admission) -> bytes:
    """The A-ASSOCIATE-RJ of a rejection (PS3.8 9.3.4)."""
    numbers = admission.result, admission.source, admission.diagnostic
    return struct.pack(">BxLxBBB", _ASSOCIATE_RJ, 4, *numbers)


def abort_pdu(reason: int) -> bytes:
    """The A-ABORT of the service provider (PS3.8 9.3.8)."""
    return struct.pack(">BxLxxBB", _ABORT, 4, 2, reason)
