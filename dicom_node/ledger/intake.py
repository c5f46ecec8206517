"""Writing what arrives: associations, instances and their series."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from sqlalchemy import Connection, Engine, Select, Subquery, func, insert, select, update

from dicom_node import observability
from dicom_node.ledger.tables import (
    Entity,
    InstanceState,
    SeriesState,
    associations,
    insert_or_nothing,
    instances,
    move,
    reading,
    record_event,
    series,
    writing,
)

# PS3.5 6.2: a Code String; senders that break the rule must not break the ledger.
_MODALITY_LENGTH = 16

Outcome = Literal["released", "aborted", "lost"]


@dataclass(frozen=True)
class ReceivedInstance:
    """One SOP Instance that lies durable in the spool."""

    sop_instance_uid: str
    sop_class_uid: str
    study_instance_uid: str
    series_instance_uid: str
    modality: str
    transfer_syntax_uid: str
    path: str
    sha256: str
    size: int
    association_id: int | None = None
    ignored_reason: str | None = None


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


def record_instance(engine: Engine, instance: ReceivedInstance, now: float) -> InstanceState:
    """Record a stored instance once, whatever arrives how often and how concurrently.

    Returns:
        RECEIVED: new; its series is open (again).
        IGNORED: new, acknowledged and never restored.
        DUPLICATE: the same bytes are known; only the history grows.
        CONFLICT: other bytes are known under this UID; the first stay, these are set aside.
    """
    with writing(engine) as connection:
        state = _record_new(connection, instance, now) or _record_again(connection, instance, now)
    observability.RECEIVED_BYTES.inc(instance.size)
    return state


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
    opened = _open_associations()
    query = (
        select(
            series.c.series_instance_uid,
            series.c.study_instance_uid,
            series.c.modality,
            series.c.state,
            series.c.instances,
            series.c.last_received_at.label("last_received"),
            func.coalesce(opened.c.open_associations, 0).label("open_associations"),
            series.c.forced,
            func.coalesce(associations.c.calling_ae, "").label("calling_ae"),
            func.coalesce(associations.c.called_ae, "").label("called_ae"),
            func.coalesce(associations.c.address, "").label("address"),
        )
        .outerjoin(associations, associations.c.id == series.c.association_id)
        .outerjoin(opened, opened.c.series_instance_uid == series.c.series_instance_uid)
        .where(series.c.state == SeriesState.RECEIVING, series.c.instances > 0)
        .order_by(series.c.last_received_at)
    )
    with reading(engine) as connection:
        rows = connection.execute(query).mappings().all()
    return [SeriesProgress(**{**row, "state": SeriesState(row["state"])}) for row in rows]


def series_instances(
    engine: Engine, series_uid: str, *, only_unassigned: bool = False
) -> list[InstanceRow]:
    """Return the received instances of a series in order of arrival."""
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
        )


def force_series(engine: Engine, series_uid: str, *, reason: str, now: float) -> bool:
    """Ask the assembler to take a series as complete at its next look.

    A closed series is opened again, so that it is judged anew by the rules of today.
    """
    with writing(engine) as connection:
        forced = connection.execute(
            update(series).where(series.c.series_instance_uid == series_uid).values(forced=True)
        )
        move(connection, Entity.SERIES, series_uid, SeriesState.RECEIVING, reason=reason, now=now)
        return forced.rowcount == 1


def known_paths(engine: Engine) -> set[str]:
    """Return every path in the spool that a row of an instance names."""
    with reading(engine) as connection:
        paths = connection.scalars(select(instances.c.path).where(instances.c.path.is_not(None)))
        return set(paths)


def _record_new(
    connection: Connection, instance: ReceivedInstance, now: float
) -> InstanceState | None:
    """Record an instance whose UID has no valid row yet; None when it has."""
    if connection.execute(_valid_row(instance.sop_instance_uid)).first() is not None:
        return None
    ignored = instance.ignored_reason is not None
    state = InstanceState.IGNORED if ignored else InstanceState.RECEIVED
    _ensure_series(connection, instance, now)
    values = _instance_values(instance, state, instance.ignored_reason, now)
    if not insert_or_nothing(connection, instances, values):
        return None
    if not ignored:
        _grow_series(connection, instance, now)
    observability.STATES.labels(entity=Entity.INSTANCE, state=state).inc()
    return state


def _valid_row(sop_instance_uid: str) -> Select[tuple[int, str, str]]:
    return select(instances.c.id, instances.c.sha256, instances.c.series_instance_uid).where(
        instances.c.sop_instance_uid == sop_instance_uid,
        instances.c.state.in_([InstanceState.RECEIVED, InstanceState.IGNORED]),
    )


def _ensure_series(connection: Connection, instance: ReceivedInstance, now: float) -> None:
    reason = instance.ignored_reason
    state = SeriesState.RECEIVING if reason is None else SeriesState.IGNORED
    row = {
        "series_instance_uid": instance.series_instance_uid,
        "study_instance_uid": instance.study_instance_uid,
        "modality": instance.modality[:_MODALITY_LENGTH],
        "state": state,
        "reason": reason,
        "instances": 0,
        "forced": False,
        "association_id": instance.association_id,
        "first_received_at": now,
        "last_received_at": now,
    }
    if insert_or_nothing(connection, series, row):
        key = instance.series_instance_uid
        record_event(connection, Entity.SERIES, key, None, state, reason, now)


def _instance_values(
    instance: ReceivedInstance, state: InstanceState, reason: str | None, now: float
) -> dict[str, object]:
    values = asdict(instance)
    del values["ignored_reason"]
    return {
        **values,
        "modality": instance.modality[:_MODALITY_LENGTH],
        "state": state,
        "reason": reason,
        "assigned": False,
        "received_at": now,
    }


def _grow_series(connection: Connection, instance: ReceivedInstance, now: float) -> None:
    state = _note_activity(connection, instance, now, arrived=1)
    if state != SeriesState.RECEIVING:
        key = instance.series_instance_uid
        reason = "late instance"
        move(connection, Entity.SERIES, key, SeriesState.RECEIVING, reason=reason, now=now)


def _note_activity(
    connection: Connection, instance: ReceivedInstance, now: float, *, arrived: int
) -> str | None:
    """Put off the quiet time of a series and count what arrived; return its state."""
    state: str | None = connection.scalar(
        update(series)
        .where(series.c.series_instance_uid == instance.series_instance_uid)
        .values(
            instances=series.c.instances + arrived,
            last_received_at=now,
            association_id=func.coalesce(instance.association_id, series.c.association_id),
        )
        .returning(series.c.state)
    )
    return state


def _record_again(connection: Connection, instance: ReceivedInstance, now: float) -> InstanceState:
    known = connection.execute(_valid_row(instance.sop_instance_uid)).one()
    if known.sha256 == instance.sha256:
        state, reason = InstanceState.DUPLICATE, None
        _note_activity(connection, instance, now, arrived=0)
    else:
        state, reason = InstanceState.CONFLICT, "other bytes under a known SOP Instance UID"
        if not _conflict_is_known(connection, instance):
            values = _instance_values(instance, state, reason, now)
            # The series it claims need not exist; it stands beside the instance it contradicts.
            values["series_instance_uid"] = known.series_instance_uid
            connection.execute(insert(instances).values(values))
    record_event(connection, Entity.INSTANCE, known.id, None, state, reason, now)
    return state


def _conflict_is_known(connection: Connection, instance: ReceivedInstance) -> bool:
    query = select(instances.c.id).where(
        instances.c.sop_instance_uid == instance.sop_instance_uid,
        instances.c.sha256 == instance.sha256,
        instances.c.state == InstanceState.CONFLICT,
    )
    return connection.execute(query).first() is not None


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
