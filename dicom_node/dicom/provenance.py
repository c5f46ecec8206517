"""Where a derived instance comes from: equipment, derivation, source, and times that repeat."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Protocol

from highdicom import ContributingEquipment
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import DT

from dicom_node import __version__
from dicom_node.dicom.header import PRIVATE_SCHEME, text, texts
from dicom_node.settings import Equipment

__all__ = [
    "IMPLEMENTATION_CLASS_UID",
    "IMPLEMENTATION_VERSION_NAME",
    "DerivationTimes",
    "ModelIdentity",
    "coding_schemes",
    "contributing_equipment",
    "derivation_code",
    "derivation_description",
    "derived_uid",
    "device_uid",
    "evidence",
    "referenced_series",
    "source_image",
    "times",
]

_NAMESPACE = uuid.UUID("6f1d8b0e-3a55-5c0e-9b1a-7d5f6c2e4a90")
_UUID_DIGITS = 39  # a 128-bit number in decimals (PS3.5 B.2)

IMPLEMENTATION_CLASS_UID = f"2.25.{uuid.uuid5(_NAMESPACE, 'implementation').int}"
IMPLEMENTATION_VERSION_NAME = f"DIFFCODE_{__version__}"[:16]

# CID 7203 has no code for the step of a restoring network, so the step has codes of our own.
_STEPS = {
    "ct_denoise": ("AIDN", "AI noise reduction"),
    "pet_synthesis": ("AIPET", "AI restoration of low-dose PET"),
    "mri_sr": ("AISR", "AI super-resolution"),
}

_ST_LENGTH = 1024
_LO_LENGTH = 64


class ModelIdentity(Protocol):
    """Which weights made a result."""

    @property
    def name(self) -> str:
        """The bundle's name."""

    @property
    def version(self) -> str:
        """The bundle's version."""

    @property
    def sha256(self) -> str:
        """The digest of the weights file, in hexadecimal."""


@dataclass(frozen=True)
class DerivationTimes:
    """One moment as DICOM's DA, TM and DT, in the time zone of the source."""

    date: str
    time: str
    stamp: str


def derived_uid(root: str | None, *parts: str) -> str:
    """A UID that is the same whenever the parts are: a version 5 UUID, under 2.25 or a root."""
    # A byte that no part contains separates them, so that ("a", "bc") is not ("ab", "c").
    number = uuid.uuid5(_NAMESPACE, "\x1f".join(parts)).int
    if root is None:
        return f"2.25.{number}"
    room = min(_UUID_DIGITS, 64 - len(root) - 1)
    return f"{root}.{number % 10**room}"


def device_uid(root: str | None, model: ModelIdentity) -> str:
    """The Device UID of our equipment with one set of weights: new weights, new device."""
    return derived_uid(root, "device", model.sha256)


def times(created: datetime, header: Dataset) -> DerivationTimes:
    """The moment of derivation as the source's clock would show it.

    A naive moment is taken as it is. PS3.3 C.12.1: Timezone Offset From UTC governs DA and TM.
    """
    local = created
    if created.tzinfo is not None:
        zone = _zone(text(header, "TimezoneOffsetFromUTC"))
        local = created.astimezone(zone) if zone is not None else created.astimezone()
    date, time = local.strftime("%Y%m%d"), local.strftime("%H%M%S.%f")
    return DerivationTimes(date, time, date + time)


def _zone(offset: str) -> timezone | None:
    digits = offset.lstrip("+-")
    if len(digits) != 4 or not digits.isdigit():
        return None
    away = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return timezone(-away if offset.startswith("-") else away)


def contributing_equipment(
    header: Dataset,
    *,
    model: ModelIdentity,
    equipment: Equipment,
    uid_root: str | None,
    at: DerivationTimes,
) -> list[Dataset]:
    """Everyone who had a hand in the image: earlier contributors, the scanner, and us."""
    prior = [deepcopy(item) for item in header.get("ContributingEquipmentSequence") or ()]
    known = any(_purpose(item) == codes.DCM.AcquisitionEquipment.value for item in prior)
    scanner = [] if known or not text(header, "Manufacturer") else [_scanner(header)]
    return [*prior, *scanner, _ours(model, equipment, uid_root, at)]


def _purpose(item: Dataset) -> str:
    purposes = item.get("PurposeOfReferenceCodeSequence") or ()
    return text(purposes[0], "CodeValue") if purposes else ""


def _scanner(header: Dataset) -> Dataset:
    """Read by hand: the helper of the library refuses a header that breaks a length limit."""
    item = ContributingEquipment(
        manufacturer=text(header, "Manufacturer")[:_LO_LENGTH],
        purpose_of_reference=codes.DCM.AcquisitionEquipment,
        contribution_description="Acquisition equipment of the source image",
    )
    for keyword in ("ManufacturerModelName", "DeviceSerialNumber", "InstitutionName"):
        if found := text(header, keyword)[:_LO_LENGTH]:
            setattr(item, keyword, found)
    if station := text(header, "StationName")[:16]:
        item.StationName = station
    if versions := [version[:_LO_LENGTH] for version in texts(header, "SoftwareVersions")]:
        item.SoftwareVersions = versions
    moment = text(header, "AcquisitionDate") + text(header, "AcquisitionTime")
    if moment[:8].isdigit():
        item.ContributionDateTime = DT(moment)
    return item


def _ours(
    model: ModelIdentity, equipment: Equipment, uid_root: str | None, at: DerivationTimes
) -> Dataset:
    item = ContributingEquipment(
        manufacturer=equipment.manufacturer,
        purpose_of_reference=codes.DCM.ProcessingEquipment,
        manufacturer_model_name=equipment.model_name,
        software_versions=software_versions(model),
        institution_name=equipment.institution_name,
        station_name=equipment.station_name,
        contribution_datetime=at.stamp,
        contribution_description="Restoration by a neural network",
    )
    item.DeviceUID = device_uid(uid_root, model)
    return item


def software_versions(model: ModelIdentity) -> list[str]:
    """The versions of the node and of the weights, as Software Versions has them."""
    return [__version__, f"{model.name} {model.version} {model.sha256[:12]}"[:_LO_LENGTH]]


def derivation_description(
    header: Dataset,
    *,
    task: str,
    model: ModelIdentity,
    strength: float,
    parameters_hash: str,
    remarks: Sequence[str],
    earlier: str = "",
) -> str:
    """What was done, in words for the reader of the image; what was done before comes after."""
    parts = [
        f"{_STEPS[task][1]} by neural network {model.name} {model.version} "
        f"(sha256 {model.sha256[:12]}), strength {strength:g}, parameters {parameters_hash[:12]}",
        f"original series {text(header, 'SeriesInstanceUID')}",
        *remarks,
    ]
    if earlier:
        parts.append(f"before: {earlier}")
    return "; ".join(parts)[:_ST_LENGTH]


def derivation_code(task: str) -> Dataset:
    """The code of the restoring step (PS3.3 C.12.4: one item for each step, in order)."""
    value, meaning = _STEPS[task]
    return CodedConcept(value, PRIVATE_SCHEME, meaning)


def coding_schemes(header: Dataset) -> list[Dataset]:
    """Every coding scheme that the instance declares: the source's and ours (PS3.3 C.12.1)."""
    prior = [deepcopy(item) for item in header.get("CodingSchemeIdentificationSequence") or ()]
    ours = CodingSchemeIdentificationItem(
        designator=PRIVATE_SCHEME,
        name="DiffCode derivation codes",
        responsible_organization="DiffCode",
    )
    kept = [item for item in prior if text(item, "CodingSchemeDesignator") != PRIVATE_SCHEME]
    return [*kept, ours]


def source_image(header: Dataset, *, same_grid: bool = True, frame: int | None = None) -> Dataset:
    """The instance, or the frame, that a derived one was made from (PS3.3 C.12.4.1.2)."""
    item = _reference(header)
    if frame is not None:
        item.ReferencedFrameNumber = frame
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(purpose)]
    item.SpatialLocationsPreserved = "YES" if same_grid else "NO"
    return item


def evidence(header: Dataset) -> Dataset:
    """The instance by study and series, as an evidence sequence names it (PS3.3 C.17.2.1)."""
    series = Dataset()
    series.SeriesInstanceUID = text(header, "SeriesInstanceUID")
    series.ReferencedSOPSequence = [_reference(header)]
    study = Dataset()
    study.StudyInstanceUID = text(header, "StudyInstanceUID")
    study.ReferencedSeriesSequence = [series]
    return study


def referenced_series(header: Dataset) -> list[Dataset]:
    """The series of this study that the instance refers to (PS3.3 C.12.2): the source's first."""
    item = Dataset()
    item.SeriesInstanceUID = text(header, "SeriesInstanceUID")
    item.ReferencedInstanceSequence = [_reference(header)]
    prior = header.get("ReferencedSeriesSequence") or ()
    others = [each for each in prior if text(each, "SeriesInstanceUID") != item.SeriesInstanceUID]
    return [item, *deepcopy(others)]


def _reference(header: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = text(header, "SOPClassUID")
    item.ReferencedSOPInstanceUID = text(header, "SOPInstanceUID")
    return item
