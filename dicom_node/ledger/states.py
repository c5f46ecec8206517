"""States of everything the ledger follows, and which may follow which: one table.

`docs/states.md` is made from it by `make reference`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self


class State(enum.StrEnum):
    """A state, written in lower case everywhere, and what it means in one line."""

    _value_: str
    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> Self:
        """Make the string *value*, which also knows its *meaning*."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member


class InstanceState(State):
    """What became of one received SOP Instance."""

    RECEIVED = "received", "Stored and kept for restoration."
    DUPLICATE = "duplicate", "Came again with the same bytes; nothing new to do."
    CONFLICT = "conflict", "Came again with other bytes; kept aside, the first stays valid."
    IGNORED = "ignored", "Acknowledged, stored, and never restored."
    REJECTED = "rejected", "Did not parse or decode; kept in quarantine."


class SeriesState(State):
    """How far a series has been assembled."""

    RECEIVING = "receiving", "More instances may come."
    COMPLETE = "complete", "All instances are there; its jobs are made."
    INCOMPLETE = "incomplete", "Instances are missing; policy decided what to do."
    IGNORED = "ignored", "No rule wants it."


class JobState(State):
    """How far the restoration of one volume has come."""

    QUEUED = "queued", "Waits for a worker."
    RUNNING = "running", "A worker holds its lease."
    HELD = "held", "Waits for a person."
    DONE = "done", "Restored, stored, and handed to delivery."
    REFUSED = "refused", "Outside what may be restored."
    REJECTED = "rejected", "A person declined the held job."
    FAILED = "failed", "Ended with an error."
    CANCELLED = "cancelled", "A person took it back."


class DeliveryState(State):
    """How far one restored series has come to one destination."""

    QUEUED = "queued", "Waits for a worker."
    SENDING = "sending", "A worker holds its lease."
    WAITING = "waiting", "Failed for now; is tried again later."
    DELIVERED = "delivered", "Every instance was acknowledged."
    COMMITTED = "committed", "The destination committed to keep every instance."
    DEAD = "dead", "Given up; a person may retry it."


class ItemState(State):
    """How far one restored SOP Instance has come to one destination."""

    PENDING = "pending", "Not yet acknowledged."
    DELIVERED = "delivered", "Acknowledged."
    COMMITTED = "committed", "The destination committed to keep it."
    DEAD = "dead", "Refused for good."


class BreakerState(State):
    """Whether results of one modality may pass without a person."""

    CLOSED = "closed", "The rate of failed gates is inside its band."
    OPEN = "open", "It was not; every result waits for a person until an operator resets it."


class Verdict(State):
    """What gates and policy say of one result for one destination, mildest first."""

    PASS = "pass", "It is sent."
    WARN = "warn", "It is sent with a warning in description and report."
    HOLD = "hold", "It waits for a person."
    REFUSE = "refuse", "It is never sent."


class Decision(State):
    """What a person did with a result that was held."""

    RELEASED = "released", "It is sent as it was reviewed."
    REJECTED = "rejected", "It is never sent."


class Entity(enum.StrEnum):
    """What an event of the history is about."""

    INSTANCE = "instance"
    SERIES = "series"
    JOB = "job"
    DELIVERY = "delivery"
    BREAKER = "breaker"
    #: Of an association only what it sent again is told: nothing else of that is in other rows.
    ASSOCIATION = "association"


STATES: Mapping[Entity, type[State]] = MappingProxyType(
    {
        Entity.INSTANCE: InstanceState,
        Entity.SERIES: SeriesState,
        Entity.JOB: JobState,
        Entity.DELIVERY: DeliveryState,
        Entity.BREAKER: BreakerState,
    }
)
"""The states that a row of each kind may have."""

Steps = Mapping[tuple[State, State], str]

STEPS: Mapping[Entity, Steps] = MappingProxyType(
    {
        Entity.INSTANCE: {
            (InstanceState.RECEIVED, InstanceState.REJECTED): (
                "its header or its pixel data turned out not to decode"
            ),
        },
        Entity.SERIES: {
            (SeriesState.RECEIVING, SeriesState.COMPLETE): (
                "quiet, nothing missing, or forced by an operator; its jobs are queued"
            ),
            (SeriesState.RECEIVING, SeriesState.INCOMPLETE): (
                "quiet, but instances are missing; its jobs are as policy.incomplete says"
            ),
            (SeriesState.RECEIVING, SeriesState.IGNORED): "no route wants it",
            (SeriesState.COMPLETE, SeriesState.RECEIVING): "a late instance, or an operator",
            (SeriesState.INCOMPLETE, SeriesState.RECEIVING): "a late instance, or an operator",
            (SeriesState.IGNORED, SeriesState.RECEIVING): "a late instance, or an operator",
        },
        Entity.JOB: {
            (JobState.QUEUED, JobState.RUNNING): "a worker claims it and holds its lease",
            (JobState.QUEUED, JobState.HELD): "an operator holds it",
            (JobState.QUEUED, JobState.CANCELLED): "an operator cancels it",
            (JobState.RUNNING, JobState.QUEUED): (
                "a fault that passes, the lease ended, or the worker drains"
            ),
            (JobState.RUNNING, JobState.HELD): "a gate or an operator holds it",
            (JobState.RUNNING, JobState.DONE): "restored; the outbox holds its deliveries",
            (JobState.RUNNING, JobState.REFUSED): "outside policy, domain or a gate",
            (JobState.RUNNING, JobState.FAILED): "a fault that stays, or tried too often",
            (JobState.RUNNING, JobState.CANCELLED): "an operator cancels it",
            (JobState.HELD, JobState.QUEUED): "an operator releases what was not restored yet",
            (JobState.HELD, JobState.DONE): "an operator releases what a gate held",
            (JobState.HELD, JobState.REJECTED): "an operator rejects it",
            (JobState.HELD, JobState.CANCELLED): "an operator cancels it",
            (JobState.REFUSED, JobState.QUEUED): "an operator retries it",
            (JobState.FAILED, JobState.QUEUED): "an operator retries it",
            (JobState.FAILED, JobState.CANCELLED): "an operator cancels it",
            (JobState.CANCELLED, JobState.QUEUED): "an operator retries it",
        },
        Entity.DELIVERY: {
            (DeliveryState.QUEUED, DeliveryState.SENDING): "a worker claims it",
            (DeliveryState.QUEUED, DeliveryState.DEAD): "given up before it was sent",
            (DeliveryState.SENDING, DeliveryState.QUEUED): "the lease ended, or the worker drains",
            (DeliveryState.SENDING, DeliveryState.WAITING): "a fault that passes",
            (DeliveryState.SENDING, DeliveryState.DELIVERED): "every instance is acknowledged",
            (DeliveryState.SENDING, DeliveryState.DEAD): "a fault that stays, or tried too long",
            (DeliveryState.WAITING, DeliveryState.QUEUED): "an operator retries it",
            (DeliveryState.WAITING, DeliveryState.SENDING): "its time has come; a worker claims it",
            (DeliveryState.WAITING, DeliveryState.DEAD): "given up while it waited",
            (DeliveryState.DELIVERED, DeliveryState.COMMITTED): (
                "the destination committed to keep every instance"
            ),
            (DeliveryState.DELIVERED, DeliveryState.DEAD): (
                "the destination does not commit to keep it, for good or for too long"
            ),
            (DeliveryState.DELIVERED, DeliveryState.QUEUED): (
                "an instance was not committed, or a rejection note joins it"
            ),
            (DeliveryState.COMMITTED, DeliveryState.QUEUED): "a rejection note joins it",
            (DeliveryState.DEAD, DeliveryState.QUEUED): "an operator retries it",
            (DeliveryState.DEAD, DeliveryState.COMMITTED): "a late report commits every instance",
        },
        Entity.BREAKER: {
            (BreakerState.CLOSED, BreakerState.OPEN): "the rate of failed gates left its band",
            (BreakerState.OPEN, BreakerState.CLOSED): "an operator resets it",
        },
    }
)
"""For each entity, every step from a state to the next, and what takes it."""

TRANSITIONS: Mapping[Entity, Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        entity: {
            state: frozenset(after for before, after in STEPS[entity] if before is state)
            for state in states
        }
        for entity, states in STATES.items()
    }
)
"""For each entity and state, the states that may follow it."""
