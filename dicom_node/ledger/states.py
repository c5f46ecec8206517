"""States of everything the ledger follows, and which may follow which."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class InstanceState(enum.StrEnum):
    """What became of one received SOP Instance."""

    RECEIVED = "received"  #: Stored and kept for restoration.
    DUPLICATE = "duplicate"  #: Came again with the same bytes; nothing new to do.
    CONFLICT = "conflict"  #: Came again with other bytes; kept aside, the first stays valid.
    IGNORED = "ignored"  #: Acknowledged, stored, and never restored.
    REJECTED = "rejected"  #: Did not parse or decode; kept in quarantine.


class SeriesState(enum.StrEnum):
    """How far a series has been assembled."""

    RECEIVING = "receiving"  #: More instances may come.
    COMPLETE = "complete"  #: All instances are there; its jobs are made.
    INCOMPLETE = "incomplete"  #: Instances are missing; policy decided what to do.
    IGNORED = "ignored"  #: No rule wants it.


class JobState(enum.StrEnum):
    """How far the restoration of one volume has come."""

    QUEUED = "queued"  #: Waits for a worker.
    RUNNING = "running"  #: A worker holds its lease.
    HELD = "held"  #: Waits for a person.
    DONE = "done"  #: Restored, stored, and handed to delivery.
    REFUSED = "refused"  #: Outside what may be restored.
    REJECTED = "rejected"  #: A person declined the held job.
    FAILED = "failed"  #: Ended with an error.
    CANCELLED = "cancelled"  #: A person took it back.


class DeliveryState(enum.StrEnum):
    """How far one restored series has come to one destination."""

    QUEUED = "queued"  #: Waits for a worker.
    SENDING = "sending"  #: A worker holds its lease.
    WAITING = "waiting"  #: Failed for now; is tried again later.
    DELIVERED = "delivered"  #: Every instance was acknowledged.
    COMMITTED = "committed"  #: The destination committed to keep every instance.
    DEAD = "dead"  #: Given up; a person may retry it.


class ItemState(enum.StrEnum):
    """How far one restored SOP Instance has come to one destination."""

    PENDING = "pending"  #: Not yet acknowledged.
    DELIVERED = "delivered"  #: Acknowledged.
    COMMITTED = "committed"  #: The destination committed to keep it.
    DEAD = "dead"  #: Refused for good.


class Entity(enum.StrEnum):
    """What an event of the history is about."""

    INSTANCE = "instance"
    SERIES = "series"
    JOB = "job"
    DELIVERY = "delivery"


#: For each entity and state, the states that may follow it.
TRANSITIONS: Mapping[Entity, Mapping[str, frozenset[str]]] = {
    Entity.INSTANCE: {
        InstanceState.RECEIVED: frozenset({InstanceState.REJECTED}),
        InstanceState.DUPLICATE: frozenset(),
        InstanceState.CONFLICT: frozenset(),
        InstanceState.IGNORED: frozenset(),
        InstanceState.REJECTED: frozenset(),
    },
    Entity.SERIES: {
        SeriesState.RECEIVING: frozenset(
            {SeriesState.COMPLETE, SeriesState.INCOMPLETE, SeriesState.IGNORED}
        ),
        # A late instance, or a person, opens a closed series again.
        SeriesState.COMPLETE: frozenset({SeriesState.RECEIVING}),
        SeriesState.INCOMPLETE: frozenset({SeriesState.RECEIVING}),
        SeriesState.IGNORED: frozenset({SeriesState.RECEIVING}),
    },
    Entity.JOB: {
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.HELD, JobState.CANCELLED}),
        JobState.RUNNING: frozenset(
            {
                JobState.QUEUED,
                JobState.HELD,
                JobState.DONE,
                JobState.REFUSED,
                JobState.FAILED,
                JobState.CANCELLED,
            }
        ),
        JobState.HELD: frozenset({JobState.QUEUED, JobState.REJECTED, JobState.CANCELLED}),
        JobState.DONE: frozenset(),
        JobState.REFUSED: frozenset({JobState.QUEUED}),
        JobState.REJECTED: frozenset(),
        JobState.FAILED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
        JobState.CANCELLED: frozenset({JobState.QUEUED}),
    },
    Entity.DELIVERY: {
        DeliveryState.QUEUED: frozenset({DeliveryState.SENDING, DeliveryState.DEAD}),
        DeliveryState.SENDING: frozenset(
            {
                DeliveryState.QUEUED,
                DeliveryState.WAITING,
                DeliveryState.DELIVERED,
                DeliveryState.DEAD,
            }
        ),
        DeliveryState.WAITING: frozenset(
            {DeliveryState.QUEUED, DeliveryState.SENDING, DeliveryState.DEAD}
        ),
        # A destination that does not commit gets the instances once more.
        DeliveryState.DELIVERED: frozenset({DeliveryState.COMMITTED, DeliveryState.QUEUED}),
        DeliveryState.COMMITTED: frozenset(),
        DeliveryState.DEAD: frozenset({DeliveryState.QUEUED}),
    },
}
