"""Phantom measurements against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from training.image_quality import detectability, noise_power, recovery, transfer
from training.quality_phantoms import PET_VOXEL_MM, SPHERES_MM, rods, spheres


def test_the_integral_of_the_noise_power_is_the_variance() -> None:
    rng = np.random.default_rng(0)
    volume = rng.normal(0, 12, (20, 96, 96))
    found = noise_power(volume, [(48, 48)], 64, 0.7)
    assert found.deviation == pytest.approx(12, rel=0.02)
    # White: the same power everywhere, variance times the area of a pixel.
    assert found.power.mean() == pytest.approx(144 * 0.7**2, rel=0.03)
    blotchy = noise_power(ndimage.gaussian_filter(volume, (0, 2, 2)), [(48, 48)], 64, 0.7)
    assert blotchy.mean_frequency < 0.5 * found.mean_frequency


def test_a_region_beyond_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves the image"):
        noise_power(np.zeros((1, 64, 64)), [(10, 32)], 64, 1.0)


def test_a_rod_or_a_sphere_beyond_the_image_is_refused() -> None:
    volume = np.ones((4, 32, 32))
    with pytest.raises(ValueError, match="leaves the image"):
        transfer(volume, (40, 16), 6.0, 1.0)
    with pytest.raises(ValueError, match="beyond the volume"):
        recovery(volume, (9, 16, 16), 10.0, 8.0, (1.0, 1.0, 1.0))


def test_a_gaussian_blur_has_its_modulation_transfer() -> None:
    pixel, sigma = 0.5, 0.8  # mm
    y, x = np.mgrid[:200, :200]
    rod = np.where(np.hypot(y - 99.3, x - 100.2) * pixel <= 15, 200.0, 0.0)
    blurred = ndimage.gaussian_filter(rod, sigma / pixel)
    found = transfer(blurred[None], (99.3, 100.2), 15, pixel)
    expected = np.sqrt(np.log(2) / 2) / np.pi / sigma  # exp(-2 pi^2 s^2 f^2) = 1/2
    assert found.contrast == pytest.approx(200, rel=0.01)
    assert found.at(0.5) == pytest.approx(expected, rel=0.06)
    with pytest.raises(ValueError, match="no contrast"):
        transfer(np.zeros((1, 200, 200)), (99.3, 100.2), 15, pixel)


def test_the_observer_of_white_noise_reaches_the_ideal_one() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] - 15.5
    signal = 3 * np.exp(-np.pi * (y**2 + x**2) / 12**2)  # the first channel
    noise = rng.normal(0, 4, (2, 400, 32, 32))
    found = detectability(noise[0] + signal, noise[1], 12.0)
    assert found == pytest.approx(np.linalg.norm(signal) / 4, rel=0.15)
    with pytest.raises(ValueError, match="regions of each kind"):
        detectability(noise[0][:10], noise[1][:10], 12.0)


def test_a_sphere_without_blur_is_recovered_and_a_blurred_one_is_not() -> None:
    made = spheres(20, 96)
    for diameter, place in zip(SPHERES_MM, made.places, strict=True):
        sharp = recovery(made.activity, place, diameter, made.hot, PET_VOXEL_MM)
        assert sharp.maximum == pytest.approx(1, rel=0.02)
    blurred = ndimage.gaussian_filter(made.activity, [6 / 2.355 / size for size in PET_VOXEL_MM])
    found = [
        recovery(blurred, place, diameter, made.hot, PET_VOXEL_MM).maximum
        for diameter, place in zip(SPHERES_MM, made.places, strict=True)
    ]
    assert found == sorted(found)
    assert found[0] < 0.75 < 0.95 < found[-1]


def test_the_rods_have_their_contrast() -> None:
    made = rods(2)
    assert made.volume[0, 128, 128] == 0
    for place, hu in zip(made.places, (-100, 30, 120, 900), strict=True):
        assert made.volume[1, round(place[0]), round(place[1])] == hu
