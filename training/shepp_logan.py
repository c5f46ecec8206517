"""The head of Shepp and Logan (IEEE Trans. Nucl. Sci. 21, 1974) with the contrasts of Toft (1996).

Ten ellipses and nothing between them: the phantom without noise that everybody knows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]
# Value, half axes along columns and rows, centre (column, row), degrees.
_ELLIPSES = (
    (1.0, 0.69, 0.92, 0.0, 0.0, 0.0),
    (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0),
    (-0.2, 0.11, 0.31, 0.22, 0.0, -18.0),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18.0),
    (0.1, 0.21, 0.25, 0.0, 0.35, 0.0),
    (0.1, 0.046, 0.046, 0.0, 0.1, 0.0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0.0),
    (0.1, 0.046, 0.023, -0.08, -0.605, 0.0),
    (0.1, 0.023, 0.023, 0.0, -0.606, 0.0),
    (0.1, 0.023, 0.046, 0.06, -0.605, 0.0),
)
_TILT = 4.0  # degrees, of one head against another


def shepp_logan(slices: int, size: int = 256, seed: int = 0) -> Volume:
    """(slices, size, size) in arbitrary units up to 1000; another seed tilts the head."""
    tilts = np.random.default_rng(seed).uniform(-_TILT, _TILT, slices)
    return np.stack([_head(size, float(tilt)) for tilt in tilts]).astype(np.float32)


def _head(size: int, tilt: float) -> npt.NDArray[np.float64]:
    line = (np.arange(size) - (size - 1) / 2) / (size / 2)
    image = np.zeros((size, size))
    for value, along, down, x, y, degrees in _ELLIPSES:
        turn, whole = np.deg2rad(degrees + tilt), np.deg2rad(tilt)
        centre = x * np.cos(whole) - y * np.sin(whole), x * np.sin(whole) + y * np.cos(whole)
        right, up = line[None] - centre[0], -line[:, None] - centre[1]
        first = right * np.cos(turn) + up * np.sin(turn)
        second = -right * np.sin(turn) + up * np.cos(turn)
        image[(first / along) ** 2 + (second / down) ** 2 <= 1] += 1000 * value
    return np.maximum(image, 0)
