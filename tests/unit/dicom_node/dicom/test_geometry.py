"""Slice geometry against series whose place in space is known by construction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicom_node.dicom import geometry
from dicom_node.errors import RefusedError
from tests.factories import PLANES, make_series


def frames_of(datasets: list[Dataset]) -> list[geometry.SliceFrame]:
    return [geometry.slice_frame(dataset) for dataset in datasets]


def in_order(datasets: list[Dataset]) -> list[Dataset]:
    names = [str(dataset.SOPInstanceUID) for dataset in datasets]
    return [datasets[i] for i in geometry.order(frames_of(datasets), names)]


@pytest.mark.parametrize("plane", list(PLANES))
def test_slices_are_ordered_by_position_and_not_by_instance_number(plane: str) -> None:
    datasets = in_order(make_series("MR", slices=7, plane=plane))
    along = geometry.positions(frames_of(datasets))
    assert np.allclose(np.diff(along), 3.0)
    assert [int(dataset.InstanceNumber) for dataset in datasets] == list(range(900, 893, -1))


@pytest.mark.parametrize("plane", list(PLANES))
def test_a_plane_has_its_name(plane: str) -> None:
    assert geometry.plane_name(frames_of(make_series("MR", plane=plane))[0]) == plane


@pytest.mark.parametrize("tilt", [0.0, 18.5, -18.5, 30.0])
def test_a_tilted_gantry_is_axial_and_its_angle_is_found(tilt: float) -> None:
    frames = frames_of(in_order(make_series("CT", tilt=tilt)))
    assert geometry.plane_name(frames[0]) == "axial"
    assert geometry.tilt_degrees(frames) == pytest.approx(abs(tilt), abs=1e-3)


def test_one_slice_has_no_tilt() -> None:
    assert geometry.tilt_degrees(frames_of(make_series("CT", slices=1))) == 0.0


@pytest.mark.parametrize("plane", list(PLANES))
@pytest.mark.parametrize("tilt", [0.0, 20.0])
def test_the_affine_maps_each_first_pixel_to_its_position(plane: str, tilt: float) -> None:
    datasets = in_order(make_series("MR", plane=plane, tilt=tilt, spacing=(0.7, 1.3)))
    frames = frames_of(datasets)
    matrix = geometry.affine(frames, 3.0)
    for k, frame in enumerate(frames):
        assert np.allclose(matrix @ [k, 0, 0, 1], [*frame.position, 1], atol=1e-6)
    # PS3.3 C.7.6.2.1-1: row index along the column direction, by the spacing between rows.
    step = (matrix @ [0, 5, 2, 1])[:3] - (matrix @ [0, 0, 0, 1])[:3]
    assert np.allclose(step, frames[0].column * 0.7 * 5 + frames[0].row * 1.3 * 2)


@pytest.mark.parametrize(
    ("positions", "runs"),
    [
        ([], []),
        ([0], [1]),
        ([0, 5], [2]),
        ([0, 5, 10], [3]),
        ([0, 5, 10, 20], [3, 1]),  # one slice missing near the end
        ([0, 10, 15, 20], [1, 3]),  # near the start: the gap is no spacing
        ([0, 5, 15, 20], [2, 2]),  # in the middle
        ([0, 0.6, 1.3, 1.9, 2.5], [5]),  # 0.625 mm rounded to tenths
        ([0, 3.27, 6.46, 9.73], [4]),  # a PET bed overlap rounds by 0.08 mm
        ([0, 4, 8, 12, 13.08, 20, 27, 34], [4, 4]),  # head CT: 4 mm below, 7 mm above
    ],
)
def test_a_gap_or_a_new_spacing_ends_a_run(positions: list[float], runs: list[int]) -> None:
    found = geometry.contiguous_runs(np.asarray(positions, dtype=float))
    assert [len(run) for run in found] == runs


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.1, 50.0), min_size=0, max_size=30),
    st.floats(-500, 500),
)
def test_runs_hold_every_slice_once_and_in_order(steps: list[float], start: float) -> None:
    along = start + np.concatenate([[0.0], np.cumsum(steps)])
    runs = geometry.contiguous_runs(along)
    assert [i for run in runs for i in run] == list(range(len(along)))


def test_spacing_of_one_slice_is_what_its_header_says() -> None:
    only = make_series("MR", slices=1)[0]
    assert geometry.slice_spacing(np.array([0.0]), only) == 3.0
    only.SpacingBetweenSlices = "3.3"
    assert geometry.slice_spacing(np.array([0.0]), only) == 3.3
    del only.SpacingBetweenSlices, only.SliceThickness
    assert geometry.slice_spacing(np.array([0.0]), only) == 1.0


def test_several_orientations_are_noticed() -> None:
    axial, coronal = make_series("MR"), make_series("MR", plane="coronal")
    assert geometry.one_orientation(frames_of(axial))
    assert not geometry.one_orientation(frames_of([*axial, *coronal]))


def test_slices_at_one_position_are_noticed() -> None:
    frames = frames_of(in_order(make_series("CT", duplicated=[2])))
    assert geometry.has_duplicates(geometry.positions(frames))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("ImagePositionPatient", None),
        ("ImagePositionPatient", [0, 0]),
        ("ImageOrientationPatient", None),
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
        ("ImageOrientationPatient", [0, 0, 0, 0, 0, 0]),
        ("PixelSpacing", None),
        ("PixelSpacing", [0, 1]),
    ],
)
def test_a_slice_without_a_place_is_refused(keyword: str, value: object) -> None:
    dataset = make_series("CT", slices=1, **{keyword: value})[0]
    with pytest.raises(RefusedError, match=keyword):
        geometry.slice_frame(dataset)


def test_a_finer_grid_begins_where_its_operator_says() -> None:
    frame = frames_of(make_series("MR", slices=1, plane="oblique", spacing=(2.0, 4.0)))[0]
    assert not geometry.SAME_GRID.changes
    fourier = geometry.Resampling(4)
    assert fourier.changes
    assert np.array_equal(geometry.resampled_position(frame, fourier), frame.position)
    box = geometry.Resampling(4, (-0.375, -0.375))
    moved = geometry.resampled_position(frame, box) - frame.position
    assert np.allclose(moved, -0.75 * frame.column - 1.5 * frame.row)
