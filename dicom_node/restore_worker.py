"""One job from the queue to the outbox: load, restore, derive, store, finish.

Everything that goes into the output comes from the job and its instances, never from this try:
UIDs, seeds and times. A worker that is killed leaves a lease to run out, and the next one writes
the same files.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from sqlalchemy import Engine as Ledger

from dicom_node.dicom import derived, division, volume
from dicom_node.dicom.derived import DerivedInstance, RestoredVolume
from dicom_node.dicom.header import number, read_header, text, texts
from dicom_node.dicom.reports import GateValue, Restoration, with_reports
from dicom_node.dicom.volume import SeriesVolume
from dicom_node.errors import (
    PermanentError,
    RefusedError,
    TransientError,
    UnreadableInstanceError,
)
from dicom_node.inference import (
    Engine,
    ModelIdentity,
    Progress,
    RestorationRequest,
    RestorationResult,
)
from dicom_node.ledger import intake, queue
from dicom_node.ledger.queue import Job, Output
from dicom_node.observability import get_logger
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool

STRENGTH = 1.0

_log = get_logger(__name__)

Clock = Callable[[], float]


class LeaseLostError(Exception):
    """Another worker has the job now: leave it, and whatever was written, to that one."""


class DrainingError(Exception):
    """The process is to end: give the job back."""


@dataclass(frozen=True)
class RestoredSeries:
    """A restored job on its way to files; *instances* are made as they are asked for."""

    volumes: tuple[RestoredVolume, ...]  # one, or those of a multi-frame image
    series_instance_uid: str
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    quantities: dict[str, Any]  # clamped: pixels; intensity_scale: of MR
    instances: Iterator[DerivedInstance]


@dataclass
class _Volumes:
    """What is gathered volume by volume."""

    restored: list[RestoredVolume] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    gates: list[GateValue] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    load_s: float = 0.0
    restore_s: float = 0.0


def restore_series(
    paths: Sequence[Path],
    task: str,
    engine: Engine,
    settings: NodeSettings,
    *,
    created: datetime,
    note: str | None = None,
    scale: float | None = None,
    progress: Progress | None = None,
) -> RestoredSeries:
    """Restore the images of one job; used by the worker and by ``dicom-node restore``.

    *created* is the time that the result will bear; the same arguments make the same bytes.
    *scale* is the MR intensity scale of the volume that late slices belong to.

    Raises:
        RefusedError: outside what may be restored, by policy or by the bundle's domain.
        UnreadableInstanceError: pixel data that do not decode.
        PermanentError, TransientError: as the engine says.
    """
    if task not in engine.tasks:
        raise RefusedError(f"the model {engine.model.name} cannot do {task}")
    done = _restore_volumes(paths, task, engine, settings, scale, progress)
    warnings = tuple(dict.fromkeys([*([note] if note else []), *done.warnings]))
    steered = parameters_hash(task, engine.parameters(task))
    made = derived.build(
        done.restored,
        task=task,
        model=engine.model,
        identity=settings.identity,
        warnings=warnings,
        strength=STRENGTH,
        created=created,
        parameters_hash=steered,
    )
    restoration = Restoration(task, engine.model, steered, created, STRENGTH, warnings)
    quantities: dict[str, Any] = {"clamped": sum(each.clamped for each in done.restored)}
    if len(done.scales) == 1:
        quantities["intensity_scale"] = done.scales[0]
    return RestoredSeries(
        tuple(done.restored),
        _series_uid([f.header for each in done.restored for f in each.frames], task, engine,
                    settings),
        warnings,
        {"load": done.load_s, "restore": done.restore_s},
        quantities,
        with_reports(
            made, _as_derived(done), restoration, settings.identity, settings.report
        ),
    )  # fmt: skip


def _restore_volumes(
    paths: Sequence[Path],
    task: str,
    engine: Engine,
    settings: NodeSettings,
    scale: float | None,
    progress: Progress | None,
) -> _Volumes:
    """Load, restore and quantise one volume after the other: one is held in physical units."""
    gathered, slices = _Volumes(), 0
    started = time.perf_counter()
    for series in volume.load_volumes(paths, task, settings.policy):
        gathered.warnings += [*series.warnings, *judge_domain(series, task, engine, settings)]
        loaded = time.perf_counter()
        request = RestorationRequest(
            array=series.array,
            task=task,
            spacing=series.spacing,
            seeds=seeds(series.headers, engine.model, series.frames),
            strength=STRENGTH,
            scale=scale,
        )
        result = engine.restore(request, _onwards(progress, slices))
        # The domain was judged above, with all that the header says.
        guards = [flag for flag in result.flags if flag != "outside_domain"]
        gathered.warnings += [f"guard {guard} did not hold" for guard in guards]
        gathered.gates += gate_values(result, len(series.array), first=slices)
        if "intensity_scale" in result.diagnostics and task == "mri_sr":
            gathered.scales.append(float(result.diagnostics["intensity_scale"]))
        gathered.restored.append(derived.quantise(series, result.array, result.resampling))
        slices += len(series.array)
        ended = time.perf_counter()
        gathered.load_s += loaded - started
        gathered.restore_s += ended - loaded
        started = ended
    return gathered


def _as_derived(done: _Volumes) -> list[GateValue]:
    """The values by the place of their slice in the result.

    A multi-frame result has its frames in the order of the source's, not in that of space.
    """
    if done.restored[0].source is None:
        return done.gates
    numbers = [frame.number for each in done.restored for frame in each.frames]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    place = {index: after for after, index in enumerate(order)}
    return [
        gate if gate.slice is None else replace(gate, slice=place[gate.slice])
        for gate in done.gates
    ]


def _onwards(progress: Progress | None, before: int) -> Progress | None:
    """Progress of one volume, counted on from the slices of those before it."""
    if progress is None or not before:
        return progress
    return lambda done, total: progress(before + done, before + total)


def gate_values(result: RestorationResult, slices: int, first: int = 0) -> list[GateValue]:
    """What the engine measured, slice by slice, and whether its guards held over the volume.

    *first* is the place of the volume's first slice among the slices of the job.
    """
    values: list[GateValue] = []
    for name, measured in sorted(result.diagnostics.items()):
        if isinstance(measured, int | float):
            values.append(GateValue(name, float(measured)))
        elif isinstance(measured, Sequence) and len(measured) == slices:
            values += [GateValue(name, float(v), slice=first + i) for i, v in enumerate(measured)]
            worst = max(measured, key=abs)
            verdict = "warn" if name in result.flags else None
            values.append(GateValue(name, float(worst), verdict))
    return values


def _series_uid(
    headers: Sequence[Dataset], task: str, engine: Engine, settings: NodeSettings
) -> str:
    return derived.derived_series_uid(
        headers[0],
        task=task,
        model=engine.model,
        identity=settings.identity,
        strength=STRENGTH,
        parameters_hash=parameters_hash(task, engine.parameters(task)),
        source_set=derived.source_set_hash(headers),
    )


def seeds(
    headers: Sequence[Dataset], model: ModelIdentity, frames: Sequence[int] | None = None
) -> tuple[int, ...]:
    """One seed for each slice from its SOP Instance UID: alike on every try, in any company.

    The frames of a multi-frame image, which share one, are told apart by their numbers.
    """
    names = [str(header.SOPInstanceUID) for header in headers]
    if frames is not None:
        names = [f"{name}#{number}" for name, number in zip(names, frames, strict=True)]
    digests = (hashlib.sha256(f"{name}\n{model.sha256}".encode()).digest() for name in names)
    return tuple(int.from_bytes(digest[:8], "big") >> 1 for digest in digests)


def parameters_hash(task: str, model_parameters: Mapping[str, Any]) -> str:
    """SHA-256 of what steers a restoration beside the weights and the source."""
    parameters = {
        "task": task,
        "strength": STRENGTH,
        "seeds": "source SOP Instance UID, 1",
        "model": dict(model_parameters),
    }
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()


def judge_domain(
    series: SeriesVolume, task: str, engine: Engine, settings: NodeSettings
) -> list[str]:
    """Warnings about the bundle's training domain; RefusedError where policy says so."""
    verdict = engine.judge(task, facts(series))
    outside = "; ".join(verdict.outside)
    if outside and settings.policy.domain == "refuse":
        raise RefusedError(f"outside the model's training domain: {outside}")
    missing = ", ".join(verdict.missing)
    if missing and settings.policy.missing_metadata == "refuse":
        raise RefusedError(f"the header does not state {missing}")
    return [
        *([f"outside the model's training domain: {outside}"] if outside else []),
        *([f"the header does not state {missing}"] if missing else []),
    ]


def facts(series: SeriesVolume) -> dict[str, Any]:
    """What the headers say of the acquisition, by the names of the bundle's domain."""
    header = series.headers[0]
    return {
        "modality": next(iter(texts(header, "Modality")), None),
        "pixel_spacing_mm": series.spacing[1:],
        "slice_thickness_mm": number(header, "SliceThickness"),
        "field_strength_t": number(header, "MagneticFieldStrength"),
        "kernel": texts(header, "ConvolutionKernel") or None,
    }


class RestoreWorker:
    """Takes jobs from the queue, one at a time, until there are none."""

    def __init__(
        self,
        settings: NodeSettings,
        spool: Spool,
        ledger: Ledger,
        engine: Engine,
        *,
        name: str,
        clock: Clock,
        stop: threading.Event | None = None,
    ) -> None:
        """*stop*, once set, makes the worker give its job back at the next batch of slices."""
        self._settings = settings
        self._spool = spool
        self._ledger = ledger
        self._engine = engine
        self._name = name
        self._clock = clock
        self._stop = stop or threading.Event()
        self._next_heartbeat = 0.0

    def recover(self, now: float) -> int:
        """Give back what an earlier process of this name left running; call at start."""
        limit = self._settings.engine.max_attempts
        return queue.release_leases(self._ledger, self._name, now, max_attempts=limit)

    def run_once(self, now: float) -> bool:
        """Do one job; False when none is due."""
        lease_s = self._settings.engine.lease_s
        job = queue.claim(self._ledger, self._name, lease_s=lease_s, now=now)
        if job is None:
            return False
        self._next_heartbeat = now + lease_s / 4
        _log.info("job started", action="job_started", job=job.id, task=job.task)
        self._work(job)
        return True

    def _work(self, job: Job) -> None:
        """Bring the job to the state its outcome calls for."""
        try:
            self._restore(job)
        except LeaseLostError:
            _log.warning("job lost", action="job_lost", job=job.id)
        except DrainingError:
            self.recover(self._clock())
            _log.info("job given back", action="job_given_back", job=job.id)
        except RefusedError as error:
            self._conclude(queue.refuse, job, "refused", error.message)
        except UnreadableInstanceError as error:
            self._put_aside(job, error)
            self._conclude(queue.fail, job, "failed", error.message)
        except PermanentError as error:
            self._conclude(queue.fail, job, "failed", error.message)
        except TransientError as error:
            self._retry(job, error.message)
        except Exception as error:
            # The text may quote a header; where it happened is enough to find it.
            self._conclude(queue.fail, job, "failed", f"unexpected {_whereabouts(error)}")

    def _restore(self, job: Job) -> None:
        earlier = queue.earlier_quantities(self._ledger, job, self._engine.model.sha256)
        made = restore_series(
            [self._spool.resolve(path) for path in self._fresh(job)],
            job.task,
            self._engine,
            self._settings,
            created=datetime.fromtimestamp(job.created, UTC),
            note=job.note,
            scale=earlier.get("intensity_scale"),
            progress=lambda done, total: self._beat(job),
        )
        started = time.perf_counter()
        outputs = self._store(job, made)
        seconds = made.seconds | {"derive": time.perf_counter() - started}
        finished = queue.finish(
            self._ledger,
            job.id,
            self._name,
            outputs=outputs,
            derived_series_instance_uid=made.series_instance_uid,
            model_sha256=self._engine.model.sha256,
            seconds={key: round(value, 3) for key, value in seconds.items()},
            note="; ".join(made.warnings) or None,
            quantities=made.quantities,
            now=self._clock(),
        )
        if not finished:
            raise LeaseLostError
        _log.info("job done", action="job_done", job=job.id, instances=len(outputs), **seconds)

    def _fresh(self, job: Job) -> list[str]:
        """The files of the job that this model has not restored yet, in an earlier job.

        A slice of CT or MR has one result for one model whatever company it comes in; PET, whose
        set of instances is part of what it becomes, is a new series as a whole.
        """
        headers = {uid: read_header(self._spool.resolve(path)) for uid, path in job.paths}
        if text(next(iter(headers.values())), "Modality") == "PT":
            return [path for _, path in job.paths]
        root = self._settings.identity.uid_root
        results = {}
        for uid, header in headers.items():
            place = division.representative([header])
            series = _series_uid([place], job.task, self._engine, self._settings)
            results[uid] = derived.derived_sop_uid(header, series, root)
        made = queue.already_made(self._ledger, results.values())
        fresh = [path for uid, path in job.paths if results[uid] not in made]
        if not fresh:
            raise RefusedError("restored before by this model, in an earlier job")
        return fresh

    def _store(self, job: Job, made: RestoredSeries) -> list[Output]:
        outputs = []
        for instance in made.instances:
            self._beat(job)
            stored = self._spool.write_outgoing(
                made.series_instance_uid, instance.sop_instance_uid, instance.data
            )
            outputs.append(
                Output(
                    sop_instance_uid=instance.sop_instance_uid,
                    sop_class_uid=instance.sop_class_uid,
                    source_sop_instance_uid=instance.source_sop_instance_uid,
                    path=stored.path,
                    sha256=stored.sha256,
                    size=stored.size,
                )
            )
        return outputs

    def _beat(self, job: Job) -> None:
        """Keep the lease; leave the job when it is lost or the process is to end."""
        if self._stop.is_set():
            raise DrainingError
        now = self._clock()
        if now < self._next_heartbeat:
            return
        lease_s = self._settings.engine.lease_s
        if not queue.heartbeat(self._ledger, job.id, self._name, lease_s=lease_s, now=now):
            raise LeaseLostError
        self._next_heartbeat = now + lease_s / 4

    def _conclude(self, write: Callable[..., bool], job: Job, outcome: str, reason: str) -> None:
        write(self._ledger, job.id, self._name, reason=reason, now=self._clock())
        _log.warning(f"job {outcome}", action=f"job_{outcome}", job=job.id, reason=reason)

    def _retry(self, job: Job, reason: str) -> None:
        engine = self._settings.engine
        queue.retry_later(
            self._ledger,
            job.id,
            self._name,
            reason=reason,
            delay_s=engine.retry_s,
            now=self._clock(),
            max_attempts=engine.max_attempts,
        )
        _log.warning("job waits", action="job_waits", job=job.id, reason=reason)

    def _put_aside(self, job: Job, error: UnreadableInstanceError) -> None:
        """Quarantine the instance that does not decode, so that a good copy may be sent again."""
        uid = error.sop_instance_uid
        path = dict(job.paths).get(uid or "")
        if uid is None or path is None:
            return
        # Copy, row, original: whenever this is cut short, the row names a file that is there.
        kept = self._spool.quarantine(self._spool.resolve(path).read_bytes(), error.message)
        now = self._clock()
        if intake.quarantine_instance(
            self._ledger, uid, path=kept.path, reason=error.message, now=now
        ):
            self._spool.delete(path)


def _whereabouts(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = type(error).__name__
    if trace is None:
        return name
    return f"{name} at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
