"""Is a data set whole?  A walk over the element lengths of an encoded data set (PS3.5 7).

pydicom's reader accepts a stream that stops between two elements, within an element's tag, or
within encapsulated pixel data.  What a node acknowledges must be all there, so the lengths are
followed to the last byte; no value is decoded and none is quoted in an error.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from dicom_node.errors import UnreadableInstanceError

# PS3.5 A.5: a deflated data set of a few bytes can inflate without end.
MAX_INFLATED = 1 << 30
# PS3.5 7.5 sets no limit on the nesting of sequences; a stack does.
MAX_DEPTH = 64

_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
# PS3.5 7.1.2: these VRs have two reserved bytes and a length of 32 bits.
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR"})
_LONG |= {b"UT", b"UV"}

Tag = tuple[int, int]


@dataclass(frozen=True)
class _Element:
    tag: Tag
    vr: bytes | None
    length: int
    value: int  # offset of the first byte of the value


@dataclass(frozen=True)
class _Stream:
    data: memoryview
    implicit: bool
    tag_format: str
    short_format: str
    long_format: str

    def header(self, at: int) -> _Element:
        """The element that begins at *at*."""
        _reach(self.data, at + 8)
        tag = struct.unpack_from(self.tag_format, self.data, at)
        # PS3.5 7.5: items and delimiters have no VR in any transfer syntax.
        if self.implicit or tag[0] == 0xFFFE:
            (length,) = struct.unpack_from(self.long_format, self.data, at + 4)
            return _Element(tag, None, length, at + 8)
        vr = bytes(self.data[at + 4 : at + 6])
        if vr not in _LONG:
            if not (vr.isalpha() and vr.isupper()):
                raise UnreadableInstanceError("an element has no value representation")
            (length,) = struct.unpack_from(self.short_format, self.data, at + 6)
            return _Element(tag, vr, length, at + 8)
        _reach(self.data, at + 12)
        (length,) = struct.unpack_from(self.long_format, self.data, at + 8)
        return _Element(tag, vr, length, at + 12)


def check_whole(data: bytes | memoryview, transfer_syntax_uid: str) -> frozenset[Tag]:
    """Follow every length of an encoded data set (without file meta information) to its end.

    Returns the tags at its top level.  Raises UnreadableInstanceError where the data end early,
    an element has no VR, sequences nest too deep, or a deflated data set inflates beyond 1 GiB.
    """
    stream = _open(data, transfer_syntax_uid)
    tags: set[Tag] = set()
    at, end = 0, len(stream.data)
    while at < end:
        if end - at < 8 and not any(stream.data[at:]):
            break  # padding of a file that was cut to an even or block length
        element = stream.header(at)
        tags.add(element.tag)
        at = _after(stream, element, 0)
    return frozenset(tags)


def _open(data: bytes | memoryview, transfer_syntax_uid: str) -> _Stream:
    if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        data = _inflate(data)
    if transfer_syntax_uid == ExplicitVRBigEndian:
        return _Stream(memoryview(data), False, ">HH", ">H", ">L")
    return _little(memoryview(data), implicit=transfer_syntax_uid == ImplicitVRLittleEndian)


def _little(data: memoryview, *, implicit: bool) -> _Stream:
    return _Stream(data, implicit, "<HH", "<H", "<L")


def _inflate(data: bytes | memoryview) -> bytes:
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = engine.decompress(data, MAX_INFLATED)
    except zlib.error:
        raise UnreadableInstanceError("the deflated data set does not inflate") from None
    if engine.unconsumed_tail:
        raise UnreadableInstanceError("the deflated data set inflates beyond 1 GiB")
    if not engine.eof:
        raise UnreadableInstanceError("the data set ends early")
    return inflated


def _reach(data: memoryview, end: int) -> None:
    if end > len(data):
        raise UnreadableInstanceError("the data set ends early")


def _after(stream: _Stream, element: _Element, depth: int) -> int:
    """The offset behind an element's value."""
    if element.length != _UNDEFINED:
        _reach(stream.data, element.value + element.length)
        return element.value + element.length
    if depth > MAX_DEPTH:
        raise UnreadableInstanceError("sequences are nested too deep")
    # PS3.5 6.2.2 note 4: UN of undefined length is a sequence in implicit VR little endian.
    inner = _little(stream.data, implicit=True) if element.vr == b"UN" else stream
    return _walk(inner, element.value, _SEQUENCE_END, _item_end, depth)


def _item_end(stream: _Stream, item: _Element, depth: int) -> int:
    if item.tag != _ITEM:
        raise UnreadableInstanceError("a sequence holds something other than items")
    if item.length != _UNDEFINED:
        return _after(stream, item, depth)
    return _walk(stream, item.value, _ITEM_END, _after, depth + 1)


def _walk(
    stream: _Stream,
    at: int,
    delimiter: Tag,
    step: Callable[[_Stream, _Element, int], int],
    depth: int,
) -> int:
    """Step over elements until the delimiter; the offset behind it."""
    while (element := stream.header(at)).tag != delimiter:
        at = step(stream, element, depth)
    return element.value
