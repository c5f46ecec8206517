"""The frames of a multi-frame image as headers of single slices.

Geometry, scale, timing and contrast of a frame lie in functional groups (PS3.3 C.7.6.16): shared
by all frames, or in the frame's own item. A frame header lays them flat under the names that a
classic image gives them, so that one set of rules reads both. It is a view for reading; what is
written comes from the groups themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.valuerep import format_number_as_ds

from dicom_node.dicom.header import number, quiet_pydicom, text, texts
from dicom_node.dicom.image_classes import CLASSES
from dicom_node.errors import RefusedError

__all__ = [
    "PER_FRAME",
    "SHARED",
    "VOLUME_ATTRIBUTES",
    "frame_headers",
    "group_items",
    "is_multiframe",
]

SHARED = "SharedFunctionalGroupsSequence"
PER_FRAME = "PerFrameFunctionalGroupsSequence"

# Groups that say something of other images, or in other terms than the frame's own attributes.
_NOT_LAID_FLAT = frozenset(
    {
        "DerivationImageSequence",
        "ReferencedImageSequence",
        "RealWorldValueMappingSequence",
        "ConversionSourceAttributesSequence",
        "ContrastBolusUsageSequence",
        "CTAdditionalXRaySourceSequence",
    }
)
VOLUME_ATTRIBUTES = (
    "StackID",
    "NominalPercentageOfCardiacPhase",
    "NominalCardiacTriggerDelayTime",
    "NominalPercentageOfRespiratoryPhase",
    "MonoenergeticEnergyEquivalent",
    "MetaboliteMapDescription",
    "ReconstructionAlgorithm",
)
"""Attributes of a frame that no volume mixes, beside those of every image."""

_BULK = frozenset({"PixelData", SHARED, PER_FRAME})

# Measurement Units Code (UCUM, CID 84 and 85) → Units of a classic PET image (C.8.9.1.1.3).
_UCUM_UNITS = {
    "Bq/ml": "BQML",
    "Bq/mL": "BQML",
    "{counts}": "CNTS",
    "{propcounts}": "PROPCNTS",
    "g/ml": "GML",
    "g/ml{SUVbw}": "GML",
    "g/mL{SUVbw}": "GML",
    "{SUVbw}g/ml": "GML",
}
# Enhanced PET says YES or NO (C.8.22.5) where a classic image lists words (C.8.9.1.1.2).
_CORRECTIONS = {
    "DecayCorrected": "DECY",
    "AttenuationCorrected": "ATTN",
    "ScatterCorrected": "SCAT",
    "RandomsCorrected": "RAN",
    "DeadTimeCorrected": "DTIM",
    "DetectorNormalizationCorrection": "NORM",
}


def is_multiframe(header: Dataset) -> bool:
    """Whether the data set is of a class whose attributes lie in functional groups."""
    image = CLASSES.get(text(header, "SOPClassUID"))
    return image is not None and image.multiframe


def frame_headers(dataset: Dataset) -> list[Dataset]:
    """One flat header for each frame, in the order of the frames.

    Raises RefusedError where the functional groups do not fit the number of frames, or one of them
    holds text in place of a number.
    """
    per_frame = _items(dataset, PER_FRAME)
    announced = int(number(dataset, "NumberOfFrames") or 0)
    if announced < 1 or len(per_frame) != announced:
        raise RefusedError(f"{len(per_frame)} per-frame functional groups for {announced} frames")
    base = _root(dataset)
    # A value that breaks its VR's rules is warned of, in words that quote it, when it is laid flat.
    with quiet_pydicom():
        for shared in _items(dataset, SHARED)[:1]:
            _lay_flat(base, shared)
        return [_frame(base, item, i) for i, item in enumerate(per_frame, start=1)]


def group_items(dataset: Dataset, frame: int, macro: str) -> list[Dataset]:
    """The items of one functional group of a frame (from 1): the frame's own, or the shared."""
    for groups in (_items(dataset, PER_FRAME)[frame - 1 : frame], _items(dataset, SHARED)[:1]):
        for item in groups:
            if found := _items(item, macro):
                return found
    return []


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    value = dataset.get(keyword)
    return list(value) if isinstance(value, DicomSequence) else []


def _root(dataset: Dataset) -> Dataset:
    flat = Dataset()
    for element in dataset:
        if element.keyword not in _BULK:
            flat.add(element)
    # Which values a frame has is said by its own groups; at the root it is another standard's.
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        if keyword in flat:
            delattr(flat, keyword)
    if hasattr(dataset, "file_meta"):
        flat.file_meta = dataset.file_meta
    return flat


def _frame(base: Dataset, item: Dataset, frame: int) -> Dataset:
    flat = Dataset()
    flat.update(base)
    if hasattr(base, "file_meta"):
        flat.file_meta = base.file_meta
    _lay_flat(flat, item)
    values = {keyword: read(flat) for keyword, read in _TRANSLATED.items()}
    for keyword, value in {**values, "InstanceNumber": str(frame)}.items():
        if value:
            try:
                # A new element: that of the image, or of another frame, must not change with it.
                flat.add_new(keyword, dictionary_VR(keyword), value)
            except (ValueError, TypeError, OverflowError):
                # Left out it might join volumes that it tells apart; the cause quotes the value.
                raise RefusedError(f"{keyword} of a frame has a value that is none") from None
    return flat


def _lay_flat(flat: Dataset, groups: Dataset) -> None:
    for group in groups:
        if not isinstance(group.value, DicomSequence) or not group.value:
            continue
        if group.keyword == "RealWorldValueMappingSequence":
            flat.add(group)
        elif group.keyword in _NOT_LAID_FLAT or not group.keyword or group.tag.is_private:
            continue  # what a group of an unknown tag holds may mean something else there
        elif group.keyword.startswith("Unassigned"):
            # What the conversion of a classic image found no group for stands under its own name.
            _lay_under(flat, group.value[0])
        else:
            flat.update(group.value[0])


def _lay_under(flat: Dataset, item: Dataset) -> None:
    for element in item:
        if element.tag not in flat:
            flat.add(element)


def _first_of(*keywords: str) -> Callable[[Dataset], str]:
    return lambda flat: next((found for word in keywords if (found := text(flat, word))), "")


def _date(flat: Dataset) -> str:
    return _first_of("FrameAcquisitionDateTime", "FrameReferenceDateTime")(flat)[:8]


def _time(flat: Dataset) -> str:
    return _first_of("FrameAcquisitionDateTime", "FrameReferenceDateTime")(flat)[8:]


def _units(flat: Dataset) -> str:
    stated = text(flat, "Units")
    if stated or text(flat, "Modality") != "PT":
        return stated
    for mapping in _items(flat, "RealWorldValueMappingSequence"):
        for code in _items(mapping, "MeasurementUnitsCodeSequence"):
            if (unit := _UCUM_UNITS.get(text(code, "CodeValue"))) is not None:
                return unit
    return ""


def _corrected(flat: Dataset) -> list[str]:
    stated = texts(flat, "CorrectedImage")
    found = [word for keyword, word in _CORRECTIONS.items() if text(flat, keyword) == "YES"]
    return list(stated) or found


def _decay_correction(flat: Dataset) -> str:
    stated = text(flat, "DecayCorrection")
    if stated:
        return stated
    # PS3.3 C.8.22.5: corrected to Decay Correction DateTime, which is the reference time.
    return "START" if text(flat, "DecayCorrected") == "YES" else ""


def _echo_time(flat: Dataset) -> str:
    effective = number(flat, "EffectiveEchoTime")
    return text(flat, "EchoTime") if effective is None else format_number_as_ds(effective)


_TRANSLATED: Mapping[str, Callable[[Dataset], object]] = {
    "ImageType": lambda flat: list(texts(flat, "FrameType") or texts(flat, "ImageType")),
    "EchoTime": _echo_time,
    "TemporalPositionIdentifier": _first_of("TemporalPositionIndex", "TemporalPositionIdentifier"),
    "AcquisitionNumber": _first_of("FrameAcquisitionNumber", "AcquisitionNumber"),
    "AcquisitionDate": lambda flat: _date(flat) or text(flat, "AcquisitionDate"),
    "AcquisitionTime": lambda flat: _time(flat) or text(flat, "AcquisitionTime"),
    "Units": _units,
    "CorrectedImage": _corrected,
    "DecayCorrection": _decay_correction,
}
