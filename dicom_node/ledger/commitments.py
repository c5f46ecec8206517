"""Storage Commitment as SCU in the ledger: what is due to be asked for, and what was reported.

A delivered series is asked for until it is committed, or was asked for too often; then it is dead,
and people are told (PS3.4 J.3.2, J.3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, Engine, insert, select, update

from dicom_node.ledger import destinations
from dicom_node.ledger.outbox import (
    commit_if_all_are,
    items_of,
    not_recalled,
    restarted,
    tell_of_death,
)
from dicom_node.ledger.tables import (
    DeliveryState,
    Entity,
    ItemState,
    commitments,
    deliveries,
    delivery_items,
    move,
    outputs,
    reading,
    writing,
)

Remedy = Literal["send", "ask", "none"]

# PS3.3 C.14.1.1.
_NO_SUCH_INSTANCE, _CLASS_CONFLICT, _CLASS_NOT_SUPPORTED = 0x0112, 0x0119, 0x0122
_PROCESSING_FAILURE, _RESOURCE_LIMITATION, _DUPLICATE_TRANSACTION = 0x0110, 0x0213, 0x0131


def remedy(failure_reason: int) -> Remedy:
    """What helps where a destination does not commit to an instance, by its Failure Reason.

    One that it does not have is sent again; trouble of its own passes and is asked about again; a
    class that it does not support, or knows otherwise, stays so.
    """
    if failure_reason in (_CLASS_CONFLICT, _CLASS_NOT_SUPPORTED):
        return "none"
    if failure_reason in (_PROCESSING_FAILURE, _RESOURCE_LIMITATION, _DUPLICATE_TRANSACTION):
        return "ask"
    return "send"


@dataclass(frozen=True)
class Outstanding:
    """A delivered series whose commitment is due to be asked for."""

    delivery_id: int
    destination: str
    #: How often it has been asked for.
    asks: int
    #: (SOP Class UID, SOP Instance UID) of each instance that is not committed.
    instances: tuple[tuple[str, str], ...]


def claim_outstanding(engine: Engine, *, lease_s: float, now: float) -> Outstanding | None:
    """Take what has been due longest, for *lease_s* seconds; None: there is nothing.

    A destination that is paused is not asked.
    """
    with reading(engine) as connection:
        paused = [
            name
            for name, state in destinations.states_of(connection).items()
            if state.paused_at is not None
        ]
    due = (
        select(deliveries.c.id)
        .where(
            deliveries.c.state == DeliveryState.DELIVERED,
            deliveries.c.commitment_due <= now,
            deliveries.c.destination.not_in(paused),
        )
        .order_by(deliveries.c.commitment_due, deliveries.c.id)
        .limit(1)
    )
    with reading(engine) as connection:
        if connection.execute(due).first() is None:
            return None
    with writing(engine) as connection:
        delivery_id = connection.scalar(due.with_for_update(skip_locked=True))
        if delivery_id is None:
            return None
        row = connection.execute(
            update(deliveries)
            .where(deliveries.c.id == delivery_id)
            .values(commitment_due=now + lease_s)
            .returning(deliveries.c.destination, deliveries.c.commitment_asks)
        ).one()
        instances = connection.execute(
            select(outputs.c.sop_class_uid, outputs.c.sop_instance_uid)
            .join(delivery_items, delivery_items.c.output_id == outputs.c.id)
            .where(
                delivery_items.c.delivery_id == delivery_id,
                delivery_items.c.state == ItemState.DELIVERED,
            )
            .order_by(outputs.c.id)
        )
        named = tuple((one.sop_class_uid, one.sop_instance_uid) for one in instances)
        return Outstanding(delivery_id, row.destination, row.commitment_asks, named)


def request_commitment(
    engine: Engine, delivery_id: int, *, transaction_uid: str, now: float, next_ask: float | None
) -> bool:
    """Record a request; it is due again at *next_ask*.  False when the series is not delivered."""
    with writing(engine) as connection:
        asked = connection.execute(
            update(deliveries)
            .where(deliveries.c.id == delivery_id, deliveries.c.state == DeliveryState.DELIVERED)
            .values(commitment_asks=deliveries.c.commitment_asks + 1, commitment_due=next_ask)
        )
        if asked.rowcount != 1:
            return False
        connection.execute(
            insert(commitments).values(
                transaction_uid=transaction_uid, delivery_id=delivery_id, requested_at=now
            )
        )
        return True


def give_up(engine: Engine, delivery_id: int, *, reason: str, now: float) -> bool:
    """Conclude a delivered series as dead, since its destination does not commit to it."""
    with writing(engine) as connection:
        return _bury(connection, delivery_id, reason, now)


def report_commitment(
    engine: Engine,
    transaction_uid: str,
    *,
    committed: Sequence[str],
    failed: Mapping[str, int],
    now: float,
) -> bool:
    """Record the answer to a request (PS3.4 J.3.3); the same report again changes nothing.

    What `failed` (SOP Instance UID to Failure Reason) names is sent again, asked for again or
    given up, as `remedy` says; when all are committed, so is the delivery.

    Returns:
        False when there is no such request.
    """
    with writing(engine) as connection:
        delivery_id = connection.scalar(
            select(commitments.c.delivery_id).where(
                commitments.c.transaction_uid == transaction_uid
            )
        )
        if delivery_id is None:
            return False
        first = connection.execute(
            update(commitments)
            .where(
                commitments.c.transaction_uid == transaction_uid,
                commitments.c.reported_at.is_(None),
            )
            .values(reported_at=now, failed=len(failed))
        )
        if first.rowcount == 1:
            _set_items(connection, delivery_id, committed, ItemState.COMMITTED, now)
            _follow(connection, delivery_id, failed, now)
        return True


def _follow(
    connection: Connection, delivery_id: int, failed: Mapping[str, int], now: float
) -> None:
    hopeless = {reason for reason in failed.values() if remedy(reason) == "none"}
    missing = [uid for uid, reason in failed.items() if remedy(reason) == "send"]
    if missing:
        missing = _not_recalled(connection, delivery_id, missing)
    if hopeless:
        words = ", ".join(f"0x{reason:04X}" for reason in sorted(hopeless))
        _bury(connection, delivery_id, f"the destination does not commit: {words}", now)
    elif missing:
        reason = f"the destination does not have {len(missing)} instances"
        queued = DeliveryState.QUEUED
        values = {**restarted(now), "commitment_due": None}
        # Not while it is being sent, nor once it is dead: then the items stay as they are.
        if move(
            connection,
            Entity.DELIVERY,
            delivery_id,
            queued,
            reason=reason,
            now=now,
            only=deliveries.c.state == DeliveryState.DELIVERED,
            **values,
        ):
            _set_items(connection, delivery_id, missing, ItemState.PENDING, now)
    else:
        commit_if_all_are(connection, delivery_id, now)


def _not_recalled(connection: Connection, delivery_id: int, uids: Sequence[str]) -> list[str]:
    """Those that may be sent again."""
    query = (
        select(outputs.c.sop_instance_uid)
        .join(delivery_items, delivery_items.c.output_id == outputs.c.id)
        .where(items_of(delivery_id, uids), not_recalled())
    )
    return list(connection.scalars(query))


def _bury(connection: Connection, delivery_id: int, reason: str, now: float) -> bool:
    dead = move(
        connection,
        Entity.DELIVERY,
        delivery_id,
        DeliveryState.DEAD,
        reason=reason,
        now=now,
        only=deliveries.c.state == DeliveryState.DELIVERED,
        commitment_due=None,
        finished_at=now,
    )
    if dead:
        tell_of_death(connection, delivery_id, reason, now)
    return dead


def _set_items(
    connection: Connection, delivery_id: int, uids: Sequence[str], state: ItemState, now: float
) -> None:
    """What was committed stays so, whatever a later report says."""
    connection.execute(
        update(delivery_items)
        .where(
            items_of(delivery_id, uids),
            delivery_items.c.state.in_([ItemState.DELIVERED, ItemState.DEAD]),
        )
        .values(state=state, at=now)
    )
