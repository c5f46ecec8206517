"""Levels of the gates from what they measured on subjects: quantiles, and room for another subject.

The unit of independence is the subject. A quantile over the slices of a few subjects says where
*their* slices end; the next subject differs. So each level is moved outwards twice:

- from the median by a factor of its gate, the least with which subjects left out of the learning,
  one after the other, give no more alarms than the gate's share of what was asked for of all;
- at least to the tolerance limit over subjects: a normal distribution of the subjects' extreme
  slices has a share `Level.content` of subjects inside it, with a confidence of CONFIDENCE. Its
  factor is exact and grows as subjects get fewer (noncentral t; Hahn and Meeker, Statistical
  Intervals, 4.4).

A gate that fewer than LEAST_SUBJECTS subjects speak for keeps the level of the program. The next
of n alike subjects is more extreme than all of them with a probability of 1 / (n + 1) on each side:
with fewer than 19 that alone is more than one in twenty, and nothing in their slices can tell.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from restoration.fidelity import GATES, Bounds, GateSpec, Levels
from restoration.fidelity.catalogue import BY_NAME
from restoration.tasks import RestorationTask

Values = npt.NDArray[np.float64]
#: Gate → subject → values of its slices (NaN where a slice had nothing), aligned over the gates.
Table = Mapping[str, Mapping[str, Values]]

LEAST_SUBJECTS = 19
CONFIDENCE = 0.95
_FACTORS = tuple(np.round(np.arange(1.0, 4.01, 0.1), 1).tolist())
_TINY = 1e-9
_GATES_AT_ONCE = 8  # of about twenty gates, many alarm on the same slices
_CLOSEST = 1.2  # of the median: a ratio that hardly varies on few subjects may on the next


class Level(enum.Enum):
    """A level: its quantile of slices, the alarms it may raise, and the subjects inside it."""

    WARN = (0.99, 0.02, 0.99)
    FAIL = (0.999, 0.005, 0.9975)

    @property
    def quantile(self) -> float:
        """Of the slices of those it is learnt from."""
        quantile, _, _ = self.value
        return quantile

    @property
    def alarms(self) -> float:
        """Share of the slices of a subject that was left out."""
        _, alarms, _ = self.value
        return alarms

    @property
    def content(self) -> float:
        """Share of all subjects whose slices lie inside one end of one gate."""
        _, _, content = self.value
        return content


@dataclass(frozen=True)
class Learnt:
    """Levels of a task, and how they were found."""

    levels: Mapping[str, Levels]
    medians: Mapping[str, float]
    factors: Mapping[str, tuple[float, float]]  #: of the warning and the failing level, by gate
    alarms: tuple[float, float] | None
    """Warnings and failures of the subjects that were left out, any learnt gate; None without."""
    kept: Mapping[str, int]
    """Gates that keep the level of the program, and how many subjects spoke for each."""


def learn(table: Table, task: RestorationTask, least: int = LEAST_SUBJECTS) -> Learnt:
    """Warning and failing levels of every gate of a task that enough subjects speak for.

    Raises ValueError for fewer than two subjects: nothing would say how subjects differ.
    """
    subjects = sorted({subject for rows in table.values() for subject in rows})
    if len(subjects) < 2:
        raise ValueError("levels need at least two subjects to learn from")
    counts = {
        spec.name: len(_known(table[spec.name], subjects))
        for spec in GATES
        if spec.learns(task) and spec.name in table
    }
    kept = {name: count for name, count in counts.items() if count < max(2, least)}
    measured = {
        spec.name: _known(table[spec.name], subjects) for spec in GATES if spec.name in table
    }
    medians = {
        name: float(np.median(np.concatenate(rows)))
        for name, rows in measured.items()
        if rows and BY_NAME[name].learn
    }
    learnable = {name: rows for name, rows in table.items() if name in counts and name not in kept}
    margins = {level: _margins(learnable, subjects, task, level) for level in Level}
    levels, factors = {}, {}
    for spec in _specs(learnable):
        rows = _known(table[spec.name], subjects)
        both = [margins[level][0][spec.name] for level in Level]
        inner, outer = (
            bounds(spec, Spread.of(spec, rows, level), task, level, factor)
            for level, factor in zip(Level, both, strict=True)
        )
        levels[spec.name] = Levels(inner, _around(outer, inner))
        factors[spec.name] = (both[0], both[1])
    shares = (margins[Level.WARN][1], margins[Level.FAIL][1]) if levels else None
    return Learnt(levels, medians, factors, shares, kept)


@dataclass(frozen=True)
class Spread:
    """Where the values of a gate lie on the gate's own scale: median, and both ends twice."""

    middle: float
    tails: tuple[float, float]  #: quantiles of the slices
    limits: tuple[float, float]  #: tolerance limits over the subjects

    @classmethod
    def of(cls, spec: GateSpec, rows: Sequence[Values], level: Level) -> Spread:
        """Of the values of each subject, at least one of at least one subject; no NaN."""
        scaled = [np.log(np.maximum(row, _TINY)) if spec.logarithmic else row for row in rows]
        pooled = np.concatenate(scaled)
        middle, low, high = np.quantile(pooled, [0.5, 1 - level.quantile, level.quantile])
        lowest, highest = (np.array([end(row) for row in scaled]) for end in (np.min, np.max))
        if len(rows) < 2:
            return cls(float(middle), (float(low), float(high)), (float(low), float(high)))
        factor = tolerance_factor(len(rows), level.content)
        limits = (
            float(lowest.mean() - factor * lowest.std(ddof=1)),
            float(highest.mean() + factor * highest.std(ddof=1)),
        )
        return cls(float(middle), (float(low), float(high)), limits)


@functools.lru_cache(maxsize=256)
def tolerance_factor(subjects: int, content: float, confidence: float = CONFIDENCE) -> float:
    """How many SD above the mean of a normal sample the one-sided tolerance limit lies."""
    from scipy.stats import nct, norm

    root = math.sqrt(subjects)
    return float(nct.ppf(confidence, subjects - 1, root * norm.ppf(content)) / root)


def bounds(
    spec: GateSpec, spread: Spread, task: RestorationTask, level: Level, factor: float
) -> Bounds:
    """The tails that the gate looks at, moved out from the median by a factor.

    Never inside the tolerance limits over subjects, as far as the program lets any model go; never
    nearer to zero than a share of the program's own level, for rounding is no harm; and never
    nearer to the median of a ratio than _CLOSEST.
    """
    default = getattr(spec.level(task), level.name.lower())
    middle, (lowest, highest) = spread.middle, spread.limits
    low, high = (middle + factor * (tail - middle) for tail in spread.tails)
    if spec.logarithmic:
        lowest = min(lowest, middle - math.log(_CLOSEST))
        highest = max(highest, middle + math.log(_CLOSEST))
        low, high, lowest, highest = map(math.exp, (low, high, lowest, highest))
    low = min(low, lowest if default.low is None else max(lowest, default.low))
    high = max(high, highest if default.high is None else min(highest, default.high))
    if default.low is not None and default.low <= 0:
        low = min(low, spec.least * default.low)
    if default.high is not None and default.high >= 0:
        high = max(high, spec.least * default.high)
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

    names = [spec.name for spec in _specs(table)]
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
    rows = [(spec, _known(table[spec.name], subjects)) for spec in _specs(table)]
    return [(spec, Spread.of(spec, values, level)) for spec, values in rows if values]


def _specs(table: Table) -> list[GateSpec]:
    return [spec for spec in GATES if spec.name in table]


def _known(rows: Mapping[str, Values], subjects: Sequence[str]) -> list[Values]:
    """The values of each subject that has any."""
    found = [rows[name][~np.isnan(rows[name])] for name in subjects if name in rows]
    return [values for values in found if values.size]


def _around(outer: Bounds, inner: Bounds) -> Bounds:
    """The failing bounds, never inside the warning ones."""
    low = None if outer.low is None or inner.low is None else min(outer.low, inner.low)
    high = None if outer.high is None or inner.high is None else max(outer.high, inner.high)
    return Bounds(low, high)
