"""Deliveries of restored series: claim, per-instance status, conclusion, commitment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    func,
    insert,
    literal,
    select,
    update,
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
    record_event,
    writing,
)

_NO_LEASE: Mapping[str, Any] = {"worker": None, "lease_until": None}


@dataclass(frozen=True)
class DeliveryItem:
    """One restored SOP Instance that the destination has not acknowledged."""

    sop_instance_uid: str
    sop_class_uid: str
    path: str
    transfer_syntax_uid: str


@dataclass(frozen=True)
class Delivery:
    """One restored series on its way to one destination."""

    id: int
    job_id: int
    destination: str
    #: How often it was claimed, this time included.
    attempts: int
    #: When it was first claimed; `delivery.give_up_after_s` counts from here.
    first_attempt: float
    items: tuple[DeliveryItem, ...]


def make_delivery(connection: Connection, job_id: int, destination: str, now: float) -> int:
    """Put the outputs of a job in the outbox for one destination, in the caller's transaction."""
    delivery_id = int(
        connection.execute(
            insert(deliveries)
            .values(
                job_id=job_id,
                destination=destination,
                state=DeliveryState.QUEUED,
                not_before=now,
                attempts=0,
                created_at=now,
            )
            .returning(deliveries.c.id)
        ).scalar_one()
    )
    connection.execute(
        insert(delivery_items).from_select(
            ["delivery_id", "output_id", "state"],
            select(literal(delivery_id), outputs.c.id, literal(str(ItemState.PENDING))).where(
                outputs.c.job_id == job_id
            ),
        )
    )
    queued = DeliveryState.QUEUED
    record_event(connection, Entity.DELIVERY, delivery_id, None, queued, destination, now)
    return delivery_id


def claim_delivery(engine: Engine, worker: str, *, lease_s: float, now: float) -> Delivery | None:
    """Take the delivery that has been due longest, or None."""
    due = (
        select(deliveries.c.id)
        .where(
            deliveries.c.state.in_([DeliveryState.QUEUED, DeliveryState.WAITING]),
            deliveries.c.not_before <= now,
        )
        .order_by(deliveries.c.not_before, deliveries.c.id)
        .limit(1)
    )
    with reading(engine) as connection:
        # An idle worker must not take the write lock twice a second.
        if connection.execute(due).first() is None:
            return None
    with writing(engine) as connection:
        delivery_id = connection.scalar(due.with_for_update(skip_locked=True))
        if delivery_id is None or not move(
            connection,
            Entity.DELIVERY,
            delivery_id,
            DeliveryState.SENDING,
            reason=None,
            now=now,
            worker=worker,
            lease_until=now + lease_s,
            attempts=deliveries.c.attempts + 1,
            first_attempt_at=func.coalesce(deliveries.c.first_attempt_at, now),
        ):
            return None
        return _delivery(connection, delivery_id)


def heartbeat_delivery(
    engine: Engine, delivery_id: int, worker: str, *, lease_s: float, now: float
) -> bool:
    """Extend the lease; False when the delivery is no longer this worker's."""
    with writing(engine) as connection:
        extended = connection.execute(
            update(deliveries)
            .where(deliveries.c.id == delivery_id, _held_by(worker))
            .values(lease_until=now + lease_s)
        )
        return extended.rowcount == 1


def record_sent(
    engine: Engine,
    delivery_id: int,
    sop_instance_uid: str,
    status: int,
    outcome: Literal["delivered", "retry", "dead"],
    now: float,
) -> None:
    """Record the destination's answer for one instance; what it has delivered stays so."""
    state = {
        "delivered": ItemState.DELIVERED,
        "retry": ItemState.PENDING,
        "dead": ItemState.DEAD,
    }[outcome]
    with writing(engine) as connection:
        connection.execute(
            update(delivery_items)
            .where(
                _items_of(delivery_id, [sop_instance_uid]),
                delivery_items.c.state.in_([ItemState.PENDING, ItemState.DEAD]),
            )
            .values(state=state, status=status, at=now)
        )


def conclude_delivery(
    engine: Engine,
    delivery_id: int,
    worker: str,
    *,
    state: DeliveryState,
    reason: str | None,
    next_attempt: float | None,
    now: float,
) -> bool:
    """Give the delivery back as delivered, waiting (until `next_attempt`) or dead.

    Returns:
        False when the lease was lost.
    """
    is_over = state in (DeliveryState.DELIVERED, DeliveryState.DEAD)
    with writing(engine) as connection:
        return move(
            connection,
            Entity.DELIVERY,
            delivery_id,
            state,
            reason=reason,
            now=now,
            only=_held_by(worker),
            not_before=now if next_attempt is None else next_attempt,
            finished_at=now if is_over else None,
            **_NO_LEASE,
        )


def retry_delivery(engine: Engine, delivery_id: int, *, reason: str, now: float) -> bool:
    """Queue a waiting or dead delivery at once, dead instances included."""
    with writing(engine) as connection:
        resumed = move(
            connection,
            Entity.DELIVERY,
            delivery_id,
            DeliveryState.QUEUED,
            reason=reason,
            now=now,
            only=deliveries.c.state.in_([DeliveryState.WAITING, DeliveryState.DEAD]),
            **_restarted(now),
        )
        if resumed:
            connection.execute(
                update(delivery_items)
                .where(
                    delivery_items.c.delivery_id == delivery_id,
                    delivery_items.c.state == ItemState.DEAD,
                )
                .values(state=ItemState.PENDING)
            )
        return resumed


def expire_delivery_leases(engine: Engine, now: float) -> int:
    """Queue deliveries whose lease has ended."""
    return _take_back(engine, deliveries.c.lease_until < now, now)


def release_delivery_leases(engine: Engine, worker: str, now: float) -> int:
    """Queue what an earlier process of the same worker left sending; call at its start."""
    return _take_back(engine, deliveries.c.worker == worker, now)


def request_commitment(
    engine: Engine, delivery_id: int, *, transaction_uid: str, now: float
) -> bool:
    """Record a Storage Commitment request; False when the series is not delivered."""
    with writing(engine) as connection:
        state = connection.scalar(select(deliveries.c.state).where(deliveries.c.id == delivery_id))
        if state != DeliveryState.DELIVERED:
            return False
        connection.execute(
            insert(commitments).values(
                transaction_uid=transaction_uid, delivery_id=delivery_id, requested_at=now
            )
        )
        return True


def report_commitment(
    engine: Engine,
    transaction_uid: str,
    *,
    committed: Sequence[str],
    failed: Mapping[str, int],
    now: float,
) -> bool:
    """Record the answer to a request (PS3.4 J.3.3).

    Instances in `failed` (SOP Instance UID to Failure Reason) are sent once more; when all are
    committed, so is the delivery.

    Returns:
        False when there is no such request or it has been answered.
    """
    with writing(engine) as connection:
        delivery_id = connection.scalar(
            update(commitments)
            .where(
                commitments.c.transaction_uid == transaction_uid,
                commitments.c.reported_at.is_(None),
            )
            .values(reported_at=now, failed=len(failed))
            .returning(commitments.c.delivery_id)
        )
        if delivery_id is None:
            return False
        _set_items(connection, delivery_id, list(committed), ItemState.COMMITTED, now)
        _set_items(connection, delivery_id, list(failed), ItemState.PENDING, now)
        _follow_commitment(connection, delivery_id, len(failed), now)
        return True


def _follow_commitment(connection: Connection, delivery_id: int, failed: int, now: float) -> None:
    if failed:
        reason = f"the destination did not commit {failed} instances"
        queued = DeliveryState.QUEUED
        values = _restarted(now)
        move(connection, Entity.DELIVERY, delivery_id, queued, reason=reason, now=now, **values)
        return
    open_items = select(delivery_items.c.output_id).where(
        delivery_items.c.delivery_id == delivery_id,
        delivery_items.c.state != ItemState.COMMITTED,
    )
    if connection.execute(open_items).first() is None:
        state = DeliveryState.COMMITTED
        move(connection, Entity.DELIVERY, delivery_id, state, reason=None, now=now)


def _set_items(
    connection: Connection, delivery_id: int, uids: list[str], state: ItemState, now: float
) -> None:
    connection.execute(
        update(delivery_items).where(_items_of(delivery_id, uids)).values(state=state, at=now)
    )


def _items_of(delivery_id: int, sop_instance_uids: Sequence[str]) -> ColumnElement[bool]:
    ids = select(outputs.c.id).where(outputs.c.sop_instance_uid.in_(sop_instance_uids))
    return (delivery_items.c.delivery_id == delivery_id) & delivery_items.c.output_id.in_(ids)


def _held_by(worker: str) -> ColumnElement[bool]:
    return (deliveries.c.state == DeliveryState.SENDING) & (deliveries.c.worker == worker)


def _restarted(now: float) -> dict[str, Any]:
    """Return the columns of a delivery that begins its patience anew."""
    return {"not_before": now, "first_attempt_at": None, "finished_at": None}


def _take_back(engine: Engine, condition: ColumnElement[bool], now: float) -> int:
    lost = select(deliveries.c.id).where(deliveries.c.state == DeliveryState.SENDING, condition)
    with reading(engine) as connection:
        if connection.execute(lost).first() is None:
            return 0
    with writing(engine) as connection:
        return sum(
            move(
                connection,
                Entity.DELIVERY,
                delivery_id,
                DeliveryState.QUEUED,
                reason="its worker ended or fell silent",
                now=now,
                only=condition,
                not_before=now,
                **_NO_LEASE,
            )
            for delivery_id in connection.scalars(lost).all()
        )


def _delivery(connection: Connection, delivery_id: int) -> Delivery:
    row = connection.execute(select(deliveries).where(deliveries.c.id == delivery_id)).one()
    items = connection.execute(
        select(
            outputs.c.sop_instance_uid,
            outputs.c.sop_class_uid,
            outputs.c.path,
            outputs.c.transfer_syntax_uid,
        )
        .join(delivery_items, delivery_items.c.output_id == outputs.c.id)
        .where(
            delivery_items.c.delivery_id == delivery_id,
            delivery_items.c.state == ItemState.PENDING,
        )
        .order_by(outputs.c.id)
    )
    return Delivery(
        id=row.id,
        job_id=row.job_id,
        destination=row.destination,
        attempts=row.attempts,
        first_attempt=row.first_attempt_at,
        items=tuple(DeliveryItem(*item) for item in items),
    )
