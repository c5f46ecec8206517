"""Volumes as a caller gives them: checked, on a finer grid, and at full strength again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from restoration.kspace import zero_fill

Volume = npt.NDArray[np.float32]
Spacing = tuple[float, float, float]  # z, y, x in mm


def checked(volume: npt.NDArray[np.generic]) -> Volume:
    """The volume as float32; TypeError for what cannot be physical units, ValueError for values."""
    if not isinstance(volume, np.ndarray):
        raise TypeError(f"'volume' must be a NumPy array, not {type(volume).__name__}.")
    integer = np.issubdtype(volume.dtype, np.integer) and volume.dtype.itemsize > 1
    if not (integer or np.issubdtype(volume.dtype, np.floating)):
        raise TypeError(
            f"'volume' must hold floats or integers of 16 bits or more, not {volume.dtype}."
        )
    if volume.ndim != 3 or 0 in volume.shape:
        raise ValueError(
            f"'volume' must be (slices, rows, columns), none of them 0, not {volume.shape}."
        )
    # torch cannot share memory that is read-only, as that of a mapped file is.
    x = np.require(volume, dtype=np.float32, requirements=["C", "W"])
    for index, plane in enumerate(x):
        if not np.isfinite(plane).all():
            raise ValueError(f"Slice {index} of 'volume' holds a value that is not finite.")
    return x


def zero_filled(x: Volume, factor: int) -> Volume:
    """(slices, rows, columns) on a grid `factor` times finer: `kspace.zero_fill`."""
    # Slice by slice, in double precision: the samples of the source come back as they were.
    slices = [zero_fill(torch.from_numpy(plane).double(), factor).float() for plane in x]
    return torch.stack(slices).numpy()


def finer(spacing: Spacing, factor: int) -> Spacing:
    """The spacing of that grid."""
    return spacing[0], spacing[1] / factor, spacing[2] / factor


def full_strength(x: Volume, y: Volume, strength: float) -> Volume:
    """What `y` would be if all of the change were applied to `x`; at strength 0, `y` itself."""
    if strength in (0.0, 1.0):
        return y
    full: Volume = x + (y - x) / np.float32(strength)
    return full
