"""What the safety gates said of each job, who decided what was held, and the circuit breakers.

A delivery is made by `permit` alone, and only where a verdict of the same transaction, or of one
before it, lets the result go to that destination.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, func, insert, or_, select, update

from dicom_node import breaker
from dicom_node.errors import PermanentError
from dicom_node.ledger.outbox import make_delivery
from dicom_node.ledger.states import BreakerState, Decision, Verdict
from dicom_node.ledger.tables import (
    Entity,
    JobState,
    breakers,
    gate_readings,
    insert_or_nothing,
    jobs,
    judgements,
    move,
    verdicts,
    writing,
)
from dicom_node.readings import GateReading

__all__ = [
    "NOWHERE",
    "Judged",
    "Recorded",
    "record",
    "reject",
    "release",
    "reset_breaker",
    "settle",
]

#: The destination of a job that has none: its result stays in the spool.
NOWHERE = ""
_SENDABLE = (Verdict.PASS, Verdict.WARN)
# The volume key of a series that holds one volume.
_UNDIVIDED = "whole"


@dataclass(frozen=True)
class Judged:
    """A result as the gates and the site's policy see it."""

    modality: str
    model_sha256: str
    failed: bool  #: a gate is past its limit, whatever the policy makes of that
    verdicts: Mapping[str, Verdict]  #: by destination; NOWHERE where there is none
    reason: str | None
    readings: tuple[GateReading, ...]
    breaker: breaker.Rule
    review: str | None = None  #: folder of the review report in the spool


@dataclass(frozen=True)
class Recorded:
    """The verdicts that hold, the breaker and the rest of the volume considered, and why."""

    verdicts: Mapping[str, Verdict]
    reason: str | None
    added: tuple[str, ...] = ()  #: of the reasons those that the judgement has not

    @property
    def state(self) -> JobState:
        """The state of the job: held as long as one destination waits for a person."""
        found = set(self.verdicts.values())
        if Verdict.HOLD in found:
            return JobState.HELD
        return JobState.DONE if found & set(_SENDABLE) else JobState.REFUSED


def record(connection: Connection, job_id: int, judged: Judged, now: float) -> Recorded:
    """Write what was judged, in the caller's transaction.

    What an earlier try of the job left is replaced. The job counts for the breaker of its
    modality; while that is open, nothing passes without a person. Nor does what came late go alone
    to a destination that has not got the rest of its volume.
    """
    for table in (gate_readings, verdicts, judgements):
        connection.execute(delete(table).where(table.c.job_id == job_id))
    connection.execute(
        insert(judgements).values(
            job_id=job_id,
            modality=judged.modality,
            model_sha256=judged.model_sha256,
            failed=judged.failed,
            review=judged.review,
            at=now,
        )
    )
    rows = [_reading_row(job_id, place, each) for place, each in enumerate(judged.readings)]
    if rows:
        connection.execute(insert(gate_readings), rows)
    tripped = _breaker_reason(connection, judged, now)
    kept = _kept_back(connection, job_id, judged)
    effective = {
        destination: Verdict.HOLD
        if (tripped or destination in kept) and verdict in _SENDABLE
        else verdict
        for destination, verdict in judged.verdicts.items()
    }
    added = tuple(dict.fromkeys(each for each in (tripped, *kept.values()) if each))
    reason = "; ".join(each for each in (judged.reason, *added) if each) or None
    for destination, verdict in effective.items():
        values = {"job_id": job_id, "destination": destination, "verdict": verdict}
        connection.execute(insert(verdicts).values(**values, reason=reason))
    return Recorded(effective, reason, added)


def note_review(engine: Engine, job_id: int, folder: str) -> None:
    """Note where the review report of a job is that was written after its conclusion."""
    with writing(engine) as connection:
        connection.execute(
            update(judgements).where(judgements.c.job_id == job_id).values(review=folder)
        )


def settle(connection: Connection, job_id: int, recorded: Recorded, now: float) -> None:
    """Put the result in the outbox for every destination whose recorded verdict lets it pass."""
    for destination, verdict in recorded.verdicts.items():
        if verdict in _SENDABLE and destination != NOWHERE:
            _permit(connection, job_id, destination, now)


def release(engine: Engine, job_id: int, *, operator: str, reason: str, now: float) -> bool:
    """Let a held job go on: what the gates held is sent as it was reviewed, else it is queued.

    Returns:
        False, with nothing written, when the job is not held.
    """
    words = f"released by {operator}: {reason}"
    with writing(engine) as connection:
        waiting = _held_destinations(connection, job_id)
        state = JobState.DONE if waiting else JobState.QUEUED
        values: dict[str, Any] = {"worker": None, "lease_until": None}
        values |= {"finished_at": now} if waiting else _FRESH
        only = jobs.c.state == JobState.HELD
        moved = move(
            connection, Entity.JOB, job_id, state, reason=words, now=now, only=only, **values
        )
        if not moved:
            return False
        _decide(connection, job_id, Decision.RELEASED, operator, reason, now)
        for destination in waiting:
            if destination != NOWHERE:
                _permit(connection, job_id, destination, now)
    return True


_FRESH: Mapping[str, Any] = {"attempts": 0, "not_before": 0.0, "finished_at": None}


def reject(engine: Engine, job_id: int, *, operator: str, reason: str, now: float) -> bool:
    """Decline a held job for good: what was held is never sent; False when it is not held."""
    with writing(engine) as connection:
        moved = move(
            connection,
            Entity.JOB,
            job_id,
            JobState.REJECTED,
            reason=f"rejected by {operator}: {reason}",
            now=now,
            only=jobs.c.state == JobState.HELD,
            worker=None,
            lease_until=None,
            finished_at=now,
        )
        if moved:
            _decide(connection, job_id, Decision.REJECTED, operator, reason, now)
        return moved


def reset_breaker(engine: Engine, modality: str, *, operator: str, reason: str, now: float) -> bool:
    """Close an open breaker; what was judged before counts no longer. False when it is closed."""
    with writing(engine) as connection:
        return move(
            connection,
            Entity.BREAKER,
            modality,
            BreakerState.CLOSED,
            reason=f"reset by {operator}: {reason}",
            now=now,
            counts_from=now,
            operator=operator,
        )


def _permit(connection: Connection, job_id: int, destination: str, now: float) -> None:
    """Make the delivery; the row of the verdict decides, not the caller."""
    row = connection.execute(
        select(verdicts.c.verdict, verdicts.c.decision).where(
            verdicts.c.job_id == job_id, verdicts.c.destination == destination
        )
    ).one_or_none()
    passes = row is not None and (
        row.verdict in _SENDABLE
        or (row.verdict == Verdict.HOLD and row.decision == Decision.RELEASED)
    )
    if not passes:
        raise PermanentError(f"no verdict lets job {job_id} go to {destination}")
    make_delivery(connection, job_id, destination, now)


def _held_destinations(connection: Connection, job_id: int) -> list[str]:
    return list(
        connection.scalars(
            select(verdicts.c.destination)
            .where(verdicts.c.job_id == job_id, verdicts.c.verdict == Verdict.HOLD)
            .order_by(verdicts.c.destination)
        )
    )


def _decide(
    connection: Connection,
    job_id: int,
    decision: Decision,
    operator: str,
    reason: str,
    now: float,
) -> None:
    connection.execute(
        update(verdicts)
        .where(verdicts.c.job_id == job_id, verdicts.c.verdict == Verdict.HOLD)
        .values(decision=decision, operator=operator, decision_reason=reason, decided_at=now)
    )


def _kept_back(connection: Connection, job_id: int, judged: Judged) -> dict[str, str]:
    """The destinations that an earlier part of the volume was kept from, and which part that is.

    PET comes again as a whole, so that no part of it joins another.
    """
    if judged.modality == "PT":
        return {}
    this, earlier = jobs.alias("this"), jobs.alias("earlier")
    same_volume = or_(
        earlier.c.volume_key == this.c.volume_key,
        earlier.c.volume_key == _UNDIVIDED,
        this.c.volume_key == _UNDIVIDED,
    )
    is_kept = or_(
        verdicts.c.verdict == Verdict.REFUSE,
        (verdicts.c.verdict == Verdict.HOLD)
        & verdicts.c.decision.is_distinct_from(Decision.RELEASED),
    )
    query = (
        select(verdicts.c.destination, earlier.c.id)
        .join(earlier, earlier.c.id == verdicts.c.job_id)
        .join(this, this.c.series_instance_uid == earlier.c.series_instance_uid)
        .where(this.c.id == job_id, earlier.c.id < job_id, earlier.c.task == this.c.task)
        .where(same_volume, is_kept, verdicts.c.destination.in_(list(judged.verdicts)))
        .order_by(earlier.c.id)
    )
    found = connection.execute(query).all()
    return {name: f"the rest of the volume was not sent: job {other}" for name, other in found}


def _breaker_reason(connection: Connection, judged: Judged, now: float) -> str | None:
    """Why the breaker of the modality is open, after the judgement just written; or None."""
    insert_or_nothing(
        connection,
        breakers,
        {"modality": judged.modality, "state": BreakerState.CLOSED, "counts_from": 0.0},
    )
    # The row is locked: two workers that end at once see each other's judgement.
    row = connection.execute(
        select(breakers).where(breakers.c.modality == judged.modality).with_for_update()
    ).one()
    if row.state == BreakerState.CLOSED:
        failed, total = _window(connection, judged, row)
        why = breaker.leaves_band(failed, total, judged.breaker)
        if why is None:
            return None
        move(
            connection,
            Entity.BREAKER,
            judged.modality,
            BreakerState.OPEN,
            reason=why,
            now=now,
            opened_at=now,
        )
        return f"circuit breaker {judged.modality} opened: {why}"
    return f"circuit breaker {judged.modality} is open: {row.reason}"


def _window(connection: Connection, judged: Judged, row: Row[Any]) -> tuple[int, int]:
    """Failed and all jobs among the latest of this modality and model since the last reset."""
    latest = (
        select(judgements.c.failed)
        .where(
            judgements.c.modality == judged.modality,
            judgements.c.model_sha256 == judged.model_sha256,
            judgements.c.at > row.counts_from,
        )
        .order_by(judgements.c.at.desc(), judgements.c.job_id.desc())
        .limit(judged.breaker.window)
        .subquery()
    )
    found = connection.execute(
        select(func.count().filter(latest.c.failed), func.count()).select_from(latest)
    ).one()
    return int(found[0]), int(found[1])


def _reading_row(job_id: int, place: int, reading: GateReading) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "place": place,
        "gate": reading.gate,
        "level": reading.level,
        "unit": reading.unit,
        "worst_slice": reading.worst_slice,
        "reason": reading.reason or None,
        "measured": reading.to_json(),
    }
