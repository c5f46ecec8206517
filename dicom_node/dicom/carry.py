"""Attributes carried over from a source as they are: public ones, overlays, the private few."""

from __future__ import annotations

from copy import copy, deepcopy

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from dicom_node.dicom import policy

__all__ = ["copy_overlays", "copy_private", "public_copy"]


def public_copy(element: DataElement) -> DataElement:
    """A copy of an element without the private attributes inside its items."""
    if not isinstance(element.value, DicomSequence):
        return copy(element)
    copied = deepcopy(element)
    for item in copied.value:
        item.remove_private_tags()
    return copied


def copy_overlays(source: Dataset, target: Dataset) -> None:
    """Copy the overlays of the target's grid; those in the bits of the pixels went with them."""
    tags = source.keys()
    present = {tag.group for tag in tags}
    for group in policy.OVERLAY_GROUPS:
        if group not in present:
            continue
        plane = source.group_dataset(group)
        if not all((group, element) in plane for element in (0x0010, 0x0011, 0x3000)):
            continue
        grid = plane[group, 0x0010].value, plane[group, 0x0011].value
        if grid == (target.get("Rows"), target.get("Columns")):
            target.update(deepcopy(plane))


def copy_private(source: Dataset, target: Dataset, modality: str) -> None:
    """Copy the private attributes that the policy keeps for the modality."""
    for rule in policy.PRIVATE_KEPT.get(modality, ()):
        try:
            element = source.private_block(rule.group, rule.creator)[rule.offset]
        except KeyError:
            continue
        block = target.private_block(rule.group, rule.creator, create=True)
        block.add_new(rule.offset, element.VR, deepcopy(element.value))
