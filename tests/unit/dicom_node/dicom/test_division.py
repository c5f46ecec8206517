"""Dividing series, and the frames of one image, into volumes; judging which may be restored."""

from __future__ import annotations

import random

import pytest
from pydicom.dataset import Dataset

from dicom_node.dicom import division
from dicom_node.dicom.division import WHOLE
from dicom_node.errors import RefusedError
from dicom_node.settings import PolicySettings
from tests.factories import make_series
from tests.multiframe import Change, legacy_converted, make_enhanced

SPLIT_BY = ("echo_time", "b_value", "image_type", "temporal_position")


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


def volumes(modality: str, keyword: str, *values: str, slices: int = 4) -> list[Dataset]:
    """Volumes at the same positions, one for each value of an attribute."""
    return [
        dataset
        for value in values
        for dataset in make_series(
            modality,  # type: ignore[arg-type]
            slices=slices,
            rows=8,
            series=f"{keyword} {value}",
            **{keyword: value},  # type: ignore[arg-type]
        )
    ]


@pytest.mark.parametrize(
    ("modality", "keyword", "values", "name"),
    [
        ("CT", "AcquisitionNumber", ("2", "5"), "acquisition=2"),
        ("CT", "TriggerTime", ("0", "400"), "phase=0"),
        ("CT", "AcquisitionTime", ("100005", "100035"), "acquired=100005"),
        ("PT", "FrameReferenceTime", ("60000", "240000"), "frame_reference_time=60000"),
    ],
)
def test_phases_and_time_frames_of_one_series_are_told_apart(
    modality: str, keyword: str, values: tuple[str, ...], name: str
) -> None:
    datasets = volumes(modality, keyword, *values)
    first, second = division.group_volumes(datasets, SPLIT_BY)
    assert (first.key, len(first.sop_instance_uids)) == (name, 4)
    for group, value in zip((first, second), values, strict=True):
        members = {d.SOPInstanceUID for d in datasets if str(d[keyword].value) == value}
        assert set(group.sop_instance_uids) == members


def test_overlapping_beds_are_volumes_of_their_own_and_joined_ones_are_not() -> None:
    def bed(number: int, first: int) -> list[Dataset]:
        slices = sorted(
            make_series("PT", slices=6, rows=8, series=f"bed {number}"),
            key=lambda d: float(d.ImagePositionPatient[2]),
        )
        for i, dataset in enumerate(slices, start=first):
            dataset.ImagePositionPatient = [-20, -30, -40 + 3 * i]
            dataset.AcquisitionTime = f"10{number:02d}00"
            dataset.FrameReferenceTime = str(60000 * number)
        return slices

    overlapping = division.group_volumes([*bed(1, 0), *bed(2, 4)])
    assert [len(group.sop_instance_uids) for group in overlapping] == [6, 6]
    (joined,) = division.group_volumes([*bed(1, 0), *bed(2, 6)])
    assert (joined.key, len(joined.sop_instance_uids)) == (WHOLE, 12)


def test_an_attribute_that_each_slice_has_for_itself_divides_nothing() -> None:
    datasets = make_series("MR", slices=6, rows=8, duplicated=[0, 1, 2, 3, 4, 5])
    for i, dataset in enumerate(datasets):
        dataset.AcquisitionTime = f"1000{i:02d}"
    groups = division.group_volumes(datasets)
    assert [group.key for group in groups] == ["copy=1", "copy=2"]


def test_a_multi_frame_image_is_one_group_whatever_it_holds() -> None:
    image = make_enhanced("MR", slices=3, rows=8, volumes=2)
    (group,) = division.group_volumes([image], SPLIT_BY)
    assert (group.key, group.sop_instance_uids) == (WHOLE, (image.SOPInstanceUID,))
    other = legacy_converted("MR", slices=3, rows=8)
    keys = {g.key for g in division.group_volumes([image, other], SPLIT_BY)}
    assert keys == {f"object={image.SOPInstanceUID}", f"object={other.SOPInstanceUID}"}


def test_a_gap_between_frames_is_told() -> None:
    (group,) = division.group_volumes([make_enhanced("CT", slices=6, rows=8, missing=[2])])
    assert group.note == "slices are missing or unevenly spaced: runs of 2 + 3"


def echo(volume: int, _: int, groups: Dataset) -> None:
    groups.MREchoSequence[0].EffectiveEchoTime = 10.0 + 80 * volume
    groups.FrameContentSequence[0].TemporalPositionIndex = 1


def b_value(volume: int, _: int, groups: Dataset) -> None:
    item = Dataset()
    item.DiffusionBValue = 1000.0 * volume
    groups.MRDiffusionSequence = [item]
    groups.FrameContentSequence[0].TemporalPositionIndex = 1


def stack(volume: int, _: int, groups: Dataset) -> None:
    groups.FrameContentSequence[0].StackID = str(volume + 1)
    groups.FrameContentSequence[0].TemporalPositionIndex = 1


def orientation(volume: int, _: int, groups: Dataset) -> None:
    item = Dataset()
    item.ImageOrientationPatient = [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]][volume]
    groups.PlaneOrientationSequence = [item]
    groups.FrameContentSequence[0].TemporalPositionIndex = 1
    if volume:
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        groups.PlanePositionSequence[0].ImagePositionPatient = [place[0], place[2], place[1]]


def cardiac(volume: int, _: int, groups: Dataset) -> None:
    item = Dataset()
    item.NominalCardiacTriggerDelayTime = 100.0 * volume
    groups.CardiacSynchronizationSequence = [item]
    groups.FrameContentSequence[0].TemporalPositionIndex = 1


@pytest.mark.parametrize("change", [None, echo, b_value, stack, orientation, cardiac])
def test_volumes_inside_one_image_are_restored_apart(change: Change | None) -> None:
    image = make_enhanced("MR", slices=4, rows=8, volumes=2, change=change)
    judged = division.judge([image], task="mri_sr", policy=PolicySettings())
    found = sorted(sorted(part.frames) for part in judged.parts)
    assert found == [[1, 3, 5, 7], [2, 4, 6, 8]]
    for part in judged.parts:
        assert [header.InstanceNumber for header in part.headers] == list(part.frames)


def phase(volume: int, _: int, groups: Dataset) -> None:
    if volume == 1:
        item = Dataset()
        item.FrameType = ["DERIVED", "PRIMARY", "PHASE_MAP", "NONE"]
        groups.MRImageFrameTypeSequence = [item]


def test_frames_that_may_not_be_restored_are_left_out_and_named() -> None:
    image = make_enhanced("MR", slices=3, rows=8, volumes=2, change=phase)
    judged = division.judge([image], task="mri_sr", policy=PolicySettings())
    assert [part.frames for part in judged.parts] == [(1, 3, 5)]
    (warning,) = judged.warnings
    assert warning.startswith("frames 2, 4, 6 left out: ImageType PHASE_MAP")


def test_an_image_of_which_nothing_is_left_is_refused() -> None:
    image = make_enhanced("MR", slices=2, rows=8)
    kind = image.SharedFunctionalGroupsSequence[0].MRImageFrameTypeSequence[0]
    kind.ComplexImageComponent = "PHASE"
    with pytest.raises(RefusedError, match="Complex Image Component PHASE"):
        division.judge([image], task="mri_sr", policy=PolicySettings())
    with pytest.raises(RefusedError, match="several multi-frame"):
        division.judge([image, image], task="mri_sr", policy=PolicySettings())


def test_the_representative_is_the_middle_slice_or_frame() -> None:
    slices = make_series("CT", slices=5, rows=8)
    assert division.representative(slices) is slices[2]
    image = make_enhanced("CT", slices=5, rows=8)
    middle = division.representative([image])
    assert (middle.InstanceNumber, middle.KVP) == (3, "120")
    del image.PerFrameFunctionalGroupsSequence
    assert division.representative([image]) is image
