"""Low frequencies of the measurement, held against SciPy's Gaussian and by identities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from restoration.lowpass import kept_of_modes, low_frequency_change, smoothing_matrix

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
WIDTHS = st.tuples(*[st.sampled_from([0.0, 0.7, 1.5, 4.0])] * 3)


def volumes(shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return tuple(draw.normal(0, 100, shape).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


@given(SIZES, WIDTHS, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_change_is_scipys_gaussian_of_the_difference(
    shape: tuple[int, int, int], sigma: tuple[float, float, float], seed: int
) -> None:
    x, y = volumes(shape, seed)

    change = low_frequency_change(x, y, sigma)

    oracle = gaussian_filter((x - y).astype(np.float64), sigma, mode="reflect")
    np.testing.assert_allclose(change, oracle, atol=1e-4)


def test_the_total_becomes_that_of_the_measurement() -> None:
    x, y = volumes((7, 33, 45))

    held = y + low_frequency_change(x, y, (1.5, 1.5, 1.5))

    assert held.sum(dtype=np.float64) == pytest.approx(x.sum(dtype=np.float64), abs=0.5)


def test_a_shifted_mean_comes_back_and_a_texture_stays() -> None:
    x = np.zeros((1, 64, 64), np.float32)
    rows = np.arange(64)
    texture = np.float32(10) * (-1.0) ** (rows[:, None] + rows[None, :])
    y = (x + 5 + texture).astype(np.float32)

    held = y + low_frequency_change(x, y, (0, 4, 4))

    # At the edges the mirrored texture beats with itself.
    inside = (slice(17, -17), slice(17, -17))
    np.testing.assert_allclose(held[0][inside], texture[inside], atol=1e-2)


def test_equal_volumes_stay_as_they_are_bit_by_bit() -> None:
    x, _ = volumes((3, 20, 30))

    assert not low_frequency_change(x, x.copy(), (1.5, 2, 2)).any()


def test_slices_do_not_depend_on_each_other_without_a_width_between_them() -> None:
    x, y = volumes((5, 32, 48))

    together = low_frequency_change(x, y, (0, 4, 4))

    for index in range(5):
        alone = low_frequency_change(x[index : index + 1], y[index : index + 1], (0, 4, 4))
        assert (alone[0] == together[index]).all()


@pytest.mark.parametrize("sigma", [(1, 1), (-1, 1, 1), (np.nan, 1, 1), (np.inf, 1, 1)])
def test_widths_that_are_none_are_refused(sigma: tuple[float, ...]) -> None:
    x, y = volumes((2, 8, 8))

    with pytest.raises(ValueError, match="three widths"):
        low_frequency_change(x, y, sigma)


@pytest.mark.parametrize("size", [1, 7, 48])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 4.0, 30.0])
def test_cosine_modes_are_only_scaled(size: int, sigma: float) -> None:
    modes = np.cos(np.pi / size * np.arange(size)[:, None] * (np.arange(size) + 0.5))

    smoothed = modes @ smoothing_matrix(size, sigma).T

    np.testing.assert_allclose(smoothed, kept_of_modes(size, sigma)[:, None] * modes, atol=1e-12)
