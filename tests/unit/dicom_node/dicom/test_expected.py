"""What headers announce of a series, and what it proves when some of it is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dicom_node.dicom.expected import (
    Evidence,
    announced_by,
    counts,
    ranges,
    slice_count,
    slice_gaps,
)
from tests.factories import make_series


def header(**values: Any) -> Dataset:
    made = Dataset()
    made.Modality = "PT"
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def pet(indices: range | list[int], **values: Any) -> list[Dataset]:
    usual = {"SeriesType": ["STATIC", "IMAGE"], "NumberOfSlices": 6}
    return [header(ImageIndex=index, **{**usual, **values}) for index in indices]


def by_signal(headers: list[Dataset], **options: Any) -> dict[str, Evidence]:
    return {each.signal: each for each in counts(headers, **options)}


DYNAMIC = {"SeriesType": ["DYNAMIC", "IMAGE"], "NumberOfSlices": 3, "NumberOfTimeSlices": 4}
GATED = {
    "SeriesType": ["GATED", "IMAGE"],
    "NumberOfSlices": 2,
    "NumberOfTimeSlots": 3,
    "NumberOfRRIntervals": 2,
}


@pytest.mark.parametrize(
    ("headers", "verdict", "expected", "words"),
    [
        (pet(range(1, 7)), "whole", 6, "Image Index 1-6 without a gap"),
        (pet([1, 2, 5, 6]), "short", 6, "2 of 6 images missing by Image Index: 3-4"),
        (pet([2, 3, 4, 5, 6]), "short", 6, "1 of 6 images missing by Image Index: 1"),
        # 3 slices at 4 times, the third time missing: ((t - 1) · 3) + s
        (
            pet([1, 2, 3, 4, 5, 6, 10, 11, 12], **DYNAMIC),
            "short", 12, "3 of 12 images missing by Image Index: 7-9",
        ),
        (pet(range(1, 13), **GATED), "whole", 12, "Image Index 1-12 without a gap"),
        # all alike, as one vendor writes it
        (pet([1, 1, 1]), "unproven", None, "Image Index is absent or repeats itself"),
        # no total: the highest may itself be missing
        (pet([1, 2, 3], NumberOfSlices=None), "unproven", None, "Image Index 1-3 without a gap"),
        (pet([1, 3], NumberOfSlices=None), "short", 3, "1 of 3 images missing by Image Index: 2"),
    ],
)  # fmt: skip
def test_the_image_index_of_pet_tells_which_images_are_missing(
    headers: list[Dataset], verdict: str, expected: int | None, words: str
) -> None:
    found = by_signal(headers)["image_index"]
    assert (found.verdict, found.expected, found.words) == (verdict, expected, words)


def test_dynamic_pet_lacks_a_time_slice_that_no_volume_of_it_misses() -> None:
    found = by_signal(pet([1, 2, 3, 4, 5, 6, 7, 8, 9], **DYNAMIC))["time_slices"]
    assert (found.verdict, found.expected, found.found) == ("short", 12, 9)
    assert "time_slices" not in by_signal(pet(range(1, 7)))


def test_number_of_slices_is_that_of_one_volume() -> None:
    whole = slice_count(pet(range(1, 7)))
    assert whole is not None
    assert whole.verdict == "whole"
    short = slice_count(pet(range(1, 5)))
    assert short is not None
    assert (short.verdict, short.expected, short.found) == ("short", 6, 4)
    assert slice_count([header()]) is None


def position(identifier: int | None, of: int = 3) -> Dataset:
    values = {} if identifier is None else {"TemporalPositionIdentifier": identifier}
    return header(NumberOfTemporalPositions=of, **values)


@pytest.mark.parametrize(
    ("identifiers", "verdict", "words"),
    [
        ([1, 1, 2, 2, 3, 3], "unproven", "3 temporal positions of 2 slices"),
        ([1, 1, 3, 3], "short", "temporal positions 2 of 3 are missing"),
        ([1, 1, 2, 3, 3], "short", "temporal positions 2 have fewer than 2 slices"),
    ],
)
def test_temporal_positions_are_counted_where_each_image_names_its_own(
    identifiers: list[int], verdict: str, words: str
) -> None:
    found = by_signal([position(each) for each in identifiers])["temporal_positions"]
    assert (found.verdict, found.words) == (verdict, words)


def test_temporal_positions_that_no_image_names_say_nothing() -> None:
    assert "temporal_positions" not in by_signal([position(None), position(None)])


def acquired(number: int, images: int) -> Dataset:
    return header(Modality="CT", AcquisitionNumber=number, ImagesInAcquisition=images)


@pytest.mark.parametrize(
    ("headers", "trusted", "verdict"),
    [
        ([acquired(1, 2), acquired(1, 2)], False, "whole"),
        ([acquired(1, 2), acquired(2, 1)], False, "unproven"),  # the rest may be elsewhere
        ([acquired(1, 2), acquired(2, 1)], True, "short"),
    ],
)
def test_images_in_acquisition_proves_a_lack_only_where_it_is_trusted(
    headers: list[Dataset], trusted: bool, verdict: str
) -> None:
    found = by_signal(headers, trust_images_in_acquisition=trusted)["images_in_acquisition"]
    assert found.verdict == verdict


def test_an_acquisition_without_a_number_of_images_says_nothing() -> None:
    assert by_signal([acquired(1, 2), header(AcquisitionNumber=2)]) == {}


def test_the_parts_of_a_concatenation_are_counted() -> None:
    part = header(ConcatenationUID="1.2.3", InConcatenationTotalNumber=3)
    assert by_signal([part, part])["concatenation"].verdict == "short"
    assert by_signal([part, part, part])["concatenation"].verdict == "whole"


def test_gaps_are_told_from_positions_of_one_spacing() -> None:
    whole = slice_gaps(np.asarray([0.0, 3.0, 6.0, 9.0]))
    assert whole is not None
    assert (whole.verdict, whole.words) == ("unproven", "4 slices, 3 mm apart")
    gap = slice_gaps(np.asarray([0.0, 3.0, 6.0, 12.0, 15.0]))
    assert gap is not None
    assert gap.verdict == "short"
    assert slice_gaps(np.asarray([0.0, 3.0])) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [([], ""), ([3], "3"), ([1, 2, 3, 7], "1-3, 7"), ([9, 1, 2], "1-2, 9")],
)
def test_numbers_are_told_as_ranges(values: list[int], words: str) -> None:
    assert ranges(values) == words


def test_many_ranges_are_cut_short() -> None:
    assert ranges(range(0, 60, 2)).endswith("20, 22 …")


@pytest.mark.parametrize(
    ("first", "announced"),
    [
        (pet([1])[0], 6),
        (pet([1], **DYNAMIC)[0], 12),
        (pet([1], **GATED)[0], 12),
        (acquired(1, 40), 40),
        (header(Modality="CT"), None),
        (header(NumberOfSlices=0), None),
    ],
)
def test_one_header_tells_how_many_instances_there_are_at_the_least(
    first: Dataset, announced: int | None
) -> None:
    assert announced_by(first) == announced


def test_the_phantoms_of_pet_count_themselves_whole() -> None:
    assert by_signal(make_series("PT", slices=4, rows=8))["image_index"].verdict == "whole"


def test_evidence_is_kept_without_what_is_unset() -> None:
    row = Evidence("c_find", "short", "words", expected=3).as_row()
    assert row == {"signal": "c_find", "verdict": "short", "words": "words", "expected": 3}
