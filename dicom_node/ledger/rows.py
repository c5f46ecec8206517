"""Rows of the ledger as dictionaries ready for JSON: the queries behind `reports`."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    Select,
    Subquery,
    case,
    func,
    select,
)

from dicom_node.ledger import tables
from dicom_node.ledger.tables import DeliveryState, Entity, InstanceState, ItemState

Report = dict[str, Any]

_STEPS = ("load", "restore", "derive")
_SENT = (ItemState.DELIVERED, ItemState.COMMITTED)


def iso(at: float | None) -> str | None:
    """A moment as ISO 8601 in UTC, to the millisecond."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


Wanted = str | int | Sequence[str] | None


def conditions(
    created_at: Column[float],
    since: float | None,
    equal: Mapping[Column[Any], Wanted],
    until: float | None = None,
) -> list[ColumnElement[bool]]:
    """What a row must be: of these values (one of several), created from *since* to *until*."""
    wanted: list[ColumnElement[bool]] = []
    for column, value in equal.items():
        if isinstance(value, str | int):
            wanted.append(column == value)
        elif value:
            wanted.append(column.in_(value))
    if since is not None:
        wanted.append(created_at >= since)
    if until is not None:
        wanted.append(created_at < until)
    return wanted


def job_rows(
    connection: Connection, wanted: list[ColumnElement[bool]], limit: int | None
) -> list[Report]:
    members = (
        select(func.count())
        .where(tables.job_instances.c.job_id == tables.jobs.c.id)
        .scalar_subquery()
    )
    query = (
        select(tables.jobs, tables.series.c.study_instance_uid, members.label("instances"))
        .join(
            tables.series,
            tables.series.c.series_instance_uid == tables.jobs.c.series_instance_uid,
        )
        .where(*wanted)
        .order_by(tables.jobs.c.id.desc())
        .limit(limit)
    )
    chosen = query.with_only_columns(tables.jobs.c.id).subquery()
    sent = _deliveries_by_job(connection, chosen)
    return [_job(row, sent[row.id]) for row in connection.execute(query)]


def _job(row: Row[Any], sent: list[Report]) -> Report:
    return {
        "id": row.id,
        "state": row.state,
        "task": row.task,
        "reason": row.reason,
        "study_instance_uid": row.study_instance_uid,
        "series_instance_uid": row.series_instance_uid,
        "derived_series_instance_uid": row.derived_series_instance_uid,
        "volume": row.volume_key,
        "revision": row.revision,
        "route": row.route,
        "priority": row.priority,
        "attempts": row.attempts,
        "worker": row.worker,
        "note": row.note,
        "instances": row.instances,
        "model_sha256": row.model_sha256,
        "created": iso(row.created_at),
        "finished": iso(row.finished_at),
        "seconds": {step: row.seconds.get(step) for step in _STEPS} | row.seconds,
        "quantities": row.quantities,
        "strength": row.strength,
        "evidence": row.evidence,
        "deliveries": sent,
    }


def _deliveries_by_job(connection: Connection, chosen: Subquery) -> dict[int, list[Report]]:
    query = _deliveries_query([tables.deliveries.c.job_id.in_(select(chosen.c.id))], None)
    found: dict[int, list[Report]] = defaultdict(list)
    for row in connection.execute(query.order_by(tables.deliveries.c.id)):
        found[row.job_id].append(
            {
                "id": row.id,
                "destination": row.destination,
                "state": row.state,
                "reason": row.reason,
                "sent": row.sent,
                "total": row.total,
            }
        )
    return found


def _deliveries_query(wanted: list[ColumnElement[bool]], limit: int | None) -> Select[Any]:
    """The newest of the wanted deliveries, with how many of their instances are there."""
    chosen = (
        select(tables.deliveries.c.id)
        .where(*wanted)
        .order_by(tables.deliveries.c.id.desc())
        .limit(limit)
    )
    item = tables.delivery_items.c
    # Counted for the chosen alone: the ledger has an item for each instance it ever sent.
    counts = (
        select(
            item.delivery_id,
            func.count().label("total"),
            func.sum(case((item.state.in_(_SENT), 1), else_=0)).label("sent"),
        )
        .where(item.delivery_id.in_(chosen))
        .group_by(item.delivery_id)
        .subquery()
    )
    return (
        select(
            tables.deliveries,
            func.coalesce(counts.c.sent, 0).label("sent"),
            func.coalesce(counts.c.total, 0).label("total"),
        )
        .outerjoin(counts, counts.c.delivery_id == tables.deliveries.c.id)
        .where(tables.deliveries.c.id.in_(chosen))
    )


def delivery_rows(
    connection: Connection, wanted: list[ColumnElement[bool]], limit: int | None
) -> list[Report]:
    query = (
        _deliveries_query(wanted, limit)
        .add_columns(tables.jobs.c.series_instance_uid, tables.jobs.c.derived_series_instance_uid)
        .join(tables.jobs, tables.jobs.c.id == tables.deliveries.c.job_id)
        .order_by(tables.deliveries.c.id.desc())
    )
    return [_delivery(row) for row in connection.execute(query)]


def _delivery(row: Row[Any]) -> Report:
    is_waiting = row.state == DeliveryState.WAITING
    return {
        "id": row.id,
        "job": row.job_id,
        "destination": row.destination,
        "state": row.state,
        "reason": row.reason,
        "series_instance_uid": row.series_instance_uid,
        "derived_series_instance_uid": row.derived_series_instance_uid,
        "sent": row.sent,
        "total": row.total,
        "attempts": row.attempts,
        "created": iso(row.created_at),
        "next_attempt": iso(row.not_before) if is_waiting else None,
        "finished": iso(row.finished_at),
    }


def series_rows(
    connection: Connection, wanted: list[ColumnElement[bool]], limit: int | None
) -> list[Report]:
    query = (
        select(
            tables.series,
            _stored().label("stored"),
            tables.associations.c.calling_ae,
            tables.associations.c.called_ae,
        )
        .outerjoin(tables.associations, tables.associations.c.id == tables.series.c.association_id)
        .where(*wanted)
        .order_by(tables.series.c.first_received_at.desc())
        .limit(limit)
    )
    return [
        {
            "series_instance_uid": row.series_instance_uid,
            "study_instance_uid": row.study_instance_uid,
            "modality": row.modality,
            "state": row.state,
            "reason": row.reason,
            "instances": row.stored,
            "evidence": row.evidence,
            "calling_ae": row.calling_ae,
            "called_ae": row.called_ae,
            "first_received": iso(row.first_received_at),
            "last_received": iso(row.last_received_at),
        }
        for row in connection.execute(query)
    ]


def _stored() -> ColumnElement[int]:
    """The instances of a series that are stored; its row counts those to be restored alone."""
    instance = tables.instances.c
    ignored = (
        select(func.count())
        .where(
            instance.series_instance_uid == tables.series.c.series_instance_uid,
            instance.state == InstanceState.IGNORED,
        )
        .scalar_subquery()
    )
    # Counted only where nothing is to be restored, which leaves a listing as quick as it was.
    return case((tables.series.c.instances == 0, ignored), else_=tables.series.c.instances)


def instance_rows(
    connection: Connection, wanted: list[ColumnElement[bool]], limit: int | None
) -> list[Report]:
    query = (
        select(tables.instances, tables.associations.c.calling_ae, tables.associations.c.called_ae)
        .outerjoin(
            tables.associations, tables.associations.c.id == tables.instances.c.association_id
        )
        .where(*wanted)
        .order_by(tables.instances.c.id.desc())
        .limit(limit)
    )
    return [
        {
            "id": row.id,
            "sop_instance_uid": row.sop_instance_uid,
            "sop_class_uid": row.sop_class_uid,
            "series_instance_uid": row.series_instance_uid,
            "study_instance_uid": row.study_instance_uid,
            "modality": row.modality,
            "transfer_syntax_uid": row.transfer_syntax_uid,
            "state": row.state,
            "reason": row.reason,
            "path": row.path,
            "sha256": row.sha256,
            "size": row.size,
            "calling_ae": row.calling_ae,
            "called_ae": row.called_ae,
            "received": iso(row.received_at),
            "purged": iso(row.purged_at),
        }
        for row in connection.execute(query)
    ]


def source_uids(connection: Connection, job_id: int) -> list[str]:
    query = (
        select(tables.instances.c.sop_instance_uid)
        .join(tables.job_instances, tables.job_instances.c.instance_id == tables.instances.c.id)
        .where(tables.job_instances.c.job_id == job_id)
        .order_by(tables.job_instances.c.position)
    )
    return list(connection.scalars(query))


def output_rows(connection: Connection, condition: ColumnElement[bool]) -> list[Report]:
    query = select(tables.outputs).where(condition).order_by(tables.outputs.c.id)
    return [
        {
            "sop_instance_uid": row.sop_instance_uid,
            "source_sop_instance_uid": row.source_sop_instance_uid,
            "job": row.job_id,
            "path": row.path,
            "sha256": row.sha256,
            "size": row.size,
            "purged": iso(row.purged_at),
        }
        for row in connection.execute(query)
    ]


def item_rows(connection: Connection, condition: ColumnElement[bool]) -> list[Report]:
    item = tables.delivery_items.c
    query = (
        select(
            tables.outputs.c.sop_instance_uid,
            tables.outputs.c.sop_class_uid,
            tables.deliveries.c.destination,
            item.state,
            item.status,
            item.at,
        )
        .join(tables.outputs, tables.outputs.c.id == item.output_id)
        .join(tables.deliveries, tables.deliveries.c.id == item.delivery_id)
        .where(condition)
        .order_by(item.delivery_id, item.output_id)
    )
    return [
        {
            "sop_instance_uid": row.sop_instance_uid,
            "sop_class_uid": row.sop_class_uid,
            "destination": row.destination,
            "state": row.state,
            "status": None if row.status is None else f"0x{row.status:04X}",
            "at": iso(row.at),
        }
        for row in connection.execute(query)
    ]


def history(connection: Connection, entity: Entity, keys: list[Any]) -> list[Report]:
    table = tables.events.c
    query = (
        select(tables.events)
        .where(table.entity == entity, table.entity_id.in_([str(key) for key in keys]))
        .order_by(table.id)
    )
    return [
        {
            "at": iso(row.at),
            "from": row.from_state,
            "to": row.to_state,
            "reason": row.reason,
        }
        for row in connection.execute(query)
    ]


def instance_counts(connection: Connection) -> dict[str, int]:
    """How many instances have each state; two indices tell it, the rows need not be read."""
    table = tables.instances.c
    found: dict[str, int] = {str(each): 0 for each in InstanceState}
    for gone in (table.purged_at.is_(None), table.purged_at.is_not(None)):
        query = select(table.state, func.count()).where(gone).group_by(table.state)
        for state, count in connection.execute(query):
            found[state] = found.get(state, 0) + count
    return found


def counts(
    connection: Connection, state: Column[str], states: type[enum.StrEnum]
) -> dict[str, int]:
    found = connection.execute(select(state, func.count()).group_by(state))
    return {str(each): 0 for each in states} | {str(name): count for name, count in found}


def open_associations(connection: Connection) -> int:
    query = select(func.count()).where(tables.associations.c.closed_at.is_(None))
    return connection.scalar(query) or 0


def oldest(connection: Connection, table: Any, states: list[str]) -> str | None:
    return iso(connection.scalar(select(func.min(table.created_at)).where(table.state.in_(states))))
