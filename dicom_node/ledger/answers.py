"""What a destination has answered for each instance of a delivery."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Connection, Engine, bindparam, literal_column, select, update

from dicom_node.ledger.database import Prepared
from dicom_node.ledger.tables import (
    DeliveryState,
    ItemState,
    deliveries,
    delivery_items,
    outputs,
    writing,
)
from dicom_node.ledger.writer import Writer

#: What an answer means for an instance.
Outcome = Literal["delivered", "retry", "dead"]
#: SOP Instance UID, status of the C-STORE response, what it means.
Answer = tuple[str, int, Outcome]

_STATES = {
    "delivered": ItemState.DELIVERED,
    "retry": ItemState.PENDING,
    "dead": ItemState.DEAD,
}
# One for each instance: what SQLAlchemy makes of a statement each time takes longer than the rest
# of sending it.
_RECORDED = Prepared(
    update(delivery_items)
    .where(
        delivery_items.c.delivery_id == bindparam("delivery"),
        delivery_items.c.output_id
        == select(outputs.c.id)
        .where(outputs.c.sop_instance_uid == bindparam("uid"))
        .scalar_subquery(),
        delivery_items.c.state.in_(
            [literal_column(f"'{state}'") for state in (ItemState.PENDING, ItemState.DEAD)]
        ),
    )
    .values(state=bindparam("to"), status=bindparam("status"), at=bindparam("now"))
    .returning(delivery_items.c.output_id)
)
_EXTENDED = Prepared(
    update(deliveries)
    .where(
        deliveries.c.id == bindparam("delivery"),
        deliveries.c.state == literal_column(f"'{DeliveryState.SENDING}'"),
        deliveries.c.worker == bindparam("worker"),
    )
    .values(lease_until=bindparam("until"))
    .returning(deliveries.c.id)
)


def record_and_keep(
    writer: Writer, delivery_id: int, worker: str, answer: Answer, *, lease_s: float, now: float
) -> bool:
    """Record the answer for one instance, and keep the lease.

    False when the delivery is no longer this worker's; what was answered is recorded all the same.
    The commit is not flushed: a loss of power may take it, and an instance that the destination
    has is sent to it again.
    """
    with writer.writing() as connection:
        _record(connection, delivery_id, answer, now)
        kept = {"delivery": delivery_id, "worker": worker, "until": now + lease_s}
        return bool(_EXTENDED.rows(connection, kept))


def record_sent(engine: Engine, delivery_id: int, answer: Answer, now: float) -> None:
    """Record the answer for one instance, by who holds no lease; flushed."""
    with writing(engine) as connection:
        _record(connection, delivery_id, answer, now)


def _record(connection: Connection, delivery_id: int, answer: Answer, now: float) -> None:
    """What a destination has taken stays so, whatever it answers later."""
    uid, status, outcome = answer
    _RECORDED.rows(
        connection,
        {
            "delivery": delivery_id,
            "uid": uid,
            "to": str(_STATES[outcome]),
            "status": status,
            "now": now,
        },
    )
