"""Jobs of restoration: how they are made, and what a person may do to them.

What a worker does to jobs and deliveries (`leases`, `outbox`) is offered here too, so that its
callers know one module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, insert, select, update

from dicom_node.errors import NotFoundError
from dicom_node.ledger.leases import (
    MAX_ATTEMPTS,
    Job,
    Output,
    already_made,
    claim,
    earlier_quantities,
    expire_leases,
    fail,
    finish,
    heartbeat,
    refuse,
    release_leases,
    retry_later,
)
from dicom_node.ledger.outbox import (
    Delivery,
    DeliveryItem,
    claim_delivery,
    conclude_delivery,
    expire_delivery_leases,
    heartbeat_delivery,
    record_sent,
    release_delivery_leases,
    retry_delivery,
)
from dicom_node.ledger.tables import (
    Entity,
    InstanceState,
    JobState,
    SeriesState,
    instances,
    job_instances,
    move,
    reading,
    record_event,
    series,
    writing,
)
from dicom_node.ledger.tables import jobs as jobs_table
from dicom_node.ledger.tables import outputs as outputs_table

__all__ = [
    "MAX_ATTEMPTS",
    "Delivery",
    "DeliveryItem",
    "Job",
    "NewJob",
    "Output",
    "already_made",
    "cancel",
    "claim",
    "claim_delivery",
    "conclude_delivery",
    "earlier_quantities",
    "enqueue",
    "expire_delivery_leases",
    "expire_leases",
    "fail",
    "finish",
    "heartbeat",
    "heartbeat_delivery",
    "hold",
    "is_own_output",
    "record_sent",
    "refuse",
    "reject",
    "release",
    "release_delivery_leases",
    "release_leases",
    "retry",
    "retry_delivery",
    "retry_later",
]

_NO_LEASE: Mapping[str, Any] = {"worker": None, "lease_until": None}
_FRESH: Mapping[str, Any] = {"attempts": 0, "not_before": 0.0, "finished_at": None}


@dataclass(frozen=True)
class NewJob:
    """One volume to restore, as the assembler asks for it."""

    series_instance_uid: str
    volume_key: str
    task: str
    destinations: tuple[str, ...]
    instance_uids: tuple[str, ...]
    route: str
    priority: int = 0
    #: QUEUED, or HELD / REFUSED where policy says so at once.
    state: JobState = JobState.QUEUED
    #: Why it is held or refused, or a note for the description of the result.
    reason: str | None = None


def enqueue(
    engine: Engine,
    series_uid: str,
    *,
    series_state: SeriesState,
    reason: str | None,
    jobs: Sequence[NewJob],
    instances_seen: int,
    now: float,
) -> list[int] | None:
    """Close a series and make its jobs in one transaction.

    A volume that comes again with the same instances is the same job and makes no new one; with
    other instances it is the next revision.

    Args:
        engine: The ledger.
        series_uid: The series, in state `receiving`.
        series_state: COMPLETE or INCOMPLETE.
        reason: Why it is incomplete, or None.
        jobs: One per volume and task.
        instances_seen: `SeriesProgress.instances` of the look that led to this.
        now: Seconds since 1970 UTC.

    Returns:
        The ids of the new jobs; None, with nothing written, when an instance came in between
        or another process was faster. The next look sees it.
    """
    with writing(engine) as connection:
        closed = move(
            connection,
            Entity.SERIES,
            series_uid,
            series_state,
            reason=reason,
            now=now,
            only=series.c.instances == instances_seen,
            forced=False,
        )
        if not closed:
            return None
        connection.execute(
            update(instances)
            .where(
                instances.c.series_instance_uid == series_uid,
                instances.c.state == InstanceState.RECEIVED,
            )
            .values(assigned=True)
        )
        made = [_insert_job(connection, job, now) for job in jobs]
    return [job_id for job_id in made if job_id is not None]


def hold(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Keep a queued or running job from being worked on."""
    return _decide(engine, job_id, JobState.HELD, reason, now)


def release(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Queue a held job."""
    only = jobs_table.c.state == JobState.HELD
    return _decide(engine, job_id, JobState.QUEUED, reason, now, only=only, **_FRESH)


def reject(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Decline a held job for good."""
    return _decide(engine, job_id, JobState.REJECTED, reason, now, finished_at=now)


def cancel(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Take back a job that is not done."""
    return _decide(engine, job_id, JobState.CANCELLED, reason, now, finished_at=now)


def retry(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Queue a failed, refused or cancelled job again."""
    ended = (JobState.FAILED, JobState.REFUSED, JobState.CANCELLED)
    only = jobs_table.c.state.in_(ended)
    return _decide(engine, job_id, JobState.QUEUED, reason, now, only=only, **_FRESH)


def is_own_output(engine: Engine, *, sop_instance_uid: str, series_instance_uid: str) -> bool:
    """Tell whether the node itself made this instance or series."""
    instance = select(outputs_table.c.id).where(
        outputs_table.c.sop_instance_uid == sop_instance_uid
    )
    made = select(jobs_table.c.id).where(
        jobs_table.c.derived_series_instance_uid == series_instance_uid
    )
    with reading(engine) as connection:
        return bool(connection.scalar(select(instance.exists() | made.exists())))


def _decide(
    engine: Engine,
    job_id: int,
    state: JobState,
    reason: str,
    now: float,
    *,
    only: ColumnElement[bool] | None = None,
    **values: object,
) -> bool:
    """Carry out a person's decision; False when the job's state does not allow it."""
    with writing(engine) as connection:
        return move(
            connection,
            Entity.JOB,
            job_id,
            state,
            reason=reason,
            now=now,
            only=only,
            **_NO_LEASE,
            **values,
        )


def _insert_job(connection: Connection, job: NewJob, now: float) -> int | None:
    members = _instance_ids(connection, job)
    same_volume = (
        (jobs_table.c.series_instance_uid == job.series_instance_uid)
        & (jobs_table.c.volume_key == job.volume_key)
        & (jobs_table.c.task == job.task)
    )
    earlier = connection.execute(
        select(jobs_table.c.id, jobs_table.c.revision).where(same_volume)
    ).all()
    if any(_members(connection, row.id) == set(members) for row in earlier):
        return None
    values = asdict(job)
    del values["instance_uids"]
    values |= {
        "note": job.reason,
        "revision": max((row.revision for row in earlier), default=0) + 1,
        "not_before": now,
        "attempts": 0,
        "created_at": now,
        "finished_at": now if job.state is JobState.REFUSED else None,
        "seconds": {},
    }
    job_id = int(
        connection.execute(
            insert(jobs_table).values(values).returning(jobs_table.c.id)
        ).scalar_one()
    )
    rows = [
        {"job_id": job_id, "instance_id": member, "position": position}
        for position, member in enumerate(members)
    ]
    connection.execute(insert(job_instances), rows)
    record_event(connection, Entity.JOB, job_id, None, job.state, job.reason, now)
    return job_id


def _instance_ids(connection: Connection, job: NewJob) -> list[int]:
    rows = connection.execute(
        select(instances.c.sop_instance_uid, instances.c.id).where(
            instances.c.series_instance_uid == job.series_instance_uid,
            instances.c.state == InstanceState.RECEIVED,
        )
    )
    ids = {row.sop_instance_uid: row.id for row in rows}
    missing = [uid for uid in job.instance_uids if uid not in ids]
    if missing or not job.instance_uids:
        raise NotFoundError(f"a job of series {job.series_instance_uid} names unknown instances")
    return [ids[uid] for uid in job.instance_uids]


def _members(connection: Connection, job_id: int) -> set[int]:
    return set(
        connection.scalars(
            select(job_instances.c.instance_id).where(job_instances.c.job_id == job_id)
        )
    )
