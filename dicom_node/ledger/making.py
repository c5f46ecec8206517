"""How jobs are made: a series is closed and its jobs are queued, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, insert, select, update

from dicom_node.errors import NotFoundError
from dicom_node.ledger.tables import (
    Entity,
    InstanceState,
    JobState,
    SeriesState,
    instances,
    job_instances,
    jobs,
    move,
    reading,
    record_event,
    series,
    writing,
)

__all__ = ["EarlierJob", "NewJob", "enqueue", "series_jobs"]


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
    #: How much of the change is applied, 0 < strength ≤ 1.
    strength: float = 1.0
    #: Not before this time, where the route's hours say so.
    not_before: float = 0.0
    #: What says whether the volume is whole, as `Evidence.as_row`.
    evidence: tuple[Mapping[str, Any], ...] = ()
    #: Held or refused only because instances are missing.
    awaits_rest: bool = False
    #: Queued or held jobs that this one takes the place of.
    supersedes: tuple[int, ...] = ()


@dataclass(frozen=True)
class EarlierJob:
    """A job that a series has had, for what comes later to follow."""

    id: int
    volume_key: str
    task: str
    route: str
    destinations: tuple[str, ...]
    priority: int
    strength: float
    state: JobState
    awaits_rest: bool
    derived_series_instance_uid: str | None
    instance_uids: frozenset[str]

    @property
    def waits_for_more(self) -> bool:
        """Whether its instances are still to be restored, together with those that are missing."""
        return self.awaits_rest and self.state in (JobState.HELD, JobState.REFUSED)


class _ChangedError(Exception):
    """A job that was to be superseded is no longer in the state that was seen."""


def series_jobs(engine: Engine, series_uid: str) -> list[EarlierJob]:
    """Return the jobs of a series, oldest first."""
    own = jobs.c.series_instance_uid == series_uid
    members = (
        select(job_instances.c.job_id, instances.c.sop_instance_uid)
        .join(jobs, jobs.c.id == job_instances.c.job_id)
        .join(instances, instances.c.id == job_instances.c.instance_id)
        .where(own)
    )
    with reading(engine) as connection:
        uids: dict[int, set[str]] = {}
        for job_id, uid in connection.execute(members):
            uids.setdefault(job_id, set()).add(uid)
        rows = connection.execute(select(jobs).where(own).order_by(jobs.c.id)).all()
    return [
        EarlierJob(
            row.id,
            row.volume_key,
            row.task,
            row.route,
            tuple(row.destinations),
            row.priority,
            row.strength,
            JobState(row.state),
            row.awaits_rest,
            row.derived_series_instance_uid,
            frozenset(uids.get(row.id, ())),
        )
        for row in rows
    ]


def enqueue(
    engine: Engine,
    series_uid: str,
    *,
    series_state: SeriesState,
    reason: str | None,
    jobs: Sequence[NewJob],
    instances_seen: int,
    now: float,
    evidence: Sequence[Mapping[str, Any]] = (),
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
        evidence: What the state rests on, as `Evidence.as_row`.

    Returns:
        The ids of the new jobs; None, with nothing written, when an instance came in between,
        a job that was to be superseded went on, or another process was faster. The next look
        sees it.
    """
    try:
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
                evidence=list(evidence),
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
    except _ChangedError:
        return None
    return [job_id for job_id in made if job_id is not None]


def _insert_job(connection: Connection, job: NewJob, now: float) -> int | None:
    members = _instance_ids(connection, job)
    alike = (jobs.c.series_instance_uid == job.series_instance_uid) & (jobs.c.task == job.task)
    earlier = connection.execute(
        select(jobs.c.id, jobs.c.volume_key, jobs.c.revision, jobs.c.awaits_rest).where(alike)
    ).all()
    # A volume may have got another key when others came beside it; its instances are its own.
    known = [row for row in earlier if _members(connection, row.id) == set(members)]
    if any(job.awaits_rest or not row.awaits_rest for row in known):
        return None
    revision = 1 + max((r.revision for r in earlier if r.volume_key == job.volume_key), default=0)
    _supersede(connection, job, revision, now)
    values = asdict(job)
    del values["instance_uids"], values["supersedes"]
    values |= {
        "note": job.reason,
        "revision": revision,
        "not_before": max(now, job.not_before),
        "attempts": 0,
        "created_at": now,
        "finished_at": now if job.state is JobState.REFUSED else None,
        "seconds": {},
    }
    job_id = int(connection.execute(insert(jobs).values(values).returning(jobs.c.id)).scalar_one())
    rows = [
        {"job_id": job_id, "instance_id": member, "position": position}
        for position, member in enumerate(members)
    ]
    connection.execute(insert(job_instances), rows)
    record_event(connection, Entity.JOB, job_id, None, job.state, job.reason, now)
    return job_id


def _supersede(connection: Connection, job: NewJob, revision: int, now: float) -> None:
    """Take back the jobs that a new one takes the place of, unless one has gone on meanwhile."""
    waiting = jobs.c.state.in_((JobState.QUEUED, JobState.HELD))
    reason = f"superseded by revision {revision}: more instances came"
    for job_id in job.supersedes:
        gone = move(
            connection,
            Entity.JOB,
            job_id,
            JobState.CANCELLED,
            reason=reason,
            now=now,
            only=waiting,
            finished_at=now,
        )
        if not gone:
            raise _ChangedError


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
