"""Writing what arrives: associations, instances and their series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sqlalchemy import Engine, Select, Subquery, case, func, insert, select, update

from dicom_node import observability
from dicom_node.ledger.arrivals import ReceivedInstance, record_instance, record_instances
from dicom_node.ledger.tables import (
    Entity,
    InstanceState,
    SeriesState,
    associations,
    instances,
    move,
    reading,
    record_event,
    series,
    writing,
)

__all__ = [
    "InstanceRow",
    "Outcome",
    "ReceivedInstance",
    "Sender",
    "SeriesProgress",
    "close_association",
    "close_lost_associations",
    "force_series",
    "ignore_series",
    "instances_kept",
    "instances_purged",
    "known_paths",
    "lost_association",
    "open_association",
    "open_since",
    "quarantine_instance",
    "record_instance",
    "record_instances",
    "reject_instance",
    "series_instances",
    "series_progress",
    "series_senders",
]

Outcome = Literal["released", "aborted", "lost"]


@dataclass(frozen=True)
class SeriesProgress:
    """A series in state `receiving`, as the assembler judges it."""

    series_instance_uid: str
    study_instance_uid: str
    modality: str
    state: SeriesState
    #: Instances in state `received`; `queue.enqueue` compares it (`instances_seen`).
    instances: int
    last_received: float
    open_associations: int
    #: A person asked to take it as complete now.
    forced: bool
    calling_ae: str
    called_ae: str
    address: str
    #: Why it is open: a late instance, or the words of the person who forced it.
    reason: str | None = None
    first_received: float = 0.0


@dataclass(frozen=True)
class Sender:
    """An association that brought instances of a series, or was the last to send one again."""

    calling_ae: str
    called_ae: str
    address: str
    #: released, aborted or lost; None: it is open.
    outcome: str | None
    #: Instances of the series that it brought first.
    instances: int


@dataclass(frozen=True)
class InstanceRow:
    """One received SOP Instance of a series."""

    sop_instance_uid: str
    sop_class_uid: str
    path: str
    received_at: float
    #: An earlier `queue.enqueue` has already dealt with it.
    assigned: bool


def open_association(
    engine: Engine, *, calling_ae: str, called_ae: str, address: str, now: float
) -> int:
    """Record an accepted association and return its id."""
    row = {"calling_ae": calling_ae, "called_ae": called_ae, "address": address, "opened_at": now}
    with writing(engine) as connection:
        return int(
            connection.execute(
                insert(associations).values(row).returning(associations.c.id)
            ).scalar_one()
        )


def close_association(engine: Engine, association_id: int, outcome: Outcome, now: float) -> None:
    """Record the end of an association; a second end changes nothing."""
    with writing(engine) as connection:
        connection.execute(
            update(associations)
            .where(associations.c.id == association_id, associations.c.closed_at.is_(None))
            .values(closed_at=now, outcome=outcome)
        )


def close_lost_associations(engine: Engine, now: float) -> int:
    """Close associations that a killed receive process left open; call before listening."""
    with writing(engine) as connection:
        return connection.execute(
            update(associations)
            .where(associations.c.closed_at.is_(None))
            .values(closed_at=now, outcome="lost")
        ).rowcount


def lost_association(engine: Engine, series_uid: str) -> int | None:
    """The association by which a series came last, if its end is not recorded."""
    query = (
        select(associations.c.id)
        .join(series, series.c.association_id == associations.c.id)
        .where(series.c.series_instance_uid == series_uid, associations.c.closed_at.is_(None))
    )
    with reading(engine) as connection:
        found: int | None = connection.scalar(query)
        return found


def reject_instance(
    engine: Engine,
    *,
    sop_instance_uid: str | None,
    path: str | None,
    reason: str,
    association_id: int | None,
    now: float,
) -> None:
    """Record an instance that was refused on arrival; `path` is its quarantined copy."""
    with writing(engine) as connection:
        connection.execute(
            insert(instances).values(
                sop_instance_uid=sop_instance_uid,
                path=path,
                reason=reason,
                association_id=association_id,
                state=InstanceState.REJECTED,
                assigned=False,
                received_at=now,
            )
        )
    observability.STATES.labels(entity=Entity.INSTANCE, state=InstanceState.REJECTED).inc()


def quarantine_instance(
    engine: Engine, sop_instance_uid: str, *, path: str, reason: str, now: float
) -> bool:
    """Turn a received instance whose pixel data do not decode into a rejected one.

    A good copy may then be received under the same UID.
    """
    with writing(engine) as connection:
        row = connection.execute(
            select(instances.c.id, instances.c.series_instance_uid).where(
                instances.c.sop_instance_uid == sop_instance_uid,
                instances.c.state == InstanceState.RECEIVED,
            )
        ).first()
        if row is None or not move(
            connection,
            Entity.INSTANCE,
            row.id,
            InstanceState.REJECTED,
            reason=reason,
            now=now,
            path=path,
        ):
            return False
        connection.execute(
            update(series)
            .where(series.c.series_instance_uid == row.series_instance_uid)
            .values(instances=series.c.instances - 1)
        )
        return True


def series_progress(engine: Engine) -> list[SeriesProgress]:
    """Return the series in state `receiving`, oldest first."""
    with reading(engine) as connection:
        rows = connection.execute(_progress_query()).mappings().all()
    return [SeriesProgress(**{**row, "state": SeriesState(row["state"])}) for row in rows]


@cache
def _progress_query() -> Select[*tuple[Any, ...]]:
    """Made once: the assembler asks each second, in the process that receives."""
    opened = _open_associations()
    return (
        select(
            series.c.series_instance_uid,
            series.c.study_instance_uid,
            series.c.modality,
            series.c.state,
            series.c.instances,
            series.c.last_received_at.label("last_received"),
            func.coalesce(
                opened.c.open_associations,
                # One that sends again what is known has brought no row.
                case((associations.c.id.is_not(None) & associations.c.closed_at.is_(None), 1)),
                0,
            ).label("open_associations"),
            series.c.forced,
            func.coalesce(associations.c.calling_ae, "").label("calling_ae"),
            func.coalesce(associations.c.called_ae, "").label("called_ae"),
            func.coalesce(associations.c.address, "").label("address"),
            series.c.reason,
            series.c.first_received_at.label("first_received"),
        )
        .outerjoin(associations, associations.c.id == series.c.association_id)
        .outerjoin(opened, opened.c.series_instance_uid == series.c.series_instance_uid)
        .where(series.c.state == SeriesState.RECEIVING, series.c.instances > 0)
        .order_by(series.c.last_received_at)
    )


def series_senders(engine: Engine, series_uid: str) -> list[Sender]:
    """Return the associations that had to do with a series, in order of their opening."""
    brought = (
        select(instances.c.association_id, func.count().label("instances"))
        .where(
            instances.c.series_instance_uid == series_uid,
            instances.c.state.in_([InstanceState.RECEIVED, InstanceState.IGNORED]),
        )
        .group_by(instances.c.association_id)
        .subquery()
    )
    latest = select(series.c.association_id).where(series.c.series_instance_uid == series_uid)
    query = (
        select(
            associations.c.calling_ae,
            associations.c.called_ae,
            associations.c.address,
            associations.c.outcome,
            func.coalesce(brought.c.instances, 0).label("instances"),
        )
        .outerjoin(brought, brought.c.association_id == associations.c.id)
        .where(
            brought.c.association_id.is_not(None) | (associations.c.id == latest.scalar_subquery())
        )
        .order_by(associations.c.id)
    )
    with reading(engine) as connection:
        return [Sender(*row) for row in connection.execute(query)]


def instances_kept(engine: Engine, series_uid: str) -> frozenset[str]:
    """Return every SOP Instance UID of a series that the node has, ignored ones included."""
    query = select(instances.c.sop_instance_uid).where(
        instances.c.series_instance_uid == series_uid,
        instances.c.state.in_([InstanceState.RECEIVED, InstanceState.IGNORED]),
    )
    with reading(engine) as connection:
        return frozenset(connection.scalars(query))


def instances_purged(engine: Engine, series_uid: str) -> frozenset[str]:
    """Return the received instances of a series whose files have left the spool."""
    query = select(instances.c.sop_instance_uid).where(
        instances.c.series_instance_uid == series_uid,
        instances.c.state == InstanceState.RECEIVED,
        instances.c.purged_at.is_not(None),
    )
    with reading(engine) as connection:
        return frozenset(connection.scalars(query))


def open_since(engine: Engine, series_uid: str) -> float | None:
    """Return when the first instance came that no conclusion has dealt with, if there is one."""
    query = select(func.min(instances.c.received_at)).where(
        instances.c.series_instance_uid == series_uid,
        instances.c.state == InstanceState.RECEIVED,
        instances.c.assigned.is_(False),
    )
    with reading(engine) as connection:
        found: float | None = connection.scalar(query)
        return found


def series_instances(
    engine: Engine, series_uid: str, *, only_unassigned: bool = False
) -> list[InstanceRow]:
    """Return the received instances of a series that are in the spool, in order of arrival."""
    query = (
        select(
            instances.c.sop_instance_uid,
            instances.c.sop_class_uid,
            instances.c.path,
            instances.c.received_at,
            instances.c.assigned,
        )
        .where(
            instances.c.series_instance_uid == series_uid,
            instances.c.state == InstanceState.RECEIVED,
            instances.c.purged_at.is_(None),
        )
        .order_by(instances.c.id)
    )
    if only_unassigned:
        query = query.where(instances.c.assigned.is_(False))
    with reading(engine) as connection:
        return [InstanceRow(*row) for row in connection.execute(query)]


def ignore_series(
    engine: Engine,
    series_uid: str,
    reason: str,
    now: float,
    *,
    instances_seen: int | None = None,
    evidence: Sequence[Mapping[str, Any]] = (),
) -> bool:
    """Close a receiving series without a job.

    Returns:
        False when it is not receiving or, with `instances_seen`, when it has grown meanwhile.
    """
    with writing(engine) as connection:
        return move(
            connection,
            Entity.SERIES,
            series_uid,
            SeriesState.IGNORED,
            reason=reason,
            now=now,
            only=None if instances_seen is None else series.c.instances == instances_seen,
            forced=False,
            evidence=list(evidence),
        )


def force_series(engine: Engine, series_uid: str, *, reason: str, now: float) -> bool:
    """Ask the assembler to take a series as complete at its next look.

    A closed series is opened again, so that it is judged anew by the rules of today.
    """
    with writing(engine) as connection:
        own = series.c.series_instance_uid == series_uid
        state = connection.scalar(
            update(series).where(own).values(forced=True, reason=reason).returning(series.c.state)
        )
        opened = SeriesState.RECEIVING
        if state == opened:
            record_event(connection, Entity.SERIES, series_uid, opened, opened, reason, now)
        elif state is not None:
            move(connection, Entity.SERIES, series_uid, opened, reason=reason, now=now)
        return state is not None


def known_paths(engine: Engine) -> set[str]:
    """Return every path in the spool that a row of an instance names and that is not purged."""
    named = select(instances.c.path).where(
        instances.c.path.is_not(None), instances.c.purged_at.is_(None)
    )
    with reading(engine) as connection:
        return set(connection.scalars(named))


def _open_associations() -> Subquery:
    """Count, per series, the open associations that brought one of its instances."""
    return (
        select(
            instances.c.series_instance_uid,
            func.count(associations.c.id.distinct()).label("open_associations"),
        )
        .join(associations, associations.c.id == instances.c.association_id)
        .where(associations.c.closed_at.is_(None))
        .group_by(instances.c.series_instance_uid)
        .subquery()
    )
