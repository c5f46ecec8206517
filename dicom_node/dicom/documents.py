"""What the objects that go with a restored series share: whom they refer to, and their header.

A report or a presentation state is made from the restored images alone: their headers name the
source. The library makes the object from stand-ins, since its constructors refuse values that
scanners do send, and the patient's and the study's attributes are copied afterwards as they are.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO

import numpy as np
from highdicom.base import SOPClass
from pydicom import dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import UID, EnhancedSRStorage, GrayscaleSoftcopyPresentationStateStorage

from dicom_node.dicom import provenance
from dicom_node.dicom.header import number, text, texts
from dicom_node.dicom.provenance import ModelIdentity
from dicom_node.settings import IdentitySettings

__all__ = [
    "OBJECT_CLASSES",
    "Reference",
    "Restoration",
    "RestoredImage",
    "encode",
    "finish",
    "restored_image",
    "series_number",
    "stand_in",
]

OBJECT_CLASSES: dict[str, str] = {
    str(EnhancedSRStorage): "SR",
    str(GrayscaleSoftcopyPresentationStateStorage): "PR",
}
"""SOP Class UID of each kind of object that may go with a restored series, with its Modality."""

_LO_LENGTH = 64
_IS_MAXIMUM = 2**31 - 1


@dataclass(frozen=True)
class Reference:
    """One instance by class and UID, and the series that it is in."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str


@dataclass(frozen=True)
class RestoredImage:
    """A restored instance: its header, where it came from, and what slices it holds."""

    header: Dataset
    reference: Reference
    source: Reference
    stored: tuple[tuple[int, int], ...]  # lowest and highest stored value of each slice
    source_frames: tuple[int, ...] = ()  # of each frame, from 1; empty: a classic image

    @property
    def frames(self) -> int:
        """How many slices it holds."""
        return len(self.source_frames) or 1


@dataclass(frozen=True)
class Restoration:
    """What was done to all images of one series."""

    task: str
    model: ModelIdentity
    parameters_hash: str
    created: datetime
    strength: float = 1.0
    warnings: tuple[str, ...] = ()


def restored_image(dataset: Dataset) -> RestoredImage:
    """A restored image from its data set, which loses its pixels, and the source that it names.

    Earlier steps may have named sources of their own; ours is the last.
    """
    pixels = dataset.pixel_array
    slices = pixels if pixels.ndim == 3 else pixels[np.newaxis]
    header = dataset
    del header.PixelData
    groups = header.get("PerFrameFunctionalGroupsSequence") or ()
    sources = [group.DerivationImageSequence[-1].SourceImageSequence[0] for group in groups]
    first = sources[0] if sources else header.SourceImageSequence[0]
    return RestoredImage(
        header=header,
        reference=Reference(
            text(header, "SOPClassUID"),
            text(header, "SOPInstanceUID"),
            text(header, "SeriesInstanceUID"),
        ),
        source=Reference(
            text(first, "ReferencedSOPClassUID"),
            text(first, "ReferencedSOPInstanceUID"),
            text(header.ReferencedSeriesSequence[0], "SeriesInstanceUID"),
        ),
        stored=tuple((int(each.min()), int(each.max())) for each in slices),
        source_frames=tuple(int(item.ReferencedFrameNumber) for item in sources),
    )


def stand_in(study_uid: str, reference: Reference) -> Dataset:
    """An instance as the library wants to see it: identity alone, and nobody's."""
    dataset = Dataset()
    dataset.SOPClassUID = reference.sop_class_uid
    dataset.SOPInstanceUID = reference.sop_instance_uid
    dataset.SeriesInstanceUID = reference.series_instance_uid
    dataset.StudyInstanceUID = study_uid
    for keyword in (
        "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber",
        "StudyID", "StudyDate", "StudyTime",
    ):  # fmt: skip
        setattr(dataset, keyword, None)
    return dataset


def series_number(header: Dataset, offset: int) -> int:
    """The Series Number of an object that goes with the restored series of *header*."""
    return min(max(1, int(number(header, "SeriesNumber") or 0) + offset), _IS_MAXIMUM)


def finish(
    document: SOPClass,
    header: Dataset,
    restoration: Restoration,
    identity: IdentitySettings,
    *,
    description: str,
) -> None:
    """Give the object its patient and study, our equipment, and times that repeat.

    *header*: the first restored image's.
    """
    for keyword in ("SpecificCharacterSet", "TimezoneOffsetFromUTC"):
        if keyword in header:
            setattr(document, keyword, deepcopy(header[keyword].value))
    document.copy_patient_and_study_information(header)
    filled: Dataset = document  # the library's own types know fewer values than the standard
    equipment, model = identity.equipment, restoration.model
    filled.Manufacturer = equipment.manufacturer
    filled.ManufacturerModelName = equipment.model_name
    filled.SoftwareVersions = provenance.software_versions(model)
    filled.DeviceSerialNumber = model.sha256[:_LO_LENGTH]
    for keyword in ("institution_name", "station_name"):
        if stated := getattr(equipment, keyword):
            setattr(filled, keyword.title().replace("_", ""), stated)
    at = provenance.times(restoration.created, header)
    filled.SeriesDate = filled.InstanceCreationDate = at.date
    filled.SeriesTime = filled.InstanceCreationTime = at.time
    if "ContentDate" in filled:
        filled.ContentDate, filled.ContentTime = at.date, at.time
    filled.SeriesDescription = _described(header, description)
    # The restored image already names everyone who had a hand in it, us last.
    filled.ContributingEquipmentSequence = deepcopy(header.ContributingEquipmentSequence)
    filled.CodingSchemeIdentificationSequence = provenance.coding_schemes(Dataset())
    filled.file_meta.ImplementationClassUID = UID(provenance.IMPLEMENTATION_CLASS_UID)
    filled.file_meta.ImplementationVersionName = provenance.IMPLEMENTATION_VERSION_NAME


def _described(header: Dataset, description: str) -> str:
    """The restored series by its description, which the source's language may fill, and ours."""
    restored = "".join(texts(header, "SeriesDescription")[:1])
    room = _LO_LENGTH - len(description) - 2
    return f"{restored[:room].rstrip()}: {description}" if restored else description


def encode(document: Dataset) -> bytes:
    """The object as a PS3.10 file."""
    buffer = BytesIO()
    dcmwrite(buffer, document, enforce_file_format=True)
    return buffer.getvalue()
