"""Recording stored instances: once, in groups, with duplicates and conflicts told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Engine,
    Integer,
    Select,
    bindparam,
    cast,
    func,
    insert,
    literal_column,
    null,
    select,
    union_all,
    update,
)

from dicom_node import observability
from dicom_node.errors import LedgerError
from dicom_node.ledger.database import Prepared
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
from dicom_node.ledger.writer import Writer

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
    ledger: Engine | Writer,
    group: Sequence[ReceivedInstance],
    now: float,
    set_aside: SetAside = _left,
) -> list[InstanceState]:
    """Record stored instances once, whatever arrives how often and how concurrently.

    The group is one transaction: all are recorded, or LedgerError and none.  `set_aside` moves
    the file of a conflict away and returns its new path.  A `Writer` flushes what could not be
    recorded again from the files in the spool: which association a series came by, and conflicts.

    Returns, for each:
        RECEIVED: new; its series is open (again).
        IGNORED: new, acknowledged and never restored; so is what the node itself made.
        DUPLICATE: the same bytes are known; only the history grows.
        CONFLICT: other bytes are known under this UID; the first stay, these are set aside.
    """
    if isinstance(ledger, Writer):
        with ledger.writing() as connection:
            recorded = [_record(connection, instance, now, set_aside) for instance in group]
        ledger.flush(needed=not all(one.repeatable for one in recorded))
    else:
        with writing(ledger) as connection:
            recorded = [_record(connection, instance, now, set_aside) for instance in group]
    states = [one.state for one in recorded]
    for state in states:
        if state in (InstanceState.RECEIVED, InstanceState.IGNORED):
            observability.STATES.labels(entity=Entity.INSTANCE, state=state).inc()
    observability.RECEIVED_BYTES.inc(sum(instance.size for instance in group))
    return states


class _Valid(NamedTuple):
    id: int
    sha256: str
    series_instance_uid: str


class _Known(NamedTuple):
    """What the ledger holds of an instance's UIDs; *made*: the node itself has made them."""

    valid: _Valid | None
    series: bool
    association_id: int | None  # that the series came by last
    made: bool


class _Recorded(NamedTuple):
    """What an instance was recorded as, and whether its file alone tells as much."""

    state: InstanceState
    repeatable: bool


def _record(
    connection: Connection, instance: ReceivedInstance, now: float, set_aside: SetAside
) -> _Recorded:
    """Record one instance in an open transaction."""
    known = _known(connection, instance)
    same_way = known.series and known.association_id == instance.association_id
    if known.valid is None:
        state = _record_new(connection, _judged(instance, known), known, now)
        if state is not None:
            return _Recorded(state, same_way)
        known = _known(connection, instance)
    if known.valid is None:
        raise LedgerError("ledger: an instance is neither new nor known")
    state = _record_again(connection, instance, known.valid, now, set_aside)
    return _Recorded(state, same_way and state is not InstanceState.CONFLICT)


def _known(connection: Connection, instance: ReceivedInstance) -> _Known:
    uids = {"uid": instance.sop_instance_uid, "series": instance.series_instance_uid}
    found = {row[0]: row for row in _KNOWN.rows(connection, uids)}
    valid = found.get("instance")
    return _Known(
        valid=_Valid._make(valid[1:]) if valid is not None else None,
        series="series" in found,
        association_id=found["series"][1] if "series" in found else None,
        made="made" in found,
    )


def _kind(
    kind: str, condition: ColumnElement[bool], key: ColumnElement[Any] | None = None
) -> Select[*tuple[Any, ...]]:
    absent: list[Any] = [null().label(name) for name in ("sha256", "series_instance_uid")]
    found: ColumnElement[Any] = literal_column(f"'{kind}'").label("kind")
    return select(found, (null() if key is None else key).label("id"), *absent).where(condition)


_UID: BindParameter[str] = bindparam("uid")
_SERIES: BindParameter[str] = bindparam("series")
_VALID = instances.c.state.in_(
    [literal_column(f"'{state}'") for state in (InstanceState.RECEIVED, InstanceState.IGNORED)]
)
_KNOWN = Prepared(
    union_all(
        select(
            literal_column("'instance'").label("kind"),
            instances.c.id,
            instances.c.sha256,
            instances.c.series_instance_uid,
        ).where(instances.c.sop_instance_uid == _UID, _VALID),
        _kind("series", series.c.series_instance_uid == _SERIES, series.c.association_id),
        _kind("made", outputs.c.sop_instance_uid == _UID),
        _kind("made", jobs.c.derived_series_instance_uid == _SERIES),
    )
)


def _record_new(
    connection: Connection, instance: ReceivedInstance, known: _Known, now: float
) -> InstanceState | None:
    """Record an instance whose UID had no valid row; None where another process just has."""
    if not known.series:
        _ensure_series(connection, instance, now)
    reason = instance.ignored_reason
    state = InstanceState.RECEIVED if reason is None else InstanceState.IGNORED
    values = _instance_values(instance, state, reason, now)
    if not _INSERT.rows(connection, values):
        return None
    if reason is None:
        _grow_series(connection, instance, now)
    return state


def _judged(instance: ReceivedInstance, known: _Known) -> ReceivedInstance:
    if known.made and instance.ignored_reason is None:
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


def _instance_values(
    instance: ReceivedInstance, state: InstanceState, reason: str | None, now: float
) -> dict[str, object]:
    return {
        "sop_instance_uid": instance.sop_instance_uid,
        "sop_class_uid": instance.sop_class_uid,
        "study_instance_uid": instance.study_instance_uid,
        "series_instance_uid": instance.series_instance_uid,
        "modality": instance.modality[:_MODALITY_LENGTH],
        "transfer_syntax_uid": instance.transfer_syntax_uid,
        "path": instance.path,
        "sha256": instance.sha256,
        "size": instance.size,
        "association_id": instance.association_id,
        "state": state.value,
        "reason": reason,
        "assigned": False,
        "received_at": now,
    }


_COLUMNS: dict[str, BindParameter[Any]] = {
    name: bindparam(name)
    for name in (
        *("sop_instance_uid", "sop_class_uid", "study_instance_uid", "series_instance_uid"),
        *("modality", "transfer_syntax_uid", "path", "sha256", "size", "association_id"),
        *("state", "reason", "assigned", "received_at"),
    )
}
_INSERT = Prepared(
    lambda dialect: (
        dialect.insert(instances)
        .values(_COLUMNS)
        .on_conflict_do_nothing()
        .returning(instances.c.id)
    )
)


def _grow_series(connection: Connection, instance: ReceivedInstance, now: float) -> None:
    state = _note_activity(connection, instance, now, arrived=1)
    if state != SeriesState.RECEIVING:
        key = instance.series_instance_uid
        reason = "late instance"
        move(connection, Entity.SERIES, key, SeriesState.RECEIVING, reason=reason, now=now)


_ACTIVITY = Prepared(
    update(series)
    .where(series.c.series_instance_uid == _SERIES)
    .values(
        instances=series.c.instances + bindparam("arrived", type_=Integer),
        last_received_at=bindparam("now"),
        association_id=func.coalesce(
            cast(bindparam("association"), Integer), series.c.association_id
        ),
    )
    .returning(series.c.state)
)


def _note_activity(
    connection: Connection, instance: ReceivedInstance, now: float, *, arrived: int
) -> str | None:
    """Put off the quiet time of a series and count what arrived; return its state."""
    values = {
        "series": instance.series_instance_uid,
        "arrived": arrived,
        "now": now,
        "association": instance.association_id,
    }
    states = _ACTIVITY.rows(connection, values)
    return states[0][0] if states else None


_KEEP = Prepared(
    update(instances)
    .where(instances.c.id == bindparam("instance"), instances.c.purged_at.is_not(None))
    .values(purged_at=null(), received_at=bindparam("now"))
    .returning(instances.c.id)
)


def _record_again(
    connection: Connection,
    instance: ReceivedInstance,
    known: _Valid,
    now: float,
    set_aside: SetAside,
) -> InstanceState:
    kept = True
    if known.sha256 == instance.sha256:
        state, reason = InstanceState.DUPLICATE, None
        _note_activity(connection, instance, now, arrived=0)
        # Its file may have left the spool; the one that has just been stored is kept anew.
        _KEEP.rows(connection, {"instance": known.id, "now": now})
    else:
        state, reason = InstanceState.CONFLICT, "other bytes under a known SOP Instance UID"
        path = set_aside(instance.path, reason)
        kept = _conflict_is_known(connection, instance)
        if not kept:
            values = _instance_values(instance, state, reason, now)
            # The series it claims need not exist; it stands beside the instance it contradicts.
            values["series_instance_uid"] = known.series_instance_uid
            connection.execute(insert(instances).values(values | {"path": path}))
    record_event(connection, Entity.INSTANCE, known.id, None, state, reason, now)
    if kept and instance.association_id is not None:
        # `reports.repeats` reads it: the audit trail tells of what was held before.
        association, uid = instance.association_id, instance.sop_instance_uid
        record_event(connection, Entity.ASSOCIATION, association, None, state, uid, now)
    return state


def _conflict_is_known(connection: Connection, instance: ReceivedInstance) -> bool:
    query = select(instances.c.id).where(
        instances.c.sop_instance_uid == instance.sop_instance_uid,
        instances.c.sha256 == instance.sha256,
        instances.c.state == InstanceState.CONFLICT,
    )
    return connection.execute(query).first() is not None
