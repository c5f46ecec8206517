"""An image that was made before its series was complete has the bytes of one made at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dicom_node.dicom import derived
from dicom_node.dicom.derived import RestoredVolume
from dicom_node.dicom.volume import SeriesVolume
from dicom_node.settings import IdentitySettings
from tests.factories import NAMES, make_series
from tests.unit.dicom_node.dicom.conftest import Model, build

Load = Callable[[list[Dataset]], SeriesVolume]
PARAMETERS = "cd" * 32


@dataclass(frozen=True)
class Given:
    """What is kept of the one slice of a volume."""

    octets: bytes | None
    pixels: bytes | None

    def image(self, index: int) -> bytes | None:
        return self.octets

    def stored(self, index: int) -> bytes | None:
        return self.pixels


def prepared(volume: RestoredVolume, **changes: Any) -> Given:
    arguments: dict[str, Any] = {
        "task": "ct_denoise",
        "model": Model(),
        "identity": IdentitySettings(),
        "strength": 1,
        "parameters_hash": PARAMETERS,
        "drift": 0.25,
        **changes,
    }
    made = derived.prepare(volume, **arguments)
    assert made is not None
    return Given(made.image, made.stored)


def both_ways(
    load: Load, dataset: Dataset, then: dict[str, Any], **before: Any
) -> tuple[bytes, bytes, bool]:
    """The image made at once and by what was prepared of it, and whether that was of use."""
    series = load([dataset])
    changed = series.array + np.float32(3)
    once = derived.quantise(series, changed)
    again = derived.quantise(series, changed, prepared=prepared(once, **before))
    (frame,) = again.frames
    assert frame.prepared is not None
    (plain,), (made,) = build([once], **then), build([again], **then)
    assert made.clamped == plain.clamped
    # A head that nobody may look at tells whether it was looked at.
    broken = replace(frame, prepared=replace(frame.prepared, head=b"", holes=()))
    (other,) = build([RestoredVolume((broken,), None)], **then)
    return plain.data, made.data, other.data != plain.data


@pytest.mark.parametrize(
    "then",
    [
        {},
        {"warnings": ("guard mean_drift did not hold", "a gap before slice 4")},
        {"warnings": ("ä" * 3000,)},
        {"created": datetime(2031, 12, 24, 1, 2, 3, 4, tzinfo=UTC)},
        {
            "identity": IdentitySettings.model_validate(
                {"description_suffixes": {"ct_denoise": " [AI-DN] CHECK"}}
            )
        },
    ],
)
def test_the_bytes_are_those_of_an_image_made_at_once(load: Load, then: dict[str, Any]) -> None:
    (dataset,) = make_series("CT", slices=1, rows=9, columns=7)
    plain, made, was_used = both_ways(load, dataset, then)
    assert made == plain
    assert was_used


@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_script_come_through(load: Load, name: str) -> None:
    charset, words = NAMES[name]
    (dataset,) = make_series("CT", slices=1)
    dataset.SpecificCharacterSet = charset
    dataset.SeriesDescription = words
    dataset.TimezoneOffsetFromUTC = "+0930"
    plain, made, was_used = both_ways(load, dataset, {"warnings": ("narrow",)})
    assert made == plain
    assert was_used


@pytest.mark.parametrize(
    "then",
    [
        {"identity": IdentitySettings(series_number_offset=4242)},
        {"model": Model(version="2")},
        {"parameters_hash": "ef" * 32},
        {"strength": 0.5},
    ],
)
def test_what_was_prepared_for_another_derivation_is_not_used(
    load: Load, then: dict[str, Any]
) -> None:
    (dataset,) = make_series("CT", slices=1)
    plain, made, was_used = both_ways(load, dataset, then)
    assert made == plain
    assert not was_used


def test_octets_that_are_none_and_those_of_another_slice_are_not_taken(load: Load) -> None:
    first, second = make_series("CT", slices=2)
    other = prepared(derived.quantise(series := load([second]), series.array))
    series = load([first])
    good = prepared(derived.quantise(series, series.array))
    image = good.octets
    assert image is not None
    for octets in (None, b"", b"\xff" * 9, image[:-3], image + b" ", image[:40], other.octets):
        given = Given(octets, good.pixels)
        made = derived.quantise(series, series.array, prepared=given)
        assert made.frames[0].prepared is None
        assert np.array_equal(made.frames[0].stored, series.stored[0])


def test_pixels_that_are_gone_or_none_are_made_again(load: Load) -> None:
    series = load(make_series("CT", slices=1))
    changed = series.array + np.float32(3)
    good = prepared(once := derived.quantise(series, changed))
    assert good.pixels is not None
    for pixels in (good.pixels, None, b"", good.pixels[:-2], good.pixels + b"\0\0"):
        (frame,) = derived.quantise(series, changed, prepared=replace(good, pixels=pixels)).frames
        assert frame.prepared is not None
        assert np.array_equal(frame.stored, once.frames[0].stored)


def test_an_image_whose_places_are_in_doubt_is_not_prepared(load: Load) -> None:
    """A moment that our own is told by stands in the header twice."""
    (dataset,) = make_series("CT", slices=1)
    dataset.ImageComments = "28830130235959.987654"
    series = load([dataset])
    volume = derived.quantise(series, series.array)
    found = derived.prepare(
        volume,
        task="ct_denoise",
        model=Model(),
        identity=IdentitySettings(),
        strength=1.0,
        parameters_hash=PARAMETERS,
        drift=None,
    )
    assert found is None
