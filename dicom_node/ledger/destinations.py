"""What holds for a destination as a whole: paused by a person, held for a while, full.

A destination that is down, or out of resources, is down for every series: it is tried by one of
them at a time, and the others wait without an attempt of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, delete, func, select, update

from dicom_node.ledger.tables import (
    DeliveryState,
    deliveries,
    destination_states,
    insert_or_nothing,
    reading,
    writing,
)

_table = destination_states.c


@dataclass(frozen=True)
class DestinationState:
    """A destination as the ledger knows it; times in seconds since 1970 UTC."""

    destination: str
    paused_at: float | None = None
    paused_reason: str | None = None
    held_until: float | None = None
    held_reason: str | None = None
    #: Attempts in a row that did not reach it.
    failures: int = 0

    def why_closed(self, now: float) -> str | None:
        """Why nothing is sent to it now, or None."""
        if self.paused_at is not None:
            return f"paused: {self.paused_reason}"
        if self.held_until is not None and self.held_until > now:
            return f"held: {self.held_reason}"
        return None


def states(engine: Engine) -> dict[str, DestinationState]:
    """What is known, by destination; one that was never in trouble is not in it."""
    with reading(engine) as connection:
        return states_of(connection)


def pause(engine: Engine, destination: str, *, reason: str, now: float) -> bool:
    """Send nothing more there until it is resumed; False where it is paused already."""
    with writing(engine) as connection:
        _ensure(connection, destination)
        changed = connection.execute(
            update(destination_states)
            .where(_table.destination == destination, _table.paused_at.is_(None))
            .values(paused_at=now, paused_reason=reason)
        )
        return changed.rowcount == 1


def resume(engine: Engine, destination: str, *, now: float) -> bool:
    """Send again, at once: a hold ends too, and what waits there is due; False: neither was on."""
    with writing(engine) as connection:
        gone = connection.execute(
            delete(destination_states)
            .where(_table.destination == destination)
            .returning(_table.paused_at, _table.held_until)
        ).first()
        if gone is None or (gone.paused_at is None and gone.held_until is None):
            return False
        connection.execute(
            update(deliveries)
            .where(
                deliveries.c.destination == destination,
                deliveries.c.state == DeliveryState.WAITING,
                deliveries.c.not_before > now,
            )
            .values(not_before=now)
        )
        return True


def hold(engine: Engine, destination: str, *, until: float, reason: str) -> None:
    """Let every series wait until then: the destination did not take one for a reason of its own.

    What was claimed meanwhile goes on.
    """
    with writing(engine) as connection:
        _ensure(connection, destination)
        connection.execute(
            update(destination_states)
            .where(_table.destination == destination)
            .values(held_until=until, held_reason=reason, failures=_table.failures + 1)
        )


def answers(engine: Engine, destination: str) -> None:
    """It has stored something: what was held is no longer."""
    with writing(engine) as connection:
        connection.execute(
            update(destination_states)
            .where(_table.destination == destination)
            .values(held_until=None, held_reason=None, failures=0)
        )


def closed(connection: Connection, limits: Mapping[str, int], now: float) -> list[str]:
    """The destinations that nothing may be sent to now: paused, held, or at their limit."""
    shut = {name for name, state in states_of(connection).items() if state.why_closed(now)}
    sending = select(deliveries.c.destination, func.count().label("number")).where(
        deliveries.c.state == DeliveryState.SENDING
    )
    for row in connection.execute(sending.group_by(deliveries.c.destination)):
        if row.number >= limits.get(row.destination, 1):
            shut.add(row.destination)
    return sorted(shut)


def lock(connection: Connection, destination: str) -> None:
    """Let one transaction at a time decide whether a destination is at its limit (PostgreSQL).

    SQLite has one writer in any case.
    """
    if connection.dialect.name == "postgresql":
        _ensure(connection, destination)
        connection.execute(
            select(_table.destination).where(_table.destination == destination).with_for_update()
        )


def failures(connection: Connection, destination: str) -> int:
    """How many attempts in a row did not reach it."""
    query = select(_table.failures).where(_table.destination == destination)
    return connection.scalar(query) or 0


def states_of(connection: Connection) -> dict[str, DestinationState]:
    """The same in the caller's transaction."""
    rows = connection.execute(select(destination_states)).mappings()
    return {row["destination"]: DestinationState(**row) for row in rows}


def _ensure(connection: Connection, destination: str) -> None:
    row: dict[str, Any] = {"destination": destination, "failures": 0}
    insert_or_nothing(connection, destination_states, row)
