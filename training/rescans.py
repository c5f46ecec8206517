"""The same head scanned another time: moved a little between the scans, and with noise of its own.

Truncated k-space holds no noise of ours, so that a series of MR has one degraded version alone.
Another scan of the subject would have another position on the grid and other thermal noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from restoration.restorer import Restoration
from restoration.tasks import RestorationTask, intensity_scale
from training.degrade import truncate_kspace
from training.restored import Series

Volume = npt.NDArray[np.float32]
_TURN = 6.0  # degrees to either side
_SHIFT = 6.0  # pixels of the full matrix to either side
_ROOM = 12  # pixels of air on each side
_NOISE = 0.02  # of the median of what is no air, in each channel, at the full matrix
_AIR = 0.05  # of the scale of the series


def rescanned(
    series: Series, restore: Callable[[Volume], Restoration], rng: np.random.Generator, name: str
) -> Series:
    """Another scan of an MR series, restored by `restore`."""
    # Series are cropped to the head; a scanner's field of view leaves room around it.
    wide = np.pad(series.hq, ((0, 0), (_ROOM, _ROOM), (_ROOM, _ROOM)))
    full = _turned(wide, float(rng.uniform(-_TURN, _TURN)), rng.uniform(-_SHIFT, _SHIFT, 2))
    level = float(np.median(full[full > _AIR * full.max()]))
    real, imaginary = _NOISE * level * rng.standard_normal((2, *full.shape))
    hq = np.hypot(full + real, imaginary).astype(np.float32)
    lq = truncate_kspace(hq)
    scale = np.float32(intensity_scale(lq, RestorationTask.MRI_SR))
    lq, hq = lq * scale, hq * scale
    return replace(series, name=name, lq=lq, hq=hq, made=restore(lq))


def _turned(volume: Volume, degrees: float, shift: npt.NDArray[np.float64]) -> Volume:
    """All slices alike, by cubic splines; what comes in from outside is air."""
    from scipy.ndimage import affine_transform

    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (np.array(volume.shape[1:]) - 1) / 2
    offset = centre - turn @ (centre + shift)
    turned = np.stack([affine_transform(plane, turn, offset, order=3) for plane in volume])
    positive: Volume = np.maximum(turned, 0).astype(np.float32)
    return positive
