"""What a bundle knows about its gates: levels learnt from subjects, and what inputs are like.

A manifest keeps `Calibration.to_dict()` per task; `diffcode calibrate` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from restoration.fidelity.verdicts import Levels


@dataclass(frozen=True)
class InputModel:
    """What training inputs are like: `inputs.describe` of their slices, and how that spreads."""

    #: What each feature is expected to be, by what it depends on: (`inputs.COVARIATES`, features).
    coefficients: tuple[tuple[float, ...], ...]
    precision: tuple[tuple[float, ...], ...]  #: inverse covariance of what is left
    #: By the name of a gate, the weights of the features that tell best a way to differ: in SD.
    directions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = len(self.precision)
        rows = (*self.precision, *self.coefficients, *self.directions.values())
        if not self.coefficients or any(len(row) != size for row in rows):
            raise ValueError(f"coefficients, precision or directions are not of {size} features")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "coefficients": [list(row) for row in self.coefficients],
            "precision": [list(row) for row in self.precision],
            "directions": {name: list(row) for name, row in self.directions.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputModel:
        """Inverse of `to_dict`; ValueError for sizes that do not fit, or of an older program."""
        if "coefficients" not in values:
            raise ValueError("inputs learnt by an older program: run `diffcode calibrate` again")
        return cls(
            _matrix(values["coefficients"]),
            _matrix(values["precision"]),
            {name: _row(row) for name, row in values.get("directions", {}).items()},
        )


@dataclass(frozen=True)
class ScanModel:
    """What MR series of the training are like: `scans.texture`, and `scans.lines` of an axis."""

    texture: tuple[float, ...]  #: expected
    precision: tuple[tuple[float, ...], ...]  #: inverse covariance of the texture
    lines: tuple[float, ...]  #: expected along an axis without motion
    motion: tuple[float, ...]  #: weights, which way motion moves that; the value is in SD

    def __post_init__(self) -> None:
        size = len(self.texture)
        if any(len(row) != size for row in (self.precision, *self.precision)):
            raise ValueError(f"precision is not of {size} features")
        if len(self.lines) != len(self.motion):
            raise ValueError(f"{len(self.motion)} weights for {len(self.lines)} features")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "texture": list(self.texture),
            "precision": [list(row) for row in self.precision],
            "lines": list(self.lines),
            "motion": list(self.motion),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScanModel:
        """Inverse of `to_dict`; ValueError for sizes that do not fit."""
        return cls(
            _row(values["texture"]),
            _matrix(values["precision"]),
            _row(values["lines"]),
            _row(values["motion"]),
        )


def _matrix(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(_row(row) for row in rows)


def _row(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


@dataclass(frozen=True)
class Calibration:
    """The gates of one task of one model."""

    levels: Mapping[str, Levels]  #: by the name of the gate; others keep the program's
    inputs: InputModel | None = None
    basis: Mapping[str, Any] = field(default_factory=dict)  #: quantiles, subjects, slices, alarms
    scans: ScanModel | None = None  #: of MR

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "levels": {name: levels.to_dict() for name, levels in self.levels.items()},
            "inputs": None if self.inputs is None else self.inputs.to_dict(),
            "basis": dict(self.basis),
            **({} if self.scans is None else {"scans": self.scans.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_dict`; ValueError names what is unknown or out of order."""
        unknown = sorted(set(values) - {"levels", "inputs", "basis", "scans"})
        if unknown:
            raise ValueError(f"unknown key in calibration: {', '.join(unknown)}")
        inputs, scans = values.get("inputs"), values.get("scans")
        return cls(
            {name: Levels.from_dict(levels) for name, levels in values["levels"].items()},
            None if inputs is None else InputModel.from_dict(inputs),
            dict(values.get("basis", {})),
            # Of a program before `lines`: the gates on scans say that nothing was learnt.
            None if scans is None or "lines" not in scans else ScanModel.from_dict(scans),
        )
