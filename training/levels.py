"""Levels of the gates from what they measured on subjects: quantiles, and room for another subject.

The unit of independence is the subject. A quantile over the slices of a few subjects says where
*their* slices end; the next subject differs. So each level is moved outwards from the median by a
factor, the least with which subjects left out of the learning, one after the other, give no more
alarms than was asked for.
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
_LEAST = 0.1  # of the level that the program has by default


@dataclass(frozen=True)
class Learnt:
    """Levels of a task, and how they were found."""

    levels: Mapping[str, Levels]
    medians: Mapping[str, float]
    factors: tuple[float, float]  #: of the warning and the failing levels
    alarms: tuple[float, float]  #: warnings and failures of the subjects that were left out


def learn(table: Table, task: RestorationTask) -> Learnt:
    """Warning and failing levels of every gate of a task with something to learn from.

    Raises ValueError for fewer than two subjects: nothing would say how subjects differ.
    """
    subjects = sorted({subject for rows in table.values() for subject in rows})
    if len(subjects) < 2:
        raise ValueError("levels need at least two subjects to learn from")
    warn = _margin(table, subjects, task, Level.WARN)
    fail = _margin(table, subjects, task, Level.FAIL)
    levels, medians = {}, {}
    for spec in _learnable(table):
        values = _pooled(table[spec.name], subjects)
        if values.size == 0:
            continue
        medians[spec.name] = float(np.median(values))
        inner = bounds(spec, values, task, Level.WARN, warn[0])
        outer = bounds(spec, values, task, Level.FAIL, fail[0])
        levels[spec.name] = Levels(inner, _around(outer, inner))
    return Learnt(levels, medians, (warn[0], fail[0]), (warn[1], fail[1]))


def bounds(
    spec: GateSpec, values: Values, task: RestorationTask, level: Level, factor: float
) -> Bounds:
    """From the quantile of each tail that the gate looks at, moved out from the median.

    Never nearer to zero than a share of the program's own level: rounding is no harm.
    """
    scaled = np.log(np.maximum(values, _TINY)) if spec.logarithmic else values
    middle = float(np.median(scaled))
    tails = (1 - level.quantile, level.quantile)
    ends = [middle + factor * (float(np.quantile(scaled, tail)) - middle) for tail in tails]
    low, high = (float(np.exp(end)) if spec.logarithmic else end for end in ends)
    default = getattr(spec.level(task), level.name.lower())
    if default.low is not None and default.low <= 0:
        low = min(low, _LEAST * default.low)  # 0 for the classifier: another task is never right
    if default.high is not None and default.high >= 0:
        high = max(high, _LEAST * default.high)
    if spec.name == "routing":
        low = max(low, 0.0)
    return Bounds(
        low if spec.learn in ("low", "both") else None,
        high if spec.learn in ("high", "both") else None,
    )


def alarms(table: Table, subject: str, levels: Mapping[str, Bounds]) -> float:
    """The share of a subject's slices in which some gate lies outside its bounds."""
    outside: npt.NDArray[np.bool_] | None = None
    for name, limits in levels.items():
        values = table[name].get(subject)
        if values is None:
            continue
        hit = np.array([not np.isnan(value) and value not in limits for value in values])
        outside = hit if outside is None else outside | hit
    return 0.0 if outside is None or outside.size == 0 else float(outside.mean())


def _margin(
    table: Table, subjects: Sequence[str], task: RestorationTask, level: Level
) -> tuple[float, float]:
    """The least factor with at most so many alarms on subjects left out; the alarms it gives."""
    share = 1.0
    for factor in _FACTORS:
        found = []
        for subject in subjects:
            others = [other for other in subjects if other != subject]
            levels = {
                spec.name: bounds(spec, values, task, level, factor)
                for spec in _learnable(table)
                if (values := _pooled(table[spec.name], others)).size
            }
            found.append(alarms(table, subject, levels))
        share = float(np.mean(found))
        if share <= level.alarms:
            return factor, share
    return _FACTORS[-1], share


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
