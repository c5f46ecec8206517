"""Schema of the ledger, and the one function that changes states.

`move` enforces the tables of transitions by compare-and-set and writes the history. SQLite and
PostgreSQL run the same statements.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    UniqueConstraint,
    false,
    insert,
    select,
    text,
    update,
)

from dicom_node import observability
from dicom_node.ledger.custody_tables import (
    archived_originals,
    custody_inquiries,
    custody_items,
    custody_requests,
)
from dicom_node.ledger.database import insert_or_nothing, open_ledger, reading, writing
from dicom_node.ledger.schema import metadata
from dicom_node.ledger.states import (
    TRANSITIONS,
    DeliveryState,
    Entity,
    InstanceState,
    ItemState,
    JobState,
    SeriesState,
)

__all__ = [
    "TRANSITIONS",
    "DeliveryState",
    "Entity",
    "InstanceState",
    "ItemState",
    "JobState",
    "SeriesState",
    "archived_originals",
    "custody_inquiries",
    "custody_items",
    "custody_requests",
    "insert_or_nothing",
    "metadata",
    "move",
    "open_ledger",
    "reading",
    "record_event",
    "writing",
]

# Times are seconds since 1970 UTC.
associations = Table(
    "associations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("calling_ae", String(64), nullable=False),
    Column("called_ae", String(64), nullable=False),
    Column("address", String(64), nullable=False),
    Column("opened_at", Double, nullable=False),
    Column("closed_at", Double),
    Column("outcome", String(16)),
    Index(None, "closed_at"),
)

series = Table(
    "series",
    metadata,
    Column("series_instance_uid", String(64), primary_key=True),
    Column("study_instance_uid", String(64), nullable=False),
    Column("modality", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String),
    Column("instances", Integer, nullable=False),  # in state received
    Column("forced", Boolean, nullable=False),
    Column("association_id", Integer, ForeignKey("associations.id")),  # the latest
    Column("first_received_at", Double, nullable=False),
    Column("last_received_at", Double, nullable=False),
    # What it was last concluded on: `evidence.Evidence` as tables. Empty before that.
    Column("evidence", JSON, nullable=False, server_default=text("'[]'")),
    Index(None, "state", "last_received_at"),
)

instances = Table(
    "instances",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sop_instance_uid", String(64)),  # NULL where the header did not parse
    Column("sop_class_uid", String(64)),
    Column("study_instance_uid", String(64)),
    Column("series_instance_uid", String(64), ForeignKey("series.series_instance_uid")),
    Column("modality", String(16)),
    Column("transfer_syntax_uid", String(64)),
    Column("path", String),
    Column("sha256", String(64)),
    Column("size", BigInteger),
    Column("association_id", Integer, ForeignKey("associations.id")),
    Column("state", String(16), nullable=False),
    Column("reason", String),
    Column("assigned", Boolean, nullable=False),
    Column("received_at", Double, nullable=False),
    Column("purged_at", Double),  # its file has left the spool
    # One valid row per SOP Instance; what was set aside may be there any number of times.
    Index(
        "uq_instances_valid_sop_instance_uid",
        "sop_instance_uid",
        unique=True,
        sqlite_where=text("state IN ('received', 'ignored')"),
        postgresql_where=text("state IN ('received', 'ignored')"),
    ),
    Index(None, "series_instance_uid", "state"),
    Index(None, "association_id"),
    Index(None, "received_at"),
    # What the janitor looks through, and what counts: the ledger grows, the spool does not.
    Index(
        "ix_instances_kept",
        "state",
        "received_at",
        "size",
        "series_instance_uid",
        sqlite_where=text("purged_at IS NULL"),
        postgresql_where=text("purged_at IS NULL"),
    ),
    Index(
        "ix_instances_purged",
        "state",
        sqlite_where=text("purged_at IS NOT NULL"),
        postgresql_where=text("purged_at IS NOT NULL"),
    ),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column(
        "series_instance_uid", String(64), ForeignKey("series.series_instance_uid"), nullable=False
    ),
    Column("volume_key", String, nullable=False),
    Column("task", String(32), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("route", String, nullable=False),
    Column("destinations", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String),
    Column("note", String),
    Column("worker", String),
    Column("lease_until", Double),
    Column("not_before", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("derived_series_instance_uid", String(64)),
    Column("model_sha256", String(64)),
    Column("seconds", JSON, nullable=False),
    # What the result rests on beside the weights: MR scale, clamped pixels. Empty before it.
    Column("quantities", JSON, nullable=False, server_default=text("'{}'")),
    Column("evidence", JSON, nullable=False, server_default=text("'[]'")),
    Column("strength", Double, nullable=False, server_default=text("1.0")),
    # Held or refused only because instances are missing: those that come are joined with these.
    Column("awaits_rest", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("series_instance_uid", "volume_key", "task", "revision"),
    Index(None, "derived_series_instance_uid"),
)
# The order of claims, so that a long queue takes no longer than a short one.
Index("ix_jobs_due", jobs.c.state, jobs.c.priority.desc(), jobs.c.id)

job_instances = Table(
    "job_instances",
    metadata,
    Column("job_id", Integer, ForeignKey("jobs.id"), primary_key=True),
    Column("instance_id", Integer, ForeignKey("instances.id"), primary_key=True),
    Column("position", Integer, nullable=False),
    Index(None, "instance_id"),
)

outputs = Table(
    "outputs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", Integer, ForeignKey("jobs.id"), nullable=False),
    Column("sop_instance_uid", String(64), nullable=False, unique=True),
    Column("sop_class_uid", String(64), nullable=False),
    Column("source_sop_instance_uid", String(64), nullable=False),
    Column("transfer_syntax_uid", String(64), nullable=False),
    Column("path", String, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("purged_at", Double),  # its file has left the spool
    Index(None, "job_id"),
    Index(None, "source_sop_instance_uid"),
    Index(
        "ix_outputs_kept",
        "job_id",
        "size",
        sqlite_where=text("purged_at IS NULL"),
        postgresql_where=text("purged_at IS NULL"),
    ),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", Integer, ForeignKey("jobs.id"), nullable=False),
    Column("destination", String, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String),
    Column("worker", String),
    Column("lease_until", Double),
    Column("not_before", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("first_attempt_at", Double),
    Column("finished_at", Double),
    # When Storage Commitment is asked for next; NULL where it is not, or no longer.
    Column("commitment_due", Double),
    Column("commitment_asks", Integer, nullable=False, server_default=text("0")),
    UniqueConstraint("job_id", "destination"),
    Index(None, "state", "not_before"),
    Index(None, "commitment_due"),
)

delivery_items = Table(
    "delivery_items",
    metadata,
    Column("delivery_id", Integer, ForeignKey("deliveries.id"), primary_key=True),
    Column("output_id", Integer, ForeignKey("outputs.id"), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("status", Integer),  # of the last C-STORE response
    Column("at", Double),
    Index(None, "output_id"),
)

commitments = Table(
    "commitments",
    metadata,
    Column("transaction_uid", String(64), primary_key=True),
    Column("delivery_id", Integer, ForeignKey("deliveries.id"), nullable=False),
    Column("requested_at", Double, nullable=False),
    Column("reported_at", Double),
    Column("failed", Integer),
    Index(None, "delivery_id"),
)

# What holds for a destination as a whole; one that was never in trouble has no row.
destination_states = Table(
    "destination_states",
    metadata,
    Column("destination", String, primary_key=True),
    Column("paused_at", Double),  # by a person; NULL: not paused
    Column("paused_reason", String),
    # Nothing is sent before: it is down or out of resources.
    Column("held_until", Double),
    Column("held_reason", String),
    Column("failures", Integer, nullable=False),  # in a row
)

# What people are told by webhook and e-mail: an outbox, written with the state that it is about.
notices = Table(
    "notices",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("event", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("told", JSON, nullable=False),  # the channels that have taken it
    Column("finished_at", Double),
    Column("outcome", String),
    Index(None, "finished_at", "not_before"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("entity", String(16), nullable=False),
    Column("entity_id", String(64), nullable=False),
    Column("at", Double, nullable=False),
    Column("from_state", String(16)),
    Column("to_state", String(16), nullable=False),
    Column("reason", String),
    Index(None, "entity", "entity_id"),
)

# What the gates said of a job's result; how each stands to each destination is in `verdicts`.
judgements = Table(
    "judgements",
    metadata,
    Column("job_id", Integer, ForeignKey("jobs.id"), primary_key=True),
    Column("modality", String(16), nullable=False),
    Column("model_sha256", String(64), nullable=False),
    Column("failed", Boolean, nullable=False),
    Column("review", String),
    Column("at", Double, nullable=False),
    Index(None, "modality", "at"),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("job_id", Integer, ForeignKey("jobs.id"), primary_key=True),
    Column("destination", String, primary_key=True),  # "" where the job has none
    Column("verdict", String(16), nullable=False),
    Column("reason", String),
    Column("decision", String(16)),
    Column("operator", String),
    Column("decision_reason", String),
    Column("decided_at", Double),
)

gate_readings = Table(
    "gate_readings",
    metadata,
    Column("job_id", Integer, ForeignKey("jobs.id"), primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("gate", String(64), nullable=False),
    Column("level", String(16), nullable=False),
    Column("unit", String(16), nullable=False),
    Column("worst_slice", Integer),
    Column("reason", String),
    Column("measured", JSON, nullable=False),  # values, slices, levels, warn, fail
)

breakers = Table(
    "breakers",
    metadata,
    Column("modality", String(16), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", String),
    Column("counts_from", Double, nullable=False),  # the last reset
    Column("opened_at", Double),
    Column("operator", String),  # of the last reset
)

_TABLES: Mapping[Entity, Table] = {
    Entity.INSTANCE: instances,
    Entity.SERIES: series,
    Entity.JOB: jobs,
    Entity.DELIVERY: deliveries,
    Entity.BREAKER: breakers,
}


def move(
    connection: Connection,
    entity: Entity,
    key: int | str,
    to: str,
    *,
    reason: str | None,
    now: float,
    only: ColumnElement[bool] | None = None,
    **values: object,
) -> bool:
    """Change the state of one row by compare-and-set and write the history.

    Args:
        connection: A writing transaction.
        entity: What kind of row.
        key: Its primary key.
        to: The new state.
        reason: Why, for people; replaces the row's reason.
        now: Seconds since 1970 UTC.
        only: A further condition on the row, as "the lease is mine".
        values: Further columns to set.

    Returns:
        False when there is no such row, the state may not follow, or another was faster.
    """
    table = _TABLES[entity]
    (primary_key,) = table.primary_key
    condition = primary_key == key if only is None else (primary_key == key) & only
    state = connection.scalar(select(table.c.state).where(condition))
    if state is None or to not in TRANSITIONS[entity][state]:
        return False
    moved = connection.execute(
        update(table)
        .where(condition, table.c.state == state)
        .values(state=to, reason=reason, **values)
    )
    if moved.rowcount != 1:
        return False
    record_event(connection, entity, key, state, to, reason, now)
    return True


def record_event(
    connection: Connection,
    entity: Entity,
    key: int | str,
    previous: str | None,
    to: str,
    reason: str | None,
    now: float,
) -> None:
    """Write one line of the history and count it."""
    connection.execute(
        insert(events).values(
            entity=entity,
            entity_id=str(key),
            at=now,
            from_state=previous,
            to_state=to,
            reason=reason,
        )
    )
    observability.STATES.labels(entity=entity, state=to).inc()
