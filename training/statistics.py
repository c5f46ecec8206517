"""Differences between methods; the unit is the subject, whose slices are not independent.

A difference is the mean over slices of the paired difference, as a table's figures are means over
slices. Its interval resamples subjects, each with all their slices (cluster bootstrap; Field &
Welsh, J R Stat Soc B 69, 2007). With fewer than five subjects there is no interval and nothing is
claimed: the difference of each subject is all there is to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST_SUBJECTS = 5
RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean paired difference of a figure, by subject and, with enough of them, with an interval."""

    mean: float  #: over slices
    subjects: Mapping[str, float]  #: mean over each subject's slices
    slices: int
    interval: tuple[float, float] | None = None  #: None with fewer than LEAST_SUBJECTS subjects

    @property
    def significant(self) -> bool:
        """Whether the interval exists and leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; ``interval`` only where there is one."""
        values: dict[str, object] = {
            "mean": self.mean, "slices": self.slices, "significant": self.significant,
            "subjects": dict(self.subjects),
        }  # fmt: skip
        if self.interval is not None:
            values["interval_95"] = list(self.interval)
        return values


def difference(pairs: Sequence[tuple[str, float]], seed: int = 0) -> Difference:
    """Of the (subject, paired difference) of each slice; ValueError for none."""
    if not pairs:
        raise ValueError("no slices to compare")
    by_subject: dict[str, list[float]] = {}
    for subject, value in pairs:
        by_subject.setdefault(subject, []).append(value)
    means = {subject: float(np.mean(values)) for subject, values in by_subject.items()}
    mean = float(np.mean([value for _, value in pairs]))
    interval = None
    if len(by_subject) >= LEAST_SUBJECTS:
        sums = np.array([np.sum(values) for values in by_subject.values()])
        counts = np.array([len(values) for values in by_subject.values()])
        interval = _interval(_resampled(sums, counts, seed))
    return Difference(mean, means, len(pairs), interval)


def average_difference(groups: Sequence[Sequence[tuple[str, float]]], seed: int = 0) -> Difference:
    """The mean over groups (tasks) of their differences, each group's subjects resampled apart.

    Without an interval where any group has fewer than LEAST_SUBJECTS subjects; ``subjects`` stays
    empty, since one subject may be in several groups.
    """
    parts = [difference(group, seed + i) for i, group in enumerate(groups)]
    mean = float(np.mean([part.mean for part in parts]))
    interval = None
    if all(part.interval is not None for part in parts):
        draws = [_group_draws(group, seed + i) for i, group in enumerate(groups)]
        interval = _interval(np.mean(draws, axis=0))
    return Difference(mean, {}, sum(part.slices for part in parts), interval)


def _group_draws(pairs: Sequence[tuple[str, float]], seed: int) -> npt.NDArray[np.float64]:
    names = sorted({subject for subject, _ in pairs})
    place = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names), int)
    for subject, value in pairs:
        sums[place[subject]] += value
        counts[place[subject]] += 1
    return _resampled(sums, counts, seed)


def _resampled(
    sums: npt.NDArray[np.float64], counts: npt.NDArray[np.int_], seed: int
) -> npt.NDArray[np.float64]:
    """Means over slices of RESAMPLES draws of as many subjects as there are."""
    chosen = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means: npt.NDArray[np.float64] = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    return means


def _interval(draws: npt.NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
