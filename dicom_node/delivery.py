"""The outbox is emptied here: one restored series to one destination, until it is stored there.

The ledger says what is due; an attempt sends what the destination has not acknowledged, so the
next one goes on from the first unsent instance.  When to try again is a pure function.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy import Engine

from dicom_node.association import Peer
from dicom_node.audit import RemoteNode
from dicom_node.errors import DestinationError, NodeError, NotFoundError, PermanentError
from dicom_node.ledger import outbox, queue, reports
from dicom_node.ledger.tables import DeliveryState, ItemState
from dicom_node.observability import get_logger
from dicom_node.settings import DeliverySettings, NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_scu import Sendable, Sent, send_all
from dicom_node.transfers import Dispatches

Clock = Callable[[], float]

_log = get_logger(__name__)


def next_attempt(
    attempts: int,
    *,
    first_attempt: float,
    now: float,
    backoff: DeliverySettings,
    rng: random.Random,
) -> float | None:
    """When to try again after *attempts* failed ones; None once it has failed for too long.

    The wait doubles (``factor``) from ``first_s`` up to ``max_s``; jitter takes off up to a fifth
    so that deliveries which failed together do not all return together.
    """
    if now - first_attempt >= backoff.give_up_after_s:
        return None
    steps = max(0, attempts - 1)
    # A float overflows after a thousand doublings; the wait has met its limit long before.
    wait = min(backoff.max_s, backoff.first_s * backoff.factor ** min(steps, 64))
    return now + wait * (1.0 - 0.2 * rng.random())


@dataclass
class _Attempt:
    """What one attempt came to: counts, and the words of the first trouble of each kind."""

    delivered: int = 0
    dead: int = 0
    dead_why: str = ""
    retry_why: str = ""
    delivered_classes: Counter[str] = field(default_factory=Counter)  # by SOP Class UID

    def note(self, sent: Sent, sop_class_uid: str) -> None:
        if sent.outcome == "delivered":
            self.delivered += 1
            self.delivered_classes[sop_class_uid] += 1
        elif sent.outcome == "dead":
            self.dead += 1
            self.dead_why = self.dead_why or sent.why
        else:
            self.retry_why = self.retry_why or sent.why


@dataclass(frozen=True)
class Conclusion:
    """The state that a delivery goes to, why, and when it is due again."""

    state: DeliveryState
    reason: str | None
    next_attempt: float | None


class DeliveryWorker:
    """Takes one due delivery at a time from the outbox and sends it."""

    def __init__(
        self,
        settings: NodeSettings,
        spool: Spool,
        engine: Engine,
        clock: Clock = time.time,
        *,
        name: str | None = None,
        rng: random.Random | None = None,
        stop: threading.Event | None = None,
        on_delivered: Callable[[queue.Delivery, Peer], None] | None = None,
        dispatches: Dispatches | None = None,
    ) -> None:
        """*stop*, once set, ends a delivery after the instance in hand; it goes on later.

        *on_delivered* is called once for each series that is stored, to ask for commitment;
        *dispatches* tells the audit trail of each attempt.
        """
        self._settings = settings
        self._spool = spool
        self._engine = engine
        self._clock = clock
        self._name = name or f"deliver@{socket.gethostname()}:{os.getpid()}"
        # Jitter only spreads retries; it guards nothing.
        self._rng = rng or random.Random()
        self._stop = stop or threading.Event()
        self._on_delivered = on_delivered
        self._dispatches = dispatches

    def recover(self) -> int:
        """Give back what an earlier process of the same name, or this one, left in hand."""
        return outbox.release_delivery_leases(self._engine, self._name, self._clock())

    def run_once(self) -> bool:
        """Attempt the next delivery that is due; False when there is none."""
        lease = self._settings.delivery.lease_s
        delivery = queue.claim_delivery(self._engine, self._name, lease_s=lease, now=self._clock())
        if delivery is None:
            return False
        conclusion = self._attempt(delivery)
        _log.info(
            "delivery attempted",
            action="delivery_attempted",
            delivery=delivery.id,
            destination=delivery.destination,
            state=conclusion.state.value,
            reason=conclusion.reason,
        )
        concluded = queue.conclude_delivery(
            self._engine,
            delivery.id,
            self._name,
            state=conclusion.state,
            reason=conclusion.reason,
            next_attempt=conclusion.next_attempt,
            now=self._clock(),
        )
        if concluded and conclusion.state is DeliveryState.DELIVERED:
            self._announce(delivery)
        return True

    def _announce(self, delivery: queue.Delivery) -> None:
        """The series is stored, whatever becomes of the request to keep it."""
        if self._on_delivered is None:
            return
        peer = Peer.of(self._settings.destinations[delivery.destination], self._settings)
        try:
            self._on_delivered(delivery, peer)
        except NodeError as error:
            _log.warning(
                "commitment not requested",
                action="commitment",
                delivery=delivery.id,
                error=error.message,
            )

    def _attempt(self, delivery: queue.Delivery) -> Conclusion:
        attempt = _Attempt()
        try:
            peer, items = self._prepare(delivery)
            self._keep(delivery, peer)
            with self._told(peer, delivery, attempt):
                self._send(delivery, peer, items, attempt)
        except PermanentError as error:
            return Conclusion(DeliveryState.DEAD, error.message, None)
        except DestinationError as error:
            attempt.retry_why = attempt.retry_why or error.message
        return self._conclude(delivery, attempt)

    @contextmanager
    def _told(self, peer: Peer, delivery: queue.Delivery, attempt: _Attempt) -> Iterator[None]:
        """Tell the audit trail that the attempt begins, and what came of it however it ends."""
        if self._dispatches is None:
            yield
            return
        to = RemoteNode(peer.ae_title, peer.host)
        begun = self._dispatches.begun(to, delivery.items)
        why = ""
        try:
            yield
        except NodeError as error:
            why = error.message
            raise
        finally:
            why = why or attempt.retry_why or attempt.dead_why
            self._dispatches.ended(to, begun, attempt.delivered_classes, why)

    def _prepare(self, delivery: queue.Delivery) -> tuple[Peer, list[Sendable]]:
        destination = self._settings.destinations.get(delivery.destination)
        if destination is None:
            raise NotFoundError(f"destination {delivery.destination!r} is no longer configured")
        items = [
            Sendable(
                self._spool.resolve(item.path),
                item.sop_class_uid,
                item.sop_instance_uid,
                item.transfer_syntax_uid,
            )
            for item in delivery.items
        ]
        return Peer.of(destination, self._settings), items

    def _send(
        self, delivery: queue.Delivery, peer: Peer, items: Sequence[Sendable], attempt: _Attempt
    ) -> None:
        classes = {item.sop_instance_uid: item.sop_class_uid for item in items}
        answers = send_all(peer, items)
        try:
            for sent in answers:
                attempt.note(sent, classes[sent.sop_instance_uid])
                self._record(delivery, sent)
                # Out of resources: the next instance would be refused too, and waits for it.
                if sent.outcome == "retry" or self._stop.is_set():
                    return
                if not self._keep(delivery, peer):
                    return
        finally:
            # Runs the generator's own clean-up now: the association is released, not dropped.
            answers.close()

    def _record(self, delivery: queue.Delivery, sent: Sent) -> None:
        if sent.status is None:
            return  # no answer is no news of the instance
        queue.record_sent(
            self._engine,
            delivery.id,
            sent.sop_instance_uid,
            sent.status,
            sent.outcome,
            self._clock(),
        )

    def _keep(self, delivery: queue.Delivery, peer: Peer) -> bool:
        """Extend the lease beyond the next answer; False when another worker has the delivery."""
        patience = peer.connection_timeout + peer.acse_timeout + peer.dimse_timeout
        return queue.heartbeat_delivery(
            self._engine,
            delivery.id,
            self._name,
            lease_s=max(self._settings.delivery.lease_s, 2 * patience),
            now=self._clock(),
        )

    def _conclude(self, delivery: queue.Delivery, attempt: _Attempt) -> Conclusion:
        left = len(delivery.items) - attempt.delivered - attempt.dead
        now = self._clock()
        if left and self._stop.is_set() and not attempt.retry_why:
            return Conclusion(DeliveryState.WAITING, "interrupted by shutdown", now)
        if left:
            due = next_attempt(
                delivery.attempts,
                first_attempt=delivery.first_attempt,
                now=now,
                backoff=self._settings.delivery,
                rng=self._rng,
            )
            why = attempt.retry_why or "the association ended early"
            if due is None:
                return Conclusion(DeliveryState.DEAD, f"given up: {why}", None)
            return Conclusion(DeliveryState.WAITING, why, due)
        dead = self._dead_statuses(delivery.id)
        if dead:
            why = attempt.dead_why or f"answered {dead[0]}"
            return Conclusion(DeliveryState.DEAD, f"{len(dead)} refused: {why}", None)
        return Conclusion(DeliveryState.DELIVERED, None, None)

    def _dead_statuses(self, delivery_id: int) -> list[str]:
        """The status of each instance refused for good, in this attempt or one before."""
        items = reports.delivery(self._engine, delivery_id)["items"]
        return [item["status"] for item in items if item["state"] == ItemState.DEAD]
