"""Functional groups that a derived multi-frame image does not copy, each as a whole."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
from pydicom.dataset import Dataset

from dicom_node.dicom import carry, policy, provenance
from dicom_node.dicom.header import number
from dicom_node.dicom.image_classes import CLASSES, Kind
from dicom_node.dicom.making import Frame, Making, described, slope_text, steps
from dicom_node.dicom.multiframe import group_items

__all__ = [
    "derivation_image",
    "pixel_value_transformation",
    "real_world_values",
    "unassigned_per_frame",
    "unassigned_shared",
]


def derivation_image(making: Making, frame: Frame) -> list[Dataset]:
    """Derivation Image (PS3.3 C.7.6.16.2.6): earlier steps, then ours from the source frame."""
    earlier = _items(making, frame, "DerivationImageSequence")
    ours = Dataset()
    ours.DerivationDescription = described(making, earlier[-1] if earlier else Dataset())
    ours.DerivationCodeSequence = steps(making, Dataset())
    same = not frame.resampling.changes
    ours.SourceImageSequence = [
        provenance.source_image(making.source, same_grid=same, frame=frame.number)
    ]
    return [*(_public(item) for item in earlier), ours]


def pixel_value_transformation(making: Making, frame: Frame) -> list[Dataset]:
    """Pixel Value Transformation (PS3.3 C.7.6.16.2.9): the new scale of the frame."""
    items = [_public(item) for item in _items(making, frame, "PixelValueTransformationSequence")]
    item = items[0] if items else Dataset()
    item.RescaleIntercept = "0"
    item.RescaleSlope = slope_text(frame)
    if "RescaleType" not in item:
        item.RescaleType = "US"
    return [item]


def real_world_values(making: Making, frame: Frame) -> list[Dataset] | None:
    """Real World Value Mapping (PS3.3 C.7.6.16.2.11) in terms of the new stored values.

    A line r = a·s + b over the source's stored values s becomes one over the new values s' of
    the same quantity, s·m + i = s'·m' + i'. A table of values cannot be carried over, and a
    mapping that is one is left out; None where none is left.
    """
    kept = []
    for source in _items(making, frame, "RealWorldValueMappingSequence"):
        slope = number(source, "RealWorldValueSlope")
        intercept = number(source, "RealWorldValueIntercept")
        if slope is None or intercept is None:
            continue
        old, new = frame.source_rescale, frame.rescale
        item = _public(source)
        item.RealWorldValueSlope = slope * new.slope / old.slope
        shift = (new.intercept - old.intercept) / old.slope
        item.RealWorldValueIntercept = intercept + slope * shift
        _set_range(item, frame)
        kept.append(item)
    return kept or None


def _set_range(item: Dataset, frame: Frame) -> None:
    for keyword in tuple(element.keyword for element in item):
        if keyword.endswith(("FirstValueMapped", "LastValueMapped")):
            delattr(item, keyword)
    limits = np.iinfo(frame.stored.dtype)
    kind = "SS" if frame.stored.dtype.kind == "i" else "US"
    item.add_new("RealWorldValueFirstValueMapped", kind, int(limits.min))
    item.add_new("RealWorldValueLastValueMapped", kind, int(limits.max))


def unassigned_shared(making: Making, frame: Frame) -> list[Dataset]:
    """What a conversion could place in no group, as far as a classic image would keep it."""
    return _unassigned(making, frame, "UnassignedSharedConvertedAttributesSequence")


def unassigned_per_frame(making: Making, frame: Frame) -> list[Dataset]:
    """The same of one frame."""
    return _unassigned(making, frame, "UnassignedPerFrameConvertedAttributesSequence")


def _unassigned(making: Making, frame: Frame, macro: str) -> list[Dataset]:
    modality = making.image.modality
    classic = next(
        image.uid
        for image in CLASSES.values()
        if image.modality == modality and image.kind is Kind.CLASSIC
    )
    kept = []
    for source in _items(making, frame, macro):
        item = Dataset()
        for element in source:
            if policy.fate(classic, element.keyword) is policy.Action.COPY:
                item.add(carry.public_copy(element))
        carry.copy_private(source, item, modality)
        kept.append(item)
    return kept


def _items(making: Making, frame: Frame, macro: str) -> list[Dataset]:
    return group_items(making.source, frame.number, macro)


def _public(item: Dataset) -> Dataset:
    copied = deepcopy(item)
    copied.remove_private_tags()
    return copied
