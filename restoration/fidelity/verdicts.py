"""What a gate says: values with bounds, a verdict for each slice, and one for the series.

Plain data without an image in it: what a ledger keeps, a report draws and a policy decides on.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Verdict(enum.Enum):
    """How a value stands to its bounds."""

    NOT_APPLICABLE = "not_applicable"  #: could not be judged; the gate's reason says why
    PASS = "pass"  # noqa: S105  #: inside the warning bounds
    WARN = "warn"  #: outside the warning bounds, inside those of failure
    FAIL = "fail"  #: outside the bounds of failure, or not a number where one was due


_SEVERITY = {verdict: rank for rank, verdict in enumerate(Verdict)}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The most severe of all; NOT_APPLICABLE when there is none."""
    return max(verdicts, key=_SEVERITY.__getitem__, default=Verdict.NOT_APPLICABLE)


@dataclass(frozen=True)
class Bounds:
    """An inclusive interval; None leaves a side open."""

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        ends = [end for end in (self.low, self.high) if end is not None]
        if any(math.isnan(end) for end in ends) or ends != sorted(ends):
            raise ValueError(f"no interval: {self.low} ... {self.high}")

    def __contains__(self, value: float) -> bool:
        return not (
            math.isnan(value)
            or (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
        )

    def to_list(self) -> list[float | None]:
        """[low, high] for JSON."""
        return [self.low, self.high]

    @classmethod
    def from_list(cls, values: Sequence[float | None]) -> Bounds:
        """Inverse of `to_list`; ValueError for anything but two ends in order."""
        if len(values) != 2:
            raise ValueError(f"bounds are [low, high], not {list(values)}")
        return cls(*values)


@dataclass(frozen=True)
class Levels:
    """Where a gate warns and where it fails."""

    warn: Bounds = Bounds()
    fail: Bounds = Bounds()

    def judge(self, value: float | None) -> Verdict:
        """The verdict on one value; None could not be measured."""
        if value is None:
            return Verdict.NOT_APPLICABLE
        if value not in self.fail:
            return Verdict.FAIL
        return Verdict.PASS if value in self.warn else Verdict.WARN

    def to_dict(self) -> dict[str, list[float | None]]:
        """Plain values for JSON."""
        return {"warn": self.warn.to_list(), "fail": self.fail.to_list()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Levels:
        """Inverse of `to_dict`; ValueError names what is unknown or no interval."""
        unknown = sorted(set(values) - {"warn", "fail"})
        if unknown:
            raise ValueError(f"unknown key in levels: {', '.join(unknown)}")
        return cls(*(Bounds.from_list(values.get(key, (None, None))) for key in ("warn", "fail")))


@dataclass(frozen=True)
class Gate:
    """One gate over a series: a value for each slice it looked at, or one for the series.

    `values[i]` belongs to slice `slices[i]`; `slices` is empty where the one value is of the whole
    series. None in `values` means that the slice gave nothing to measure (no bone, no hot spot).
    """

    name: str
    unit: str  #: UCUM-like: "HU", "%", "1" (a ratio), "sd"
    values: tuple[float | None, ...]
    slices: tuple[int, ...]
    levels: Levels
    reason: str = ""  #: why it does not apply, or what is wrong, in words for a person

    def __post_init__(self) -> None:
        if self.slices and len(self.slices) != len(self.values):
            raise ValueError(f"{self.name}: {len(self.values)} values, {len(self.slices)} slices")
        if not self.slices and len(self.values) > 1:
            raise ValueError(f"{self.name}: a series has one value, not {len(self.values)}")

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for each value."""
        return tuple(self.levels.judge(value) for value in self.values)

    @property
    def verdict(self) -> Verdict:
        """The most severe; NOT_APPLICABLE when nothing could be measured."""
        return worst(self.verdicts)

    @property
    def worst_slice(self) -> int | None:
        """The slice furthest beyond (or nearest to) its bounds; None without slices or values."""
        found = [
            (_SEVERITY[self.levels.judge(value)], self._pressure(value), -index)
            for value, index in zip(self.values, self.slices, strict=False)
            if value is not None
        ]
        return -max(found)[2] if found else None

    def _pressure(self, value: float) -> float:
        """How near to or far beyond the bounds of failure, to compare slices of one gate."""
        if not math.isfinite(value):
            return math.inf
        low, high = self.levels.fail.low, self.levels.fail.high
        if low is not None and high is not None:
            return abs(value - (low + high) / 2)
        if low is not None:
            return low - value
        return value if high is not None else abs(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the verdict and the worst slice are there for readers."""
        return {
            "name": self.name,
            "unit": self.unit,
            "values": [_plain(value) for value in self.values],
            "slices": list(self.slices),
            **self.levels.to_dict(),
            "verdict": self.verdict.value,
            "worst_slice": self.worst_slice,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Gate:
        """Inverse of `to_dict`; the verdict is judged again, never believed."""
        return cls(
            name=values["name"],
            unit=values["unit"],
            values=tuple(_number(value) for value in values["values"]),
            slices=tuple(values["slices"]),
            levels=Levels.from_dict({key: values[key] for key in ("warn", "fail")}),
            reason=values.get("reason", ""),
        )


@dataclass(frozen=True)
class Fidelity:
    """What all gates say about one restored series."""

    task: str
    slices: int  #: of the series
    gates: tuple[Gate, ...]
    calibrated: bool  #: levels learnt for this model; else the defaults of the program

    @property
    def verdict(self) -> Verdict:
        """The most severe of the gates."""
        return worst(gate.verdict for gate in self.gates)

    @property
    def slice_verdicts(self) -> tuple[Verdict, ...]:
        """The most severe for each slice; gates of the whole series count for none."""
        found: list[list[Verdict]] = [[] for _ in range(self.slices)]
        for gate in self.gates:
            for index, verdict in zip(gate.slices, gate.verdicts, strict=False):
                found[index].append(verdict)
        return tuple(worst(verdicts) for verdicts in found)

    @property
    def not_applicable(self) -> tuple[Gate, ...]:
        """The gates that judged nothing, each with its reason."""
        return tuple(gate for gate in self.gates if gate.verdict is Verdict.NOT_APPLICABLE)

    def named(self, name: str) -> Gate:
        """The gate of that name; KeyError when it was not run."""
        for gate in self.gates:
            if gate.name == name:
                return gate
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "task": self.task,
            "slices": self.slices,
            "calibrated": self.calibrated,
            "verdict": self.verdict.value,
            "slice_verdicts": [verdict.value for verdict in self.slice_verdicts],
            "gates": [gate.to_dict() for gate in self.gates],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fidelity:
        """Inverse of `to_dict`; verdicts are judged again, never believed."""
        return cls(
            task=values["task"],
            slices=values["slices"],
            gates=tuple(Gate.from_dict(gate) for gate in values["gates"]),
            calibrated=values["calibrated"],
        )


def _plain(value: float | None) -> float | str | None:
    # JSON has no word for these three, and a gate must be able to say them.
    return value if value is None or math.isfinite(value) else str(value)


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)
