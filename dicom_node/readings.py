"""What a safety gate measured on a volume: plain data, as the ledger keeps it.

The engine measures and compares with the levels of its bundle; what follows from that is policy
(`gates`), what a person sees of it a report (`review`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

__all__ = ["GateReading", "Level"]

Bounds = tuple[float | None, float | None]


class Level(enum.StrEnum):
    """How a value stands to the levels of its gate, mildest first."""

    NOT_APPLICABLE = "not_applicable"  #: could not be measured; the reason says why
    PASS = "pass"  # noqa: S105
    WARN = "warn"  #: past the warning level
    FAIL = "fail"  #: past the limit

    @property
    def severity(self) -> int:
        """The rank among the levels, from 0."""
        return _RANKS[self]


_RANKS = {level: rank for rank, level in enumerate(Level)}


@dataclass(frozen=True)
class GateReading:
    """One gate on one volume: a value for each slice that it looked at, or one for the volume.

    `values[i]` and `levels[i]` belong to slice `slices[i]`, counted from 0 over the slices of the
    job; `slices` is empty where the one value is the volume's. None: nothing to measure there.
    """

    gate: str
    unit: str  #: "HU", "%", "1" (a ratio), "sd"
    values: tuple[float | None, ...]
    slices: tuple[int, ...]
    levels: tuple[Level, ...]
    warn: Bounds  #: inclusive; None leaves a side open
    fail: Bounds
    worst_slice: int | None = None
    reason: str = ""

    @property
    def level(self) -> Level:
        """The most severe of the levels."""
        return max(self.levels, key=lambda level: level.severity, default=Level.NOT_APPLICABLE)

    @property
    def worst_value(self) -> float | None:
        """The value of the worst slice, or that of the volume."""
        if not self.slices:
            return self.values[0] if self.values else None
        if self.worst_slice is None:
            return None
        return self.values[self.slices.index(self.worst_slice)]

    def shifted(self, first: int) -> Self:
        """The same reading where the volume's first slice is slice *first* of the job."""
        worst = None if self.worst_slice is None else self.worst_slice + first
        return replace(self, slices=tuple(i + first for i in self.slices), worst_slice=worst)

    def placed(self, place: Mapping[int, int] | Sequence[int]) -> Self:
        """The same reading where slice i is told as slice `place[i]`."""
        worst = None if self.worst_slice is None else place[self.worst_slice]
        return replace(self, slices=tuple(place[i] for i in self.slices), worst_slice=worst)

    def to_json(self) -> dict[str, Any]:
        """All of it but gate, unit, worst slice and reason, in values that JSON has."""
        return {
            "values": [_plain(value) for value in self.values],
            "slices": list(self.slices),
            "levels": [str(level) for level in self.levels],
            "warn": list(self.warn),
            "fail": list(self.fail),
        }

    @classmethod
    def from_report(cls, told: Mapping[str, Any]) -> Self:
        """The reading of which `reports.job` tells, one of its `gates`."""
        return cls(
            gate=told["gate"],
            unit=told["unit"],
            values=tuple(None if each is None else float(each) for each in told["values"]),
            slices=tuple(told["slices"]),
            levels=tuple(map(Level, told["levels"])),
            warn=tuple(told["warn"]),
            fail=tuple(told["fail"]),
            worst_slice=told["worst_slice"],
            reason=told["reason"] or "",
        )


def _plain(value: float | None) -> float | str | None:
    # JSON has no word for what is not finite, and a gate must be able to say it.
    return value if value is None or math.isfinite(value) else str(value)
