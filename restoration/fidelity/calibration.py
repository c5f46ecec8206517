"""What a bundle knows about its gates: levels learnt from subjects, and what inputs are like.

A manifest keeps `Calibration.to_dict()` per task; `diffcode calibrate` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from restoration.fidelity.verdicts import Levels


@dataclass(frozen=True)
class InputModel:
    """Mean and inverse covariance of `measures.input_features` over training slices."""

    mean: tuple[float, ...]
    precision: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        size = len(self.mean)
        if len(self.precision) != size or any(len(row) != size for row in self.precision):
            raise ValueError(f"the precision of {size} features is not {size} x {size}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"mean": list(self.mean), "precision": [list(row) for row in self.precision]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputModel:
        """Inverse of `to_dict`; ValueError for sizes that do not fit."""
        return cls(
            tuple(float(value) for value in values["mean"]),
            tuple(tuple(float(value) for value in row) for row in values["precision"]),
        )


@dataclass(frozen=True)
class Calibration:
    """The gates of one task of one model."""

    levels: Mapping[str, Levels]  #: by the name of the gate; others keep the program's
    inputs: InputModel | None = None
    basis: Mapping[str, Any] = field(default_factory=dict)  #: quantiles, subjects, slices, alarms

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "levels": {name: levels.to_dict() for name, levels in self.levels.items()},
            "inputs": None if self.inputs is None else self.inputs.to_dict(),
            "basis": dict(self.basis),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_dict`; ValueError names what is unknown or out of order."""
        unknown = sorted(set(values) - {"levels", "inputs", "basis"})
        if unknown:
            raise ValueError(f"unknown key in calibration: {', '.join(unknown)}")
        inputs = values.get("inputs")
        return cls(
            {name: Levels.from_dict(levels) for name, levels in values["levels"].items()},
            None if inputs is None else InputModel.from_dict(inputs),
            dict(values.get("basis", {})),
        )
