"""Deliveries of restored series: claim, per-instance status, conclusion, commitment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Engine

from dicom_node.ledger.tables import DeliveryState


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


def claim_delivery(engine: Engine, worker: str, *, lease_s: float, now: float) -> Delivery | None:
    """Take the next delivery that is due, or None."""
    raise NotImplementedError


def heartbeat_delivery(
    engine: Engine, delivery_id: int, worker: str, *, lease_s: float, now: float
) -> bool:
    """Extend the lease; False when the delivery is no longer this worker's."""
    raise NotImplementedError


def record_sent(
    engine: Engine,
    delivery_id: int,
    sop_instance_uid: str,
    status: int,
    outcome: Literal["delivered", "retry", "dead"],
    now: float,
) -> None:
    """Record the destination's answer for one instance."""
    raise NotImplementedError


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
    """Give the delivery back as delivered, waiting (until `next_attempt`) or dead."""
    raise NotImplementedError


def retry_delivery(engine: Engine, delivery_id: int, *, reason: str, now: float) -> bool:
    """Queue a waiting or dead delivery at once, dead instances included."""
    raise NotImplementedError


def request_commitment(
    engine: Engine, delivery_id: int, *, transaction_uid: str, now: float
) -> bool:
    """Record a Storage Commitment request for a delivered series."""
    raise NotImplementedError


def report_commitment(
    engine: Engine,
    transaction_uid: str,
    *,
    committed: Sequence[str],
    failed: Mapping[str, int],
    now: float,
) -> bool:
    """Record the answer to a request: instances committed, and those that failed with why."""
    raise NotImplementedError
