"""What a restore worker does to jobs: claim, heartbeat, finish, give back.

A worker holds a job by a lease; every statement that follows a claim names the worker, so that
one whose lease was taken away changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Row, exists, insert, or_, select, update

from dicom_node import observability
from dicom_node.ledger import verdicts
from dicom_node.ledger.tables import (
    Entity,
    JobState,
    instances,
    job_instances,
    jobs,
    move,
    reading,
    record_event,
    series,
    writing,
)
from dicom_node.ledger.tables import outputs as outputs_table
from dicom_node.ledger.verdicts import Judged, Recorded

#: A job that was claimed so often without an end is failed.
MAX_ATTEMPTS = 10
# Values in one statement; databases have limits of their own.
_AT_ONCE = 500
_NO_LEASE: Mapping[str, Any] = {"worker": None, "lease_until": None}


@dataclass(frozen=True)
class Job:
    """One volume to restore, as its worker sees it."""

    id: int
    series_instance_uid: str
    study_instance_uid: str
    volume_key: str
    revision: int
    task: str
    route: str
    destinations: tuple[str, ...]
    #: How often it was claimed, this time included.
    attempts: int
    created: float
    #: `NewJob.reason` of a queued job.
    note: str | None
    #: (SOP Instance UID, path in the spool) in the order of `NewJob.instance_uids`.
    paths: tuple[tuple[str, str], ...]
    #: When the last of its instances came.
    received: float
    #: How much of the change is applied, 0 < strength ≤ 1.
    strength: float = 1.0


@dataclass(frozen=True)
class Output:
    """One restored SOP Instance that lies durable in the spool."""

    sop_instance_uid: str
    sop_class_uid: str
    source_sop_instance_uid: str
    path: str
    sha256: str
    size: int
    transfer_syntax_uid: str = "1.2.840.10008.1.2.1"


def claim(engine: Engine, worker: str, *, lease_s: float, now: float) -> Job | None:
    """Take the next job (highest priority, then oldest), or None.

    A job whose volume another worker restores at the moment waits for that: late slices are brought
    into the window by the scale that it finds.
    """
    due = (
        select(jobs.c.id)
        .where(jobs.c.state == JobState.QUEUED, jobs.c.not_before <= now, ~_volume_is_running())
        .order_by(jobs.c.priority.desc(), jobs.c.id)
        .limit(1)
    )
    with reading(engine) as connection:
        # An idle worker must not take the write lock twice a second.
        if connection.execute(due).first() is None:
            return None
    with writing(engine) as connection:
        row = connection.execute(
            update(jobs)
            .where(
                jobs.c.id == due.with_for_update(skip_locked=True).scalar_subquery(),
                jobs.c.state == JobState.QUEUED,
            )
            .values(
                state=JobState.RUNNING,
                worker=worker,
                lease_until=now + lease_s,
                attempts=jobs.c.attempts + 1,
            )
            .returning(*jobs.c)
        ).first()
        if row is None:
            return None
        record_event(connection, Entity.JOB, row.id, JobState.QUEUED, JobState.RUNNING, worker, now)
        return _job(connection, row)


def heartbeat(engine: Engine, job_id: int, worker: str, *, lease_s: float, now: float) -> bool:
    """Extend the lease; False when the job is no longer this worker's."""
    with writing(engine) as connection:
        extended = connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id, _held_by(worker))
            .values(lease_until=now + lease_s)
        )
        return extended.rowcount == 1


def expire_leases(engine: Engine, now: float, *, max_attempts: int = MAX_ATTEMPTS) -> int:
    """Queue running jobs whose lease has ended; failed when tried `max_attempts` times."""
    return _take_back(engine, jobs.c.lease_until < now, now, max_attempts)


def release_leases(
    engine: Engine, worker: str, now: float, *, max_attempts: int = MAX_ATTEMPTS
) -> int:
    """Queue what an earlier process of the same worker left running; call at its start."""
    return _take_back(engine, jobs.c.worker == worker, now, max_attempts)


def finish(
    engine: Engine,
    job_id: int,
    worker: str,
    *,
    judged: Judged,
    outputs: Sequence[Output],
    derived_series_instance_uid: str | None,
    model_sha256: str,
    seconds: Mapping[str, float],
    note: str | None,
    now: float,
    quantities: Mapping[str, Any] | None = None,
) -> Recorded | None:
    """Conclude a job by what was judged, and make the deliveries that this permits: all or nothing.

    The verdicts are written first, in the same transaction. The job is held where one destination
    waits for a person, and refused where none may have it. *quantities* is what the result rests
    on, as `earlier_quantities` gives it back.

    Returns:
        What holds of the verdicts; None, with nothing written, when the job is no longer this
        worker's.
    """
    with writing(engine) as connection:
        own = select(jobs.c.task).where(jobs.c.id == job_id, _held_by(worker))
        task = connection.scalar(own.with_for_update())
        if task is None:
            return None
        recorded = verdicts.record(connection, job_id, judged, now)
        _conclude(
            connection,
            job_id,
            worker,
            recorded.state,
            note if recorded.state is JobState.DONE else recorded.reason,
            now,
            derived_series_instance_uid=derived_series_instance_uid,
            model_sha256=model_sha256,
            seconds=dict(seconds),
            quantities=dict(quantities or {}),
        )
        if outputs:
            rows = [{**vars(output), "job_id": job_id} for output in outputs]
            connection.execute(insert(outputs_table), rows)
        verdicts.settle(connection, job_id, recorded, now)
    for step, duration in seconds.items():
        observability.JOB_SECONDS.labels(task=task, step=step).observe(duration)
    return recorded


def earlier_quantities(engine: Engine, job: Job, model_sha256: str) -> Mapping[str, Any]:
    """What the first restoration of the job's volume by the same weights rested on.

    Empty where the volume was not restored before. A volume that got its key only when others
    came beside it is found under the whole series.
    """
    query = (
        select(jobs.c.volume_key, jobs.c.quantities)
        .where(
            jobs.c.series_instance_uid == job.series_instance_uid,
            jobs.c.task == job.task,
            # What a gate held, or a person rejected, rested on the same.
            jobs.c.state.in_([JobState.DONE, JobState.HELD, JobState.REJECTED]),
            jobs.c.model_sha256 == model_sha256,
            jobs.c.id != job.id,
        )
        .order_by(jobs.c.id)
    )
    with reading(engine) as connection:
        rows = connection.execute(query).all()
    of_volume = [row for row in rows if row.volume_key == job.volume_key] or rows
    found: Mapping[str, Any] = of_volume[0].quantities if of_volume else {}
    return found


def already_made(engine: Engine, sop_instance_uids: Iterable[str]) -> frozenset[str]:
    """Those of the derived SOP Instances that an earlier job made."""
    uids, made = list(sop_instance_uids), outputs_table.c.sop_instance_uid
    with reading(engine) as connection:
        return frozenset(
            uid
            for start in range(0, len(uids), _AT_ONCE)
            for uid in connection.scalars(
                select(made).where(made.in_(uids[start : start + _AT_ONCE]))
            )
        )


def refuse(engine: Engine, job_id: int, worker: str, reason: str, now: float) -> bool:
    """Conclude a running job as outside what may be restored; False when the lease was lost."""
    with writing(engine) as connection:
        return _conclude(connection, job_id, worker, JobState.REFUSED, reason, now)


def fail(engine: Engine, job_id: int, worker: str, reason: str, now: float) -> bool:
    """Conclude a running job as failed; False when the lease was lost."""
    with writing(engine) as connection:
        return _conclude(connection, job_id, worker, JobState.FAILED, reason, now)


def retry_later(
    engine: Engine,
    job_id: int,
    worker: str,
    reason: str,
    delay_s: float,
    now: float,
    *,
    max_attempts: int = MAX_ATTEMPTS,
) -> bool:
    """Queue a running job again after a delay; failed once it was tried `max_attempts` times.

    Returns:
        False when the lease was lost.
    """
    with writing(engine) as connection:
        attempts = connection.scalar(select(jobs.c.attempts).where(jobs.c.id == job_id))
        if attempts is not None and attempts >= max_attempts:
            return _conclude(connection, job_id, worker, JobState.FAILED, reason, now)
        return move(
            connection,
            Entity.JOB,
            job_id,
            JobState.QUEUED,
            reason=reason,
            now=now,
            only=_held_by(worker),
            not_before=now + delay_s,
            **_NO_LEASE,
        )


def _volume_is_running() -> ColumnElement[bool]:
    """Whether a job of the same volume, or of the undivided series, is being worked on."""
    other = jobs.alias("other")
    same = or_(other.c.volume_key == jobs.c.volume_key, other.c.volume_key == "whole")
    return exists(
        select(other.c.id)
        .where(
            other.c.series_instance_uid == jobs.c.series_instance_uid,
            other.c.task == jobs.c.task,
            other.c.state == JobState.RUNNING,
            same,
        )
        .correlate(jobs)
    )


def _held_by(worker: str) -> ColumnElement[bool]:
    return (jobs.c.state == JobState.RUNNING) & (jobs.c.worker == worker)


def _conclude(
    connection: Connection,
    job_id: int,
    worker: str,
    state: JobState,
    reason: str | None,
    now: float,
    **values: object,
) -> bool:
    return move(
        connection,
        Entity.JOB,
        job_id,
        state,
        reason=reason,
        now=now,
        only=_held_by(worker),
        finished_at=None if state is JobState.HELD else now,
        **_NO_LEASE,
        **values,
    )


def _take_back(
    engine: Engine, condition: ColumnElement[bool], now: float, max_attempts: int
) -> int:
    lost = select(jobs.c.id, jobs.c.attempts).where(jobs.c.state == JobState.RUNNING, condition)
    with reading(engine) as connection:
        if connection.execute(lost).first() is None:
            return 0
    with writing(engine) as connection:
        return sum(
            _take_back_one(connection, row.id, row.attempts >= max_attempts, condition, now)
            for row in connection.execute(lost).all()
        )


def _take_back_one(
    connection: Connection, job_id: int, is_last: bool, condition: ColumnElement[bool], now: float
) -> bool:
    ended = {"finished_at": now} if is_last else {}
    return move(
        connection,
        Entity.JOB,
        job_id,
        JobState.FAILED if is_last else JobState.QUEUED,
        reason="its worker ended or fell silent" + (" too often" if is_last else ""),
        now=now,
        only=condition,
        **_NO_LEASE,
        **ended,
    )


def _job(connection: Connection, row: Row[Any]) -> Job:
    members = connection.execute(
        select(instances.c.sop_instance_uid, instances.c.path, instances.c.received_at)
        .join(job_instances, job_instances.c.instance_id == instances.c.id)
        .where(job_instances.c.job_id == row.id)
        .order_by(job_instances.c.position)
    ).all()
    study = connection.execute(
        select(series.c.study_instance_uid).where(
            series.c.series_instance_uid == row.series_instance_uid
        )
    )
    return Job(
        id=row.id,
        series_instance_uid=row.series_instance_uid,
        study_instance_uid=study.scalar_one(),
        volume_key=row.volume_key,
        revision=row.revision,
        task=row.task,
        route=row.route,
        destinations=tuple(row.destinations),
        attempts=row.attempts,
        created=row.created_at,
        note=row.note,
        paths=tuple((uid, path) for uid, path, _ in members),
        received=max((received for _, _, received in members), default=row.created_at),
        strength=row.strength,
    )
