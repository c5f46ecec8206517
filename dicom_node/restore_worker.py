"""One job from the queue to the outbox: load, restore, derive, store, finish.

Everything that goes into the output comes from the job and its instances, never from this try:
UIDs, seeds and times. A worker that is killed leaves a lease to run out, and the next one writes
the same files.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydicom.dataset import Dataset
from sqlalchemy import Engine as Ledger

from dicom_node.dicom import derived
from dicom_node.dicom.derived import DerivedInstance
from dicom_node.dicom.header import text
from dicom_node.dicom.sharing import Shared
from dicom_node.dicom.volume import read_slice_header
from dicom_node.early import EarlySlices, MadeEarly
from dicom_node.early_results import EarlyResults
from dicom_node.errors import (
    NodeError,
    NotFoundError,
    PermanentError,
    RefusedError,
    TransientError,
    UnreadableInstanceError,
    whereabouts,
)
from dicom_node.gates import breaker_rule
from dicom_node.inference import Engine
from dicom_node.kept_slices import KeptSlices
from dicom_node.ledger import intake, queue
from dicom_node.ledger.queue import Job, Judged, Output, Recorded
from dicom_node.ledger.states import Verdict
from dicom_node.observability import get_logger
from dicom_node.outgoing import written
from dicom_node.rehearsal import Written, time_of
from dicom_node.restoring import RestoredSeries, restore_series, result_series_uid
from dicom_node.review import Sheet, is_wanted, rendered
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool, StoredFile

_log = get_logger(__name__)

_DECIDED_BY_A_PERSON = frozenset({Verdict.HOLD, Verdict.REFUSE})
# The nice value of what nobody waits for: the delivery begins at the same time.
_UNHURRIED = 10

Clock = Callable[[], float]


class LeaseLostError(Exception):
    """Another worker has the job now: leave it, and whatever was written, to that one."""


class DrainingError(Exception):
    """The process is to end: give the job back."""


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
        early: EarlySlices | None = None,
    ) -> None:
        """*stop*, once set, makes the worker give its job back at the next batch of slices.

        *early* has it restore slices of open series where no job is due.
        """
        self._settings = settings
        self._spool = spool
        self._ledger = ledger
        self._engine = engine
        self._name = name
        self._clock = clock
        self._stop = stop or threading.Event()
        self._early = early
        self._next_heartbeat = 0.0

    def recover(self, now: float) -> int:
        """Give back what an earlier process of this name left running; call at start."""
        limit = self._settings.engine.max_attempts
        return queue.release_leases(self._ledger, self._name, now, max_attempts=limit)

    def run_once(self, now: float) -> bool:
        """Do one job, or where none is due one slice ahead of its job; False when there is none."""
        lease_s = self._settings.engine.lease_s
        job = queue.claim(self._ledger, self._name, lease_s=lease_s, now=now)
        if job is None:
            return self._early is not None and self._early.turn(now, self._stop.is_set)
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
            self._conclude(queue.fail, job, "failed", f"unexpected {whereabouts(error)}")

    def _restore(self, job: Job) -> None:
        early = self._early.made(job) if self._early is not None else MadeEarly({})
        made, outputs = self._made(job, early)
        started = time.perf_counter()
        is_awaited = made.judgement.worst in _DECIDED_BY_A_PERSON
        with ThreadPoolExecutor(1, thread_name_prefix="review") as aside:
            # Who is to decide on a result finds its report; who has it sent does not wait for one.
            report = aside.submit(self._review, job, made.sheet) if is_awaited else None
            # A result that no destination may have is no file either.
            if outputs is None:
                outputs = self._store(job, made) if made.judgement.sendable else []
            self._beat(job)
            review = None if report is None else report.result()
        seconds = made.seconds | {"derive": time.perf_counter() - started}
        recorded = self._finish(job, made, outputs, review, seconds)
        _log.info(
            "job judged",
            action="job_judged",
            job=job.id,
            verdict=str(made.judgement.worst),
            instances=len(outputs),
            early=early.kept.found if early.kept is not None else 0,
            **seconds,
        )
        tidying = threading.Thread(
            target=_unhurried,
            args=(self._tidy, job, _told(made.sheet, recorded), early.kept, review),
            name="tidy",
        )
        tidying.start()
        tidying.join()

    def _made(self, job: Job, early: MadeEarly) -> tuple[RestoredSeries, list[Output] | None]:
        """The result of a job, and its files where they were written ahead."""
        earlier = queue.earlier_quantities(self._ledger, job, self._engine.model.sha256)
        headers = self._fresh(job, early.headers)
        scale = earlier.get("intensity_scale")
        is_all_there = scale is None and len(headers) == len(job.paths)
        if early.written is not None:
            outputs = self._given_out(early.written) if is_all_there else None
            if outputs is not None:
                return early.written.made, outputs
            names = early.written.names
            EarlyResults(self._spool).remove(job.series_instance_uid, names)
        made = restore_series(
            list(headers),
            job.task,
            self._engine,
            self._settings,
            created=time_of(job),
            destinations=job.destinations,
            note=job.note,
            scale=scale,
            strength=job.strength,
            kept=early.kept,
            known=headers,
            work=self._spool.root / "temporary",
            progress=lambda done, total: self._beat(job),
            ahead=early.volumes if is_all_there else None,
        )
        return made, None

    def _given_out(self, ready: Written) -> list[Output] | None:
        """The files that were written ahead, under their names; None where one of them is gone."""
        series = ready.made.series_instance_uid
        try:
            outputs = [
                replace(each, path=self._spool.give_out(each.path, series, each.sop_instance_uid))
                for each in ready.outputs
            ]
        except NotFoundError:
            return None
        self._spool.flush(output.path for output in outputs)
        return outputs

    def _finish(
        self,
        job: Job,
        made: RestoredSeries,
        outputs: Sequence[Output],
        review: str | None,
        seconds: Mapping[str, float],
    ) -> Recorded:
        recorded = queue.finish(
            self._ledger,
            job.id,
            self._name,
            judged=self._judged(made, review),
            outputs=outputs,
            derived_series_instance_uid=made.series_instance_uid if outputs else None,
            model_sha256=self._engine.model.sha256,
            seconds={key: round(value, 3) for key, value in seconds.items()},
            note="; ".join(made.warnings) or None,
            quantities=made.quantities,
            now=self._clock(),
        )
        if recorded is None:
            raise LeaseLostError
        return recorded

    def _tidy(self, job: Job, sheet: Sheet, kept: KeptSlices | None, review: str | None) -> None:
        """What is left to do once the job is concluded: nothing that goes wrong here changes it."""
        try:
            folder = None if review is not None else self._review(job, sheet)
            if folder is not None:
                queue.note_review(self._ledger, job.id, folder)
        except NodeError as error:
            _log.warning(
                "report not written", action="review_lost", job=job.id, error=error.message
            )
        except Exception as error:
            where = whereabouts(error)
            _log.error("report not written", action="review_lost", job=job.id, error=where)
        if kept is not None:
            kept.forget()

    def _judged(self, made: RestoredSeries, review: str | None) -> Judged:
        judgement = made.judgement
        return Judged(
            modality=made.sheet.modality,
            model_sha256=self._engine.model.sha256,
            failed=judgement.failed,
            verdicts=judgement.verdicts,
            reason=judgement.reason,
            readings=made.readings,
            breaker=breaker_rule(self._settings),
            review=review,
        )

    def _review(self, job: Job, sheet: Sheet) -> str | None:
        """Write the report for the reviewer, where the settings ask for one; its folder."""
        if not is_wanted(sheet.judgement.worst, self._settings.review):
            return None
        files = rendered(sheet, job.id, self._settings.review)
        return self._spool.write_review(job.id, files)

    def _fresh(self, job: Job, known: Mapping[Path, Dataset]) -> dict[Path, Dataset]:
        """The files of the job that this model has not restored yet, in an earlier job; headers.

        A slice of CT or MR has one result for one model whatever company it comes in; PET, whose
        set of instances is part of what it becomes, is a new series as a whole.
        """
        files = [self._spool.resolve(path) for _, path in job.paths]
        shared = Shared()
        headers = [
            known[file] if file in known else read_slice_header(file, shared) for file in files
        ]
        if text(headers[0], "Modality") == "PT":
            return dict(zip(files, headers, strict=True))
        series = result_series_uid(headers[0], job.task, self._engine, self._settings, job.strength)
        root = self._settings.identity.uid_root
        results = [derived.derived_sop_uid(header, series, root) for header in headers]
        made = queue.already_made(self._ledger, results)
        fresh = {
            file: header
            for file, header, uid in zip(files, headers, results, strict=True)
            if uid not in made
        }
        if not fresh:
            raise RefusedError("restored before by this model, in an earlier job")
        return fresh

    def _store(self, job: Job, made: RestoredSeries) -> list[Output]:
        """Write the results."""

        def write(instance: DerivedInstance) -> StoredFile:
            uid = instance.sop_instance_uid
            pieces = instance.pieces()
            return self._spool.write_outgoing(made.series_instance_uid, uid, pieces, flushed=False)

        outputs = written(made.instances, write, partial(self._beat, job))
        self._spool.flush(output.path for output in outputs)
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


def _told(sheet: Sheet, recorded: Recorded) -> Sheet:
    """The report with what the ledger had to add: an open breaker, the rest of the volume."""
    judgement = sheet.judgement
    reasons = (*judgement.reasons, *recorded.added)
    return replace(sheet, judgement=replace(judgement, verdicts=recorded.verdicts, reasons=reasons))


def _unhurried(work: Callable[..., None], *arguments: object) -> None:
    """Do what nobody waits for while others compute, who do: the thread that calls is to end."""
    with suppress(OSError, AttributeError):
        # Linux: of this thread alone. What is taken away is not given back.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _UNHURRIED)
    work(*arguments)
