"""The whole story of an instance or a job: one list in the order of time, from every table.

From the association that brought it, over assembly, restoration and delivery, to the commitment of
each destination and the day when its file left the spool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, select

from dicom_node.ledger import tables
from dicom_node.ledger.rows import Report, iso
from dicom_node.ledger.states import Entity, ItemState


@dataclass(frozen=True)
class _Entry:
    """Something that happened: when (seconds since 1970 UTC), to what, and what."""

    at: float
    what: str
    happened: str
    detail: str | None = None

    def row(self) -> Report:
        return {
            "at": iso(self.at),
            "what": self.what,
            "happened": self.happened,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class _Scope:
    """Whose story: instances and jobs by id; *output_uids* only these results, None: all."""

    instance_ids: Sequence[int]
    job_ids: Sequence[int]
    output_uids: Sequence[str] | None = None
    single: bool = True  #: of one instance: its own arrival and answers are told too


def of_instance(
    connection: Connection, instance_ids: Sequence[int], output_uids: Sequence[str]
) -> list[Report]:
    """The story of the received copies of one SOP Instance and of what was made of it."""
    member = tables.job_instances.c
    jobs = select(member.job_id).where(member.instance_id.in_(instance_ids)).distinct()
    job_ids = list(connection.scalars(jobs))
    return _told(connection, _Scope(instance_ids, job_ids, output_uids))


def of_job(connection: Connection, job_id: int) -> list[Report]:
    """The story of a job: of its series, of itself, and of its deliveries."""
    member = tables.job_instances.c
    ids = list(connection.scalars(select(member.instance_id).where(member.job_id == job_id)))
    return _told(connection, _Scope(ids, [job_id], single=False))


def _told(connection: Connection, scope: _Scope) -> list[Report]:
    entries = [
        *_associations(connection, scope),
        *(_arrivals(connection, scope) if scope.single else ()),
        *_series(connection, scope),
        *_steps(connection, Entity.JOB, scope.job_ids),
        *_deliveries(connection, scope),
        *(_answers(connection, scope) if scope.single else ()),
        *_commitments(connection, scope),
        *(_results_gone(connection, scope) if scope.single else ()),
    ]
    # Stable: of one moment, in the order of the way through.
    return [entry.row() for entry in sorted(entries, key=lambda entry: entry.at)]


def _associations(connection: Connection, scope: _Scope) -> Iterator[_Entry]:
    brought = select(tables.instances.c.association_id).where(
        tables.instances.c.id.in_(scope.instance_ids)
    )
    query = select(tables.associations).where(tables.associations.c.id.in_(brought))
    for row in connection.execute(query):
        name = f"association {row.id}"
        who = f"{row.calling_ae} at {row.address} calls {row.called_ae}"
        yield _Entry(row.opened_at, name, "opened", who)
        if row.closed_at is not None:
            yield _Entry(row.closed_at, name, row.outcome)


def _arrivals(connection: Connection, scope: _Scope) -> Iterator[_Entry]:
    query = select(tables.instances).where(tables.instances.c.id.in_(scope.instance_ids))
    for row in connection.execute(query):
        # One that was set aside later has an event of its own for it.
        state = "received" if row.state == "rejected" and row.assigned else row.state
        reason = row.reason if state == row.state else None
        kept = f"{row.size} bytes, sha256 {row.sha256[:12]}…" if row.sha256 else None
        detail = ", ".join(words for words in (reason, kept) if words)
        yield _Entry(row.received_at, "instance", state, detail or None)
        if row.purged_at is not None:
            yield _Entry(row.purged_at, "instance", "purged", "its file left the spool")
    yield from _steps(connection, Entity.INSTANCE, scope.instance_ids)


def _series(connection: Connection, scope: _Scope) -> Iterator[_Entry]:
    uids = (
        select(tables.instances.c.series_instance_uid)
        .where(tables.instances.c.id.in_(scope.instance_ids))
        .distinct()
    )
    yield from _steps(connection, Entity.SERIES, list(connection.scalars(uids)))


def _steps(connection: Connection, entity: Entity, keys: Sequence[Any]) -> Iterator[_Entry]:
    event = tables.events.c
    query = (
        select(tables.events)
        .where(event.entity == entity, event.entity_id.in_([str(key) for key in keys]))
        .order_by(event.id)
    )
    for row in connection.execute(query):
        name = str(entity) if entity in _NAMELESS else f"{entity} {row.entity_id}"
        yield _Entry(row.at, name, row.to_state, row.reason)


#: Of these there is one in a story.
_NAMELESS = frozenset({Entity.INSTANCE, Entity.SERIES})


def _deliveries(connection: Connection, scope: _Scope) -> Iterator[_Entry]:
    rows = connection.execute(_of_jobs(scope)).all()
    names = {str(row.id): f"delivery {row.id} to {row.destination}" for row in rows}
    for entry in _steps(connection, Entity.DELIVERY, [row.id for row in rows]):
        yield _Entry(entry.at, names[entry.what.split()[1]], entry.happened, entry.detail)


def _of_jobs(scope: _Scope) -> Select[Any]:
    table = tables.deliveries
    return select(table).where(table.c.job_id.in_(scope.job_ids)).order_by(table.c.id)


def _answers(connection: Connection, scope: _Scope) -> Iterator[_Entry]:
    """What each destination said of the results, last."""
    item, output, delivery = tables.delivery_items.c, tables.outputs.c, tables.deliveries.c
    query = (
        select(output.sop_instance_uid, delivery.destination, item.state, item.status, item.at)
        .select_from(tables.delivery_items)
        .join(tables.outputs, output.id == item.output_id)
        .join(tables.deliveries, delivery.id == item.delivery_id)
        .where(output.sop_instance_uid.in_(scope.output_uids or ()), item.at.is_not(None))
        .order_by(item.delivery_id, item.output_id)
    )
    for row in connection.execute(query):
        said = None if row.status is None else f"answered 0x{row.status:04X}"
        happened = "tried" if row.state == ItemState.PENDING else row.state
        name = f"result {row.sop_instance_uid} at {row.destination}"
        yield _Entry(row.at, name, happened, said)


def _commitments(connection: Connection, scope: _Scope) -> Iterator[_Entry]:
    commitment = tables.commitments.c
    query = (
        select(tables.commitments, tables.deliveries.c.destination)
        .join(tables.deliveries, tables.deliveries.c.id == commitment.delivery_id)
        .where(tables.deliveries.c.job_id.in_(scope.job_ids))
        .order_by(commitment.requested_at)
    )
    for row in connection.execute(query):
        name = f"commitment of {row.destination}"
        yield _Entry(row.requested_at, name, "asked for", f"transaction {row.transaction_uid}")
        if row.reported_at is not None:
            failed = f"{row.failed} instances not committed" if row.failed else None
            yield _Entry(row.reported_at, name, "reported", failed)


def _results_gone(connection: Connection, scope: _Scope) -> Iterator[_Entry]:
    output = tables.outputs.c
    query = select(output.sop_instance_uid, output.purged_at).where(
        output.sop_instance_uid.in_(scope.output_uids or ()), output.purged_at.is_not(None)
    )
    for row in connection.execute(query):
        name = f"result {row.sop_instance_uid}"
        yield _Entry(row.purged_at, name, "purged", "its file left the spool")
