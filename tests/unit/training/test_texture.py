"""Sharper kernels on an image: what they do to single frequencies."""

from __future__ import annotations

import numpy as np
import pytest

from training.texture import edged, sharpened


@pytest.mark.parametrize(("cycles", "gain"), [(0, 1.0), (8, 2.0), (16, 3.0), (24, 3.0)])
def test_a_frequency_is_raised_by_its_own_gain(cycles: int, gain: float) -> None:
    wave = np.cos(2 * np.pi * cycles * np.arange(64) / 64).astype(np.float32)
    x = np.broadcast_to(wave, (2, 64, 64))
    np.testing.assert_allclose(sharpened(x), gain * x, atol=1e-5)


@pytest.mark.parametrize(
    ("cycles", "gain"), [(0, 1.0), (6, 1.95892), (12.8, 3.0), (32, 1.0 + 2 * 6.25 * np.exp(-5.25))]
)
def test_an_edge_enhancing_kernel_raises_middle_frequencies(cycles: float, gain: float) -> None:
    wave = np.cos(2 * np.pi * cycles * np.arange(320) / 64).astype(np.float32)
    x = np.broadcast_to(wave, (1, 320, 320))
    np.testing.assert_allclose(edged(x), gain * x, atol=1e-4)
