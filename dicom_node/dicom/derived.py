"""Restored instances: the source's header by policy, new identity, restored pixels, provenance.

The same call makes the same bytes: UIDs come from what was done to what, times from the caller,
and nothing else varies. Every instance carries what `is_own_output_header` knows it by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from typing import Any

import numpy as np
from highdicom.base import SOPClass
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from dicom_node.dicom import pixels, policy, provenance
from dicom_node.dicom.header import is_own_output, number, quiet_pydicom, text, texts
from dicom_node.dicom.pixels import Quantised
from dicom_node.dicom.policy import Action
from dicom_node.dicom.provenance import DerivationTimes, ModelIdentity
from dicom_node.dicom.volume import SeriesVolume
from dicom_node.errors import UnreadableInstanceError
from dicom_node.settings import IdentitySettings

__all__ = [
    "DerivedInstance",
    "build",
    "derived_series_uid",
    "derived_sop_uid",
    "is_own_output_header",
]

is_own_output_header = is_own_output

_LO_LENGTH = 64
_IS_MAXIMUM = 2**31 - 1


@dataclass(frozen=True)
class DerivedInstance:
    """One restored instance as a PS3.10 file, and how many pixels the stored range clamped."""

    sop_instance_uid: str
    sop_class_uid: str
    source_sop_instance_uid: str
    data: bytes
    clamped: int = 0


@dataclass(frozen=True)
class _Derivation:
    """What all instances of one derived series share."""

    task: str
    model: ModelIdentity
    identity: IdentitySettings
    remarks: tuple[str, ...]
    strength: float
    created: datetime
    parameters_hash: str
    source_set: str


def build(
    volume: SeriesVolume,
    restored: NDArray[np.floating[Any]],
    *,
    task: str,
    model: ModelIdentity,
    identity: IdentitySettings,
    warnings: Sequence[str] = (),
    strength: float = 1.0,
    created: datetime,
    parameters_hash: str,
) -> Iterator[DerivedInstance]:
    """Make the derived series of one volume, slice by slice in the volume's order.

    restored: (S, R, C) in the volume's units. warnings go into the Derivation Description.
    Raises ValueError where the shape is not the volume's or a value is not finite.
    """
    if restored.shape != volume.array.shape:
        raise ValueError(f"restored {restored.shape}, volume {volume.array.shape}")
    for i, values in enumerate(restored):
        if not np.all(np.isfinite(values)):
            raise ValueError(f"restored slice {i} has values that are not finite")
    derivation = _Derivation(
        task, model, identity, tuple(warnings), strength, created, parameters_hash,
        source_set_hash(volume),
    )  # fmt: skip
    return (_derive(volume, i, restored[i], derivation) for i in range(len(restored)))


def source_set_hash(volume: SeriesVolume) -> str:
    """For PET, which is quantified as a set, a hash of its instances; '' for CT and MR."""
    if text(volume.headers[0], "Modality") != "PT":
        return ""
    uids = sorted(text(header, "SOPInstanceUID") for header in volume.headers)
    return hashlib.sha256("\n".join(uids).encode()).hexdigest()


def derived_series_uid(
    header: Dataset,
    *,
    task: str,
    model: ModelIdentity,
    identity: IdentitySettings,
    strength: float,
    parameters_hash: str,
    source_set: str,
) -> str:
    """The Series Instance UID of the derived series that a source instance's result goes to."""
    return provenance.derived_uid(
        identity.uid_root,
        "series",
        text(header, "SeriesInstanceUID"),
        task,
        model.sha256,
        format(strength, "g"),
        parameters_hash,
        _grid(header),
        source_set,
    )


def derived_sop_uid(header: Dataset, series_uid: str, root: str | None) -> str:
    """The SOP Instance UID of the restored instance of one source in one derived series."""
    return provenance.derived_uid(root, "instance", text(header, "SOPInstanceUID"), series_uid)


def _grid(header: Dataset) -> str:
    spacing = "\\".join(texts(header, "PixelSpacing"))
    return f"{text(header, 'Rows')}x{text(header, 'Columns')}@{spacing}"


class _DerivedImage(SOPClass):
    """A CT, MR or PET image that takes its header from a source by `policy`."""

    def __init__(self, source: Dataset, uids: tuple[str, str], series_number: int) -> None:
        # Only identity goes through the constructor: it refuses values that scanners do send
        # (sex 'U', instance number 0, some character sets), and those are copied afterwards.
        super().__init__(
            study_instance_uid=text(source, "StudyInstanceUID"),
            series_instance_uid=uids[0],
            series_number=series_number,
            sop_instance_uid=uids[1],
            sop_class_uid=text(source, "SOPClassUID"),
            instance_number=max(1, int(number(source, "InstanceNumber") or 1)),
            modality=text(source, "Modality"),
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
        _copy_by_policy(source, self)
        self.file_meta.ImplementationClassUID = UID(provenance.IMPLEMENTATION_CLASS_UID)
        self.file_meta.ImplementationVersionName = provenance.IMPLEMENTATION_VERSION_NAME


def _derive(
    volume: SeriesVolume, i: int, values: NDArray[np.floating[Any]], derivation: _Derivation
) -> DerivedInstance:
    source = volume.headers[i]
    identity = derivation.identity
    series_uid = derived_series_uid(
        source,
        task=derivation.task,
        model=derivation.model,
        identity=identity,
        strength=derivation.strength,
        parameters_hash=derivation.parameters_hash,
        source_set=derivation.source_set,
    )
    sop_uid = derived_sop_uid(source, series_uid, identity.uid_root)
    quantised = _quantise(volume, i, values)
    series_number = _series_number(source, identity)
    try:
        with quiet_pydicom():
            image = _DerivedImage(source, (series_uid, sop_uid), series_number)
            _set_series(image, source, derivation)
            _set_provenance(image, source, derivation)
            _set_pixels(image, source, quantised)
            data = _encode(image)
    except Exception as error:
        # A header that could be read may still hold values that no data set can: its kind says
        # enough, its text may quote them.
        source_uid = text(source, "SOPInstanceUID")
        raise UnreadableInstanceError(
            f"the header of SOP Instance {source_uid} cannot be carried over "
            f"({type(error).__name__})",
            sop_instance_uid=source_uid,
        ) from None
    return DerivedInstance(
        sop_instance_uid=sop_uid,
        sop_class_uid=text(source, "SOPClassUID"),
        source_sop_instance_uid=text(source, "SOPInstanceUID"),
        data=data,
        clamped=quantised.clamped,
    )


def _copy_by_policy(source: Dataset, target: Dataset) -> None:
    """Copy what the policy's tables keep: public attributes, overlays, private allow-list."""
    sop_class, modality = text(source, "SOPClassUID"), text(source, "Modality")
    for element in source:
        keyword = keyword_for_tag(element.tag)
        if policy.fate(sop_class, modality, keyword) is Action.COPY:
            target.add(_public_copy(element))
    for group in policy.OVERLAY_GROUPS:
        _copy_overlay(source, target, group)
    for rule in policy.PRIVATE_KEPT.get(modality, ()):
        _copy_private(source, target, rule)


def _public_copy(element: DataElement) -> DataElement:
    """A copy of an element without the private attributes inside its items."""
    if not isinstance(element.value, DicomSequence):
        return copy(element)
    copied = deepcopy(element)
    for item in copied.value:
        item.remove_private_tags()
    return copied


def _copy_overlay(source: Dataset, target: Dataset, group: int) -> None:
    """Copy an overlay of the same grid; one within the bits of the pixels went with them."""
    plane = source.group_dataset(group)
    if not all((group, element) in plane for element in (0x0010, 0x0011, 0x3000)):
        return
    grid = plane[group, 0x0010].value, plane[group, 0x0011].value
    if grid == (source.get("Rows"), source.get("Columns")):
        target.update(deepcopy(plane))


def _copy_private(source: Dataset, target: Dataset, rule: policy.PrivateRule) -> None:
    try:
        element = source.private_block(rule.group, rule.creator)[rule.offset]
    except KeyError:
        return
    block = target.private_block(rule.group, rule.creator, create=True)
    block.add_new(rule.offset, element.VR, deepcopy(element.value))


def _series_number(source: Dataset, identity: IdentitySettings) -> int:
    wanted = int(number(source, "SeriesNumber") or 0) + identity.series_number_offset
    return min(max(1, wanted), _IS_MAXIMUM)


def _set_series(image: Dataset, source: Dataset, derivation: _Derivation) -> None:
    """General Series and General Equipment of ours; the scanner's is in the provenance."""
    identity = derivation.identity
    suffix = _suffix(identity, derivation.task)
    described = text(source, "SeriesDescription")[: _LO_LENGTH - len(suffix)].rstrip()
    image.SeriesDescription = f"{described}{suffix}".strip()[:_LO_LENGTH]
    image.ContentQualification = _qualification(source, identity)
    image.ImageType = _image_type(source)
    modality, sop_class = text(source, "Modality"), text(source, "SOPClassUID")
    if policy.fate(sop_class, modality, "Manufacturer") is Action.SET:
        image.Manufacturer = identity.equipment.manufacturer
        image.ManufacturerModelName = identity.equipment.model_name
        image.SoftwareVersions = provenance.software_versions(derivation.model)
        if identity.equipment.institution_name:
            image.InstitutionName = identity.equipment.institution_name
        if identity.equipment.station_name:
            image.StationName = identity.equipment.station_name


def _suffix(identity: IdentitySettings, task: str) -> str:
    return next(
        (words for name, words in identity.description_suffixes.items() if name == task), ""
    )


def _qualification(source: Dataset, identity: IdentitySettings) -> str:
    # PS3.3 C.12.1: what is derived from RESEARCH content is RESEARCH content.
    stated = text(source, "ContentQualification")
    return "RESEARCH" if stated == "RESEARCH" else identity.content_qualification


def _image_type(source: Dataset) -> list[str]:
    # PS3.3 C.8.9.4.1.1: value 2 of a PET image is PRIMARY. C.8.2.1.1.1, C.8.3.1.1.1: value 3.
    modality = text(source, "Modality")
    if modality == "PT":
        return ["DERIVED", "PRIMARY"]
    described = list(texts(source, "ImageType")[2:])
    return ["DERIVED", "SECONDARY", *(described or ["AXIAL" if modality == "CT" else "OTHER"])]


def _set_provenance(image: Dataset, source: Dataset, derivation: _Derivation) -> None:
    at = provenance.times(derivation.created, source)
    _set_times(image, at)
    image.DerivationDescription = provenance.derivation_description(
        source,
        task=derivation.task,
        model=derivation.model,
        strength=derivation.strength,
        parameters_hash=derivation.parameters_hash,
        remarks=derivation.remarks,
    )
    earlier = deepcopy(source.get("DerivationCodeSequence") or ())
    image.DerivationCodeSequence = [*earlier, provenance.derivation_code(derivation.task)]
    image.CodingSchemeIdentificationSequence = provenance.coding_schemes(source)
    image.SourceImageSequence = [provenance.source_image(source)]
    image.ReferencedSeriesSequence = provenance.referenced_series(source)
    image.ContributingEquipmentSequence = provenance.contributing_equipment(
        source,
        model=derivation.model,
        equipment=derivation.identity.equipment,
        uid_root=derivation.identity.uid_root,
        at=at,
    )


def _set_times(image: Dataset, at: DerivationTimes) -> None:
    image.InstanceCreationDate = image.ContentDate = at.date
    image.InstanceCreationTime = image.ContentTime = at.time


def _quantise(volume: SeriesVolume, i: int, values: NDArray[np.floating[Any]]) -> Quantised:
    source, stored = volume.headers[i], volume.stored[i]
    none = np.zeros(stored.shape, dtype=np.bool_)
    to_stored = pixels.quantise_slice_scale if text(source, "Modality") == "PT" else pixels.quantise
    return to_stored(
        np.asarray(values, dtype=np.float64) / volume.scale.per_native,
        volume.scale.rescales[i],
        pixels.pixel_format(source),
        source=stored,
        mask=none if volume.padding is None else volume.padding[i],
        padding=pixels.padding_range(source),
    )


def _set_pixels(image: Dataset, source: Dataset, quantised: Quantised) -> None:
    stored, signed = quantised.stored, quantised.stored.dtype.kind == "i"
    if text(source, "Modality") == "PT":
        image.BitsAllocated = stored.dtype.itemsize * 8
        image.BitsStored = 16 if stored.dtype.itemsize == 2 else 8
        image.HighBit = image.BitsStored - 1
        image.RescaleIntercept = "0"
        image.RescaleSlope = _slope_text(source, quantised)
    for keyword, value in (
        ("SmallestImagePixelValue", stored.min()),
        ("LargestImagePixelValue", stored.max()),
    ):
        if keyword in source:
            image.add(DataElement(keyword, "SS" if signed else "US", int(value)))
    data = stored.tobytes()
    kind = "OW" if stored.dtype.itemsize == 2 else "OB"  # PS3.5 A.2
    image.add(DataElement("PixelData", kind, data + b"\0" * (len(data) % 2)))


def _slope_text(source: Dataset, quantised: Quantised) -> str:
    """The slope as a DS that reads back as exactly the slope that was used."""
    if number(source, "RescaleSlope") == quantised.rescale.slope:
        return text(source, "RescaleSlope")
    return format_number_as_ds(quantised.rescale.slope)


def _encode(image: Dataset) -> bytes:
    buffer = BytesIO()
    dcmwrite(buffer, image, enforce_file_format=True)
    return buffer.getvalue()
