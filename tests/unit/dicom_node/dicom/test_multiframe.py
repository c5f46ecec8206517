"""Frames of a multi-frame image as flat headers."""

from __future__ import annotations

from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_node.dicom import multiframe
from dicom_node.dicom.suv import suv_factor
from dicom_node.errors import RefusedError
from tests.factories import make_series
from tests.multiframe import legacy_converted, make_enhanced

SAME = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("make", [make_enhanced, legacy_converted])
def test_a_frame_reads_like_the_classic_slice(modality: Any, make: Any) -> None:
    shape = {"slices": 3, "rows": 8, "plane": "oblique" if modality == "MR" else "axial"}
    classic = {tuple(map(float, d.ImagePositionPatient)): d for d in make_series(modality, **shape)}
    headers = multiframe.frame_headers(make(modality, **shape))
    assert len(headers) == 3
    for header in headers:
        source = classic[tuple(map(float, header.ImagePositionPatient))]
        for keyword in SAME:
            assert str(header[keyword].value) == str(source[keyword].value), keyword
        if "RescaleSlope" in source:
            assert float(header.RescaleSlope) == float(source.RescaleSlope)


def test_only_classes_with_functional_groups_are_multi_frame() -> None:
    assert multiframe.is_multiframe(make_enhanced("CT", slices=1, rows=8))
    assert not multiframe.is_multiframe(make_series("CT", slices=1, rows=8)[0])


@pytest.mark.parametrize("make", [make_enhanced, legacy_converted])
def test_suv_of_a_multi_frame_pet_is_that_of_its_slices(make: Any) -> None:
    headers = multiframe.frame_headers(make("PT", slices=3, rows=8))
    wanted = suv_factor(make_series("PT", slices=3, rows=8)).value
    assert suv_factor(headers).value == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("code", "units"),
    [("Bq/ml", "BQML"), ("g/ml{SUVbw}", "GML"), ("{counts}", "CNTS"), ("mm", None)],
)
def test_units_come_from_the_real_world_values(code: str, units: str | None) -> None:
    image = make_enhanced("PT", slices=1, rows=8)
    mapping = image.PerFrameFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    mapping.MeasurementUnitsCodeSequence[0].CodeValue = code
    assert multiframe.frame_headers(image)[0].get("Units") == units


def test_a_pet_that_is_not_decay_corrected_does_not_say_so() -> None:
    image = make_enhanced("PT", slices=1, rows=8)
    image.DecayCorrected = "NO"
    (header,) = multiframe.frame_headers(image)
    assert "DecayCorrection" not in header
    assert "DECY" not in header.CorrectedImage


def test_what_stands_in_the_frame_goes_before_what_is_shared() -> None:
    image = make_enhanced("CT", slices=2, rows=8)
    own = Dataset()
    own.KVP = "80"
    image.PerFrameFunctionalGroupsSequence[1].CTXRayDetailsSequence = [own]
    first, second = multiframe.frame_headers(image)
    assert (first.KVP, second.KVP) == ("120", "80")
    assert multiframe.group_items(image, 2, "CTXRayDetailsSequence") == [own]
    assert multiframe.group_items(image, 1, "CTXRayDetailsSequence")[0].KVP == "120"
    assert multiframe.group_items(image, 1, "CTPositionSequence") == []


def test_geometry_at_the_root_is_not_taken_for_a_frame_s() -> None:
    image = make_enhanced("MR", slices=1, rows=8)
    image.ImagePositionPatient = [9, 9, 9]
    del image.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    assert "ImagePositionPatient" not in multiframe.frame_headers(image)[0]


def test_a_view_does_not_change_the_image() -> None:
    image = make_enhanced("PT", slices=2, rows=8)
    before = image.to_json()
    multiframe.frame_headers(image)
    assert image.to_json() == before


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_groups_that_do_not_fit_the_number_of_frames_are_refused(frames: int) -> None:
    image = make_enhanced("CT", slices=2, rows=8)
    image.NumberOfFrames = frames
    with pytest.raises(RefusedError, match="per-frame functional groups"):
        multiframe.frame_headers(image)


def test_a_group_of_an_unknown_tag_says_nothing_of_the_frame() -> None:
    image = make_enhanced("PT", slices=2, rows=8)
    first = image.PerFrameFunctionalGroupsSequence[0]
    scale = first.PixelValueTransformationSequence
    del first.PixelValueTransformationSequence
    first.add_new(0x00289160, "SQ", scale)
    headers = multiframe.frame_headers(image)
    assert ["RescaleSlope" in header for header in headers] == [False, True]
