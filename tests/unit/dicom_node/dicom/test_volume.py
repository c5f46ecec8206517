"""Dividing series into volumes and loading them into physical units."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dicom_node.dicom import division, volume
from dicom_node.dicom.division import WHOLE
from dicom_node.dicom.volume import SeriesVolume
from dicom_node.errors import RefusedError, UnreadableInstanceError
from dicom_node.settings import PolicySettings
from tests.factories import make_series, phantom, write_series

SPLIT_BY = ("echo_time", "b_value", "image_type", "temporal_position")
Load = Callable[[list[Dataset]], SeriesVolume]


def test_a_series_of_one_volume_is_whole() -> None:
    (group,) = division.group_volumes(make_series("CT", slices=5, rows=8), SPLIT_BY)
    assert (group.key, len(group.sop_instance_uids), group.note) == (WHOLE, 5, None)


def test_a_group_is_in_slice_order_whatever_the_order_of_arrival() -> None:
    datasets = make_series("CT", slices=9, rows=8)
    (wanted,) = division.group_volumes(datasets)
    shuffled = random.Random(4).sample(datasets, len(datasets))
    assert division.group_volumes(shuffled) == [wanted]
    heights = {str(d.SOPInstanceUID): float(d.ImagePositionPatient[2]) for d in datasets}
    along = [heights[uid] for uid in wanted.sop_instance_uids]
    assert along == sorted(along)


@pytest.mark.parametrize(
    ("keyword", "values", "split"),
    [
        ("EchoTime", ("11", "92"), "echo_time=11"),
        ("DiffusionBValue", (0.0, 800.0), "b_value=0.0"),
        ("TemporalPositionIdentifier", ("1", "2"), "temporal_position=1"),
    ],
)
def test_each_splitting_attribute_makes_a_volume_of_its_own(
    keyword: str, values: tuple[object, object], split: str
) -> None:
    first = make_series("MR", slices=3, rows=8, **{keyword: values[0]})  # type: ignore[arg-type]
    second = make_series("MR", slices=3, rows=8, **{keyword: values[1]})  # type: ignore[arg-type]
    for i, dataset in enumerate(second):
        dataset.SOPInstanceUID = f"1.2.3.{i}"
    groups = division.group_volumes([*first, *second], SPLIT_BY)
    assert [len(group.sop_instance_uids) for group in groups] == [3, 3]
    assert groups[0].key == split
    assert {group.note for group in groups} == {None}


def test_slices_at_one_position_go_to_a_second_volume() -> None:
    groups = division.group_volumes(make_series("CT", slices=4, rows=8, duplicated=[1, 2]))
    assert [(group.key, len(group.sop_instance_uids)) for group in groups] == [
        ("copy=1", 4),
        ("copy=2", 2),
    ]


def test_the_earlier_acquisition_is_the_first_volume() -> None:
    arterial = make_series("CT", slices=3, rows=8, AcquisitionNumber="1")
    venous = make_series("CT", slices=3, rows=8, AcquisitionNumber="2", series="other")
    first, second = division.group_volumes([*venous, *arterial])
    assert set(first.sop_instance_uids) == {d.SOPInstanceUID for d in arterial}
    assert set(second.sop_instance_uids) == {d.SOPInstanceUID for d in venous}


def test_matrices_and_kernels_are_never_mixed() -> None:
    small = make_series("CT", slices=2, rows=8)
    large = make_series("CT", slices=2, rows=16, series="large")
    sharp = make_series("CT", slices=2, rows=8, series="sharp", ConvolutionKernel="B70f")
    groups = division.group_volumes([*small, *large, *sharp])
    assert sorted(len(group.sop_instance_uids) for group in groups) == [2, 2, 2]


def test_a_gap_does_not_divide_a_volume_and_is_told() -> None:
    (group,) = division.group_volumes(make_series("CT", slices=8, rows=8, missing=[5]))
    assert len(group.sop_instance_uids) == 7
    assert group.note == "slices are missing or unevenly spaced: runs of 5 + 2"


def test_fewer_slices_than_announced_are_told() -> None:
    (group,) = division.group_volumes(make_series("PT", slices=4, rows=8, NumberOfSlices=9))
    assert group.note == "4 of the 9 slices that Number of Slices announces"


def test_a_series_without_an_order_in_space_stays_whole() -> None:
    nowhere = make_series("MR", slices=3, rows=8, ImagePositionPatient=None)
    (group,) = division.group_volumes(nowhere, SPLIT_BY)
    assert len(group.sop_instance_uids) == 3
    mixed = [*make_series("MR", slices=2), *make_series("MR", slices=2, plane="coronal", seed=1)]
    (group,) = division.group_volumes(mixed, SPLIT_BY)
    assert (group.key, len(group.sop_instance_uids)) == (WHOLE, 4)


def test_no_instances_are_no_volume() -> None:
    assert division.group_volumes([], SPLIT_BY) == []


def test_ct_is_loaded_in_hounsfield_units(load: Load) -> None:
    truth = phantom("CT", (5, 12, 20), seed=3)
    loaded = load(make_series("CT", physical=truth, spacing=(0.8, 1.1), slice_spacing=2.5))
    assert loaded.array.dtype == np.float32
    assert np.abs(loaded.array - truth).max() <= 0.5  # the stored step is 1 HU
    assert loaded.spacing == (2.5, 0.8, 1.1)
    assert loaded.scale.units == "HU"
    assert loaded.padding is None
    assert loaded.runs == (range(5),)
    assert all("PixelData" not in header for header in loaded.headers)


def test_pet_is_loaded_in_suv_with_a_slope_for_each_slice(load: Load) -> None:
    truth = phantom("PT", (4, 16, 16), seed=3)
    loaded = load(make_series("PT", physical=truth))
    per_bq = 70_000 / (350e6 * 2 ** (-3600 / 6586.2))
    assert len({rescale.slope for rescale in loaded.scale.rescales}) == 4
    assert loaded.scale.units == "SUV"
    assert np.abs(loaded.array - truth * per_bq).max() <= per_bq  # a stored step is below 1 Bq/ml


def test_mr_is_loaded_in_its_own_units(load: Load) -> None:
    truth = phantom("MR", (3, 16, 16), seed=3)
    loaded = load(make_series("MR", physical=truth, plane="oblique"))
    assert np.abs(loaded.array - truth).max() <= 0.5
    assert loaded.scale.units == "a.u."
    assert loaded.stored.dtype == np.uint16


def test_pet_without_suv_is_loaded_by_a_stored_scale(load: Load) -> None:
    loaded = load(make_series("PT", slices=3, Units="CNTS"))
    assert loaded.scale.units == "scaled"
    assert float(np.quantile(loaded.array, 0.999)) == pytest.approx(10.0, rel=1e-3)
    assert any("no SUV" in warning for warning in loaded.warnings)


def test_padding_is_marked(load: Load) -> None:
    loaded = load(make_series("CT", slices=3, padding=-2000))
    assert loaded.padding is not None
    assert (loaded.stored[loaded.padding] == -2000).all()


def test_a_gap_is_a_warning_and_makes_runs(load: Load) -> None:
    loaded = load(make_series("CT", slices=6, rows=8, missing=[2]))
    assert loaded.runs == (range(2), range(2, 5))
    assert loaded.warnings == ("slices are missing or unevenly spaced: runs of 2 + 3",)


def test_a_refused_volume_says_every_reason(tmp_path: Path, policy: PolicySettings) -> None:
    paths = write_series(
        make_series("CT", slices=2, plane="coronal", BurnedInAnnotation="YES"), tmp_path
    )
    with pytest.raises(RefusedError, match=r"burned.*; coronal"):
        volume.load(paths, "ct_denoise", policy)
    with pytest.raises(RefusedError, match="no instance"):
        volume.load([], "ct_denoise", policy)


def test_pixels_that_end_early_are_unreadable(tmp_path: Path, policy: PolicySettings) -> None:
    (path,) = write_series(make_series("CT", slices=1), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnreadableInstanceError):
        volume.load([path], "ct_denoise", policy)
