"""Headers of one series in as little memory as what tells them apart.

A header of a hundred attributes is some 50 kB of objects, most of them the same in every slice:
code sequences, names, parameters. Headers that are read with the same `Shared` have such elements
in common, and each holds a table of its own only for those that differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag, Tag

__all__ = ["ElementKey", "Shared", "element_key"]

#: What an element was converted from; elements with the same key are alike.
ElementKey = tuple[Hashable, ...]
_Elements = MutableMapping[BaseTag, Any]

_CHARACTER_SET, _PIXEL_REPRESENTATION = Tag(0x00080005), Tag(0x00280103)
# What `lossy.record` corrects in a header: Lossy Image Compression, its ratio and method.
_CHANGED = frozenset({0x00282110, 0x00282112, 0x00282114})


class Shared:
    """What the headers of one series have in common; they are to be read, not written."""

    def __init__(self) -> None:
        #: Elements by what they were converted from.
        self.elements: dict[ElementKey, DataElement] = {}
        self._tables: dict[tuple[BaseTag, ...], dict[BaseTag, Any]] = {}
        self._metas: dict[ElementKey, FileMetaDataset] = {}

    def __len__(self) -> int:
        """The number of elements that headers have in common, or may yet."""
        return len(self.elements)

    def clear(self) -> None:
        """Forget all of it; headers that were read keep what they have."""
        for each in (self.elements, self._tables, self._metas):
            each.clear()

    def lay_over(self, dataset: Dataset) -> None:
        """Let a header whose elements are converted hold what is its own and no more."""
        # Each element that is shared brings its tag with it: a hundred of them are 8 kB.
        own = {element.tag: element for element in dataset._dict.values()}
        table = self._tables.setdefault(tuple(own), own)
        dataset._dict = _Overlay(
            table, {tag: each for tag, each in own.items() if table[tag] is not each}
        )
        meta = getattr(dataset, "file_meta", None)
        if meta is not None:
            # Which slice it is the header itself tells.
            for keyword in ("FileMetaInformationGroupLength", "MediaStorageSOPInstanceUID"):
                meta.pop(keyword, None)
            key = tuple((int(each.tag), str(each.value)) for each in meta._dict.values())
            dataset.file_meta = self._metas.setdefault(key, meta)


class _Overlay(MutableMapping[BaseTag, Any]):
    """Elements of one header above a table of all tags that it has, which others lie on too."""

    __slots__ = ("_own", "_table")

    def __init__(self, table: dict[BaseTag, Any], own: dict[BaseTag, Any]) -> None:
        self._table, self._own = table, own

    def __getitem__(self, tag: BaseTag) -> Any:
        return self._own[tag] if tag in self._own else self._table[tag]

    def get(self, tag: BaseTag, default: Any = None) -> Any:
        """An element, or the default."""
        return self._own[tag] if tag in self._own else self._table.get(tag, default)

    def __contains__(self, tag: object) -> bool:
        return tag in self._own or tag in self._table

    def __iter__(self) -> Iterator[BaseTag]:
        yield from self._table
        for tag in self._own:
            if tag not in self._table:
                yield tag

    def __len__(self) -> int:
        return len(self._table) + sum(tag not in self._table for tag in self._own)

    def __setitem__(self, tag: BaseTag, element: Any) -> None:
        self._own[tag] = element

    def __delitem__(self, tag: BaseTag) -> None:
        if tag in self._table:
            self._own, self._table = dict(self), {}
        del self._own[tag]


def element_key(dataset: Dataset, raw: Any) -> ElementKey | None:
    """What an element is converted from; None where others have a say in it, or it may change."""
    if isinstance(raw, DataElement) and raw.tag == _CHARACTER_SET:
        return int(raw.tag), str(raw.value)
    if isinstance(raw, DataElement) and isinstance(raw.value, DicomSequence):
        # Of undefined length: its items have been found, and their elements not been converted.
        items = [_item_key(item) for item in raw.value]
        return None if None in items else (int(raw.tag), _said_above(dataset), *items)
    if not isinstance(raw, RawDataElement) or not isinstance(raw.value, bytes):
        return None
    if raw.VR in (None, "UN") and (raw.tag.is_private or " or " in _dictionary_vr(raw.tag)):
        return None
    if raw.tag in _CHANGED:
        return None
    return (
        int(raw.tag),
        raw.VR,
        raw.value,
        raw.is_implicit_VR,
        raw.is_little_endian,
        _said_above(dataset),
    )


def _item_key(item: Dataset) -> ElementKey | None:
    keys = [element_key(item, raw) for raw in item._dict.values()]
    return None if None in keys else (_said_above(item), *keys)


def _said_above(dataset: Dataset) -> ElementKey:
    """What elements outside an element say about how it, and those in its items, are read."""
    stated = dataset._dict.get(_PIXEL_REPRESENTATION)
    return str(dataset._character_set), None if stated is None else str(stated.value)


def _dictionary_vr(tag: BaseTag) -> str:
    """As PS3.6 gives it, "US or SS" where that hangs on another element; "or" for none."""
    try:
        return dictionary_VR(tag)
    except KeyError:
        return " or "
