"""Planted faults in a node without its network: engines, policies, and a process that may die."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, event

from dicom_node.dicom.header import InstanceSummary, instance_summary
from dicom_node.inference import (
    DomainVerdict,
    MadeSlice,
    ModelIdentity,
    Progress,
    RestorationRequest,
    RestorationResult,
    SliceRequest,
    _readings,
)
from dicom_node.readings import GateReading, Level
from dicom_node.restored_volumes import seeds
from restoration.fidelity import assess
from tests.factories import make_series

TASKS = {"CT": "ct_denoise", "MR": "mri_sr", "PT": "pet_synthesis"}
DESTINATIONS = ("pacs", "research", "backup")
ACTIONS = ("pass", "warn", "hold", "refuse")
ROWS = 16


class CrashError(BaseException):
    """The process is gone: nothing of ours may handle it."""


# ---- faults ----


@dataclass(frozen=True)
class Fault:
    """What a broken engine makes of a slice, and what it then does with the slices of a volume."""

    name: str
    of_slice: Callable[[Any], Any]
    #: Which of the two quick gates must see it; None: as much as neighbouring slices differ.
    fails: frozenset[str] | None
    of_volume: Callable[[Any], Any] | None = None  #: None: they stay as they are


def _lesion(x: Any) -> Any:
    made = x.copy()
    made[..., 6:10, 6:10] += 200.0
    return made


def _noise(x: Any) -> Any:
    return x + 80 * np.sign(np.indices(x.shape)[-2:].sum(0) % 2 - 0.5)


def _good(x: Any) -> Any:
    return x + 0.01


FAULTS = (
    Fault("none", _good, frozenset()),
    Fault("offset", lambda x: x + 60.0, frozenset({"gain", "range"})),
    Fault("contrast", lambda x: x * 1.5 + 50.0, frozenset({"gain", "range"})),
    Fault("lesion", _lesion, frozenset({"range"})),
    Fault("noise", _noise, frozenset({"range"})),
    Fault("slices swapped", _good, None, lambda x: x[::-1]),
)


def quick_gates(x: Any, y: Any) -> tuple[GateReading, ...]:
    """Two gates over the pixels: the change of the mean, and the largest change of a pixel."""
    drift, largest = float(abs((y - x).mean())), float(abs(y - x).max())
    return tuple(
        GateReading(name, "1", (value,), (), (level,), (None, limit / 2), (None, limit))
        for name, value, limit in (("gain", drift, 20.0), ("range", largest, 40.0))
        for level in (Level.FAIL if value > limit else Level.PASS,)
    )


@dataclass(frozen=True)
class Said:
    """What an engine made of a volume, and what its gates measured."""

    readings: tuple[GateReading, ...]
    planes: Mapping[str, NDArray[np.float32]]  #: by SOP Instance UID of the source

    @property
    def failed(self) -> frozenset[str]:
        """The gates past their limits."""
        return frozenset(each.gate for each in self.readings if each.level is Level.FAIL)

    @property
    def warned(self) -> bool:
        """Whether a gate is past its warning level alone."""
        return any(each.level is Level.WARN for each in self.readings)


@dataclass
class Planted:
    """The engine's seam with the pixels of a fault; what its gates said is kept for the oracle."""

    fault: Fault
    real: bool  #: the model's own gates look at the pixels, not the quick ones
    model: ModelIdentity
    tasks: tuple[str, ...] = tuple(TASKS.values())
    #: By the seeds of its slices: what the gates measured, and what was made of each.
    _said: dict[frozenset[int], tuple[tuple[GateReading, ...], dict[int, Any]]] = field(
        default_factory=dict
    )

    def said(self, sop_instance_uids: Sequence[str]) -> Said:
        """Of the volume of these source instances."""
        names: Any = [SimpleNamespace(SOPInstanceUID=uid) for uid in sop_instance_uids]
        given = seeds(names, self.model)
        readings, made = self._said[frozenset(given)]
        planes = {u: made[seed] for u, seed in zip(sop_instance_uids, given, strict=True)}
        return Said(readings, planes)

    def judge(self, task: str, facts: Any) -> DomainVerdict:
        return DomainVerdict()

    def parameters(self, task: str) -> dict[str, Any]:
        return {}

    def basis(self, task: str) -> str | None:
        by_slice = task == TASKS["CT"] and self.fault.of_volume is None
        return "as ever" if by_slice else None

    def restore_slice(self, request: SliceRequest) -> MadeSlice | None:
        return MadeSlice(b"facts", self._slice(np.asarray(request.array)).tobytes())

    def plane(self, made: MadeSlice, shape: tuple[int, int]) -> Any:
        return np.frombuffer(made.plane, np.float32).reshape(shape)

    def probed(self, task: str, slices: int) -> Sequence[int]:
        return (0,)

    def probe_slice(self, request: SliceRequest, facts: bytes) -> bytes | None:
        return facts + b", twice"

    def restore(
        self, request: RestorationRequest, progress: Progress | None = None
    ) -> RestorationResult:
        source = np.stack([np.asarray(request.array[n]) for n in range(len(request.array))])
        made = np.stack([self._kept(request, n) for n in range(len(source))])
        if self.fault.of_volume is not None:
            made = self.fault.of_volume(made).copy()
        if self.real:
            readings = tuple(_readings(assess(source, made, request.task)))
        else:
            readings = quick_gates(source, made)
        by_seed = dict(zip(request.seeds, made, strict=True))
        self._said[frozenset(request.seeds)] = readings, by_seed
        return RestorationResult(made, self.model, (), 0.0, {}, readings=readings, calibrated=True)

    def _kept(self, request: RestorationRequest, number: int) -> NDArray[np.float32]:
        source = np.asarray(request.array[number])
        kept = request.kept
        plane = kept.plane(number) if kept is not None and kept.facts(number) is not None else None
        if plane is None:
            return self._slice(source)
        return np.frombuffer(plane, np.float32).reshape(source.shape)

    def _slice(self, source: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(self.fault.of_slice(source), dtype=np.float32)


# ---- policies ----


def random_policy(dice: random.Random) -> dict[str, Any]:
    """Some policy that the settings allow."""

    def actions() -> dict[str, str]:
        return {
            gate: dice.choice(ACTIONS)
            for gate in ("gain", "range", "structure", "whiteness")
            if dice.random() < 0.4
        }

    return {
        "on_fail": dice.choice(ACTIONS),
        "actions": actions(),
        "by_modality": {m: actions() for m in TASKS if dice.random() < 0.5},
        "by_destination": {d: actions() for d in DESTINATIONS if dice.random() < 0.5},
    }


def allowed(policy: Mapping[str, Any], gate: str, modality: str, destination: str) -> str:
    """The oracle's reading of the policy: the nearest table that names the gate."""
    found: str = policy["on_fail"]
    for table in (
        policy["actions"],
        policy["by_modality"].get(modality, {}),
        policy["by_destination"].get(destination, {}),
    ):
        found = table.get(gate, found)
    return found


# ---- series ----

_UID = 44
_SERIES = "2.25." + "7" * (_UID - 5)


def _instance(number: int) -> str:
    return f"2.25.{number}" + "8" * (_UID - 6)


@dataclass(frozen=True)
class Template:
    """The files of a series, whose UIDs are put in as bytes: encoding a thousand takes long."""

    files: tuple[tuple[InstanceSummary, bytes], ...]

    @classmethod
    def make(cls, modality: Any, slices: int) -> Template:
        """A phantom of so many slices, none of which says how many there are."""
        files = []
        made = make_series(modality, slices=slices, rows=ROWS, NumberOfSlices=None)
        for number, dataset in enumerate(made, 1):
            uid = _instance(number)
            dataset.SeriesInstanceUID = _SERIES
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
            buffer = BytesIO()
            dataset.save_as(buffer, enforce_file_format=True)
            files.append((instance_summary(dataset), buffer.getvalue()))
        return cls(tuple(files))

    def instances(self, series_uid: str) -> list[tuple[InstanceSummary, bytes, str]]:
        """Summary, file and SOP Instance UID of each instance of a new series."""
        made = []
        for number, (summary, data) in enumerate(self.files, 1):
            uid = f"{series_uid[:-1]}{number}"
            new = data.replace(_instance(number).encode(), uid.encode())
            made.append((summary, new.replace(_SERIES.encode(), series_uid.encode()), uid))
        return made


def series_uid(dice: random.Random) -> str:
    """A Series Instance UID as long as that of a template."""
    return "2.25." + "".join(dice.choices("123456789", k=_UID - 5))


# ---- death ----


@dataclass
class Mortal:
    """A ledger whose process dies before a statement that a test chooses."""

    statements: int = 0
    deadly: int | None = None

    @contextmanager
    def dying_at(self, statement: int | None) -> Iterator[None]:
        """The process dies before so many more statements have reached the database."""
        self.statements, self.deadly = 0, statement
        try:
            yield
        finally:
            self.deadly = None

    def _live_or_die(self, database: Any) -> None:
        self.statements += 1
        if self.deadly is not None and self.statements > self.deadly:
            database.rollback()  # as SQLite does with what a dead process leaves
            raise CrashError

    def watch(self, ledger: Engine, patch: Any) -> None:
        """Count each statement and each commit; *patch* is a `pytest.MonkeyPatch`."""

        @event.listens_for(ledger, "before_cursor_execute")
        def before_statement(connection: Any, *_: Any) -> None:
            self._live_or_die(connection.connection.dbapi_connection)

        do_commit = ledger.dialect.do_commit

        def commit(connection: Any) -> None:
            self._live_or_die(connection)
            do_commit(connection)

        patch.setattr(ledger.dialect, "do_commit", commit)
