from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest
import torch

from training.degrade import (
    CtNoiseInsertion,
    KSpaceTruncation,
    PetThinning,
    calibrated_photons,
    insert_ct_noise,
    soft_tissue_noise,
    truncate_kspace,
)
from training.phantoms import chest_ct

Volume = npt.NDArray[np.float32]


def ellipse(size: int, wide: float, high: float) -> npt.NDArray[np.bool_]:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.asarray((x / wide) ** 2 + (y / high) ** 2 < 1)


def water(size: int = 160, slices: int = 2) -> Volume:
    """An ellipse of water with 10 HU of white noise, 2 mm pixels: 300 x 200 mm."""
    hu = np.where(ellipse(size, size * 0.47, size * 0.31), 0.0, -1000.0)
    noise = np.random.default_rng(0).standard_normal((slices, size, size)) * 10
    return (hu + noise * (hu > -500)).astype(np.float32)


def quiet_quarter(noise: Volume) -> float:
    """25th percentile of the SD of 7 x 7 windows inside the ellipse of ``water``."""
    windows = np.lib.stride_tricks.sliding_window_view(noise, (7, 7), axis=(1, 2))
    inside = ellipse(154, 160 * 0.47 - 5, 160 * 0.31 - 5)
    return float(np.percentile(windows.std((3, 4))[:, inside], 25))


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.1])
def test_ct_noise_grows_with_one_over_the_root_of_the_dose(fraction: float) -> None:
    hq = water()
    lq = CtNoiseInsertion(dose_fraction=fraction, views=120).apply(
        hq, pixel_mm=2.0, noise_hu=10.0, rng=np.random.default_rng(1)
    )
    expected = 10 * np.sqrt(1 / fraction - 1)
    assert quiet_quarter(lq - hq) == pytest.approx(expected, rel=0.15)


def test_the_calibrated_full_dose_noise_is_the_measured_one() -> None:
    scan, rng = CtNoiseInsertion(dose_fraction=0.5, views=120, electronic_quanta=0), np.random
    hq = torch.from_numpy(water())
    few = calibrated_photons(hq, scan, pixel_mm=2.0, noise_hu=20, rng=rng.default_rng(1))
    many = calibrated_photons(hq, scan, pixel_mm=2.0, noise_hu=10, rng=rng.default_rng(1))
    assert many == pytest.approx(4 * few)
    # At half the dose the added variance equals that of the full dose.
    noisy = insert_ct_noise(hq, scan, pixel_mm=2.0, photons=many, rng=rng.default_rng(2))
    assert quiet_quarter((noisy - hq).numpy()) == pytest.approx(10, rel=0.15)


def test_ct_noise_has_no_mean_and_is_strongest_along_the_long_axis() -> None:
    hq = water(slices=4)
    lq = CtNoiseInsertion(views=120).apply(
        hq, pixel_mm=2.0, noise_hu=10.0, rng=np.random.default_rng(3)
    )
    noise = (lq - hq)[:, ellipse(160, 40, 30)].reshape(4, -1)
    assert abs(noise.mean()) < 0.5
    streaks = (lq - hq)[:, 60:100, 50:110]
    along = np.abs(np.diff(streaks, axis=2)).mean()
    across = np.abs(np.diff(streaks, axis=1)).mean()
    assert along < across


def test_ct_noise_does_not_touch_edges() -> None:
    hq = water(slices=1)
    lq = np.mean(
        [
            CtNoiseInsertion(views=60).apply(
                hq, pixel_mm=2.0, noise_hu=5.0, rng=np.random.default_rng(seed)
            )
            for seed in range(12)
        ],
        axis=0,
    )
    edge = np.abs(np.diff(hq[0], axis=1)) > 900
    steps = np.diff(lq[0], axis=1)[edge] / np.diff(hq[0], axis=1)[edge]
    assert steps.mean() == pytest.approx(1, abs=0.005)


def test_full_dose_stays_as_it_is() -> None:
    hq = water(80, 1)
    lq = CtNoiseInsertion(dose_fraction=1.0, views=30).apply(
        hq, pixel_mm=4.0, noise_hu=10.0, rng=np.random.default_rng(0)
    )
    np.testing.assert_array_equal(lq, hq)


def test_the_same_seed_gives_the_same_noise() -> None:
    hq, scan = water(80, 1), CtNoiseInsertion(views=30)
    first, again, other = (
        scan.apply(hq, pixel_mm=4.0, noise_hu=10.0, rng=np.random.default_rng(seed))
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_dose_fraction_outside_zero_to_one_is_refused(fraction: float) -> None:
    scan = CtNoiseInsertion(dose_fraction=fraction)
    with pytest.raises(ValueError, match="dose_fraction"):
        scan.apply(water(80, 1), pixel_mm=4.0, noise_hu=10.0, rng=np.random.default_rng(0))


def test_noise_needs_a_positive_level_and_soft_tissue() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="noise_hu"):
        CtNoiseInsertion().apply(water(80, 1), pixel_mm=4.0, noise_hu=0.0, rng=rng)
    with pytest.raises(ValueError, match="soft tissue"):
        soft_tissue_noise(np.full((1, 40, 40), -900, np.float32))


def test_the_noise_of_a_phantom_is_measured_as_it_was_made() -> None:
    assert soft_tissue_noise(chest_ct(2, 192).volume) == pytest.approx(9, abs=2.5)


def test_mr_truncation_removes_the_outer_band_and_keeps_the_mean() -> None:
    rng = np.random.default_rng(0)
    hq = (100 + 5 * rng.standard_normal((2, 64, 48))).astype(np.float32)
    lq = truncate_kspace(hq, 4)
    spectrum = np.abs(np.fft.fftshift(np.fft.fft2(lq), axes=(1, 2)))
    outer = np.ones((64, 48), bool)
    outer[32 - 9 : 32 + 9, 24 - 7 : 24 + 7] = False
    assert spectrum[:, outer].max() < 1e-3 * spectrum.max()
    np.testing.assert_allclose(lq.mean((1, 2)), hq.mean((1, 2)), rtol=1e-4)
    np.testing.assert_array_equal(lq, KSpaceTruncation().apply(hq))


def torso(slices: int = 12) -> tuple[Volume, Volume]:
    """A water torso of 350 x 240 mm with a liver of SUV 2.2, 4 mm pixels, and its attenuation."""
    body = ellipse(96, 350 / 8, 240 / 8)
    y, x = np.mgrid[:96, :96] - 47.5
    liver = np.hypot(x + 16, y) < 11
    activity = np.repeat((body + 1.2 * liver)[None], slices, 0).astype(np.float32)
    return activity, np.broadcast_to(0.0096 * body, activity.shape).astype(np.float32)


def test_pet_noise_is_clinical_at_full_count_and_grows_with_the_root_of_the_reduction() -> None:
    activity, attenuation = torso()
    lq, hq = PetThinning().apply(activity, attenuation, pixel_mm=4.0, rng=np.random.default_rng(0))
    y, x = np.mgrid[:96, :96] - 47.5
    core = np.hypot(x + 16, y) < 7
    full, low = (np.mean([p[core].std() / p[core].mean() for p in image]) for image in (hq, lq))
    assert 0.07 < full < 0.13
    assert low / full == pytest.approx(np.sqrt(12), rel=0.15)
    assert hq[:, core].mean() == pytest.approx(2.2, rel=0.03)
    assert lq[:, core].mean() == pytest.approx(2.2, rel=0.08)


def test_pet_activity_is_conserved_never_negative_and_repeatable() -> None:
    activity, attenuation = torso(2)
    first, again = (
        PetThinning().apply(activity, attenuation, pixel_mm=4.0, rng=np.random.default_rng(4))
        for _ in range(2)
    )
    for image, repeat in zip(first, again, strict=True):
        np.testing.assert_array_equal(image, repeat)
        assert image.min() >= 0
        assert image.sum() == pytest.approx(activity.sum(), rel=0.04)


def test_attenuation_costs_counts_but_is_corrected() -> None:
    activity, attenuation = torso(4)
    scan = PetThinning()
    noise = []
    for mu in (attenuation, np.zeros_like(attenuation)):
        _, hq = scan.apply(activity, mu, pixel_mm=4.0, rng=np.random.default_rng(2))
        core = ellipse(96, 12, 12)
        assert hq[:, core].mean() == pytest.approx(activity[:, core].mean(), rel=0.05)
        noise.append((hq[1:] - hq[:-1])[:, core].std())
    assert noise[0] > 3 * noise[1]


@pytest.mark.parametrize("operator", [KSpaceTruncation(), CtNoiseInsertion(), PetThinning()])
def test_an_operator_records_name_version_and_parameters(
    operator: KSpaceTruncation | CtNoiseInsertion | PetThinning,
) -> None:
    record = json.loads(json.dumps(operator.record()))
    assert record["name"] == operator.name
    assert record["version"] == 1
    assert type(operator)(**record["params"]) == operator
