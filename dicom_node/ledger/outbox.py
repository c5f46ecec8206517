"""Deliveries of restored series: claim, lease, conclusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.uid import KeyObjectSelectionDocumentStorage
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    func,
    insert,
    literal,
    select,
    update,
)

from dicom_node.ledger import destinations, notices
from dicom_node.ledger.tables import (
    DeliveryState,
    Entity,
    ItemState,
    deliveries,
    delivery_items,
    jobs,
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
    #: How many attempts in a row, of any series, did not reach the destination.
    failures: int = 0


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


def claim_delivery(
    engine: Engine,
    worker: str,
    *,
    lease_s: float,
    now: float,
    limits: Mapping[str, int] | None = None,
) -> Delivery | None:
    """Take the due delivery of the highest priority, then the longest due, or None.

    Left alone is what goes to a destination that is paused, held, or has as many deliveries under
    way as *limits* allow it (default 1).
    """
    with reading(engine) as connection:
        # An idle worker must not take the write lock twice a second.
        shut = destinations.closed(connection, limits or {}, now)
        if connection.execute(_due(now, shut)).first() is None:
            return None
    with writing(engine) as connection:
        shut = destinations.closed(connection, limits or {}, now)
        found = connection.execute(
            _due(now, shut).with_for_update(skip_locked=True, of=deliveries)
        ).first()
        if found is None:
            return None
        destinations.lock(connection, found.destination)
        if found.destination in destinations.closed(connection, limits or {}, now):
            return None  # another process was faster
        return _take(connection, found.id, worker, lease_s, now)


def is_due(engine: Engine, destination: str, now: float) -> bool:
    """Whether another series waits for this destination and may go now, but for its limit."""
    with reading(engine) as connection:
        state = destinations.states_of(connection).get(destination)
        if state is not None and state.why_closed(now):
            return False
        return connection.execute(_due(now, only=destination)).first() is not None


def _due(now: float, shut: Sequence[str] = (), only: str | None = None) -> Select[tuple[int, str]]:
    query = (
        select(deliveries.c.id, deliveries.c.destination)
        .join(jobs, jobs.c.id == deliveries.c.job_id)
        .where(
            deliveries.c.state.in_([DeliveryState.QUEUED, DeliveryState.WAITING]),
            deliveries.c.not_before <= now,
        )
        .order_by(jobs.c.priority.desc(), deliveries.c.not_before, deliveries.c.id)
        .limit(1)
    )
    if only is not None:
        return query.where(deliveries.c.destination == only)
    return query.where(deliveries.c.destination.not_in(shut)) if shut else query


def _take(
    connection: Connection, delivery_id: int, worker: str, lease_s: float, now: float
) -> Delivery | None:
    moved = move(
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
    )
    return _delivery(connection, delivery_id) if moved else None


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
    """Conclude without asking for more: `conclude_and_follow`; False when the lease was lost."""
    concluded, _ = conclude_and_follow(
        engine,
        delivery_id,
        worker,
        state=state,
        reason=reason,
        next_attempt=next_attempt,
        now=now,
    )
    return concluded


@dataclass(frozen=True)
class Following:
    """Asks for the next delivery to the same destination, in the transaction of a conclusion."""

    lease_s: float


def conclude_and_follow(
    engine: Engine,
    delivery_id: int,
    worker: str,
    *,
    state: DeliveryState,
    reason: str | None,
    next_attempt: float | None,
    now: float,
    told: str | None = None,
    wants_commitment: bool = False,
    following: Following | None = None,
) -> tuple[bool, Delivery | None]:
    """Give the delivery back as delivered, waiting (until `next_attempt`) or dead.

    Args:
        engine: The ledger.
        delivery_id: The delivery.
        worker: Who holds its lease.
        state: What it comes to.
        reason: Why, for the ledger; may hold words of the peer.
        next_attempt: When it is due again; None: now.
        now: Seconds since 1970 UTC.
        told: Why, for those who are told of a dead delivery: in our own words.
        wants_commitment: A delivered series is due for a Storage Commitment request.
        following: Take the next delivery to the same destination, without another in between.

    Returns:
        Whether the lease was still this worker's, and what *following* asked for.
    """
    is_over = state in (DeliveryState.DELIVERED, DeliveryState.DEAD)
    is_asked = wants_commitment and state is DeliveryState.DELIVERED
    with writing(engine) as connection:
        concluded = move(
            connection,
            Entity.DELIVERY,
            delivery_id,
            state,
            reason=reason,
            now=now,
            only=_held_by(worker),
            not_before=now if next_attempt is None else next_attempt,
            finished_at=now if is_over else None,
            commitment_due=now if is_asked else None,
            **_NO_LEASE,
        )
        if not concluded:
            return False, None
        if state is DeliveryState.DEAD:
            tell_of_death(connection, delivery_id, told or "", now)
        if is_asked:
            # A person may have asked to send again what a late report has committed.
            commit_if_all_are(connection, delivery_id, now)
        return True, _follow(connection, delivery_id, worker, following, now)


def commit_if_all_are(connection: Connection, delivery_id: int, now: float) -> bool:
    """Conclude a delivery as committed, once each of its instances is."""
    open_items = select(delivery_items.c.output_id).where(
        delivery_items.c.delivery_id == delivery_id,
        delivery_items.c.state != ItemState.COMMITTED,
    )
    if connection.execute(open_items).first() is not None:
        return False
    state = DeliveryState.COMMITTED
    values: dict[str, Any] = {"commitment_due": None, "finished_at": now}
    return move(connection, Entity.DELIVERY, delivery_id, state, reason=None, now=now, **values)


def _follow(
    connection: Connection, delivery_id: int, worker: str, following: Following | None, now: float
) -> Delivery | None:
    if following is None:
        return None
    destination = connection.scalar(
        select(deliveries.c.destination).where(deliveries.c.id == delivery_id)
    )
    found = connection.execute(
        _due(now, only=destination).with_for_update(skip_locked=True, of=deliveries)
    ).first()
    if found is None:
        return None
    return _take(connection, found.id, worker, following.lease_s, now)


def tell_of_death(connection: Connection, delivery_id: int, told: str, now: float) -> None:
    """Put the notice of a dead delivery in the outbox: no UID, no word of a peer is in it."""
    row = connection.execute(
        select(deliveries.c.job_id, deliveries.c.destination).where(deliveries.c.id == delivery_id)
    ).one()
    counts = (
        select(delivery_items.c.state, func.count())
        .where(delivery_items.c.delivery_id == delivery_id)
        .group_by(delivery_items.c.state)
    )
    by_state: dict[str, int] = {row[0]: row[1] for row in connection.execute(counts)}
    arrived = by_state.get(ItemState.DELIVERED, 0) + by_state.get(ItemState.COMMITTED, 0)
    event = {
        "event": "delivery_dead",
        "delivery": delivery_id,
        "job": row.job_id,
        "destination": row.destination,
        "reason": told,
        "stored": arrived,
        "committed": by_state.get(ItemState.COMMITTED, 0),
        "instances": sum(by_state.values()),
        "at": now,
    }
    notices.write(connection, event, now)


def retry_delivery(engine: Engine, delivery_id: int, *, reason: str, now: float) -> bool:
    """Queue a waiting or dead delivery at once, dead instances included.

    What a recall has rejected stays dead: False where nothing else is left to send.
    """
    with writing(engine) as connection:
        left = select(delivery_items.c.output_id).where(
            delivery_items.c.delivery_id == delivery_id,
            delivery_items.c.state.in_([ItemState.PENDING, ItemState.DEAD]),
        )
        is_ended = connection.execute(left).first() is None
        if not is_ended and connection.execute(left.where(not_recalled())).first() is None:
            return False
        resumed = move(
            connection,
            Entity.DELIVERY,
            delivery_id,
            DeliveryState.QUEUED,
            reason=reason,
            now=now,
            only=deliveries.c.state.in_([DeliveryState.WAITING, DeliveryState.DEAD]),
            **restarted(now),
            commitment_asks=0,
        )
        if resumed:
            connection.execute(
                update(delivery_items)
                .where(
                    delivery_items.c.delivery_id == delivery_id,
                    delivery_items.c.state == ItemState.DEAD,
                    not_recalled(),
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


def items_of(delivery_id: int, sop_instance_uids: Sequence[str]) -> ColumnElement[bool]:
    """Condition on `delivery_items`: these instances of this delivery."""
    ids = select(outputs.c.id).where(outputs.c.sop_instance_uid.in_(sop_instance_uids))
    return (delivery_items.c.delivery_id == delivery_id) & delivery_items.c.output_id.in_(ids)


def not_recalled() -> ColumnElement[bool]:
    """Condition on `delivery_items`: the job has no rejection note, or the output is the note."""
    made, note = outputs.alias("made"), outputs.alias("note")
    kind = str(KeyObjectSelectionDocumentStorage)
    noted = select(note.c.id).where(note.c.job_id == made.c.job_id, note.c.sop_class_uid == kind)
    left = (made.c.sop_class_uid == kind) | ~noted.exists()
    return select(made.c.id).where(made.c.id == delivery_items.c.output_id, left).exists()


def _held_by(worker: str) -> ColumnElement[bool]:
    return (deliveries.c.state == DeliveryState.SENDING) & (deliveries.c.worker == worker)


def restarted(now: float) -> dict[str, Any]:
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
        failures=destinations.failures(connection, row.destination),
    )
