"""Levels of the gates from what they measured on subjects: quantiles, and room for another subject.

The unit of independence is the subject. A quantile over the slices of a few subjects says where
*their* slices end; the next subject differs. So each level is moved outwards from the median by a
factor of its gate, the least with which subjects left out of the learning, one after the other,
give no more alarms than the gate's share of what was asked for of all.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from restoration.fidelity import GATES, Bounds, GateSpec, Levels
from restoration.tasks import RestorationTask

Values = npt.NDArray[np.float64]
#: Gate → subject → values of its slices (NaN where a slice had nothing), aligned over the gates.
Table = Mapping[str, Mapping[str, Values]]


class Level(enum.Enum):
    """A level: its quantile of slices, and the alarms it may raise on a subject left out."""

    WARN = (0.99, 0.05)
    FAIL = (0.999, 0.005)

    @property
    def quantile(self) -> float:
        """Of the slices of those it is learnt from."""
        quantile, _ = self.value
        return quantile

    @property
    def alarms(self) -> float:
        """Share of the slices of a subject that was left out."""
        _, alarms = self.value
        return alarms


_FACTORS = tuple(np.round(np.arange(1.0, 4.01, 0.1), 1).tolist())
_TINY = 1e-9
_GATES_AT_ONCE = 8  # of about twenty gates, many alarm on the same slices
_CLOSEST = 1.2  # of the median: a ratio that hardly varies on few subjects may on the next
_LEAST = 0.1  # of the level that the program has by default


@dataclass(frozen=True)
class Learnt:
    """Levels of a task, and how they were found."""

    levels: Mapping[str, Levels]
    medians: Mapping[str, float]
    factors: Mapping[str, tuple[float, float]]  #: of the warning and the failing level, by gate
    alarms: tuple[
        float, float
    ]  #: warnings and failures of the subjects that were left out, any gate


def learn(table: Table, task: RestorationTask) -> Learnt:
    """Warning and failing levels of every gate of a task with something to learn from.

    Raises ValueError for fewer than two subjects: nothing would say how subjects differ.
    """
    subjects = sorted({subject for rows in table.values() for subject in rows})
    if len(subjects) < 2:
        raise ValueError("levels need at least two subjects to learn from")
    margins = {level: _margins(table, subjects, task, level) for level in Level}
    levels, medians, factors = {}, {}, {}
    for spec in _learnable(table):
        values = _pooled(table[spec.name], subjects)
        if values.size == 0:
            continue
        medians[spec.name] = float(np.median(values))
        inner, outer = (
            bounds(spec, Spread.of(spec, values, level), task, level, margins[level][0][spec.name])
            for level in Level
        )
        levels[spec.name] = Levels(inner, _around(outer, inner))
        factors[spec.name] = (margins[Level.WARN][0][spec.name], margins[Level.FAIL][0][spec.name])
    return Learnt(levels, medians, factors, (margins[Level.WARN][1], margins[Level.FAIL][1]))


@dataclass(frozen=True)
class Spread:
    """Where the values of a gate lie: median and both tails, on the gate's own scale."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, spec: GateSpec, values: Values, level: Level) -> Spread:
        """Of pooled values, at least one."""
        scaled = np.log(np.maximum(values, _TINY)) if spec.logarithmic else values
        tails = np.quantile(scaled, [0.5, 1 - level.quantile, level.quantile])
        return cls(*(float(each) for each in tails))


def bounds(
    spec: GateSpec, spread: Spread, task: RestorationTask, level: Level, factor: float
) -> Bounds:
    """The tails that the gate looks at, moved out from the median by a factor.

    Never nearer to zero than a share of the program's own level, for rounding is no harm, and never
    nearer to the median of a ratio than _CLOSEST.
    """
    ends = (spread.middle + factor * (end - spread.middle) for end in (spread.low, spread.high))
    low, high = (float(np.exp(end)) if spec.logarithmic else end for end in ends)
    if spec.logarithmic:
        low = min(low, float(np.exp(spread.middle)) / _CLOSEST)
        high = max(high, float(np.exp(spread.middle)) * _CLOSEST)
    default = getattr(spec.level(task), level.name.lower())
    if default.low is not None and default.low <= 0:
        low = min(low, _LEAST * default.low)
    if default.high is not None and default.high >= 0:
        high = max(high, _LEAST * default.high)
    return Bounds(
        low if spec.learn in ("low", "both") else None,
        high if spec.learn in ("high", "both") else None,
    )


def alarms(table: Table, subject: str, levels: Mapping[str, Bounds]) -> float:
    """The share of a subject's slices in which some gate lies outside its bounds."""
    outside = [
        _outside(table[name][subject], limits)
        for name, limits in levels.items()
        if subject in table[name]
    ]
    return float(np.any(outside, axis=0).mean()) if outside else 0.0


def _outside(values: Values, limits: Bounds) -> npt.NDArray[np.bool_]:
    """NaN, nothing to measure, is outside nothing."""
    low = -np.inf if limits.low is None else limits.low
    high = np.inf if limits.high is None else limits.high
    return (values < low) | (values > high)


def _margins(
    table: Table, subjects: Sequence[str], task: RestorationTask, level: Level
) -> tuple[dict[str, float], float]:
    """The factor of each gate, and the alarms of all of them on subjects left out."""
    spreads = {
        subject: _spreads(table, [other for other in subjects if other != subject], level)
        for subject in subjects
    }

    def left_out(names: Sequence[str], factors: Mapping[str, float]) -> float:
        found = [
            alarms(
                table,
                subject,
                {
                    spec.name: bounds(spec, spread, task, level, factors[spec.name])
                    for spec, spread in spreads[subject]
                    if spec.name in names
                },
            )
            for subject in subjects
        ]
        return float(np.mean(found))

    names = [spec.name for spec in _learnable(table)]
    share = level.alarms / _GATES_AT_ONCE
    factors = {
        name: next(
            (factor for factor in _FACTORS if left_out([name], {name: factor}) <= share),
            _FACTORS[-1],
        )
        for name in names
    }
    return factors, left_out(names, factors)


def _spreads(table: Table, subjects: Sequence[str], level: Level) -> list[tuple[GateSpec, Spread]]:
    pooled = [(spec, _pooled(table[spec.name], subjects)) for spec in _learnable(table)]
    return [(spec, Spread.of(spec, values, level)) for spec, values in pooled if values.size]


def _learnable(table: Table) -> list[GateSpec]:
    return [spec for spec in GATES if spec.learn and spec.name in table]


def _pooled(rows: Mapping[str, Values], subjects: Sequence[str]) -> Values:
    values = np.concatenate([np.empty(0), *(rows[name] for name in subjects if name in rows)])
    pooled: Values = values[~np.isnan(values)]
    return pooled


def _around(outer: Bounds, inner: Bounds) -> Bounds:
    """The failing bounds, never inside the warning ones."""
    low = None if outer.low is None or inner.low is None else min(outer.low, inner.low)
    high = None if outer.high is None or inner.high is None else max(outer.high, inner.high)
    return Bounds(low, high)
