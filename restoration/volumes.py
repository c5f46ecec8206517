"""Volumes as a caller gives them: checked, on a finer grid, and at full strength again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from restoration.kspace import zero_fill

Volume = npt.NDArray[np.float32]
Spacing = tuple[float, float, float]  # z, y, x in mm


class Planes(Protocol):
    """A volume (slices, rows, columns) that gives its planes by their index: any array is one.

    What is no array may read or compute a plane when it is asked for it.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(slices, rows, columns)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the planes."""

    def __len__(self) -> int:
        """The number of slices."""

    def __getitem__(self, index: int, /) -> Any:
        """One plane (rows, columns)."""


class OnDemand:
    """Planes in single precision, each made when it is asked for and not held."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...], plane: Callable[[int], Volume]) -> None:
        self.shape = shape
        self._plane = plane

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int, /) -> Volume:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._plane(index)


def taken(volume: Planes, indices: Sequence[int]) -> Volume:
    """The slices of these indices, as an array of their own."""
    return np.stack([volume[index] for index in indices])


def whole(volume: Planes) -> npt.NDArray[Any]:
    """All planes as one array: the volume itself where it is one."""
    return volume if isinstance(volume, np.ndarray) else taken(volume, range(len(volume)))


def checked(volume: Planes) -> Volume:
    """The volume as float32; TypeError for what cannot be physical units, ValueError for values."""
    _require_units(volume)
    # torch cannot share memory that is read-only, as that of a mapped file is.
    x = np.require(whole(volume), dtype=np.float32, requirements=["C", "W"])
    for index, plane in enumerate(x):
        _require_finite(plane, index)
    return x


def checked_planes(volume: Planes) -> OnDemand:
    """The same of a volume whose planes are looked at when they are asked for, and no earlier."""
    _require_units(volume)

    def plane(index: int) -> Volume:
        found: Volume = np.require(volume[index], np.float32, ["C", "W"])
        _require_finite(found, index)
        return found

    return OnDemand(volume.shape, plane)


def zero_filled(x: Volume, factor: int) -> Volume:
    """(slices, rows, columns) on a grid `factor` times finer: `kspace.zero_fill`."""
    # Slice by slice, in double precision: the samples of the source come back as they were.
    slices = [zero_fill(torch.from_numpy(plane).double(), factor).float() for plane in x]
    return torch.stack(slices).numpy()


def finer(spacing: Spacing, factor: int) -> Spacing:
    """The spacing of that grid."""
    return spacing[0], spacing[1] / factor, spacing[2] / factor


def full_strength(x: Planes, y: Planes, strength: float) -> Planes:
    """What `y` would be if all of the change were applied to `x`; at strength 0, `y` itself."""
    if strength in (0.0, 1.0):
        return y

    def plane(index: int) -> Volume:
        full: Volume = x[index] + (y[index] - x[index]) / np.float32(strength)
        return full

    return OnDemand(x.shape, plane)


def _require_units(volume: Planes) -> None:
    if not hasattr(volume, "dtype") or not hasattr(volume, "shape"):
        raise TypeError(f"'volume' must be a NumPy array, not {type(volume).__name__}.")
    integer = np.issubdtype(volume.dtype, np.integer) and volume.dtype.itemsize > 1
    if not (integer or np.issubdtype(volume.dtype, np.floating)):
        raise TypeError(
            f"'volume' must hold floats or integers of 16 bits or more, not {volume.dtype}."
        )
    if len(volume.shape) != 3 or 0 in volume.shape:
        raise ValueError(
            f"'volume' must be (slices, rows, columns), none of them 0, not {volume.shape}."
        )


def _require_finite(plane: Volume, index: int) -> None:
    if not np.isfinite(plane).all():
        raise ValueError(f"Slice {index} of 'volume' holds a value that is not finite.")
