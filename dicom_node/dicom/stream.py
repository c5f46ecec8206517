"""Is a data set whole?  A walk over the element lengths of an encoded data set (PS3.5 7).

pydicom's reader accepts a stream that stops between two elements, within an element's tag, or
within encapsulated pixel data.  What a node acknowledges must be all there, so the lengths are
followed to the last byte, while the bytes come and without keeping them; no value is decoded and
none is quoted in an error.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from dicom_node.errors import UnreadableInstanceError

# PS3.5 A.5: a deflated data set of a few bytes can inflate without end.
MAX_INFLATED = 1 << 30
# No limit stands in the standard; a walk takes about a microsecond for each.
MAX_ELEMENTS = 5_000_000
# PS3.5 7.5 sets no limit on the nesting of sequences; a stack does.
MAX_DEPTH = 64
# A wanted value that is larger is not kept.
MAX_KEPT = 1 << 16

_UNDEFINED = 0xFFFFFFFF
_DELIMITERS = 0xFFFE
_ITEM, _ITEM_END, _SEQUENCE_END = 0xE000, 0xE00D, 0xE0DD
# PS3.5 7.1.2: these VRs have two reserved bytes and a length of 32 bits.
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR"})
_LONG |= {b"UT", b"UV"}
_SHORT = frozenset({b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO"})
_SHORT |= {b"LT", b"PN", b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"}
_INFLATED_PIECE = 1 << 18

Tag = tuple[int, int]
Octets = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Encoding:
    """How the elements of a transfer syntax lie in its bytes."""

    implicit: bool
    element: struct.Struct  # explicit: tag, VR, short length; implicit: tag, long length
    item: struct.Struct  # tag, long length
    length: struct.Struct


_LITTLE = struct.Struct("<HHL")
_IMPLICIT = Encoding(True, _LITTLE, _LITTLE, struct.Struct("<L"))
_EXPLICIT = Encoding(False, struct.Struct("<HH2sH"), _LITTLE, struct.Struct("<L"))
_BIG = Encoding(False, struct.Struct(">HH2sH"), struct.Struct(">HHL"), struct.Struct(">L"))


def encoding_of(transfer_syntax_uid: str) -> Encoding:
    """The encoding of a transfer syntax once it is inflated (PS3.5 A)."""
    if transfer_syntax_uid == ExplicitVRBigEndian:
        return _BIG
    return _IMPLICIT if transfer_syntax_uid == ImplicitVRLittleEndian else _EXPLICIT


@dataclass(frozen=True)
class Contents:
    """What a walk has seen of a whole data set: the tags and the wanted values at its top level.

    A value is what stands in the stream, of a sequence with its items, and None where it is too
    large to be kept.
    """

    tags: frozenset[Tag]
    values: Mapping[Tag, bytes | None]


@dataclass
class _Level:
    """A sequence whose items are awaited, or an item (or the data set) with its elements."""

    encoding: Encoding
    items: bool


class Scanner:
    """Follows the lengths of an encoded data set (without meta information) as its bytes come.

    `feed` and `finish` raise UnreadableInstanceError where the data end early, an element has no
    VR, a wanted one stands twice, sequences nest too deep, there are too many elements, or a
    deflated data set inflates beyond its limit.  *wanted* are the tags whose values are kept,
    *noted* those whose presence is told as well: every tag where it is None.  Otherwise memory
    does not grow with the data set.
    """

    def __init__(
        self,
        transfer_syntax_uid: str,
        wanted: Collection[Tag] = (),
        *,
        noted: Collection[Tag] | None = None,
        max_elements: int = MAX_ELEMENTS,
        max_inflated: int = MAX_INFLATED,
    ) -> None:
        self._levels = [_Level(encoding_of(transfer_syntax_uid), items=False)]
        self._items_open = 0
        self._wanted = wanted
        self._noted = None if noted is None else frozenset((*wanted, *noted))
        self._left = max_elements
        self._skip = 0
        self._tail = b""
        self._tags: set[Tag] = set()
        self._values: dict[Tag, bytes | None] = {}
        self._sequence: Tag | None = None  # wanted, of undefined length, being walked
        self._captured = bytearray()
        self._inflater = (
            _Inflater(max_inflated)
            if transfer_syntax_uid == DeflatedExplicitVRLittleEndian
            else None
        )

    def feed(self, octets: Octets) -> None:
        """Take the next bytes of the data set."""
        if self._inflater is None:
            self._take(octets)
            return
        self._inflater.push(octets)
        while inflated := self._inflater.pull():
            self._take(inflated)

    def finish(self) -> Contents:
        """What the data set holds, once all its bytes were fed."""
        if self._inflater is not None and not self._inflater.ended:
            raise _early()
        # Fewer than eight zeros are padding of a file that was cut to an even or block length.
        if self._skip or len(self._levels) > 1 or len(self._tail) >= 8 or any(self._tail):
            raise _early()
        return Contents(frozenset(self._tags), self._values)

    def _take(self, octets: Octets) -> None:
        if self._skip:
            skipped = min(self._skip, len(octets))
            self._capture(octets[:skipped])
            self._skip -= skipped
            if self._skip or skipped == len(octets):
                return
            octets = octets[skipped:]
        if self._tail:
            octets = b"".join((self._tail, octets))
        at = self._walk(octets)
        self._tail = bytes(octets[at:])

    def _walk(self, data: Octets) -> int:
        """Step over the elements that are there; the offset of the first that is not."""
        at, end = 0, len(data)
        level = self._levels[-1]
        encoding = level.encoding
        while end - at >= 8:
            if self._noted is not None and len(self._levels) == 1 and not encoding.implicit:
                at = self._pass_plain(data, at, self._noted)
                if end - at < 8:
                    break
            start = at
            vr = None
            if encoding.implicit:
                group, element, length = encoding.element.unpack_from(data, at)
                at += 8
            else:
                group, element, vr, length = encoding.element.unpack_from(data, at)
                if group == _DELIMITERS:
                    # PS3.5 7.5: items and delimiters have no VR in any transfer syntax.
                    (length,) = encoding.length.unpack_from(data, at + 4)
                    at += 8
                elif vr in _SHORT:
                    at += 8
                elif vr in _LONG:
                    if end - at < 12:
                        return at
                    (length,) = encoding.length.unpack_from(data, at + 8)
                    at += 12
                elif vr.isalpha() and vr.isupper():
                    at += 8  # a VR that a later edition may know
                else:
                    raise UnreadableInstanceError("an element has no value representation")
            if len(self._levels) == 1:
                tag = (group, element)
                if tag in self._wanted and tag in self._tags:
                    # PS3.5 7.1: at most once. Two readers might believe one each.
                    raise UnreadableInstanceError("an element stands twice in the data set")
                if tag in self._wanted and length != _UNDEFINED:
                    if length <= MAX_KEPT:
                        if end - at < length:
                            return start
                        self._values[tag] = bytes(data[at : at + length])
                    else:
                        self._values[tag] = None
                if self._noted is None or tag in self._noted:
                    self._tags.add(tag)
            self._left -= 1
            if self._left < 0:
                raise UnreadableInstanceError("the data set has more elements than allowed")
            if length == _UNDEFINED or level.items or group == _DELIMITERS:
                length = self._enter_or_leave(group, element, vr, length)
                level = self._levels[-1]
                encoding = level.encoding
            if self._sequence is not None:
                self._capture(data[start : min(at + length, end)])
            at += length
            if at > end:
                self._skip = at - end
                return end
        return at

    def _pass_plain(self, data: Octets, at: int, noted: frozenset[Tag]) -> int:
        """Step over what is short, whole and of no interest: nearly all elements of a header."""
        end, left = len(data), self._left
        unpack = self._levels[0].encoding.element.unpack_from
        while end - at >= 8:
            group, element, vr, length = unpack(data, at)
            following = at + 8 + length
            if vr not in _SHORT or following > end or group == _DELIMITERS:
                break
            if (group, element) in noted or left <= 0:
                break
            left -= 1
            at = following
        self._left = left
        return at

    def _enter_or_leave(self, group: int, element: int, vr: bytes | None, length: int) -> int:
        """Go down into a sequence or item, or up again; how many bytes of value to step over."""
        level = self._levels[-1]
        end = _SEQUENCE_END if level.items else _ITEM_END
        if len(self._levels) > 1 and (group, element) == (_DELIMITERS, end):
            self._levels.pop()
            self._items_open -= not level.items
            return 0
        if level.items:
            if (group, element) != (_DELIMITERS, _ITEM):
                raise UnreadableInstanceError("a sequence holds something other than items")
            if length != _UNDEFINED:
                return length
            self._items_open += 1
            self._levels.append(_Level(level.encoding, items=False))
            return 0
        if length != _UNDEFINED:
            return length
        if self._items_open > MAX_DEPTH:
            raise UnreadableInstanceError("sequences are nested too deep")
        if len(self._levels) == 1 and (group, element) in self._wanted:
            self._sequence = (group, element)
        # PS3.5 6.2.2 note 4: UN of undefined length is a sequence in implicit VR little endian.
        self._levels.append(_Level(_IMPLICIT if vr == b"UN" else level.encoding, items=True))
        return 0

    def _capture(self, octets: Octets) -> None:
        """Keep what stands in a wanted sequence of undefined length."""
        if self._sequence is None:
            return
        if len(self._captured) <= 2 * MAX_KEPT:
            self._captured += octets
        if len(self._levels) == 1:
            # The element's own header stands before its first item.
            header = 8 if self._levels[0].encoding.implicit else 12
            kept = bytes(self._captured[header:])
            self._values[self._sequence] = kept if len(kept) <= MAX_KEPT else None
            self._sequence = None
            self._captured = bytearray()


class _Inflater:
    """Raw deflate (PS3.5 A.5) in pieces, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._engine = zlib.decompressobj(-zlib.MAX_WBITS)
        self._left = limit
        self._waiting: Octets = b""

    @property
    def ended(self) -> bool:
        return self._engine.eof

    def push(self, octets: Octets) -> None:
        self._waiting = octets

    def pull(self) -> bytes:
        """The next piece; empty where more bytes are needed or the stream has ended."""
        if self._engine.eof:
            return b""
        try:
            piece = self._engine.decompress(self._waiting, _INFLATED_PIECE)
        except zlib.error:
            raise UnreadableInstanceError("the deflated data set does not inflate") from None
        self._waiting = self._engine.unconsumed_tail
        self._left -= len(piece)
        if self._left < 0:
            raise UnreadableInstanceError("the deflated data set inflates beyond its limit")
        return piece


def check_whole(data: Octets, transfer_syntax_uid: str) -> frozenset[Tag]:
    """Follow every length of an encoded data set to its end; the tags at its top level.

    Errors as for `Scanner`, with its default limits.
    """
    scanner = Scanner(transfer_syntax_uid, max_inflated=MAX_INFLATED)
    scanner.feed(data)
    return scanner.finish().tags


def _early() -> UnreadableInstanceError:
    return UnreadableInstanceError("the data set ends early")
