"""The rejection note against PS3.16 TID 2010."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from dicom_node.dicom.documents import Reference
from dicom_node.dicom.header import text
from dicom_node.dicom.rejection import KEY_OBJECT_SELECTION, Note, Title, rejection_note
from dicom_node.errors import PermanentError
from dicom_node.settings import IdentitySettings
from tests.factories import make_series

CREATED = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
REPORT = "1.2.840.10008.5.1.4.1.1.88.22"


def references(series: list[Dataset], *, report: bool) -> list[Reference]:
    images = [
        Reference(str(d.SOPClassUID), str(d.SOPInstanceUID), str(d.SeriesInstanceUID))
        for d in series
    ]
    return [*images, Reference(REPORT, "2.25.77", "2.25.7")] if report else images


def _equipment() -> Dataset:
    item = Dataset()
    item.Manufacturer = "Phantoms"
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "109102", "DCM"
    purpose.CodeMeaning = "Processing Equipment"
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item


def made(
    title: Title = "quality", *, without: Sequence[str] = (), report: bool = True
) -> tuple[Note, Dataset, list[Reference]]:
    """A note on three images and, unless told, their report; what is in it, what it is on."""
    series = make_series("CT", slices=3, rows=16)
    for dataset in series:
        dataset.SoftwareVersions = ["1.0", "compact 2.1 abcdef012345"]
        dataset.ContributingEquipmentSequence = [_equipment()]
        for keyword in without:
            delattr(dataset, keyword)
    note = rejection_note(
        series[0],
        references(series, report=report),
        title=title,
        why="halo at edges (model abcdef012345)",
        task="ct_denoise",
        model_sha256="ab" * 32,
        identity=IdentitySettings(),
        created=CREATED,
    )
    return note, dcmread(BytesIO(note.data)), references(series, report=report)


def content(dataset: Dataset, relationship: str) -> list[Dataset]:
    return [item for item in dataset.ContentSequence if item.RelationshipType == relationship]


@pytest.mark.parametrize(("title", "code"), [("quality", "113001"), ("safety", "113037")])
def test_the_title_says_why_it_is_rejected(title: Title, code: str) -> None:
    _, dataset, _ = made(title)
    assert dataset.SOPClassUID == KEY_OBJECT_SELECTION
    named = dataset.ConceptNameCodeSequence[0]
    assert (named.CodeValue, named.CodingSchemeDesignator) == (code, "DCM")


def test_a_note_for_quality_says_which() -> None:
    _, dataset, _ = made("quality")
    (modifier,) = content(dataset, "HAS CONCEPT MOD")
    assert modifier.ConceptNameCodeSequence[0].CodeValue == codes.DCM.DocumentTitleModifier.value
    assert modifier.ConceptCodeSequence[0].CodeValue == codes.DCM.InappropriateImageProcessing.value
    assert dataset.ContentSequence[0] == modifier
    assert content(made("safety")[1], "HAS CONCEPT MOD") == []


def test_it_refers_to_every_instance_in_content_and_in_evidence() -> None:
    _, dataset, wanted = made()
    referred = {
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID: item.ValueType
        for item in content(dataset, "CONTAINS")
        if "ReferencedSOPSequence" in item
    }
    kinds = {each.sop_instance_uid: "IMAGE" for each in wanted} | {"2.25.77": "COMPOSITE"}
    assert referred == kinds
    (study,) = dataset.CurrentRequestedProcedureEvidenceSequence
    found = {
        (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID, series.SeriesInstanceUID)
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert found == {
        (each.sop_class_uid, each.sop_instance_uid, each.series_instance_uid) for each in wanted
    }


def test_it_belongs_to_the_patient_and_study_of_what_it_rejects() -> None:
    _, dataset, _ = made()
    source = make_series("CT", slices=3, rows=16)[0]
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert dataset[keyword].value == source[keyword].value
    assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
    assert (dataset.Modality, dataset.ContentDate) == ("KO", "20260304")
    said = [text(item, "TextValue") for item in content(dataset, "CONTAINS")]
    assert "halo at edges (model abcdef012345)" in said
    assert "compact 2.1" in dataset.SoftwareVersions[-1]


def test_the_same_rejection_has_the_same_uid_and_another_title_another() -> None:
    assert made()[0].sop_instance_uid == made()[0].sop_instance_uid
    assert made()[0].sop_instance_uid != made("safety")[0].sop_instance_uid
    assert made()[0].series_instance_uid == made("safety")[0].series_instance_uid


def test_a_header_that_fits_into_no_note_is_refused_without_its_words() -> None:
    with pytest.raises(PermanentError, match="fits into no rejection note") as caught:
        made(without=["ContributingEquipmentSequence"])
    assert "AttributeError" in str(caught.value)
    assert "PHANTOM" not in str(caught.value)
