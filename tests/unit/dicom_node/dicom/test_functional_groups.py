"""Multi-frame results: one image in kind, its groups where they belong, its frames in order."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dicom_node.dicom import derived, multiframe, volume
from dicom_node.dicom.header import is_own_output, quiet_pydicom, read_header, why_ignored
from dicom_node.dicom.suv import suv_factor
from dicom_node.settings import PolicySettings
from tests.factories import make_series, write_series
from tests.multiframe import legacy_converted, make_enhanced
from tests.unit.dicom_node.dicom.conftest import TASKS, build

MODALITIES = ("CT", "MR", "PT")
every_kind = pytest.mark.parametrize("make", [make_enhanced, legacy_converted])
every_modality = pytest.mark.parametrize("modality", MODALITIES)


def restore(image: Dataset, folder: Path, gain: float = 1.0, **changes: Any) -> bytes:
    (instance,) = build(
        [
            derived.quantise(each, each.array * np.float32(gain))
            for each in volume.load_volumes(
                write_series([image], folder), TASKS[image.Modality], PolicySettings()
            )
        ],
        **changes,
    )
    return instance.data


def read(data: bytes) -> Dataset:
    return pydicom.dcmread(BytesIO(data))


def physical(image: Dataset) -> np.ndarray[Any, Any]:
    headers = multiframe.frame_headers(image)
    frames = np.atleast_3d(image.pixel_array).reshape(len(headers), image.Rows, image.Columns)
    return np.stack(
        [
            frame * float(header.get("RescaleSlope", 1)) + float(header.get("RescaleIntercept", 0))
            for frame, header in zip(frames, headers, strict=True)
        ]
    )


@every_kind
@every_modality
def test_an_unchanged_image_comes_back_bit_exact(tmp_path: Path, make: Any, modality: Any) -> None:
    image = make(modality, slices=3, rows=9, columns=13)
    made = read(restore(image, tmp_path))
    assert np.array_equal(made.pixel_array, image.pixel_array)
    assert made.SOPClassUID == image.SOPClassUID
    assert made.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


@every_modality
@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
    ids=lambda syntax: syntax.name.split(",")[0],
)
def test_every_transfer_syntax_gives_the_same_image(
    tmp_path: Path, modality: Any, syntax: str
) -> None:
    shape = {"slices": 2, "rows": 64, "volumes": 2}
    plain = read(restore(make_enhanced(modality, **shape), tmp_path / "plain"))
    other = read(
        restore(make_enhanced(modality, **shape, transfer_syntax=syntax), tmp_path / "other")
    )
    assert other == plain


@every_kind
@every_modality
def test_the_same_call_makes_the_same_bytes(tmp_path: Path, make: Any, modality: Any) -> None:
    image = make(modality, slices=2, rows=8)
    assert restore(image, tmp_path / "1", 0.9) == restore(image, tmp_path / "2", 0.9)


@every_modality
def test_volumes_are_restored_apart_and_written_back_together(
    tmp_path: Path, modality: Any
) -> None:
    image = make_enhanced(modality, slices=3, rows=8, volumes=2)
    paths = write_series([image], tmp_path)
    first, second = volume.load_volumes(paths, TASKS[modality], PolicySettings())
    (instance,) = build(
        [derived.quantise(first, first.array * 0.5), derived.quantise(second, second.array * 2.0)]
    )
    made = read(instance.data)
    per_native = first.scale.per_native
    wanted = np.empty((6, 8, 8))
    wanted[0::2], wanted[1::2] = first.array * 0.5, second.array * 2.0
    steps = [float(h.get("RescaleSlope", 1)) for h in multiframe.frame_headers(made)]
    error = np.abs(physical(made) - wanted.astype(np.float64) / per_native).max(axis=(1, 2))
    assert (error <= np.asarray(steps) / 2 * 1.001).all()
    before, after = (multiframe.frame_headers(each) for each in (image, made))
    for one, other in zip(before, after, strict=True):
        for keyword in ("ImagePositionPatient", "DimensionIndexValues", "StackID"):
            assert one[keyword].value == other[keyword].value, keyword


@every_kind
@every_modality
def test_each_frame_names_the_frame_it_came_from(tmp_path: Path, make: Any, modality: Any) -> None:
    image = make(modality, slices=3, rows=8)
    made = read(restore(image, tmp_path, warnings=["a gap"]))
    assert "DerivationDescription" not in made
    for number in (1, 2, 3):
        (step,) = multiframe.group_items(made, number, "DerivationImageSequence")
        assert "a gap" in step.DerivationDescription
        assert step.DerivationCodeSequence[0].CodingSchemeDesignator == "99DIFFCODE"
        (source,) = step.SourceImageSequence
        assert source.ReferencedSOPInstanceUID == image.SOPInstanceUID
        assert source.ReferencedFrameNumber == number
        assert source.SpatialLocationsPreserved == "YES"
        assert source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    (study,) = made.SourceImageEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == image.SeriesInstanceUID
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID


def test_earlier_steps_stay_before_ours(tmp_path: Path) -> None:
    image = make_enhanced("CT", slices=2, rows=8)
    step, code = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "113087", "DCM", "Smoothing"
    step.DerivationDescription, step.DerivationCodeSequence = "smoothed", [code]
    step.SourceImageSequence = []
    image.SharedFunctionalGroupsSequence[0].DerivationImageSequence = [step]
    made = read(restore(image, tmp_path))
    assert "DerivationImageSequence" not in made.SharedFunctionalGroupsSequence[0]
    earlier, ours = multiframe.group_items(made, 2, "DerivationImageSequence")
    assert earlier.DerivationDescription == "smoothed"
    assert ours.DerivationDescription.endswith("before: smoothed")


@every_modality
def test_image_and_frame_types_say_derived(tmp_path: Path, modality: Any) -> None:
    made = read(restore(make_enhanced(modality, slices=2, rows=8), tmp_path))
    assert list(made.ImageType) == ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    (header, _) = multiframe.frame_headers(made)
    assert list(header.FrameType) == ["DERIVED", "PRIMARY", "VOLUME", "NONE"]


def test_frames_of_several_types_make_a_mixed_image(tmp_path: Path) -> None:
    def change(volume: int, _: int, groups: Dataset) -> None:
        item = Dataset()
        item.FrameType = ["ORIGINAL", "PRIMARY", ("T1", "T2")[volume], "NONE"]
        groups.MRImageFrameTypeSequence = [item]

    image = make_enhanced("MR", slices=2, rows=8, volumes=2, change=change)
    del image.SharedFunctionalGroupsSequence[0].MRImageFrameTypeSequence
    made = read(restore(image, tmp_path))
    assert list(made.ImageType) == ["DERIVED", "PRIMARY", "MIXED", "NONE"]
    kinds = [list(header.FrameType)[2] for header in multiframe.frame_headers(made)]
    assert kinds == ["T1", "T2", "T1", "T2"]


@every_kind
def test_pet_gets_a_slope_for_each_frame_and_keeps_its_suv(tmp_path: Path, make: Any) -> None:
    image = make("PT", slices=3, rows=16)
    made = read(restore(image, tmp_path, 0.83))
    before, after = (multiframe.frame_headers(each) for each in (image, made))
    assert suv_factor(after).value == pytest.approx(suv_factor(before).value, rel=1e-6)
    assert len({float(header.RescaleSlope) for header in after}) == 3
    wanted = physical(image) * 0.83
    steps = np.asarray([float(h.RescaleSlope) for h in after])[:, None, None]
    assert (np.abs(physical(made) - wanted) <= steps / 2 * 1.001 + 1e-6 * wanted.max()).all()


def test_real_world_values_follow_the_new_slope(tmp_path: Path) -> None:
    image = make_enhanced("PT", slices=2, rows=8)
    made = read(restore(image, tmp_path, 0.5))
    for number, frame in enumerate(made.pixel_array, start=1):
        (mapping,) = multiframe.group_items(made, number, "RealWorldValueMappingSequence")
        values = frame * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
        assert np.allclose(values, physical(made)[number - 1])
        assert mapping.RealWorldValueFirstValueMapped == -32768
        assert mapping.RealWorldValueLastValueMapped == 32767


def test_a_table_of_real_world_values_is_left_out(tmp_path: Path) -> None:
    image = make_enhanced("PT", slices=2, rows=8)
    for groups in image.PerFrameFunctionalGroupsSequence:
        (mapping,) = groups.RealWorldValueMappingSequence
        del mapping.RealWorldValueSlope
        mapping.RealWorldValueLUTData = [1.0, 2.0]
    made = read(restore(image, tmp_path))
    assert multiframe.group_items(made, 1, "RealWorldValueMappingSequence") == []


def test_frames_left_out_leave_a_smaller_image(tmp_path: Path) -> None:
    def phase(volume: int, _: int, groups: Dataset) -> None:
        if volume:
            item = Dataset()
            item.FrameType = ["DERIVED", "PRIMARY", "PHASE_MAP", "NONE"]
            groups.MRImageFrameTypeSequence = [item]

    image = make_enhanced("MR", slices=3, rows=8, volumes=2, change=phase)
    made = read(restore(image, tmp_path))
    assert made.NumberOfFrames == 3
    assert np.array_equal(made.pixel_array, image.pixel_array[::2])
    sources = [
        multiframe.group_items(made, n, "DerivationImageSequence")[0].SourceImageSequence[0]
        for n in (1, 2, 3)
    ]
    assert [source.ReferencedFrameNumber for source in sources] == [1, 3, 5]


@every_kind
@every_modality
def test_our_own_output_is_known_again(tmp_path: Path, make: Any, modality: Any) -> None:
    header = read_header(restore(make(modality, slices=2, rows=8), tmp_path))
    assert "our own output" in str(why_ignored(header))
    for keyword in ("ContributingEquipmentSequence", "Manufacturer"):
        del header[keyword]
    assert is_own_output(header)  # by the frames


@every_modality
def test_padding_of_each_frame_is_kept(tmp_path: Path, modality: Any) -> None:
    options = {"padding": 17} if modality == "PT" else {"padding": 3}
    image = make_enhanced(modality, slices=2, rows=16, **options)
    made = read(restore(image, tmp_path, 0.8))
    corners = image.pixel_array == options["padding"]
    assert corners.any()
    assert (made.pixel_array[corners] == options["padding"]).all()
    assert (made.pixel_array[~corners] != options["padding"]).all()


def test_a_conversion_keeps_what_it_could_not_place(tmp_path: Path) -> None:
    image = legacy_converted("PT", slices=2, rows=8)
    unassigned = image.SharedFunctionalGroupsSequence[0].UnassignedSharedConvertedAttributesSequence
    unassigned[0].add_new("LargestPixelValueInSeries", "US", 9)
    made = read(restore(image, tmp_path))
    (kept,) = made.SharedFunctionalGroupsSequence[0].UnassignedSharedConvertedAttributesSequence
    assert (kept.Units, kept.DecayCorrection) == ("BQML", "START")
    assert "LargestPixelValueInSeries" not in kept
    (source,) = multiframe.group_items(made, 1, "ConversionSourceAttributesSequence")
    assert source.ReferencedSOPInstanceUID in {
        dataset.SOPInstanceUID for dataset in make_series("PT", slices=2, rows=8)
    }


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    modality=st.sampled_from(MODALITIES),
    plane=st.sampled_from(["axial", "sagittal", "oblique"]),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    slices=st.integers(1, 4),
    volumes=st.integers(1, 3),
    signed=st.booleans(),
    padding=st.sampled_from([None, 0, 17]),
    bits=st.sampled_from([8, 12, 16]),
    syntax=st.sampled_from([ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless]),
)
@pytest.mark.timeout(600)
def test_any_combination_comes_back_bit_exact(
    tmp_path: Path, modality: Any, bits: int, syntax: Any, **shape: Any
) -> None:
    if modality == "CT":
        shape["plane"] = "axial"
    if modality == "PT":
        bits = 16  # PS3.3 C.8.9.4: what is stored in fewer bits gets 16
    image = make_enhanced(modality, bits_stored=bits, transfer_syntax=syntax, **shape)
    made = read(restore(image, tmp_path / "any"))
    with quiet_pydicom():
        assert np.array_equal(made.pixel_array, image.pixel_array)
