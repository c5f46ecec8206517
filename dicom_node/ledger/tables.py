"""Schema, states and transactions of the ledger.

States change in one function, `move`, which enforces the tables of transitions by
compare-and-set and writes the history. SQLite and PostgreSQL run the same statements.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Double,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    text,
)


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


def open_ledger(url: str) -> Engine:
    """Open the ledger and bring its schema up to date."""
    raise NotImplementedError
