"""What people are told: written in the transaction that it is about, sent by the deliver role."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, insert, select, update

from dicom_node.ledger.tables import notices, reading, writing


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


def claim(engine: Engine, *, lease_s: float, now: float) -> Notice | None:
    """Take the notice that has been due longest, for *lease_s* seconds; None: there is none."""
    due = (
        select(notices.c.id)
        .where(notices.c.finished_at.is_(None), notices.c.not_before <= now)
        .order_by(notices.c.not_before, notices.c.id)
        .limit(1)
    )
    with reading(engine) as connection:
        if connection.execute(due).first() is None:
            return None
    with writing(engine) as connection:
        notice_id = connection.scalar(due.with_for_update(skip_locked=True))
        if notice_id is None:
            return None
        row = connection.execute(
            update(notices)
            .where(notices.c.id == notice_id)
            .values(not_before=now + lease_s, attempts=notices.c.attempts + 1)
            .returning(*notices.c)
        ).one()
    return Notice(row.id, row.event, row.created_at, row.attempts, tuple(row.told))


def told(engine: Engine, notice: Notice, channels: Collection[str]) -> None:
    """Note the channels that have taken it, each as soon as it has: none is told twice."""
    with writing(engine) as connection:
        connection.execute(
            update(notices).where(notices.c.id == notice.id).values(told=list(channels))
        )


def postpone(engine: Engine, notice: Notice, not_before: float, why: str) -> None:
    """Try the channels that have not taken it again."""
    with writing(engine) as connection:
        connection.execute(
            update(notices)
            .where(notices.c.id == notice.id)
            .values(not_before=not_before, outcome=why)
        )


def finish(engine: Engine, notice: Notice, outcome: str, now: float) -> None:
    """Nothing more is done about it."""
    with writing(engine) as connection:
        connection.execute(
            update(notices)
            .where(notices.c.id == notice.id)
            .values(finished_at=now, outcome=outcome)
        )
