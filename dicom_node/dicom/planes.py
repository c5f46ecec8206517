"""Volumes that give their planes one by one: arrays, and what makes a plane when asked for it.

The model has a `Planes` and an `OnDemand` of its own: nothing down here may import its package,
which loads PyTorch, and it knows no node. They need no adapter, as both protocols ask for the same;
mypy holds them to each other in `dicom_node.inference`, where planes pass in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["OnDemand", "Planes"]


class Planes(Protocol):
    """A volume (slices, rows, columns); any array is one."""

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
    """Planes that are made when they are asked for, and not held."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        plane: Callable[[int], npt.NDArray[Any]],
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._plane = plane

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int, /) -> npt.NDArray[Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._plane(index)
