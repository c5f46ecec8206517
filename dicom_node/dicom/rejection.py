"""The rejection note of a recalled series: a Key Object Selection as IHE RAD IOCM asks for it.

Its title says that what it refers to is rejected (PS3.16 TID 2010, CID 7011); an archive that knows
IOCM then hides the instances. It is made from the header of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from highdicom.sr import (
    CodeContentItem,
    CodedConcept,
    DeviceObserverIdentifyingAttributes,
    ObserverContext,
    RelationshipTypeValues,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import KeyObjectSelectionDocumentStorage

from dicom_node.dicom import documents, provenance
from dicom_node.dicom.documents import Reference, Restoration
from dicom_node.dicom.header import quiet_pydicom, text, texts
from dicom_node.errors import PermanentError
from dicom_node.settings import IdentitySettings

__all__ = ["KEY_OBJECT_SELECTION", "TITLES", "Note", "Title", "rejection_note"]

KEY_OBJECT_SELECTION = str(KeyObjectSelectionDocumentStorage)
Title = Literal["quality", "safety"]

TITLES: dict[Title, CodedConcept] = {
    "quality": CodedConcept.from_code(codes.DCM.RejectedForQualityReasons),
    "safety": CodedConcept.from_code(codes.DCM.RejectedForPatientSafetyReasons),
}
"""113001 and 113037 of DCM: the titles of a rejection note (PS3.16 CID 7010, IHE RAD TF-3)."""

# PS3.16 TID 2010 row 3: a note for quality reasons says which, from CID 7011.
_WHICH_QUALITY = CodedConcept.from_code(codes.DCM.InappropriateImageProcessing)
_MODIFIER = CodedConcept.from_code(codes.DCM.DocumentTitleModifier)
# Beside the restored series, its report and its presentation states.
_SERIES_OFFSET = 900


@dataclass(frozen=True)
class Note:
    """A rejection note as a PS3.10 file."""

    sop_instance_uid: str
    series_instance_uid: str
    data: bytes


@dataclass(frozen=True)
class _Model:
    """Which weights made what is rejected, as far as its header tells."""

    name: str
    version: str
    sha256: str


def rejection_note(
    header: Dataset,
    rejected: Sequence[Reference],
    *,
    title: Title,
    why: str,
    task: str,
    model_sha256: str,
    identity: IdentitySettings,
    created: datetime,
) -> Note:
    """The note that rejects instances of one study.

    Args:
        header: Of one of them: patient and study are copied from it.
        rejected: All of them.
        title: What it is called.
        why: In words, for people; up to 1024 characters.
        task: What had been done to them.
        model_sha256: Of the weights that are recalled.
        identity: How the node names itself.
        created: The time that the note bears.

    Raises:
        PermanentError: Where what was copied fits into no note.
    """
    series = text(header, "SeriesInstanceUID")
    note_series = provenance.derived_uid(identity.uid_root, "rejection series", series)
    members = sorted(each.sop_instance_uid for each in rejected)
    uid = provenance.derived_uid(identity.uid_root, "rejection", note_series, title, *members)
    try:
        with quiet_pydicom():
            document = _document(header, rejected, title, why, identity, (note_series, uid))
            model = _Model(*_name_and_version(header), model_sha256)
            restoration = Restoration(task, model, "", created)
            documents.finish(document, header, restoration, identity, description="rejection note")
            data = documents.encode(document)
    except Exception as error:
        # The text of the cause may quote the header; its kind cannot.
        raise PermanentError(
            f"the header of series {series} fits into no rejection note ({type(error).__name__})"
        ) from None
    return Note(uid, note_series, data)


def _document(
    header: Dataset,
    rejected: Sequence[Reference],
    title: Title,
    why: str,
    identity: IdentitySettings,
    uids: tuple[str, str],
) -> KeyObjectSelectionDocument:
    study = text(header, "StudyInstanceUID")
    evidence = [documents.stand_in(study, each) for each in rejected]
    for each in evidence:
        # The library takes what has rows and columns for an image (TID 2010 row 6).
        if str(each.SOPClassUID) not in documents.OBJECT_CLASSES:
            each.Rows = each.Columns = 1
    device = provenance.derived_uid(identity.uid_root, "node", identity.equipment.model_name)
    content = KeyObjectSelection(
        document_title=TITLES[title],
        referenced_objects=evidence,
        observer_device_context=ObserverContext(
            observer_type=codes.DCM.Device,
            observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
                uid=device,
                manufacturer_name=identity.equipment.manufacturer,
                model_name=identity.equipment.model_name,
            ),
        ),
        description=why[:1024],
    )
    if title == "quality":
        modifier = CodeContentItem(
            _MODIFIER, _WHICH_QUALITY, RelationshipTypeValues.HAS_CONCEPT_MOD
        )
        content[0].ContentSequence.insert(0, modifier)
    document = KeyObjectSelectionDocument(
        evidence=evidence,
        content=content,
        series_instance_uid=uids[0],
        series_number=documents.series_number(header, _SERIES_OFFSET),
        sop_instance_uid=uids[1],
        instance_number=1,
        manufacturer=identity.equipment.manufacturer,
    )
    # PS3.3 C.17.6.2: Type 1C, and there is no request of ours.
    if "ReferencedRequestSequence" in header:
        document.ReferencedRequestSequence = deepcopy(header.ReferencedRequestSequence)
    return document


def _name_and_version(header: Dataset) -> tuple[str, str]:
    """What `provenance.software_versions` wrote: name, version and digest of the weights."""
    parts = "".join(texts(header, "SoftwareVersions")[-1:]).rsplit(" ", 2)
    return (parts[0], parts[1]) if len(parts) == 3 else ("unknown", "unknown")
