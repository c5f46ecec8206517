"""Recall: everything that one model made, and the rejection notes that follow it.

A note is an output of the job whose results it rejects, and joins the delivery to each destination
that has any of them. What has not been sent yet is not sent any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, insert, select, update

from dicom_node.errors import NotFoundError, PermanentError
from dicom_node.ledger.leases import Output
from dicom_node.ledger.outbox import restarted
from dicom_node.ledger.rows import Report
from dicom_node.ledger.tables import (
    DeliveryState,
    Entity,
    ItemState,
    JobState,
    deliveries,
    delivery_items,
    jobs,
    move,
    outputs,
    reading,
    series,
    writing,
)

_ARRIVED = (ItemState.DELIVERED, ItemState.COMMITTED)


@dataclass(frozen=True)
class MadeInstance:
    """One instance that a model made, and the destinations that have it."""

    job_id: int
    task: str
    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    source_sop_instance_uid: str
    path: str
    purged: bool
    destinations: tuple[str, ...]

    def row(self) -> Report:
        """It as a dictionary ready for JSON."""
        made = asdict(self)
        made["job"] = made.pop("job_id")
        made["destinations"] = list(self.destinations)
        return made


def full_digest(engine: Engine, sha256: str) -> str:
    """The SHA-256 of the one model that begins so.

    Raises:
        NotFoundError: No job was done by such a model, or several models begin so.
    """
    begins = jobs.c.model_sha256.like(f"{sha256.lower()}%")
    query = select(jobs.c.model_sha256).where(begins).distinct()
    with reading(engine) as connection:
        found = list(connection.scalars(query))
    if len(found) == 1:
        return str(found[0])
    if found:
        raise NotFoundError(f"{len(found)} models begin with {sha256}; give more of the digest")
    raise NotFoundError(f"the ledger knows no result of model {sha256}")


def made_by(engine: Engine, model_sha256: str, *, except_class: str) -> list[MadeInstance]:
    """Every instance that a model made, but for those of one SOP Class (the notes themselves)."""
    query = (
        select(
            outputs.c.id,
            outputs.c.job_id,
            jobs.c.task,
            series.c.study_instance_uid,
            jobs.c.derived_series_instance_uid,
            outputs.c.sop_instance_uid,
            outputs.c.sop_class_uid,
            outputs.c.source_sop_instance_uid,
            outputs.c.path,
            outputs.c.purged_at,
        )
        .join(jobs, jobs.c.id == outputs.c.job_id)
        .join(series, series.c.series_instance_uid == jobs.c.series_instance_uid)
        .where(jobs.c.model_sha256 == model_sha256, outputs.c.sop_class_uid != except_class)
        .order_by(outputs.c.job_id, outputs.c.id)
    )
    with reading(engine) as connection:
        where = _destinations(connection, jobs.c.model_sha256 == model_sha256)
        return [
            MadeInstance(
                job_id=row.job_id,
                task=row.task,
                study_instance_uid=row.study_instance_uid,
                series_instance_uid=row.derived_series_instance_uid,
                sop_instance_uid=row.sop_instance_uid,
                sop_class_uid=row.sop_class_uid,
                source_sop_instance_uid=row.source_sop_instance_uid,
                path=row.path,
                purged=row.purged_at is not None,
                destinations=tuple(where.get(row.id, ())),
            )
            for row in connection.execute(query)
        ]


def is_noted(engine: Engine, sop_instance_uid: str) -> bool:
    """Whether a note of this UID has been made before."""
    with reading(engine) as connection:
        query = select(outputs.c.id).where(outputs.c.sop_instance_uid == sop_instance_uid)
        return connection.execute(query).first() is not None


def record_note(engine: Engine, job_id: int, note: Output, *, reason: str, now: float) -> list[str]:
    """Put the rejection note of a job in the outbox; the destinations that it goes to.

    A result that waits for a person is not for sending either: its job is rejected. What a
    destination has not got of the rejected series is dead there.

    Raises:
        PermanentError: While a delivery of the job is under way: ask again when it has ended.
    """
    with writing(engine) as connection:
        rows = connection.execute(
            select(deliveries.c.id, deliveries.c.destination, deliveries.c.state)
            .where(deliveries.c.job_id == job_id)
            .order_by(deliveries.c.id)
        ).all()
        if busy := [row.id for row in rows if row.state == DeliveryState.SENDING]:
            raise PermanentError(f"delivery {busy[0]} is being sent; ask again when it has ended")
        output_id = connection.execute(
            insert(outputs).values(**asdict(note), job_id=job_id).returning(outputs.c.id)
        ).scalar_one()
        _reject_held(connection, job_id, reason, now)
        return [
            row.destination
            for row in rows
            if _send_note(connection, row.id, row.state, output_id, reason, now)
        ]


def _send_note(
    connection: Connection, delivery_id: int, state: str, output_id: int, reason: str, now: float
) -> bool:
    """Queue the note where anything has arrived; else give the delivery up."""
    own = delivery_items.c.delivery_id == delivery_id
    arrived = select(delivery_items.c.output_id).where(own, delivery_items.c.state.in_(_ARRIVED))
    has_any = connection.execute(arrived).first() is not None
    connection.execute(
        update(delivery_items)
        .where(own, delivery_items.c.state == ItemState.PENDING)
        .values(state=ItemState.DEAD, at=now)
    )
    if not has_any:
        ended: Mapping[str, Any] = {"finished_at": now}
        dead = DeliveryState.DEAD
        move(connection, Entity.DELIVERY, delivery_id, dead, reason=reason, now=now, **ended)
        return False
    connection.execute(
        insert(delivery_items).values(
            delivery_id=delivery_id, output_id=output_id, state=ItemState.PENDING
        )
    )
    if state != DeliveryState.QUEUED:
        values = {**restarted(now), "commitment_due": None, "commitment_asks": 0}
        queued = DeliveryState.QUEUED
        move(connection, Entity.DELIVERY, delivery_id, queued, reason=reason, now=now, **values)
    return True


def _reject_held(connection: Connection, job_id: int, reason: str, now: float) -> None:
    held: ColumnElement[bool] = jobs.c.state == JobState.HELD
    rejected = JobState.REJECTED
    move(
        connection, Entity.JOB, job_id, rejected, reason=reason, now=now, only=held, finished_at=now
    )


def _destinations(connection: Connection, of: ColumnElement[bool]) -> dict[int, list[str]]:
    """Where each output has arrived, by the output's id."""
    query = (
        select(delivery_items.c.output_id, deliveries.c.destination)
        .join(deliveries, deliveries.c.id == delivery_items.c.delivery_id)
        .join(jobs, jobs.c.id == deliveries.c.job_id)
        .where(of, delivery_items.c.state.in_(_ARRIVED))
        .order_by(delivery_items.c.delivery_id)
    )
    found: dict[int, list[str]] = {}
    for row in connection.execute(query):
        found.setdefault(row.output_id, []).append(row.destination)
    return found
