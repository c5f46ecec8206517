"""The table "what is restored, held, refused", row by row, on headers."""

from __future__ import annotations

from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import JPEGBaseline8Bit

from dicom_node.dicom.acceptance import Finding, check
from dicom_node.settings import PolicySettings
from tests.factories import make_series
from tests.unit.dicom_node.dicom.conftest import TASKS


def look(datasets: list[Dataset], **policy: Any) -> list[Finding]:
    return check(datasets, task=TASKS[datasets[0].Modality], policy=PolicySettings(**policy))


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_a_clean_series_has_no_finding(modality: Any) -> None:
    assert look(make_series(modality, slices=3, rows=8)) == []


@pytest.mark.parametrize(
    ("modality", "changes", "reason"),
    [
        ("CT", {"plane": "coronal"}, "coronal slices"),
        ("CT", {"plane": "oblique"}, "oblique slices"),
        ("CT", {"ImageType": ["DERIVED", "PRIMARY", "MPR"]}, "ImageType MPR"),
        ("CT", {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"]}, "ImageType MIP"),
        ("MR", {"ImageType": ["DERIVED", "PRIMARY", "ADC"]}, "ImageType ADC"),
        ("MR", {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}, "ImageType P"),
        ("CT", {"LossyImageCompression": "01"}, "compressed with loss"),
        ("CT", {"BurnedInAnnotation": "YES"}, "burned"),
        ("CT", {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "grey"),
        ("CT", {"PhotometricInterpretation": "PALETTE COLOR"}, "grey"),
        ("CT", {"RescaleType": "HU_MOD"}, "HU_MOD"),
        ("CT", {"RescaleSlope": "0"}, "RescaleSlope"),
        ("CT", {"ImagePositionPatient": None}, "ImagePositionPatient"),
        ("CT", {"ModalityLUTSequence": [Dataset()]}, "Modality LUT"),
        ("MR", {"BitsStored": 6, "HighBit": 5}, "bits stored"),
    ],
)
def test_what_may_not_be_restored_is_refused(
    modality: Any, changes: dict[str, Any], reason: str
) -> None:
    findings = look(make_series(modality, slices=2, rows=8, **changes))
    refusals = [finding.reason for finding in findings if finding.level == "refuse"]
    assert any(reason in refusal for refusal in refusals), findings


@pytest.mark.parametrize(
    ("modality", "changes"),
    [
        ("CT", {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}),  # archives re-label originals
        ("CT", {"tilt": 25.0}),
        ("CT", {"RescaleType": None}),
        ("MR", {"plane": "sagittal"}),
        ("MR", {"plane": "oblique"}),
        ("MR", {"ImageType": ["ORIGINAL", "PRIMARY", "M", "NORM", "DIS2D"]}),
        ("PT", {"plane": "coronal"}),
        ("CT", {"PhotometricInterpretation": "MONOCHROME1"}),
    ],
)
def test_what_looks_odd_and_is_an_acquisition_passes(
    modality: Any, changes: dict[str, Any]
) -> None:
    assert look(make_series(modality, slices=2, rows=8, **changes)) == []


def test_each_policy_key_changes_its_row() -> None:
    derived = make_series("CT", slices=2, ImageType=["DERIVED", "SECONDARY", "AXIAL"])
    assert [finding.level for finding in look(derived, accept_derived=False)] == ["refuse"]
    lossy = make_series("CT", slices=2, LossyImageCompression="01")
    assert look(lossy, accept_lossy=True) == []
    coronal = make_series("CT", slices=2, plane="coronal")
    assert look(coronal, planes={"CT": "any"}) == []
    bare = make_series("CT", slices=2, ConvolutionKernel=None)
    assert look(bare) == [Finding("warn", "ConvolutionKernel is absent")]
    assert look(bare, missing_metadata="refuse")[0].level == "refuse"
    counts = make_series("PT", slices=2, Units="CNTS")
    assert look(counts)[0].level == "warn"
    assert look(counts, pet_units="refuse")[0].level == "refuse"


def test_a_lossy_transfer_syntax_is_lossy_whatever_the_header_says() -> None:
    datasets = make_series("CT", slices=1)
    datasets[0].file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    assert "loss" in look(datasets)[0].reason


def test_a_task_restores_its_modality_alone() -> None:
    findings = check(make_series("MR", slices=2), task="ct_denoise", policy=PolicySettings())
    assert Finding("refuse", "task ct_denoise restores CT, not MR") in findings


def test_ignored_instances_are_no_refusal() -> None:
    findings = look(make_series("CT", slices=2, localizer=True))
    assert [finding.level for finding in findings] == ["ignore"]


def test_several_orientations_in_one_volume_are_refused() -> None:
    mixed = [*make_series("MR", slices=2), *make_series("MR", slices=2, plane="sagittal", seed=1)]
    assert any("several orientations" in finding.reason for finding in look(mixed))


def test_a_gap_is_a_warning() -> None:
    findings = look(make_series("CT", slices=8, missing=[3]))
    assert findings == [Finding("warn", "slices are missing or unevenly spaced: runs of 3 + 4")]


def test_slices_at_one_position_are_refused_in_one_volume() -> None:
    findings = look(make_series("CT", slices=4, duplicated=[1]))
    assert findings[0] == Finding("refuse", "several slices at one position in one volume")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ComplexImageComponent": "PHASE"}, "Complex Image Component PHASE"),
        ({"VolumeBasedCalculationTechnique": "MAX_IP"}, "MAX_IP: computed, not acquired"),
        ({"PixelPresentation": "COLOR"}, "a colour image"),
        ({"ImageType": ["DERIVED", "PRIMARY", "T1", "SUBTRACTION"]}, "ImageType SUBTRACTION"),
    ],
)
def test_what_multi_frame_images_say_in_words_of_their_own(
    changes: dict[str, Any], reason: str
) -> None:
    (finding, *_) = look(make_series("MR", slices=2, rows=8, **changes))
    assert finding.level == "refuse"
    assert finding.reason.startswith(reason)
    harmless = {
        "ComplexImageComponent": "MAGNITUDE",
        "VolumeBasedCalculationTechnique": "NONE",
        "PixelPresentation": "MONOCHROME",
    }
    assert look(make_series("MR", slices=2, rows=8, **harmless)) == []  # type: ignore[arg-type]
