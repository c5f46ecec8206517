"""The values that derived instances do not copy: one function for each, named by `policy`.

Each takes the making of an instance and one of its frames, and returns the value of an attribute,
or None where it is not written. A function of an attribute that belongs to the whole instance
does not look at the frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.valuerep import format_number_as_ds

from dicom_node.dicom import carry, functional_groups, geometry, group_values, provenance
from dicom_node.dicom.header import number, text, texts
from dicom_node.dicom.making import Frame, Making, Value, described, slope_text, steps

__all__ = ["VALUES", "pixel_octets"]

_LO_LENGTH = 64
_IS_MAXIMUM = 2**31 - 1


def sop_class_uid(making: Making, _: Frame) -> str:
    """The class of the source: a restored CT is a CT (PS3.3 C.7.6.1.1.2)."""
    return making.image.uid


def sop_instance_uid(making: Making, _: Frame) -> str:
    """A new instance."""
    return making.sop_uid


def series_instance_uid(making: Making, _: Frame) -> str:
    """A new series."""
    return making.series_uid


def instance_number(making: Making, _: Frame) -> Any:
    """That of the source; 1 where it has none."""
    stated = making.source.get("InstanceNumber")
    return "1" if stated is None else stated


def date(making: Making, _: Frame) -> str:
    """The day of derivation, as the source's clock would show it."""
    return provenance.times(making.derivation.created, making.source).date


def time(making: Making, _: Frame) -> str:
    """The time of derivation, as the source's clock would show it."""
    return provenance.times(making.derivation.created, making.source).time


def series_number(making: Making, _: Frame) -> int:
    """The source's number and the configured offset, inside what an IS holds."""
    offset = making.derivation.identity.series_number_offset
    wanted = int(number(making.source, "SeriesNumber") or 0) + offset
    return min(max(1, wanted), _IS_MAXIMUM)


def series_description(making: Making, _: Frame) -> str:
    """The source's words and the suffix of the task, in 64 characters."""
    derivation = making.derivation
    suffixes = derivation.identity.description_suffixes
    suffix = next((words for name, words in suffixes.items() if name == derivation.task), "")
    described = text(making.source, "SeriesDescription")[: _LO_LENGTH - len(suffix)].rstrip()
    return f"{described}{suffix}".strip()[:_LO_LENGTH]


def content_qualification(making: Making, _: Frame) -> str:
    """As configured, but what is derived from RESEARCH content is RESEARCH (PS3.3 C.12.1)."""
    stated = text(making.source, "ContentQualification")
    return "RESEARCH" if stated == "RESEARCH" else making.derivation.identity.content_qualification


def image_type(making: Making, frame: Frame) -> list[str]:
    """DERIVED, with the value 2 that the IOD demands, and the source's further values.

    PS3.3 C.8.9.4.1.1: value 2 of a PET image is PRIMARY. C.8.2.1.1.1, C.8.3.1.1.1: value 3.
    """
    if making.image.modality == "PT":
        return ["DERIVED", "PRIMARY"]
    described = list(texts(frame.header, "ImageType")[2:])
    default = "AXIAL" if making.image.modality == "CT" else "OTHER"
    return ["DERIVED", "SECONDARY", *(described or [default])]


def frame_type(_: Making, frame: Frame) -> list[str]:
    """DERIVED and PRIMARY (PS3.3 C.8.16.1.1, C.8.16.1.2), with the source's values 3 and 4.

    Value 4 says by what calculation a derived contrast came about (C.8.16.1.4); a restoration
    keeps the contrast.
    """
    described = [*texts(frame.header, "ImageType")[2:4], "", ""]
    return ["DERIVED", "PRIMARY", described[0] or "OTHER", described[1] or "NONE"]


def image_type_of_frames(making: Making, frame: Frame) -> list[str]:
    """The values that all frames share; MIXED where they differ (PS3.3 C.8.16.1)."""
    columns = zip(*(frame_type(making, each) for each in making.frames), strict=True)
    found = [set(column) for column in columns]
    return [next(iter(values)) if len(values) == 1 else "MIXED" for values in found]


def manufacturer(making: Making, _: Frame) -> str:
    """Ours: the scanner is in the contributing equipment (PS3.3 C.12.1.1.5)."""
    return making.derivation.identity.equipment.manufacturer


def model_name(making: Making, _: Frame) -> str:
    """Ours."""
    return making.derivation.identity.equipment.model_name


def software_versions(making: Making, _: Frame) -> list[str]:
    """The versions of the node and of the weights."""
    return provenance.software_versions(making.derivation.model)


def serial_number(making: Making, _: Frame) -> str:
    """The weights': an enhanced image demands one of the equipment (PS3.3 C.7.5.2)."""
    return making.derivation.model.sha256[:16]


def institution_name(making: Making, _: Frame) -> Any:
    """The one that is configured, else where the patient was imaged."""
    configured = making.derivation.identity.equipment.institution_name
    if configured or "InstitutionName" not in making.source:
        return configured
    return carry.public_copy(making.source["InstitutionName"])


def station_name(making: Making, _: Frame) -> str | None:
    """The one that is configured."""
    return making.derivation.identity.equipment.station_name


def derivation_description(making: Making, _: Frame) -> str:
    """What was done, in words."""
    return described(making, making.source)


def derivation_codes(making: Making, _: Frame) -> list[Dataset]:
    """The steps in order: what was done before, our step, and the new grid where there is one."""
    return steps(making, making.source)


def source_images(making: Making, _: Frame) -> list[Dataset]:
    """The instance that this one was made from."""
    same = not making.resampling.changes
    return [provenance.source_image(making.source, same_grid=same)]


def source_image_evidence(making: Making, _: Frame) -> list[Dataset]:
    """The instance whose frames the Derivation Image groups name (PS3.3 C.8.16.1)."""
    return [provenance.evidence(making.source)]


def referenced_series(making: Making, _: Frame) -> list[Dataset]:
    """The series of this study that the instance refers to."""
    return provenance.referenced_series(making.source)


def contributing_equipment(making: Making, _: Frame) -> list[Dataset]:
    """Everyone who had a hand in the image."""
    derivation = making.derivation
    return provenance.contributing_equipment(
        making.source,
        model=derivation.model,
        equipment=derivation.identity.equipment,
        uid_root=derivation.identity.uid_root,
        at=provenance.times(derivation.created, making.source),
    )


def coding_schemes(making: Making, _: Frame) -> list[Dataset]:
    """The schemes of the codes inside."""
    return provenance.coding_schemes(making.source)


def rows(making: Making, _: Frame) -> int:
    """Of the restored grid."""
    return int(making.frames[0].stored.shape[0])


def columns(making: Making, _: Frame) -> int:
    """Of the restored grid."""
    return int(making.frames[0].stored.shape[1])


def pixel_spacing(_: Making, frame: Frame) -> Any:
    """The source's, divided by the factor of a finer grid."""
    if not frame.resampling.changes:
        return frame.header.PixelSpacing
    spacing = geometry.slice_frame(frame.header).spacing
    return [format_number_as_ds(each / frame.resampling.factor) for each in spacing]


def image_position(_: Making, frame: Frame) -> Any:
    """The centre of the first sample: moved where the operator of a finer grid moves it."""
    if not any(frame.resampling.shift):
        return frame.header.ImagePositionPatient
    moved = geometry.resampled_position(geometry.slice_frame(frame.header), frame.resampling)
    return [format_number_as_ds(float(each)) for each in moved]


def bits_allocated(making: Making, _: Frame) -> int:
    """Of the stored values."""
    return int(making.frames[0].stored.dtype.itemsize * 8)


def bits_stored(making: Making, frame: Frame) -> int:
    """All that are allocated."""
    return bits_allocated(making, frame)


def high_bit(making: Making, frame: Frame) -> int:
    """The highest."""
    return bits_allocated(making, frame) - 1


def rescale_slope(_: Making, frame: Frame) -> str:
    """A DS that reads back as exactly the slope that the pixels were divided by."""
    return slope_text(frame)


def rescale_intercept(_: Making, __: Frame) -> str:
    """PS3.3 C.8.9.4.1.6: 0."""
    return "0"


def smallest_value(making: Making, _: Frame) -> DataElement:
    """Of the restored pixels."""
    values = [int(frame.stored.min()) for frame in making.frames]
    return _sample("SmallestImagePixelValue", min(values), making)


def largest_value(making: Making, _: Frame) -> DataElement:
    """Of the restored pixels."""
    values = [int(frame.stored.max()) for frame in making.frames]
    return _sample("LargestImagePixelValue", max(values), making)


def _sample(keyword: str, value: int, making: Making) -> DataElement:
    signed = making.frames[0].stored.dtype.kind == "i"
    return DataElement(keyword, "SS" if signed else "US", value)


def pixel_data(making: Making, _: Frame) -> DataElement:
    """The frames one after the other, little endian (PS3.5 8.1.1, A.2)."""
    kind = "OW" if bits_allocated(making, making.frames[0]) == 16 else "OB"
    return DataElement("PixelData", kind, pixel_octets(making.frames))


def pixel_octets(frames: Sequence[Frame]) -> bytes:
    """The value of the pixel data of some frames, of even length."""
    data = b"".join(np.ascontiguousarray(frame.stored).data for frame in frames)
    return data + b"\0" if len(data) % 2 else data


def number_of_frames(making: Making, _: Frame) -> int:
    """Those that were restored."""
    return len(making.frames)


def concatenation_uid(making: Making, _: Frame) -> str:
    """One for all parts of one concatenation under one derivation."""
    root = making.derivation.identity.uid_root
    stated = text(making.source, "ConcatenationUID")
    return provenance.derived_uid(root, "concatenation", stated, making.series_uid)


def concatenation_source(making: Making, _: Frame) -> str:
    """The instance that the parts would make together, had it been restored whole."""
    root = making.derivation.identity.uid_root
    stated = text(making.source, "SOPInstanceUIDOfConcatenationSource")
    return provenance.derived_uid(root, "instance", stated, making.series_uid)


def shared_groups(making: Making, _: Frame) -> list[Dataset]:
    """The Shared Functional Groups Sequence."""
    return functional_groups.shared(making, VALUES)


def per_frame_groups(making: Making, _: Frame) -> list[Dataset]:
    """The Per-Frame Functional Groups Sequence."""
    return functional_groups.per_frame(making, VALUES)


_FUNCTIONS: tuple[Value, ...] = (
    sop_class_uid, sop_instance_uid, series_instance_uid, instance_number, date, time,
    series_number, series_description, content_qualification, image_type, frame_type,
    image_type_of_frames, manufacturer, model_name, software_versions, serial_number,
    institution_name, station_name, derivation_description, derivation_codes, source_images,
    source_image_evidence, referenced_series, contributing_equipment, coding_schemes, rows,
    columns, pixel_spacing, image_position, bits_allocated, bits_stored, high_bit, rescale_slope,
    rescale_intercept, smallest_value, largest_value, pixel_data, number_of_frames,
    concatenation_uid, concatenation_source, shared_groups, per_frame_groups,
    group_values.derivation_image, group_values.pixel_value_transformation,
    group_values.real_world_values, group_values.unassigned_shared,
    group_values.unassigned_per_frame,
)  # fmt: skip

VALUES: Mapping[str, Value] = {function.__name__: function for function in _FUNCTIONS}
"""By the name that a row of `policy` gives."""
