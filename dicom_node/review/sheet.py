"""What a report shows: which slices, and the facts beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicom_node.dicom.header import text
from dicom_node.dicom.planes import Planes
from dicom_node.dicom.reports import Restoration
from dicom_node.gates import Judgement
from dicom_node.ledger.states import Verdict
from dicom_node.readings import GateReading, Level
from dicom_node.settings import ReviewSettings

Plane = NDArray[np.float32]
_WANTED = {
    "always": frozenset(Verdict),
    "warned": frozenset({Verdict.WARN, Verdict.HOLD, Verdict.REFUSE}),
    "held": frozenset({Verdict.HOLD, Verdict.REFUSE}),
    "never": frozenset[Verdict](),
}


@dataclass(frozen=True)
class Picture:
    """One slice before and after, in physical units."""

    index: int  #: from 0, among the slices of the job in the order of their volumes
    source: Plane  #: (rows, columns)
    restored: Plane  #: the same, or a whole number of times as fine
    #: Gravest level of a gate there, how many gates have it, and how many find it worst there.
    severity: tuple[int, int, int]


@dataclass(frozen=True)
class Sheet:
    """The content of one report."""

    restoration: Restoration
    series_uid: str  #: of the result
    pictures: tuple[Picture, ...]
    slices: int
    readings: tuple[GateReading, ...]  #: slices counted as in `pictures`
    judgement: Judgement
    header: Dataset  #: of a source slice, without pixels

    @property
    def modality(self) -> str:
        """CT, MR or PT."""
        return text(self.header, "Modality")

    def shown(self, further: int) -> tuple[Picture, ...]:
        """The worst slice first, then so many others spread over the job."""
        if not self.pictures:
            return ()
        worst = max(self.pictures, key=lambda each: (each.severity, -each.index))
        others = [each for each in self.pictures if each is not worst]
        return (worst, *(others[i] for i in spread(len(others), further)))


def is_wanted(verdict: Verdict, settings: ReviewSettings) -> bool:
    """Whether a result of this verdict gets a report."""
    return verdict in _WANTED[settings.write]


def pictures(
    source: Planes,
    restored: Planes,
    readings: Sequence[GateReading],
    *,
    first: int,
    further: int,
) -> list[Picture]:
    """The worst slice of a volume and so many others of it, in order.

    source: (S, R, C); restored: the same, or on a finer grid. readings: of this volume, its slices
    counted from 0. first: the volume's first slice among those of the job.
    """
    severities = _severities(len(source), readings)
    worst = max(range(len(source)), key=lambda i: (severities[i], -i))
    others = [i for i in range(len(source)) if i != worst]
    wanted = sorted({worst, *(others[i] for i in spread(len(others), further))})
    # Copies: the volumes go when the next one comes.
    return [Picture(first + i, source[i].copy(), restored[i].copy(), severities[i]) for i in wanted]


def spread(count: int, wanted: int) -> list[int]:
    """So many of `count` indices, evenly apart and none at an end unless all are wanted."""
    if wanted >= count:
        return list(range(count))
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]


def _severities(slices: int, readings: Sequence[GateReading]) -> list[tuple[int, int, int]]:
    """Of each slice: its gravest level, how many gates have that, and how many find it worst.

    Where all is well, the slice that most gates find worst is the one to look at; where it is not,
    the one of those that fail.
    """
    at = [[0] * len(Level) for _ in range(slices)]
    for reading in readings:
        for i, level in zip(reading.slices, reading.levels, strict=False):
            at[i][level.severity] += 1
    found = []
    for i, counts in enumerate(at):
        gravest = max((rank for rank, count in enumerate(counts) if count), default=0)
        is_calm = gravest <= Level.PASS.severity
        nearest = sum(
            reading.worst_slice == i and (is_calm or reading.level.severity == gravest)
            for reading in readings
        )
        found.append((0, 0, nearest) if is_calm else (gravest, counts[gravest], nearest))
    return found
