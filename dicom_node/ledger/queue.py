"""Jobs of restoration: enqueue, claim, lease, finish, and what a person may do to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from dicom_node.ledger.outbox import (
    Delivery,
    DeliveryItem,
    claim_delivery,
    conclude_delivery,
    heartbeat_delivery,
    record_sent,
    retry_delivery,
)
from dicom_node.ledger.tables import JobState, SeriesState

__all__ = [
    "Delivery",
    "DeliveryItem",
    "Job",
    "NewJob",
    "Output",
    "cancel",
    "claim",
    "claim_delivery",
    "conclude_delivery",
    "enqueue",
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
    "release_leases",
    "retry",
    "retry_delivery",
    "retry_later",
]


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

    `instances_seen` is `SeriesProgress.instances`: when an instance came in between, nothing
    is written and None is returned; the next look sees it.
    """
    raise NotImplementedError


def claim(engine: Engine, worker: str, *, lease_s: float, now: float) -> Job | None:
    """Take the next job, or None."""
    raise NotImplementedError


def heartbeat(engine: Engine, job_id: int, worker: str, *, lease_s: float, now: float) -> bool:
    """Extend the lease; False when the job is no longer this worker's."""
    raise NotImplementedError


def expire_leases(engine: Engine, now: float, *, max_attempts: int = 10) -> int:
    """Queue running jobs and deliveries whose lease has ended."""
    raise NotImplementedError


def release_leases(engine: Engine, worker: str, now: float, *, max_attempts: int = 10) -> int:
    """Queue what an earlier process of the same worker name left running; call at start."""
    raise NotImplementedError


def finish(
    engine: Engine,
    job_id: int,
    worker: str,
    *,
    outputs: Sequence[Output],
    derived_series_instance_uid: str,
    model_sha256: str,
    seconds: Mapping[str, float],
    note: str | None,
    now: float,
) -> bool:
    """Conclude a job and make one delivery per destination in one transaction."""
    raise NotImplementedError


def refuse(engine: Engine, job_id: int, worker: str, *, reason: str, now: float) -> bool:
    """Conclude a running job as refused; False when the lease was lost."""
    raise NotImplementedError


def fail(engine: Engine, job_id: int, worker: str, *, reason: str, now: float) -> bool:
    """Conclude a running job as failed; False when the lease was lost."""
    raise NotImplementedError


def retry_later(
    engine: Engine,
    job_id: int,
    worker: str,
    *,
    reason: str,
    delay_s: float,
    now: float,
    max_attempts: int = 10,
) -> bool:
    """Queue a running job again after a delay; failed once it was tried too often."""
    raise NotImplementedError


def hold(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Keep a queued job from being worked on."""
    raise NotImplementedError


def release(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Queue a held job."""
    raise NotImplementedError


def reject(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Decline a held job for good."""
    raise NotImplementedError


def cancel(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Take back a job that is not done."""
    raise NotImplementedError


def retry(engine: Engine, job_id: int, *, reason: str, now: float) -> bool:
    """Queue a failed, refused or cancelled job again."""
    raise NotImplementedError


def is_own_output(engine: Engine, *, sop_instance_uid: str, series_instance_uid: str) -> bool:
    """Tell whether the node itself made this instance or series."""
    raise NotImplementedError
