"""What people are told: written in the transaction that it is about, sent by the deliver role."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, func, insert, select, update

from dicom_node.ledger.tables import notices, reading, writing

#: The outcome of a notice that each channel has taken.
TOLD = "told"
# No more in one letter.
_MOST = 1000


@dataclass(frozen=True)
class Notice:
    """One event that people are told of; *told* are the channels that have taken it."""

    id: int
    event: Mapping[str, Any]
    created_at: float
    attempts: int
    told: tuple[str, ...]


def write(connection: Connection, event: Mapping[str, Any], now: float) -> None:
    """Put an event in the outbox, in the caller's transaction; it holds no patient data."""
    connection.execute(
        insert(notices).values(
            event=dict(event), created_at=now, not_before=now, attempts=0, told=[]
        )
    )


def claim(
    engine: Engine, *, lease_s: float, now: float, apart_s: float = 0.0
) -> tuple[Notice, ...]:
    """Take what is due about one destination, for *lease_s* seconds; empty: there is nothing.

    Of a destination that people were told of less than *apart_s* seconds ago nothing is due: what
    comes meanwhile is told together.
    """
    with reading(engine) as connection:
        if connection.execute(_due(now, apart_s).limit(1)).first() is None:
            return ()
    with writing(engine) as connection:
        first = connection.execute(_due(now, apart_s).limit(1)).first()
        if first is None:
            return ()
        together = _due(now, apart_s).where(_destination() == first.destination)
        ids = connection.scalars(together.limit(_MOST).with_for_update(skip_locked=True)).all()
        rows = connection.execute(
            update(notices)
            .where(notices.c.id.in_(ids))
            .values(not_before=now + lease_s, attempts=notices.c.attempts + 1)
            .returning(*notices.c)
        ).all()
    taken = [
        Notice(row.id, row.event, row.created_at, row.attempts, tuple(row.told)) for row in rows
    ]
    return tuple(sorted(taken, key=lambda one: one.id))


def _due(now: float, apart_s: float) -> Select[tuple[int, str]]:
    destination = _destination()
    lately = select(destination).where(
        notices.c.finished_at > now - apart_s, notices.c.outcome == TOLD
    )
    return (
        select(notices.c.id, destination.label("destination"))
        .where(
            notices.c.finished_at.is_(None),
            notices.c.not_before <= now,
            destination.not_in(lately),
        )
        .order_by(notices.c.not_before, notices.c.id)
    )


def _destination() -> ColumnElement[str]:
    return func.coalesce(notices.c.event["destination"].as_string(), "")


def told(
    engine: Engine, told_of: Sequence[Notice], channels: Mapping[int, Collection[str]]
) -> None:
    """Note the channels that have taken each notice, as soon as they have: none is told twice."""
    with writing(engine) as connection:
        for notice in told_of:
            _set(connection, [notice], told=list(channels[notice.id]))


def postpone(engine: Engine, put_off: Sequence[Notice], not_before: float, why: str) -> None:
    """Try the channels that have not taken them again."""
    with writing(engine) as connection:
        _set(connection, put_off, not_before=not_before, outcome=why)


def finish(engine: Engine, ended: Sequence[Notice], outcome: str, now: float) -> None:
    """Nothing more is done about them."""
    with writing(engine) as connection:
        _set(connection, ended, finished_at=now, outcome=outcome)


def _set(connection: Connection, changed: Sequence[Notice], **values: object) -> None:
    connection.execute(
        update(notices).where(notices.c.id.in_([one.id for one in changed])).values(**values)
    )
