"""A patient who moves during an MR scan: phase errors between the lines of k-space."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]


def moved(x: Volume, shifts: npt.NDArray[np.floating], axis: int = 1) -> Volume:
    """The magnitude of (slices, rows, columns) when each line of k-space saw another position.

    `shifts` (slices, lines) in pixels along `axis`, 1 or 2, in the order of `numpy.fft.fftfreq`.
    """
    size = x.shape[axis]
    shape = [1, 1, 1]
    shape[axis] = size
    frequency = np.fft.fftfreq(size).reshape(shape)
    steps = shifts[:, :, None] if axis == 1 else shifts[:, None, :]
    spectrum = np.fft.fft2(x) * np.exp(2j * np.pi * frequency * steps)
    return np.abs(np.fft.ifft2(spectrum)).astype(np.float32)


def restless(x: Volume, rng: np.random.Generator, pixels: float = 2.0, axis: int = 1) -> Volume:
    """Somebody who never lies still: each line at a place of its own, of this SD."""
    return moved(x, rng.normal(0, pixels, (len(x), x.shape[axis])), axis)


def breathing(x: Volume, rng: np.random.Generator, pixels: float = 3.0, axis: int = 1) -> Volume:
    """Back and forth with so many pixels to each side, a breath in 4 to 25 lines of each slice."""
    lines = np.fft.fftfreq(x.shape[axis], d=1 / x.shape[axis])
    period, start = rng.uniform(4, 25, (len(x), 1)), rng.uniform(0, 2 * np.pi, (len(x), 1))
    return moved(x, pixels * np.sin(2 * np.pi * lines / period + start), axis)
