"""A series restored and measured as if it were complete, while its quiet time runs.

Its job then finds what it would have made, where it asks for just that: the same files, task,
scale and strength. Whether it is complete, and what is decided on the result, is no affair of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydicom.dataset import Dataset

from dicom_node.inference import Engine
from dicom_node.restored_volumes import KeptSlices, RestoredVolumes, restore_volumes
from dicom_node.settings import NodeSettings

Slices = TypeVar("Slices", bound=KeptSlices)

__all__ = ["Rehearsal", "Subject", "rehearsed"]


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
class Rehearsal(Generic[Slices]):
    """What was made of it, and of which early results; these are read still when it is written."""

    subject: Subject
    kept: Slices
    volumes: RestoredVolumes


def rehearsed(
    subject: Subject,
    kept: Slices,
    headers: Mapping[Path, Dataset],
    engine: Engine,
    settings: NodeSettings,
    work: Path,
    is_disturbed: Callable[[], bool],
) -> Rehearsal[Slices] | None:
    """Restore and measure a series of which all slices are kept; errors as `restore_volumes`.

    None once it *is_disturbed*, which is asked after each slice.
    """

    def onwards(_done: int, _total: int) -> None:
        if is_disturbed():
            raise _DisturbedError

    try:
        volumes = restore_volumes(
            sorted(subject.files),
            subject.task,
            engine,
            settings,
            strength=subject.strength,
            kept=kept,
            known=headers,
            work=work,
            progress=onwards,
        )
    except _DisturbedError:
        return None
    return Rehearsal(subject, kept, volumes)
