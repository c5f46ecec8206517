"""Reading the ledger: lists with filters, one row's whole story, counters.

Every function returns plain dictionaries, ready for JSON. Times are ISO 8601 in UTC. Listings
are newest first; `since` is in seconds since 1970 UTC and compares with the time of creation.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, FromClause, extract, func, select

from dicom_node.errors import NotFoundError
from dicom_node.ledger import judged_rows, retention, rows, story, tables
from dicom_node.ledger.rows import Report, Wanted
from dicom_node.ledger.tables import (
    DeliveryState,
    Entity,
    JobState,
    SeriesState,
    reading,
)

__all__ = [
    "Report",
    "Transfer",
    "breakers",
    "clocks",
    "deliveries",
    "delivery",
    "instance",
    "instances",
    "job",
    "jobs",
    "one_series",
    "open_associations",
    "series",
    "stats",
    "repeats",
    "transfers",
]


def jobs(
    engine: Engine,
    *,
    state: Wanted = None,
    since: float | None = None,
    until: float | None = None,
    task: str | None = None,
    series_uid: str | None = None,
    model: str | None = None,
    destination: str | None = None,
    limit: int | None = None,
) -> list[Report]:
    """Return jobs, each with `seconds{load,restore,derive}` and its `deliveries`.

    *state*: one or several. *model*: the SHA-256 of its bundle. *destination*: where its result
    was put into the outbox for.
    """
    table, delivery = tables.jobs.c, tables.deliveries.c
    wanted = rows.conditions(
        table.created_at,
        since,
        {
            table.state: state,
            table.task: task,
            table.series_instance_uid: series_uid,
            table.model_sha256: model,
        },
        until,
    )
    if destination is not None:
        to = select(delivery.job_id).where(delivery.destination == destination)
        wanted.append(table.id.in_(to))
    with reading(engine) as connection:
        return rows.job_rows(connection, wanted, limit)


def job(engine: Engine, job_id: int) -> Report:
    """Return one job with its `sources`, `outputs`, `verdicts`, `gates`, `history` and `story`.

    `history` is the job's own, `story` goes from the association to the commitment.

    Raises:
        NotFoundError: When there is none.
    """
    with reading(engine) as connection:
        found = rows.job_rows(connection, [tables.jobs.c.id == job_id], None)
        if not found:
            raise NotFoundError(f"there is no job {job_id}")
        return {
            **found[0],
            "sources": rows.source_uids(connection, job_id),
            "outputs": rows.output_rows(connection, tables.outputs.c.job_id == job_id),
            **judged_rows.judgement(connection, job_id),
            "history": rows.history(connection, Entity.JOB, [job_id]),
            "story": story.of_job(connection, job_id),
        }


def series(
    engine: Engine,
    *,
    state: Wanted = None,
    since: float | None = None,
    until: float | None = None,
    modality: str | None = None,
    study_uid: str | None = None,
    calling_ae: str | None = None,
    limit: int | None = None,
) -> list[Report]:
    """Return series with state, reason and number of instances."""
    table = tables.series.c
    wanted = rows.conditions(
        table.first_received_at,
        since,
        {
            table.state: state,
            table.modality: modality,
            table.study_instance_uid: study_uid,
            tables.associations.c.calling_ae: calling_ae,
        },
        until,
    )
    with reading(engine) as connection:
        return rows.series_rows(connection, wanted, limit)


def one_series(engine: Engine, series_uid: str) -> Report:
    """Return one series with its `jobs` and `history`.

    Raises:
        NotFoundError: When there is none.
    """
    with reading(engine) as connection:
        found = rows.series_rows(
            connection, [tables.series.c.series_instance_uid == series_uid], None
        )
        if not found:
            raise NotFoundError(f"there is no series {series_uid}")
        jobs_of = [tables.jobs.c.series_instance_uid == series_uid]
        return {
            **found[0],
            "jobs": rows.job_rows(connection, jobs_of, None),
            "history": rows.history(connection, Entity.SERIES, [series_uid]),
        }


def deliveries(
    engine: Engine,
    *,
    state: Wanted = None,
    since: float | None = None,
    until: float | None = None,
    destination: str | None = None,
    job_id: int | None = None,
    limit: int | None = None,
) -> list[Report]:
    """Return deliveries with `sent` of `total` instances."""
    table = tables.deliveries.c
    wanted = rows.conditions(
        table.created_at,
        since,
        {table.state: state, table.destination: destination, table.job_id: job_id},
        until,
    )
    with reading(engine) as connection:
        return rows.delivery_rows(connection, wanted, limit)


def delivery(engine: Engine, delivery_id: int) -> Report:
    """Return one delivery with its `items` and `history`.

    Raises:
        NotFoundError: When there is none.
    """
    with reading(engine) as connection:
        found = rows.delivery_rows(connection, [tables.deliveries.c.id == delivery_id], None)
        if not found:
            raise NotFoundError(f"there is no delivery {delivery_id}")
        return {
            **found[0],
            "items": rows.item_rows(connection, tables.delivery_items.c.delivery_id == delivery_id),
            "history": rows.history(connection, Entity.DELIVERY, [delivery_id]),
        }


def instances(
    engine: Engine,
    *,
    state: Wanted = None,
    since: float | None = None,
    until: float | None = None,
    series_uid: str | None = None,
    study_uid: str | None = None,
    calling_ae: str | None = None,
    limit: int | None = None,
) -> list[Report]:
    """Return received instances, conflicts and rejected ones included."""
    table = tables.instances.c
    wanted = rows.conditions(
        table.received_at,
        since,
        {
            table.state: state,
            table.series_instance_uid: series_uid,
            table.study_instance_uid: study_uid,
            tables.associations.c.calling_ae: calling_ae,
        },
        until,
    )
    with reading(engine) as connection:
        return rows.instance_rows(connection, wanted, limit)


def instance(engine: Engine, sop_instance_uid: str) -> Report:
    """Return one instance's story: each `received` copy, `jobs`, `outputs` and what became of them.

    *sop_instance_uid* is of a received instance or of one that was made of it; then the story is
    that of its source, with this result alone.

    Raises:
        NotFoundError: When there is none.
    """
    output = tables.outputs.c
    with reading(engine) as connection:
        source = connection.scalar(
            select(output.source_sop_instance_uid).where(
                output.sop_instance_uid == sop_instance_uid
            )
        )
        made = (
            output.source_sop_instance_uid == sop_instance_uid
            if source is None
            else output.sop_instance_uid == sop_instance_uid
        )
        copies = [tables.instances.c.sop_instance_uid == (source or sop_instance_uid)]
        received = rows.instance_rows(connection, copies, None)
        if not received:
            raise NotFoundError(f"there is no instance {sop_instance_uid}")
        ids = [row["id"] for row in received]
        outputs = rows.output_rows(connection, made)
        uids = [row["sop_instance_uid"] for row in outputs]
        member = tables.job_instances.c
        job_ids = select(member.job_id).where(member.instance_id.in_(ids))
        return {
            "sop_instance_uid": sop_instance_uid,
            "source_sop_instance_uid": source,
            "received": received,
            "jobs": rows.job_rows(connection, [tables.jobs.c.id.in_(job_ids)], None),
            "outputs": outputs,
            "deliveries": rows.item_rows(connection, made),
            "history": rows.history(connection, Entity.INSTANCE, ids),
            "story": story.of_instance(connection, ids, uids),
        }


def breakers(engine: Engine, *, window: int) -> list[Report]:
    """Return the circuit breakers, each with `failed` of the latest `judged` jobs."""
    with reading(engine) as connection:
        return judged_rows.breakers(connection, window)


def clocks(engine: Engine) -> tuple[float | None, float | None]:
    """Return the time of the database's own machine and that of the newest event.

    Both in seconds since 1970 UTC; the first is None where the database is a file on this machine.
    """
    # By the key: the newest that was written, whatever time it bears.
    newest = select(tables.events.c.at).order_by(tables.events.c.id.desc()).limit(1)
    with reading(engine) as connection:
        there = None
        if engine.dialect.name == "postgresql":
            there = connection.scalar(select(extract("epoch", func.clock_timestamp())))
        return None if there is None else float(there), connection.scalar(newest)


def stats(engine: Engine) -> Report:
    """Return counts by state of instances, series, jobs and deliveries, and what is oldest."""
    with reading(engine) as connection:
        return {
            "associations": {"open": rows.open_associations(connection)},
            "instances": rows.instance_counts(connection),
            "series": rows.counts(connection, tables.series.c.state, SeriesState),
            "jobs": rows.counts(connection, tables.jobs.c.state, JobState),
            "deliveries": rows.counts(connection, tables.deliveries.c.state, DeliveryState),
            "verdicts": judged_rows.verdict_counts(connection),
            "breakers": judged_rows.breaker_states(connection),
            "kept_bytes": retention.kept_bytes(connection),
            "oldest_queued_job": rows.oldest(connection, tables.jobs.c, [JobState.QUEUED]),
            "oldest_open_delivery": rows.oldest(
                connection,
                tables.deliveries.c,
                [DeliveryState.QUEUED, DeliveryState.SENDING, DeliveryState.WAITING],
            ),
        }


@dataclass(frozen=True)
class Transfer:
    """What one association brought of one SOP Class of one study."""

    calling_ae: str
    address: str
    study_instance_uid: str
    sop_class_uid: str
    instances: int
    path: str  #: of one of them


def transfers(engine: Engine, association_id: int) -> list[Transfer]:
    """Return what an association brought and the node kept, by study and SOP Class.

    What it sent again is not in it, but in `repeats`: the row of an instance names the association
    that was first.
    """
    instance = tables.instances.c
    rows = tables.instances.join(
        tables.associations, tables.associations.c.id == instance.association_id
    )
    return _grouped(engine, rows, association_id, instance.path.is_not(None))


def repeats(engine: Engine, association_id: int) -> list[Transfer]:
    """Return what an association brought and the node held already, by study and SOP Class."""
    instance, event = tables.instances.c, tables.events.c
    # Once for each instance, however often it came; and of a UID the row that is valid.
    again = (
        select(event.reason.label("uid"))
        .where(
            event.entity == Entity.ASSOCIATION,
            event.entity_id == str(association_id),
            event.to_state.in_([tables.InstanceState.DUPLICATE, tables.InstanceState.CONFLICT]),
        )
        .distinct()
        .subquery()
    )
    rows = tables.instances.join(again, again.c.uid == instance.sop_instance_uid).join(
        tables.associations, tables.associations.c.id == association_id
    )
    kept = instance.state.in_([tables.InstanceState.RECEIVED, tables.InstanceState.IGNORED])
    return _grouped(engine, rows, association_id, kept)


def _grouped(
    engine: Engine, rows: FromClause, association_id: int, wanted: ColumnElement[bool]
) -> list[Transfer]:
    """Instances of *rows* with an association, by study and SOP Class."""
    instance, association = tables.instances.c, tables.associations.c
    groups = (
        association.calling_ae,
        association.address,
        instance.study_instance_uid,
        instance.sop_class_uid,
    )
    query = (
        select(
            *groups,
            func.count().label("instances"),
            func.coalesce(func.min(instance.path), "").label("path"),
        )
        .select_from(rows)
        .where(association.id == association_id, instance.study_instance_uid.is_not(None), wanted)
        .group_by(*groups)
        .order_by(instance.study_instance_uid, instance.sop_class_uid)
    )
    with reading(engine) as connection:
        return [Transfer(**row) for row in connection.execute(query).mappings()]


def open_associations(engine: Engine) -> list[int]:
    """Return the associations whose end is not recorded, oldest first."""
    opened = select(tables.associations.c.id).where(tables.associations.c.closed_at.is_(None))
    with reading(engine) as connection:
        return list(connection.scalars(opened.order_by(tables.associations.c.id)))
