"""Recording stored instances: once, in groups, with duplicates and conflicts told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Select,
    bindparam,
    func,
    insert,
    literal_column,
    null,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from dicom_node import observability
from dicom_node.ledger.tables import (
    Entity,
    InstanceState,
    SeriesState,
    insert_or_nothing,
    instances,
    jobs,
    move,
    outputs,
    record_event,
    series,
    writing,
)

# PS3.5 6.2: a Code String; senders that break the rule must not break the ledger.
_MODALITY_LENGTH = 16

#: Moves the file of a conflict (path, reason) away; its new path.
SetAside = Callable[[str, str], str]


def _left(path: str, _: str) -> str:
    """Leave a file where it is."""
    return path


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


def record_instance(
    engine: Engine, instance: ReceivedInstance, now: float, set_aside: SetAside = _left
) -> InstanceState:
    """Record one stored instance: `record_instances` of a group of one."""
    (state,) = record_instances(engine, [instance], now, set_aside)
    return state


def record_instances(
    engine: Engine, group: Sequence[ReceivedInstance], now: float, set_aside: SetAside = _left
) -> list[InstanceState]:
    """Record stored instances once, whatever arrives how often and how concurrently.

    The group is one transaction: all are recorded, or LedgerError and none.  `set_aside` moves
    the file of a conflict away and returns its new path.

    Returns, for each:
        RECEIVED: new; its series is open (again).
        IGNORED: new, acknowledged and never restored; so is what the node itself made.
        DUPLICATE: the same bytes are known; only the history grows.
        CONFLICT: other bytes are known under this UID; the first stay, these are set aside.
    """
    with writing(engine) as connection:
        states = _record(connection, group, now, set_aside)
    for state in states:
        if state in (InstanceState.RECEIVED, InstanceState.IGNORED):
            observability.STATES.labels(entity=Entity.INSTANCE, state=state).inc()
    observability.RECEIVED_BYTES.inc(sum(instance.size for instance in group))
    return states


@dataclass(frozen=True)
class _Known:
    """What the ledger holds of the UIDs of a group."""

    instances: dict[str, _Valid]
    series: frozenset[str]
    #: SOP Instance and Series Instance UIDs that the node itself has made.
    made: frozenset[str]


class _Valid(NamedTuple):
    id: int
    sha256: str
    series_instance_uid: str


def _record(
    connection: Connection, group: Sequence[ReceivedInstance], now: float, set_aside: SetAside
) -> list[InstanceState]:
    """Record a group in an open transaction."""
    first = {instance.sop_instance_uid: place for place, instance in reversed([*enumerate(group)])}
    places = set(first.values())
    known = _known(connection, [group[place] for place in places])
    fresh = [
        place for place in sorted(places) if group[place].sop_instance_uid not in known.instances
    ]
    states = _record_new(connection, group, fresh, known, now)
    for place in places.difference(fresh):
        valid = known.instances[group[place].sop_instance_uid]
        states[place] = _record_again(connection, group[place], valid, now, set_aside)
    again = [place for place in range(len(group)) if place not in states]
    if again:
        # The UID stood in the group before, or another process was faster: it is known by now.
        rest = _record(connection, [group[place] for place in again], now, set_aside)
        states.update(zip(again, rest, strict=True))
    return [states[place] for place in range(len(group))]


def _known(connection: Connection, group: Sequence[ReceivedInstance]) -> _Known:
    uids = [instance.sop_instance_uid for instance in group]
    all_series = list({instance.series_instance_uid for instance in group})
    found = connection.execute(_KNOWN, {"uids": uids, "series": all_series}).all()
    return _Known(
        instances={
            row.uid: _Valid(row.id, row.sha256, row.series_instance_uid)
            for row in found
            if row.kind == "instance"
        },
        series=frozenset(row.uid for row in found if row.kind == "series"),
        made=frozenset(row.uid for row in found if row.kind == "made"),
    )


def _kind(kind: str, uid: Column[str], condition: ColumnElement[bool]) -> Select[*tuple[Any, ...]]:
    absent: list[Any] = [null().label(name) for name in ("id", "sha256", "series_instance_uid")]
    return select(literal_column(f"'{kind}'").label("kind"), uid.label("uid"), *absent).where(
        condition
    )


_UIDS: BindParameter[str] = bindparam("uids", expanding=True)
_SERIES: BindParameter[str] = bindparam("series", expanding=True)
_VALID = instances.c.state.in_(
    [literal_column(f"'{state}'") for state in (InstanceState.RECEIVED, InstanceState.IGNORED)]
)
_KNOWN = union_all(
    select(
        literal_column("'instance'").label("kind"),
        instances.c.sop_instance_uid.label("uid"),
        instances.c.id,
        instances.c.sha256,
        instances.c.series_instance_uid,
    ).where(instances.c.sop_instance_uid.in_(_UIDS), _VALID),
    _kind("series", series.c.series_instance_uid, series.c.series_instance_uid.in_(_SERIES)),
    _kind("made", outputs.c.sop_instance_uid, outputs.c.sop_instance_uid.in_(_UIDS)),
    _kind(
        "made",
        jobs.c.derived_series_instance_uid,
        jobs.c.derived_series_instance_uid.in_(_SERIES),
    ),
)


def _record_new(
    connection: Connection,
    group: Sequence[ReceivedInstance],
    places: Sequence[int],
    known: _Known,
    now: float,
) -> dict[int, InstanceState]:
    """Record instances whose UIDs had no valid row; not those that another process has just."""
    fresh = [_judged(group[place], known) for place in places]
    for instance in fresh:
        if instance.series_instance_uid not in known.series:
            _ensure_series(connection, instance, now)
    rows = [_instance_values(instance, *_new_state(instance), now) for instance in fresh]
    inserted = set(connection.scalars(_INSERT[connection.dialect.name], rows)) if rows else set()
    recorded = [instance for instance in fresh if instance.sop_instance_uid in inserted]
    latest = {one.series_instance_uid: one for one in recorded if one.ignored_reason is None}
    for series_uid, instance in latest.items():
        arrived = sum(
            one.series_instance_uid == series_uid and one.ignored_reason is None for one in recorded
        )
        _grow_series(connection, instance, now, arrived)
    return {
        place: _new_state(instance)[0]
        for place, instance in zip(places, fresh, strict=True)
        if instance.sop_instance_uid in inserted
    }


def _new_state(instance: ReceivedInstance) -> tuple[InstanceState, str | None]:
    reason = instance.ignored_reason
    return (InstanceState.RECEIVED if reason is None else InstanceState.IGNORED), reason


def _judged(instance: ReceivedInstance, known: _Known) -> ReceivedInstance:
    own = {instance.sop_instance_uid, instance.series_instance_uid} & known.made
    if own and instance.ignored_reason is None:
        return replace(instance, ignored_reason="our own output: it came back to us")
    return instance


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


_INSERT = {
    name: dialect.insert(instances).on_conflict_do_nothing().returning(instances.c.sop_instance_uid)
    for name, dialect in (("sqlite", sqlite), ("postgresql", postgresql))
}


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


def _grow_series(
    connection: Connection, instance: ReceivedInstance, now: float, arrived: int
) -> None:
    state = _note_activity(connection, instance, now, arrived=arrived)
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


def _record_again(
    connection: Connection,
    instance: ReceivedInstance,
    known: _Valid,
    now: float,
    set_aside: SetAside,
) -> InstanceState:
    if known.sha256 == instance.sha256:
        state, reason = InstanceState.DUPLICATE, None
        _note_activity(connection, instance, now, arrived=0)
    else:
        state, reason = InstanceState.CONFLICT, "other bytes under a known SOP Instance UID"
        path = set_aside(instance.path, reason)
        if not _conflict_is_known(connection, instance):
            values = _instance_values(instance, state, reason, now)
            # The series it claims need not exist; it stands beside the instance it contradicts.
            values["series_instance_uid"] = known.series_instance_uid
            connection.execute(insert(instances).values(values | {"path": path}))
    record_event(connection, Entity.INSTANCE, known.id, None, state, reason, now)
    return state


def _conflict_is_known(connection: Connection, instance: ReceivedInstance) -> bool:
    query = select(instances.c.id).where(
        instances.c.sop_instance_uid == instance.sop_instance_uid,
        instances.c.sha256 == instance.sha256,
        instances.c.state == InstanceState.CONFLICT,
    )
    return connection.execute(query).first() is not None
