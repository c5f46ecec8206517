"""Jobs of restoration: how they are made, and what a person may do to them.

What makes jobs (`making`) and what a worker does to jobs and deliveries (`leases`, `outbox`) is
offered here too, so that its callers know one module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Engine, select

from dicom_node.errors import PermanentError
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
from dicom_node.ledger.making import EarlierJob, NewJob, enqueue, series_jobs
from dicom_node.ledger.outbox import (
    Delivery,
    DeliveryItem,
    claim_delivery,
    conclude_delivery,
    expire_delivery_leases,
    heartbeat_delivery,
    release_delivery_leases,
    retry_delivery,
)
from dicom_node.ledger.states import Verdict
from dicom_node.ledger.tables import (
    Entity,
    JobState,
    instances,
    job_instances,
    move,
    reading,
    writing,
)
from dicom_node.ledger.tables import jobs as jobs_table
from dicom_node.ledger.tables import outputs as outputs_table
from dicom_node.ledger.tables import verdicts as verdicts_table
from dicom_node.ledger.verdicts import (
    Judged,
    Recorded,
    note_review,
    reject,
    release,
    reset_breaker,
)

__all__ = [
    "MAX_ATTEMPTS",
    "Delivery",
    "DeliveryItem",
    "EarlierJob",
    "Job",
    "Judged",
    "NewJob",
    "Output",
    "Recorded",
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
    "note_review",
    "refuse",
    "reject",
    "release",
    "release_delivery_leases",
    "release_leases",
    "reset_breaker",
    "retry",
    "retry_delivery",
    "retry_later",
    "series_jobs",
]

_NO_LEASE: Mapping[str, Any] = {"worker": None, "lease_until": None}
_FRESH: Mapping[str, Any] = {"attempts": 0, "not_before": 0.0, "finished_at": None}


def hold(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Keep a queued or running job from being worked on."""
    return _decide(engine, job_id, JobState.HELD, reason, now)


def cancel(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Take back a job that is not done; a result that a gate holds is released or rejected."""
    judged = select(verdicts_table.c.job_id).where(
        verdicts_table.c.job_id == job_id, verdicts_table.c.verdict == Verdict.HOLD
    )
    only = ~judged.exists()
    return _decide(engine, job_id, JobState.CANCELLED, reason, now, only=only, finished_at=now)


def retry(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Queue a failed, refused or cancelled job again.

    Raises:
        PermanentError: When originals of it have left the spool.
    """
    if _has_lost_originals(engine, job_id):
        raise PermanentError(f"originals of job {job_id} have left the spool; send them again")
    ended = (JobState.FAILED, JobState.REFUSED, JobState.CANCELLED)
    only = jobs_table.c.state.in_(ended)
    return _decide(engine, job_id, JobState.QUEUED, reason, now, only=only, **_FRESH)


def _has_lost_originals(engine: Engine, job_id: int) -> bool:
    lost = (
        select(instances.c.id)
        .join(job_instances, job_instances.c.instance_id == instances.c.id)
        .where(job_instances.c.job_id == job_id, instances.c.purged_at.is_not(None))
    )
    with reading(engine) as connection:
        return connection.execute(lost).first() is not None


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
