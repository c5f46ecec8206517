"""The functional groups of a derived multi-frame image, laid out as the policy says.

A group that is copied stays where the source has it: shared, or in the frame's item (PS3.3
C.7.6.16). One that is made stays shared too where it comes out alike for all frames, and goes to
the frames where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from dicom_node.dicom import iods, policy
from dicom_node.dicom.making import Frame, Making, Value
from dicom_node.dicom.multiframe import PER_FRAME, SHARED, group_items
from dicom_node.dicom.policy import Action

__all__ = ["per_frame", "shared"]


def shared(making: Making, values: Mapping[str, Value]) -> list[Dataset]:
    """The item of the Shared Functional Groups Sequence."""
    item = _copied(making, making.frames[0], _groups(making.source, SHARED, 1), values)
    for macro in _made_macros(making):
        if macro not in _groups(making.source, SHARED, 1):
            continue
        found = _made(making, macro, values)
        if found and _alike(found):
            setattr(item, macro, found[0])
    return [item]


def per_frame(making: Making, values: Mapping[str, Value]) -> list[Dataset]:
    """One item for each restored frame, in order."""
    items = [
        _copied(making, frame, _groups(making.source, PER_FRAME, frame.number), values)
        for frame in making.frames
    ]
    for macro in _made_macros(making):
        found = _made(making, macro, values)
        if not found or (macro in _groups(making.source, SHARED, 1) and _alike(found)):
            continue
        for item, sequence in zip(items, found, strict=True):
            setattr(item, macro, sequence)
    return items


def _groups(source: Dataset, sequence: str, number: int) -> Dataset:
    items = source.get(sequence) or ()
    return items[number - 1] if len(items) >= number else Dataset()


def _made_macros(making: Making) -> Iterator[str]:
    table = policy.table(making.image.uid)
    for macro in iods.functional_groups(making.image.uid):
        if table[macro].by:
            yield macro


def _made(
    making: Making, macro: str, values: Mapping[str, Value]
) -> Sequence[list[Dataset]] | None:
    """The group of each frame; None where it is not written."""
    rule = policy.table(making.image.uid)[macro]
    if rule.action is Action.RECOMPUTE and not _has(making, macro):
        return None
    found = [values[rule.by](making, frame) for frame in making.frames]
    return found if all(each is not None for each in found) else None


def _has(making: Making, macro: str) -> bool:
    return any(group_items(making.source, frame.number, macro) for frame in making.frames)


def _alike(found: Sequence[list[Dataset]]) -> bool:
    return all(each == found[0] for each in found[1:])


def _copied(making: Making, frame: Frame, groups: Dataset, values: Mapping[str, Value]) -> Dataset:
    """The groups of one item that are copied, attribute by attribute."""
    table = policy.table(making.image.uid)
    copied = Dataset()
    for group in groups:
        rule = table.get(group.keyword)
        if rule is None or rule.action is not Action.COPY:
            continue
        if isinstance(group.value, DicomSequence):
            items = [_item(making, frame, group.keyword, item, values) for item in group.value]
            setattr(copied, group.keyword, items)
    return copied


def _item(
    making: Making, frame: Frame, macro: str, source: Dataset, values: Mapping[str, Value]
) -> Dataset:
    table = policy.table(making.image.uid)
    item = Dataset()
    for element in source:
        rule = table.get(f"{macro}.{element.keyword}")
        if rule is None or rule.action is Action.DROP:
            continue
        if rule.action is Action.COPY:
            item.add(deepcopy(element))
        else:
            setattr(item, element.keyword, values[rule.by](making, frame))
    item.remove_private_tags()
    return item
