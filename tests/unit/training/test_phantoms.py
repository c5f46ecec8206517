from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from training.phantoms import SLICE_MM, Phantom, body_pet, brain_t2, chest_ct

MAKERS = (chest_ct, brain_t2, body_pet)


def median_at(phantom: Phantom, x: float, y: float, z: float = 0, reach: float = 4) -> float:
    """Median around a point given in mm from the centre of the volume."""
    volume = phantom.volume
    axes = []
    for size, step, centre in zip(volume.shape, phantom.spacing_mm, (z, y, x), strict=True):
        distance = np.abs((np.arange(size) - (size - 1) / 2) * step - centre)
        axes.append(distance <= max(reach, step / 2))
    return float(np.median(volume[np.ix_(*axes)]))


@pytest.mark.parametrize("make", MAKERS)
def test_a_phantom_is_repeatable_and_differs_by_seed(make: Callable[..., Phantom]) -> None:
    first, again, other = (make(2, 64, seed).volume for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("make", MAKERS)
def test_a_phantom_has_the_size_asked_for_and_a_geometry(make: Callable[..., Phantom]) -> None:
    phantom = make(3, 80)
    assert phantom.volume.shape == (3, 80, 80)
    assert phantom.volume.dtype == np.float32
    assert np.isfinite(phantom.volume).all()
    assert phantom.spacing_mm[0] == SLICE_MM
    assert 200 < phantom.spacing_mm[1] * 80 < 600


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("slices", "size"), [(0, 64), (1, 8)])
def test_a_phantom_without_slices_or_pixels_is_refused(
    make: Callable[..., Phantom], slices: int, size: int
) -> None:
    with pytest.raises(ValueError, match="needs a slice"):
        make(slices, size)


def test_the_chest_has_lungs_heart_spine_and_air_around() -> None:
    chest = chest_ct(5, 192)
    assert median_at(chest, -90, -25, reach=6) < -780
    assert median_at(chest, 85, -25, reach=6) < -780
    assert 60 < median_at(chest, 30, -20, reach=8) < 240
    assert median_at(chest, 27, 43) == pytest.approx(235, abs=12)  # descending aorta
    assert median_at(chest, 0, 66) > 120
    assert median_at(chest, 0, -160, reach=8) < -950


def test_the_heart_is_on_the_left_and_the_liver_on_the_right() -> None:
    chest = chest_ct(25, 128)
    assert median_at(chest, 45, -25, z=20) > 50 > median_at(chest, -60, -25, z=-20)
    assert median_at(chest, -62, 0, z=60) == pytest.approx(112, abs=12)


def test_t2_orders_fluid_grey_and_white_matter() -> None:
    brain = brain_t2(5, 224)
    fluid, deep, white = (
        median_at(brain, x, y, reach=2) for x, y in ((9, -20), (26, 0), (30, -38))
    )
    assert fluid > 900 > deep > white > 350
    assert median_at(brain, -105, -100) < 40


def test_fdg_orders_brain_heart_liver_and_muscle() -> None:
    body = body_pet(190, 64)
    shift = 5.0  # the volume is centred that far above the origin of the organs
    bladder, brain, heart, liver, lung = (
        median_at(body, x, y, z + shift, reach=6)
        for x, y, z in (
            (0, -28, 400),
            (0, -70, -410),
            (68, -20, -12),
            (-70, -20, 90),
            (-70, 0, -60),
        )
    )
    assert bladder > brain > heart > liver > lung > 0.2
    assert liver == pytest.approx(2.25, rel=0.15)
    assert body.volume.min() >= 0
