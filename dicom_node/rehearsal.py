"""A series restored, judged and written as if it were complete, while its quiet time runs.

Its job then finds what it would have made, where it asks for just that: the same files, task,
scale and strength, and for the files of the result the same time, destinations and note. Whether it
is complete is no affair of a rehearsal, and until its job has them no row names its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from pydicom.dataset import Dataset

from dicom_node.dicom.derived import DerivedInstance
from dicom_node.early_results import EarlyResults
from dicom_node.inference import Engine
from dicom_node.ledger.queue import Job, Output
from dicom_node.outgoing import written
from dicom_node.restored_volumes import KeptSlices, RestoredVolumes, restore_volumes
from dicom_node.restoring import RestoredSeries, restore_series
from dicom_node.settings import NodeSettings
from dicom_node.spool import StoredFile

Slices = TypeVar("Slices", bound=KeptSlices)

__all__ = ["Expected", "Rehearsal", "Subject", "Written", "rehearsed", "time_of"]

# A job that is made so many seconds after its last instance came is one of a series that is
# restored for the first time.
_TIMELY_S = 3600.0


class _DisturbedError(Exception):
    """Something else is to be done."""


@dataclass(frozen=True)
class Subject:
    """What a result rests on beside the engine and the settings; without a given MR scale."""

    series_instance_uid: str
    files: frozenset[Path]
    task: str
    strength: float


@dataclass(frozen=True)
class Expected:
    """What else the bytes of a result rest on."""

    created: datetime  #: the time that they bear
    destinations: tuple[str, ...]
    note: str | None

    @classmethod
    def of(cls, job: Job) -> Expected:
        """What a job asks for."""
        return cls(time_of(job), job.destinations, job.note)


@dataclass(frozen=True)
class Written:
    """A result in files of the folder of early results: as it is expected."""

    expected: Expected
    made: RestoredSeries  #: of which the instances are made
    outputs: tuple[Output, ...]

    @property
    def names(self) -> list[str]:
        """Of its files in the folder of its source series."""
        return [PurePosixPath(each.path).name for each in self.outputs]


@dataclass(frozen=True)
class Rehearsal(Generic[Slices]):
    """What was made of it, and of which early results; these are read still when it is written."""

    subject: Subject
    kept: Slices
    volumes: RestoredVolumes
    written: Written | None  #: None of a result that no destination may have


def time_of(job: Job) -> datetime:
    """The time that the results of a job bear, on every try: when the last of its source came.

    Of a job that is made later, to restore again what lies there, it is that of the job.
    """
    is_timely = job.created - job.received < _TIMELY_S
    return datetime.fromtimestamp(job.received if is_timely else job.created, UTC)


def rehearsed(
    subject: Subject,
    expected: Expected,
    kept: Slices,
    headers: Mapping[Path, Dataset],
    engine: Engine,
    settings: NodeSettings,
    results: EarlyResults,
    work: Path,
    is_disturbed: Callable[[], bool],
) -> Rehearsal[Slices] | None:
    """Restore, judge and write a series of which all slices are kept.

    None once it *is_disturbed*, which is asked after each slice. Raises as `restore_series`, and
    SpoolFullError where the files find no room. Unless all of them are written, none is left.
    """

    def onwards(_done: int = 0, _total: int = 0) -> None:
        if is_disturbed():
            raise _DisturbedError

    paths = sorted(subject.files)
    try:
        volumes = restore_volumes(
            paths,
            subject.task,
            engine,
            settings,
            strength=subject.strength,
            kept=kept,
            known=headers,
            work=work,
            progress=onwards,
        )
        made = restore_series(
            paths,
            subject.task,
            engine,
            settings,
            created=expected.created,
            destinations=expected.destinations,
            note=expected.note,
            strength=subject.strength,
            ahead=volumes,
        )
        if not made.judgement.sendable:
            return Rehearsal(subject, kept, volumes, None)
        outputs = _written_ahead(subject.series_instance_uid, made, results, onwards)
    except _DisturbedError:
        return None
    return Rehearsal(subject, kept, volumes, Written(expected, made, outputs))


def _written_ahead(
    series_uid: str, made: RestoredSeries, results: EarlyResults, onwards: Callable[[], None]
) -> tuple[Output, ...]:
    """The files of a result in the folder of early results: all of them, or none is left."""
    names: list[str] = []

    def write(instance: DerivedInstance) -> StoredFile:
        stored = results.store(series_uid, instance.pieces())
        names.append(PurePosixPath(stored.path).name)
        return stored

    try:
        return tuple(written(made.instances, write, onwards))
    except BaseException:
        results.remove(series_uid, names)
        raise
