"""The outbox is emptied here: one restored series to one destination, until it is stored there.

The ledger says what is due; an attempt sends what the destination has not acknowledged, so the
next one goes on from the first unsent instance.  What is wrong with an instance is its own affair;
what is wrong with the destination lets every series for it wait.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from sqlalchemy import Engine

from dicom_node.association import Peer
from dicom_node.audit import RemoteNode
from dicom_node.backoff import next_attempt, wait_s
from dicom_node.errors import DestinationError, NodeError, NotFoundError, PermanentError
from dicom_node.ledger import answers, destinations, outbox, reports
from dicom_node.ledger.tables import DeliveryState, ItemState
from dicom_node.ledger.writer import Writer
from dicom_node.observability import get_logger
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_scu import Sendable, Sent, StoreLink, is_out_of_resources
from dicom_node.stow import WebLink, WebPeer
from dicom_node.transfers import Dispatches

Clock = Callable[[], float]

# So many series go to one destination before the others have their turn.
_MOST_IN_A_ROW = 20

_log = get_logger(__name__)


class Link(Protocol):
    """A way to one destination that outlives a series; one thread."""

    def send(self, items: Sequence[Sendable]) -> Generator[Sent]:
        """Send instances in order; an answer for each that has one."""

    def enough(self) -> None:
        """Begin nothing more of what is being sent; what is under way is answered still."""

    def close(self) -> None:
        """End it in good order."""


@dataclass(frozen=True)
class Target:
    """A destination as the worker needs it: of either kind, by its name in node.toml."""

    name: str
    remote: RemoteNode
    #: How long one answer may take at most, before its size is allowed for; seconds.
    patience: float
    wants_commitment: bool
    connect: Callable[[], Link]


def target_of(settings: NodeSettings, name: str) -> Target:
    """The destination *name*; NotFoundError where node.toml has none of that name."""
    if (destination := settings.destinations.get(name)) is not None:
        peer = Peer.of(destination, settings)
        asks = destination.commitment
        return Target(
            name,
            RemoteNode(peer.ae_title, peer.host),
            peer.connection_timeout + peer.acse_timeout + peer.dimse_timeout,
            settings.delivery.commitment if asks is None else asks,
            lambda: StoreLink(peer, instances=destination.instances_per_association),
        )
    if (server := settings.stow.get(name)) is not None:
        web = WebPeer.of(server, settings)
        host = urlsplit(web.url).hostname or ""
        patience = web.connect_timeout + web.timeout
        return Target(name, RemoteNode(name, host), patience, False, lambda: WebLink(web))
    raise NotFoundError(f"destination {name!r} is no longer configured")


def limits(settings: NodeSettings) -> dict[str, int]:
    """How many deliveries may be under way to each destination at the same time."""
    dicom = {name: each.max_associations for name, each in settings.destinations.items()}
    return dicom | {name: each.max_requests for name, each in settings.stow.items()}


@dataclass
class _Attempt:
    """What one attempt came to: counts, and the first trouble of each kind.

    *words* may hold what a peer said, *told* is in our own words.
    """

    delivered: int = 0
    dead: int = 0
    dead_words: str = ""
    dead_told: str = ""
    retry_words: str = ""
    retry_told: str = ""
    #: The destination itself did not take it: down, lost, or out of resources.
    is_in_trouble: bool = False
    delivered_classes: Counter[str] = field(default_factory=Counter)  # by SOP Class UID

    def note(self, sent: Sent, sop_class_uid: str) -> None:
        if sent.outcome == "delivered":
            self.delivered += 1
            self.delivered_classes[sop_class_uid] += 1
        elif sent.outcome == "dead":
            self.dead += 1
            self.dead_words = self.dead_words or sent.words
            self.dead_told = self.dead_told or sent.why
        else:
            self.retry_words = self.retry_words or sent.words
            self.retry_told = self.retry_told or sent.why
            self.is_in_trouble |= is_out_of_resources(sent.status)

    def lost(self, why: str) -> None:
        self.retry_words = self.retry_words or why
        self.retry_told = self.retry_told or why
        self.is_in_trouble = True

    @property
    def why(self) -> str:
        return self.retry_words or self.dead_words


@dataclass(frozen=True)
class Conclusion:
    """The state that a delivery goes to, why, and when it and its destination are due again."""

    state: DeliveryState
    reason: str | None
    #: Why, without a word of the peer: for logs and notices.
    told: str | None
    next_attempt: float | None = None
    hold_until: float | None = None

    @classmethod
    def dead(cls, reason: str, told: str | None = None) -> Conclusion:
        """Given up."""
        return cls(DeliveryState.DEAD, reason, told or reason)


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
        dispatches: Dispatches | None = None,
    ) -> None:
        """*stop*, once set, ends a delivery after the instance in hand; it goes on later.

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
        self._dispatches = dispatches
        self._limits = limits(settings)
        self._writer = Writer(engine)
        self._link: Link | None = None
        self._following: outbox.Delivery | None = None
        self._in_a_row = 0

    def recover(self) -> int:
        """Give back what an earlier process of the same name, or this one, left in hand."""
        return outbox.release_delivery_leases(self._engine, self._name, self._clock())

    def close(self) -> None:
        """End the association that is kept for a next series; on the worker's own thread."""
        self._hang_up()
        self._writer.close()

    def run_once(self) -> bool:
        """Attempt the next delivery that is due; False when there is none."""
        delivery, self._following = self._following, None
        if delivery is None:
            self._in_a_row = 0
            delivery = outbox.claim_delivery(
                self._engine,
                self._name,
                lease_s=self._settings.delivery.lease_s,
                now=self._clock(),
                limits=self._limits,
            )
        if delivery is None:
            return False
        try:
            self._deliver(delivery)
        except BaseException:
            self._hang_up()
            raise
        return True

    def _deliver(self, delivery: outbox.Delivery) -> None:
        conclusion = self._attempt(delivery)
        _log.info(
            "delivery attempted",
            action="delivery_attempted",
            delivery=delivery.id,
            destination=delivery.destination,
            state=conclusion.state.value,
            reason=conclusion.told,
        )
        # Before the delivery is due again, lest another worker be faster.
        if conclusion.hold_until is not None:
            destinations.hold(
                self._engine,
                delivery.destination,
                until=conclusion.hold_until,
                reason=conclusion.told or "",
            )
        goes_on = self._goes_on(delivery, conclusion)
        if not goes_on:
            # Before the ledger counts one association less.
            self._hang_up()
        _, self._following = outbox.conclude_and_follow(
            self._engine,
            delivery.id,
            self._name,
            state=conclusion.state,
            reason=conclusion.reason,
            told=conclusion.told,
            next_attempt=conclusion.next_attempt,
            now=self._clock(),
            wants_commitment=self._wants_commitment(delivery),
            following=outbox.Following(self._settings.delivery.lease_s) if goes_on else None,
        )
        if self._following is None:
            self._hang_up()

    def _goes_on(self, delivery: outbox.Delivery, conclusion: Conclusion) -> bool:
        """Whether the association is kept for the next series to the same destination."""
        self._in_a_row += 1
        return (
            conclusion.state is DeliveryState.DELIVERED
            and self._in_a_row < _MOST_IN_A_ROW
            and not self._stop.is_set()
            and outbox.is_due(self._engine, delivery.destination, self._clock())
        )

    def _wants_commitment(self, delivery: outbox.Delivery) -> bool:
        try:
            return target_of(self._settings, delivery.destination).wants_commitment
        except NotFoundError:
            return False

    def _hang_up(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _attempt(self, delivery: outbox.Delivery) -> Conclusion:
        attempt = _Attempt()
        try:
            target = target_of(self._settings, delivery.destination)
            items = self._sendable(delivery)
            if items:
                self._link = self._link or target.connect()
                self._keep(delivery, target)
                with self._told(target, delivery, attempt):
                    self._send(self._link, delivery, target, items, attempt)
        except PermanentError as error:
            return Conclusion.dead(error.message)
        except DestinationError as error:
            attempt.lost(error.message)
        if attempt.delivered and delivery.failures:
            destinations.answers(self._engine, delivery.destination)
        return self._conclude(delivery, attempt)

    @contextmanager
    def _told(self, target: Target, delivery: outbox.Delivery, attempt: _Attempt) -> Iterator[None]:
        """Tell the audit trail that the attempt begins, and what came of it however it ends."""
        if self._dispatches is None:
            yield
            return
        begun = self._dispatches.begun(target.remote, delivery.items)
        why = ""
        try:
            yield
        except NodeError as error:
            why = error.message
            raise
        finally:
            why = why or attempt.why
            self._dispatches.ended(target.remote, begun, attempt.delivered_classes, why)

    def _sendable(self, delivery: outbox.Delivery) -> list[Sendable]:
        return [
            Sendable(
                self._spool.resolve(item.path),
                item.sop_class_uid,
                item.sop_instance_uid,
                item.transfer_syntax_uid,
            )
            for item in delivery.items
        ]

    def _send(
        self,
        link: Link,
        delivery: outbox.Delivery,
        target: Target,
        items: Sequence[Sendable],
        attempt: _Attempt,
    ) -> None:
        classes = {item.sop_instance_uid: item.sop_class_uid for item in items}
        replies = link.send(items)
        try:
            for sent in replies:
                attempt.note(sent, classes[sent.sop_instance_uid])
                is_kept = self._record(delivery, target, sent)
                # Out of resources: the next instance would be refused too, and waits for it.
                if attempt.is_in_trouble or self._stop.is_set() or not is_kept:
                    link.enough()
                    if not sent.more_follow:
                        return
        finally:
            replies.close()
        if attempt.delivered + attempt.dead < len(items) and not attempt.retry_words:
            attempt.lost("the association ended early")

    def _record(self, delivery: outbox.Delivery, target: Target, sent: Sent) -> bool:
        """Record an answer and keep the lease; False when another worker has the delivery."""
        if sent.status is None:
            return self._keep(delivery, target)  # no answer is no news of the instance
        return answers.record_and_keep(
            self._writer,
            delivery.id,
            self._name,
            (sent.sop_instance_uid, sent.status, sent.outcome),
            lease_s=self._lease_s(target),
            now=self._clock(),
        )

    def _keep(self, delivery: outbox.Delivery, target: Target) -> bool:
        """Extend the lease beyond the next answer; False when another worker has the delivery."""
        return outbox.heartbeat_delivery(
            self._engine,
            delivery.id,
            self._name,
            lease_s=self._lease_s(target),
            now=self._clock(),
        )

    def _lease_s(self, target: Target) -> float:
        return max(self._settings.delivery.lease_s, 2 * target.patience)

    def _conclude(self, delivery: outbox.Delivery, attempt: _Attempt) -> Conclusion:
        left = len(delivery.items) - attempt.delivered - attempt.dead
        now = self._clock()
        if left and self._stop.is_set() and not attempt.retry_words:
            words = "interrupted by shutdown"
            return Conclusion(DeliveryState.WAITING, words, words, now)
        if left:
            return self._wait(delivery, attempt, now)
        dead = self._dead_statuses(delivery.id)
        if dead:
            first = f"answered {dead[0]}"
            return Conclusion.dead(
                f"{len(dead)} refused: {attempt.dead_words or first}",
                f"{len(dead)} refused: {attempt.dead_told or first}",
            )
        return Conclusion(DeliveryState.DELIVERED, None, None)

    def _wait(self, delivery: outbox.Delivery, attempt: _Attempt, now: float) -> Conclusion:
        backoff = self._settings.delivery
        # One that has begun to take instances again begins its row of failures anew.
        failures = (0 if attempt.delivered else delivery.failures) + 1
        jitter = self._rng.random()
        due = next_attempt(
            max(delivery.attempts, failures),
            first_attempt=delivery.first_attempt,
            now=now,
            backoff=backoff,
            jitter=jitter,
        )
        words = attempt.retry_words or "the lease was lost"
        told = attempt.retry_told or words
        if due is None:
            return Conclusion.dead(f"given up: {words}", f"given up: {told}")
        hold = None
        if attempt.is_in_trouble:
            hold = min(due, now + wait_s(failures, backoff, jitter))
        return Conclusion(DeliveryState.WAITING, words, told, due, hold)

    def _dead_statuses(self, delivery_id: int) -> list[str]:
        """The status of each instance refused for good, in this attempt or one before."""
        items = reports.delivery(self._engine, delivery_id)["items"]
        return [item["status"] for item in items if item["state"] == ItemState.DEAD]
