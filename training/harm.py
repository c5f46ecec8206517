"""How many planted faults the gates catch, at how many false alarms; the unit is the slice.

Every gate says how far a value lies from its median, 1 at its level of failure. The score of a
slice is the largest of its gates. Detection is given at the levels as they are in the manifest, and
at the score that one in a hundred slices without a fault exceeds. Intervals are exact (Clopper and
Pearson, 1934); slices of one subject are not independent, so each subject stands beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from restoration.fidelity import Calibration, GateSpec, Levels, Measured
from restoration.fidelity.catalogue import BY_NAME
from restoration.restorer import Restorer
from training.calibrate import columns, measured
from training.faults import Planted
from training.restored import Series

Progress = Callable[[int, int, str], None]
Kind = tuple[str, str]  #: name and size of a fault
FALSE_ALARMS = 0.01
CONFIDENCE = 0.95
_TINY = 1e-9
_BEYOND = 1e6  # the score of a gate that no data can move and that failed


@dataclass(frozen=True)
class Slice:
    """What the gates said of one slice; NaN where they had nothing to judge."""

    task: str
    subject: str
    scores: Mapping[str, float]
    warned: bool = False  #: some gate is beyond its level of warning

    @property
    def failed(self) -> bool:
        """Some gate is beyond its level of failure."""
        return self.score > 1

    @property
    def score(self) -> float:
        """The largest of the gates; 0 where none had anything to judge."""
        known = [value for value in self.scores.values() if not math.isnan(value)]
        return max(known, default=0.0)


@dataclass(frozen=True)
class Rate:
    """So many of so many, with an exact interval."""

    hits: int
    total: int

    @property
    def share(self) -> float:
        """NaN without any."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's, of CONFIDENCE."""
        from scipy.stats import beta

        tail = (1 - CONFIDENCE) / 2
        missed = self.total - self.hits
        low = float(beta.ppf(tail, self.hits, missed + 1)) if self.hits else 0.0
        high = float(beta.ppf(1 - tail, self.hits + 1, missed)) if missed else 1.0
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"hits": self.hits, "total": self.total, "interval_95": list(self.interval)}


@dataclass(frozen=True)
class Caught:
    """One fault at one size in one task."""

    name: str
    size: str
    task: str
    shipped: Rate  #: by the levels of the manifest
    at_false_alarms: Rate  #: at FALSE_ALARMS of the slices without a fault
    gates: Mapping[str, Rate]  #: each gate alone, at FALSE_ALARMS of its own
    subjects: Mapping[str, Rate] = field(default_factory=dict)  #: at FALSE_ALARMS


def exceedance(spec: GateSpec, value: float, levels: Levels, median: float | None) -> float:
    """How far a value lies from the median of its gate, in distances to the level of failure."""
    if math.isnan(value):
        return math.nan
    if not spec.learn or median is None:
        return 0.0 if value in levels.fail else _BEYOND
    low, high = levels.fail.low, levels.fail.high
    scale = _log if spec.logarithmic else float
    middle, at = scale(median), scale(value)
    ends = [
        scale(end)
        for end in (low, high)
        if end is not None and (end - median) * (value - median) > 0
    ]
    found = [(at - middle) / (end - middle) for end in ends if end != middle]
    return max(found, default=0.0)


def slices_of(
    restorer: Restorer, planted: Planted, calibration: Calibration, *, every: int = 0
) -> list[Slice]:
    """What the gates say of the slices that were harmed."""
    series = planted.series
    found = measured(
        restorer,
        series,
        calibration.inputs,
        calibration.scans,
        every=every,
        intact=planted.intact,
    )
    return _scored(series, found, calibration, planted.slices)


def table(clean: Sequence[Slice], faulty: Mapping[Kind, Sequence[Slice]]) -> list[Caught]:
    """Rates of every fault and task; `clean` sets the false alarms, task by task."""
    rows = []
    for (name, size), slices in faulty.items():
        for task in sorted({each.task for each in slices}):
            mine = [each for each in slices if each.task == task]
            # A series on a wrong route is judged, and its alarms are counted, as of that route.
            own = [each for each in clean if each.task == task]
            limit = threshold([each.score for each in own])
            rows.append(
                Caught(
                    name,
                    size,
                    task,
                    _rate(each.failed for each in mine),
                    _rate(each.score > limit for each in mine),
                    _by_gate(own, mine),
                    {
                        subject: _rate(e.score > limit for e in mine if e.subject == subject)
                        for subject in sorted({each.subject for each in mine})
                    },
                )
            )
    return rows


def threshold(scores: Sequence[float], share: float = FALSE_ALARMS) -> float:
    """The score that at most `share` of the slices without a fault exceed; at least a whisker."""
    if not scores:
        return math.inf
    ordered = np.sort(np.asarray(scores))[::-1]
    allowed = int(share * len(ordered))
    return max(float(ordered[allowed]), _TINY)


def _by_gate(clean: Sequence[Slice], faulty: Sequence[Slice]) -> dict[str, Rate]:
    rates = {}
    for name in BY_NAME:
        values, own = _known(faulty, name), _known(clean, name)
        if values:
            limit = threshold(own) if own else 1.0
            rates[name] = _rate(value > limit for value in values)
    return rates


def _known(slices: Sequence[Slice], gate: str) -> list[float]:
    """The scores of a gate where it had something to judge."""
    found = (each.scores.get(gate, math.nan) for each in slices)
    return [score for score in found if not math.isnan(score)]


def _scored(
    series: Series,
    found: Mapping[str, Measured],
    calibration: Calibration,
    slices: Iterable[int],
) -> list[Slice]:
    medians = calibration.basis.get("medians", {})
    values = columns(found, len(series.lq))
    task = series.task
    specs = [BY_NAME[name] for name in values if task in BY_NAME[name].tasks]
    levels = {spec.name: calibration.levels.get(spec.name, spec.level(task)) for spec in specs}

    def judged(index: int) -> Slice:
        known = {spec.name: float(values[spec.name][index]) for spec in specs}
        return Slice(
            task.value,
            series.subject,
            {
                spec.name: exceedance(
                    spec, known[spec.name], levels[spec.name], medians.get(spec.name)
                )
                for spec in specs
            },
            any(
                not math.isnan(value) and value not in levels[name].warn
                for name, value in known.items()
            ),
        )

    return [judged(index) for index in slices]


def _rate(hits: Iterable[bool]) -> Rate:
    found = list(hits)
    return Rate(sum(found), len(found))


def _log(value: float) -> float:
    return math.log(max(value, _TINY))
