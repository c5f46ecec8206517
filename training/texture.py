"""Sharper kernels, put onto an image that was reconstructed already."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]
_LIFT = 3.0  # of the high frequencies
_FROM = 0.25  # cycles in a pixel: half of the Nyquist frequency
_PEAK = 0.2  # cycles in a pixel


def sharpened(x: Volume, lift: float = _LIFT) -> Volume:
    """As of a bone kernel: high spatial frequencies raised, noise and edges alike.

    (slices, rows, columns); the gain rises from 1 at 0 to `lift` at half of the Nyquist frequency.
    """
    return _filtered(x, lambda radius: 1 + (lift - 1) * np.clip(radius / _FROM, 0, 1))


def edged(x: Volume, lift: float = _LIFT) -> Volume:
    """As of an edge-enhancing kernel: middle frequencies raised, the highest left as they are.

    The gain is `lift` at two fifths of the Nyquist frequency and falls to 1 on both sides.
    """

    def gain(radius: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        share = np.square(radius / _PEAK)
        raised: npt.NDArray[np.float64] = 1 + (lift - 1) * share * np.exp(1 - share)
        return raised

    return _filtered(x, gain)


def _filtered(
    x: Volume, gain: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> Volume:
    spectrum = np.fft.rfft2(x)
    radius = np.hypot(np.fft.fftfreq(x.shape[1])[:, None], np.fft.rfftfreq(x.shape[2])[None])
    return np.fft.irfft2(spectrum * gain(radius), x.shape[1:]).astype(np.float32)
