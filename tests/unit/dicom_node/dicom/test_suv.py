"""SUVbw against the arithmetic of the QIBA rule, done by hand for each case."""

from __future__ import annotations

import math

import pytest
from pydicom.dataset import Dataset

from dicom_node.dicom.suv import (
    GE_PET_CREATOR,
    PHILIPS_PET_CREATOR,
    SIEMENS_PET_CREATOR,
    suv_factor,
)
from tests.factories import make_series

# The phantom: 70 kg, 350 MBq at 09:00, scan at 10:00, half-life 6586.2 s.
ONE_HOUR = 70_000 / (350e6 * 2 ** (-3600 / 6586.2))


def pet(**changes: object) -> list[Dataset]:
    return make_series("PT", slices=3, rows=8, **changes)  # type: ignore[arg-type]


def injection(datasets: list[Dataset], **changes: str | None) -> list[Dataset]:
    for dataset in datasets:
        item = dataset.RadiopharmaceuticalInformationSequence[0]
        for keyword, value in changes.items():
            setattr(item, keyword, value)
    return datasets


def private(datasets: list[Dataset], creator: str, group: int, **values: str) -> list[Dataset]:
    for dataset in datasets:
        block = dataset.private_block(group, creator, create=True)
        for offset, value in values.items():
            block.add_new(int(offset[1:], 16), "LO", value)
    return datasets


def test_activity_decays_from_injection_to_series_time() -> None:
    assert suv_factor(pet()).value == pytest.approx(ONE_HOUR, rel=1e-9)


def test_activity_that_is_corrected_to_administration_does_not_decay() -> None:
    assert suv_factor(pet(DecayCorrection="ADMIN")).value == pytest.approx(70_000 / 350e6)


def test_an_injection_before_midnight_belongs_to_the_day_before() -> None:
    datasets = injection(
        pet(SeriesTime="003000", AcquisitionTime="003005"), RadiopharmaceuticalStartTime="233000"
    )
    assert suv_factor(datasets).value == pytest.approx(ONE_HOUR, rel=1e-9)


def test_a_stated_date_of_injection_is_taken() -> None:
    datasets = injection(
        pet(SeriesTime="003000", AcquisitionTime="003005"),
        RadiopharmaceuticalStartDateTime="20260101233000.00",
    )
    assert suv_factor(datasets).value == pytest.approx(ONE_HOUR, rel=1e-9)


def test_fractions_of_a_second_count() -> None:
    datasets = pet(SeriesTime="100000.500", AcquisitionTime="100005")
    wanted = 70_000 / (350e6 * 2 ** (-3600.5 / 6586.2))
    assert suv_factor(datasets).value == pytest.approx(wanted, rel=1e-9)


def test_a_series_made_after_the_acquisition_needs_the_vendors_scan_time() -> None:
    datasets = pet(SeriesTime="150000", FrameReferenceTime=None)
    assert suv_factor(datasets).value is None
    private(datasets, GE_PET_CREATOR, 0x0009, x0d="20260102100000.00")
    assert suv_factor(datasets).value == pytest.approx(ONE_HOUR, rel=1e-9)


def test_a_series_that_began_before_its_first_slice_is_no_later_series() -> None:
    datasets = pet(FrameReferenceTime=None)
    datasets[2].AcquisitionTime = "103000"  # a later bed position
    assert suv_factor(datasets).value == pytest.approx(ONE_HOUR, rel=1e-9)
    datasets[1].AcquisitionTime = "095900"  # acquired before the series began
    assert suv_factor(datasets).value is None


def test_a_scan_start_that_nobody_states_is_counted_back_from_the_frame() -> None:
    """QIBA: acquisition time - frame reference time + time of the mean count rate in the frame."""
    decay = math.log(2) / 6586.2
    mean_rate_s = math.log(decay * 600 / (1 - math.exp(-decay * 600))) / decay
    assert 290 < mean_rate_s < 300  # the counts fall, so their mean lies before the middle
    # The second bed: it begins 10 minutes after the scan and lasts 10 minutes.
    datasets = pet(
        SeriesTime="150000",
        AcquisitionTime="101000",
        FrameReferenceTime=str(round((600 + mean_rate_s) * 1000, 3)),
        ActualFrameDuration="600000",
    )
    assert suv_factor(datasets).value == pytest.approx(ONE_HOUR, rel=1e-7)


def test_siemens_states_the_time_of_decay_correction_itself() -> None:
    datasets = private(
        pet(SeriesTime="095000"), SIEMENS_PET_CREATOR, 0x0071, x22="20260102100000.000000"
    )
    assert suv_factor(datasets).value == pytest.approx(ONE_HOUR, rel=1e-9)


def test_enhanced_pet_states_the_time_of_decay_correction_itself() -> None:
    datasets = pet(SeriesTime="150000", DecayCorrectionDateTime="20260102100000")
    assert suv_factor(datasets).value == pytest.approx(ONE_HOUR, rel=1e-9)


def test_grams_per_millilitre_are_suv_already() -> None:
    assert suv_factor(pet(Units="GML")).value == 1.0
    assert suv_factor(pet(Units="GML", SUVType="BW")).value == 1.0


def test_counts_take_the_vendors_suv_factor() -> None:
    datasets = private(pet(Units="CNTS"), PHILIPS_PET_CREATOR, 0x7053, x00="0.000551")
    assert suv_factor(datasets).value == 0.000551


def test_counts_with_an_activity_factor_decay_as_activity_does() -> None:
    datasets = private(pet(Units="CNTS"), PHILIPS_PET_CREATOR, 0x7053, x00="0", x09="2.5")
    datasets = [
        dataset for dataset in datasets if dataset.private_block(0x7053, PHILIPS_PET_CREATOR)
    ]
    factor = suv_factor(datasets).value
    assert factor == pytest.approx(2.5 * ONE_HOUR, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Units": "CNTS"}, "CNTS without"),
        ({"Units": "PROPCNTS"}, "PROPCNTS"),
        ({"Units": "GML", "SUVType": "LBM"}, "LBM"),
        ({"CorrectedImage": ["ATTN"]}, "DECY"),
        ({"CorrectedImage": ["DECY"]}, "ATTN"),
        ({"PatientWeight": None}, "PatientWeight"),
        ({"PatientWeight": "0"}, "PatientWeight"),
        ({"DecayCorrection": "NONE"}, "DecayCorrection"),
        ({"RadiopharmaceuticalInformationSequence": None}, "Radiopharmaceutical"),
        ({"SeriesTime": None, "AcquisitionTime": None}, "time of the scan"),
    ],
)
def test_what_the_header_cannot_prove_is_a_reason(changes: dict[str, object], reason: str) -> None:
    found = suv_factor(pet(**changes))
    assert found.value is None
    assert reason in str(found.reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"RadionuclideTotalDose": None}, "TotalDose"),
        ({"RadionuclideHalfLife": None}, "HalfLife"),
        ({"RadiopharmaceuticalStartTime": None}, "time of injection"),
        ({"RadiopharmaceuticalStartDateTime": "19990101090000"}, "belong together"),
    ],
)
def test_an_injection_that_is_not_told_is_a_reason(
    changes: dict[str, str | None], reason: str
) -> None:
    assert reason in str(suv_factor(injection(pet(), **changes)).reason)


def test_units_that_differ_within_a_series_are_a_reason() -> None:
    datasets = pet()
    datasets[1].Units = "GML"
    assert "differ" in str(suv_factor(datasets).reason)
