"""Reading series that are still coming: what has come of them, and whether somebody needs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from sqlalchemy import Engine, func, select

from dicom_node.ledger.tables import (
    InstanceState,
    JobState,
    SeriesState,
    instances,
    jobs,
    reading,
    series,
)


@dataclass(frozen=True)
class Arrival:
    """A received instance of an open series, as it is looked at before the series is complete."""

    id: int
    sop_instance_uid: str
    series_instance_uid: str
    path: str
    sha256: str
    size: int
    received_at: float


_COLUMNS = tuple(each.name for each in fields(Arrival))


def arrivals(
    engine: Engine, *, after: int, modality: str | None = None, limit: int = 1000
) -> list[Arrival]:
    """Return instances of open series that no job has, of later rows than *after*.

    Where a modality is named, of that alone.
    """
    columns = (instances.c[name] for name in _COLUMNS)
    query = (
        select(*columns)
        .join(series, series.c.series_instance_uid == instances.c.series_instance_uid)
        .where(
            series.c.state == SeriesState.RECEIVING,
            *(() if modality is None else (series.c.modality == modality,)),
            instances.c.state == InstanceState.RECEIVED,
            instances.c.assigned.is_(False),
            instances.c.purged_at.is_(None),
            instances.c.id > after,
        )
        .order_by(instances.c.id)
        .limit(limit)
    )
    with reading(engine) as connection:
        return [Arrival(*row) for row in connection.execute(query)]


def newest(engine: Engine) -> int:
    """Return the row of the instance that came last, of whichever series; 0 where none has."""
    with reading(engine) as connection:
        found: int | None = connection.scalar(select(func.max(instances.c.id)))
        return found or 0


def receiving(engine: Engine, series_uids: Iterable[str]) -> frozenset[str]:
    """Return those of the series that are open."""
    query = select(series.c.series_instance_uid).where(
        series.c.series_instance_uid.in_(list(series_uids)),
        series.c.state == SeriesState.RECEIVING,
    )
    with reading(engine) as connection:
        return frozenset(connection.scalars(query))


def in_hand(engine: Engine, series_uids: Iterable[str]) -> frozenset[str]:
    """Return those of the series that are open, or have a job that waits or runs."""
    wanted = list(series_uids)
    busy = select(jobs.c.series_instance_uid).where(
        jobs.c.series_instance_uid.in_(wanted),
        jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING]),
    )
    with reading(engine) as connection:
        found = frozenset(connection.scalars(busy))
    return found | receiving(engine, wanted)


def others_wait(engine: Engine, series_uid: str) -> bool:
    """Whether a job of another series is in the queue."""
    query = select(jobs.c.id).where(
        jobs.c.state == JobState.QUEUED, jobs.c.series_instance_uid != series_uid
    )
    with reading(engine) as connection:
        return connection.execute(query.limit(1)).first() is not None
