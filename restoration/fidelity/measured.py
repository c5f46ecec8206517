"""The values of one gate, and which of the pixels that they come from are finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """The values of one gate: of `slices`, or one of the series where that is empty."""

    values: tuple[float | None, ...]
    slices: tuple[int, ...] = ()
    reason: str = ""  #: why there is none, or what the number means


def broken_in(plane: Volume) -> float:
    """How many values are not finite."""
    # Where the sum is finite, so are its parts; of another, there is more to see.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(plane.sum(dtype=np.float32)):
            return 0.0
    return float((~np.isfinite(plane)).sum())


def mended(volume: Volume) -> Volume:
    """With zeros for the values that are not finite, so that the others can be measured."""
    return np.nan_to_num(volume, nan=0.0, posinf=0.0, neginf=0.0)


def per_slice(values: npt.NDArray[np.floating[Any]], reason: str = "") -> Measured:
    """Values of all slices of a series, in order; NaN is none."""
    plain = tuple(None if math.isnan(value) else float(value) for value in values)
    if not reason and all(value is None for value in plain):
        reason = "nothing to measure in any slice"
    return Measured(plain, tuple(range(len(plain))), reason)


def of_neighbours(values: npt.NDArray[np.floating[Any]]) -> Measured:
    """As `per_slice`, of what a slice has in common with those around it."""
    found = per_slice(values)
    unknown = all(value is None for value in found.values)
    return Measured(
        found.values, found.slices, "needs neighbouring slices that differ" if unknown else ""
    )
