"""What may leave the spool: decided and noted by rows alone, before any file is touched.

A file goes in two steps. First its row is marked in one transaction, in which every condition
still holds; then the file is removed. A crash between leaves a file whose row says that it is gone,
which `marked` finds at the next start.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    Table,
    and_,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)

from dicom_node.ledger import custody
from dicom_node.ledger.tables import (
    InstanceState,
    JobState,
    SeriesState,
    deliveries,
    instances,
    job_instances,
    jobs,
    judgements,
    outputs,
    reading,
    series,
    writing,
)

_SET_ASIDE = (InstanceState.CONFLICT, InstanceState.REJECTED)
_QUARANTINE = "quarantine/"
_OPEN_JOBS = (JobState.QUEUED, JobState.RUNNING, JobState.HELD)
# SQLite binds 32,766 values at most.
_CHUNK = 1000


class Kind(enum.StrEnum):
    """What a file is, and so which age counts."""

    ORIGINAL = "original"  #: received, restored, and every delivery of it has arrived
    RESULT = "result"  #: restored, and every delivery of it has arrived
    UNRESTORED = "unrestored"  #: received, and nothing was made of it
    DISCARDED = "discarded"  #: restored, and held back for good by a gate or a person
    QUARANTINED = "quarantined"  #: set aside: it did not parse or contradicts another
    REVIEW = "review"  #: the report on a result; no row of its own, see `dicom_node.leftovers`
    UNNAMED = "unnamed"  #: in the quarantine or among the results, and no row names it


_OF_ROWS = tuple(kind for kind in Kind if kind not in (Kind.REVIEW, Kind.UNNAMED))


@dataclass(frozen=True)
class Ages:
    """The latest moment (seconds since 1970 UTC) for each kind to be let go; None: never."""

    delivered: float | None
    unrestored: float | None
    quarantined: float | None
    reviewed: float | None = None

    def of(self, kind: Kind) -> float | None:
        """The moment for one kind; what was delivered goes together with what was made of it."""
        if kind in (Kind.UNRESTORED, Kind.DISCARDED):
            return self.unrestored
        if kind in (Kind.QUARANTINED, Kind.UNNAMED):
            return self.quarantined
        return self.reviewed if kind is Kind.REVIEW else self.delivered


@dataclass(frozen=True)
class Removable:
    """A file of the spool that may go."""

    kind: Kind
    id: int
    path: str
    size: int  #: bytes; 0 where it is not known


def removable(engine: Engine, ages: Ages, *, limit: int | None = None) -> list[Removable]:
    """What may go by *ages*, oldest first within its kind, at most *limit* of each kind."""
    with reading(engine) as connection:
        return [
            Removable(kind, row.id, row.path, row.size or 0)
            for kind in _OF_ROWS
            if (before := ages.of(kind)) is not None
            for row in connection.execute(_candidates(kind, before).limit(limit))
        ]


def mark(engine: Engine, chosen: Sequence[Removable], ages: Ages, now: float) -> list[Removable]:
    """Note in the ledger that files are gone; those of *chosen* for which it is still allowed.

    A file that another row names as well is not among them: its row alone is marked.
    """
    marked: list[Removable] = []
    with writing(engine) as connection:
        for kind in _OF_ROWS:
            before = ages.of(kind)
            of_kind = {one.id: one for one in chosen if one.kind is kind}
            if before is None or not of_kind:
                continue
            ids = _mark(connection, kind, before, list(of_kind), now)
            marked.extend(of_kind[one] for one in ids)
        shared = _named_elsewhere(connection, [one.path for one in marked])
    return [one for one in marked if one.path not in shared]


def marked(engine: Engine, paths: Iterable[str]) -> dict[str, float]:
    """Those of the paths that the ledger says are gone, and since when."""
    wanted = list(paths)
    found: dict[str, float] = {}
    with reading(engine) as connection:
        for at in range(0, len(wanted), _CHUNK):
            some = wanted[at : at + _CHUNK]
            for table in (instances, outputs):
                gone = select(table.c.path, func.max(table.c.purged_at)).where(
                    table.c.path.in_(some), table.c.purged_at.is_not(None)
                )
                rows = connection.execute(gone.group_by(table.c.path))
                found.update((row[0], row[1]) for row in rows)
        kept = _named_elsewhere(connection, list(found))
    return {path: since for path, since in found.items() if path not in kept}


def keep(engine: Engine, path: str, now: float) -> None:
    """Take back the mark of a received file: it has come again, and its age begins anew."""
    with writing(engine) as connection:
        connection.execute(
            update(instances)
            .where(instances.c.path == path, instances.c.purged_at.is_not(None))
            .values(purged_at=None, received_at=now)
        )


def kept_results(engine: Engine) -> set[str]:
    """Every path under outgoing/ that a row names and that is not gone."""
    with reading(engine) as connection:
        return set(connection.scalars(select(outputs.c.path).where(outputs.c.purged_at.is_(None))))


def unfinished_since(engine: Engine) -> float | None:
    """When the oldest job was made that is queued or runs; None without one."""
    unfinished = jobs.c.state.in_((JobState.QUEUED, JobState.RUNNING))
    with reading(engine) as connection:
        found: float | None = connection.scalar(
            select(func.min(jobs.c.created_at)).where(unfinished)
        )
    return found


def quarantined(engine: Engine) -> set[str]:
    """Every path under quarantine/ that a row names and that is not gone."""
    with reading(engine) as connection:
        return set(connection.scalars(_quarantined()))


def reviews_in_use(engine: Engine, job_ids: Iterable[int], before: float) -> set[int]:
    """Those of the jobs whose review reports stay: not ended by *before*, or held for a person."""
    wanted = list(job_ids)
    in_use = or_(jobs.c.finished_at.is_(None), jobs.c.finished_at > before)
    found: set[int] = set()
    with reading(engine) as connection:
        for at in range(0, len(wanted), _CHUNK):
            query = select(jobs.c.id).where(
                jobs.c.id.in_(wanted[at : at + _CHUNK]), or_(jobs.c.state.in_(_OPEN_JOBS), in_use)
            )
            found.update(connection.scalars(query))
    return found


def forget_review(engine: Engine, job_id: int) -> None:
    """Note that the review report of a job has left the spool."""
    with writing(engine) as connection:
        connection.execute(
            update(judgements).where(judgements.c.job_id == job_id).values(review=None)
        )


def kept_bytes(connection: Connection) -> int:
    """How many bytes of files the spool should hold."""
    total = 0
    for table in (instances, outputs):
        size = select(func.sum(table.c.size)).where(table.c.purged_at.is_(None))
        # PostgreSQL sums to a decimal, which is no number in JSON.
        total += int(connection.scalar(size) or 0)
    return total


def _candidates(kind: Kind, before: float) -> Select[tuple[int, str, int | None]]:
    table = _table(kind)
    chosen = select(table.c.id, table.c.path, table.c.size)
    if kind is Kind.ORIGINAL:
        # First, for SQLite looks at conditions in the order in which they stand.
        chosen = chosen.where(instances.c.series_instance_uid.in_(_ripe_series(before)))
    chosen = chosen.where(_may_go(kind, before))
    # As the indexes of what is kept have it, so that a limit ends the search.
    oldest = outputs.c.job_id if table is outputs else instances.c.received_at
    return chosen.order_by(oldest)


def _table(kind: Kind) -> Table:
    return outputs if kind in (Kind.RESULT, Kind.DISCARDED) else instances


def _mark(
    connection: Connection, kind: Kind, before: float, ids: Sequence[int], now: float
) -> list[int]:
    table = _table(kind)
    done: list[int] = []
    for at in range(0, len(ids), _CHUNK):
        gone = (
            update(table)
            .where(table.c.id.in_(ids[at : at + _CHUNK]), _may_go(kind, before))
            .values(purged_at=now)
            .returning(table.c.id)
        )
        done.extend(connection.scalars(gone))
    return done


def _named_elsewhere(connection: Connection, paths: Iterable[str]) -> set[str]:
    """Those of the paths that a row names which is not gone.

    Only in the quarantine have two rows one file: a valid SOP Instance has one row, and a result
    too.
    """
    wanted = {path for path in paths if path.startswith(_QUARANTINE)}
    return wanted & set(connection.scalars(_quarantined())) if wanted else set()


def _quarantined() -> Select[tuple[str]]:
    return select(instances.c.path).where(
        instances.c.state.in_(_SET_ASIDE),
        instances.c.purged_at.is_(None),
        instances.c.path.startswith(_QUARANTINE),
    )


def _may_go(kind: Kind, before: float) -> ColumnElement[bool]:
    return {
        Kind.ORIGINAL: _restored_and_arrived,
        Kind.RESULT: _result_has_arrived,
        Kind.UNRESTORED: _nothing_comes_of_it,
        Kind.DISCARDED: _result_is_held_back,
        Kind.QUARANTINED: _set_aside,
    }[kind](before)


def _restored_and_arrived(before: float) -> ColumnElement[bool]:
    """A received instance: restored, no job of it open, all that was made of it has arrived."""
    return and_(
        instances.c.state == InstanceState.RECEIVED,
        instances.c.received_at <= before,
        instances.c.purged_at.is_(None),
        instances.c.path.is_not(None),
        _has_job(jobs.c.state == JobState.DONE, _delivery_of(jobs.c.id)),
        ~_has_job(jobs.c.state.in_(_OPEN_JOBS)),
        ~_has_job(_delivery_of(jobs.c.id, _too_young(before))),
        custody.may_purge(),
    )


def _result_has_arrived(before: float) -> ColumnElement[bool]:
    return and_(outputs.c.purged_at.is_(None), outputs.c.job_id.in_(_ripe_jobs(before)))


def _ripe_jobs(before: float) -> Select[tuple[int]]:
    """The jobs with a result in the spool that has arrived everywhere, long enough ago."""
    return select(jobs.c.id).where(jobs.c.id.in_(_kept_jobs()), _has_arrived(before))


def _kept_jobs() -> Select[tuple[int]]:
    # What is in the spool is little beside what the ledger remembers: from here, not from jobs.
    return select(outputs.c.job_id).where(outputs.c.purged_at.is_(None)).distinct()


def _ripe_series(before: float) -> Select[tuple[str]]:
    """The series with an original in the spool and a job whose result has arrived everywhere.

    What is needed for one original to go, asked once for a series: of hundreds of originals each
    answer is the same.
    """
    kept = select(instances.c.series_instance_uid).where(
        instances.c.state == InstanceState.RECEIVED,
        instances.c.received_at <= before,
        instances.c.purged_at.is_(None),
    )
    return select(jobs.c.series_instance_uid).where(
        jobs.c.series_instance_uid.in_(kept.distinct()), _has_arrived(before)
    )


def _has_arrived(before: float) -> ColumnElement[bool]:
    """Condition on a row of `jobs`."""
    return and_(
        jobs.c.state == JobState.DONE,
        _delivery_of(jobs.c.id),
        ~_delivery_of(jobs.c.id, or_(~custody.arrived(), _too_young(before))),
    )


def _result_is_held_back(before: float) -> ColumnElement[bool]:
    discarded = select(jobs.c.id).where(
        jobs.c.id.in_(_kept_jobs()),
        jobs.c.state.in_((JobState.REFUSED, JobState.REJECTED, JobState.CANCELLED)),
        jobs.c.finished_at <= before,
        ~_delivery_of(jobs.c.id),
    )
    return and_(outputs.c.purged_at.is_(None), outputs.c.job_id.in_(discarded))


def _nothing_comes_of_it(before: float) -> ColumnElement[bool]:
    """An instance of a closed series, ignored, or all of whose jobs ended without a result."""
    return and_(
        instances.c.state.in_((InstanceState.RECEIVED, InstanceState.IGNORED)),
        instances.c.received_at <= before,
        instances.c.purged_at.is_(None),
        instances.c.path.is_not(None),
        ~exists().where(
            series.c.series_instance_uid == instances.c.series_instance_uid,
            series.c.state == SeriesState.RECEIVING,
        ),
        ~_has_job(or_(jobs.c.state.in_((*_OPEN_JOBS, JobState.DONE)), jobs.c.finished_at > before)),
        custody.may_purge(),
    )


def _set_aside(before: float) -> ColumnElement[bool]:
    return and_(
        instances.c.state.in_(_SET_ASIDE),
        instances.c.received_at <= before,
        instances.c.purged_at.is_(None),
        instances.c.path.startswith(_QUARANTINE),
    )


def _has_job(*conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists().where(
        job_instances.c.instance_id == instances.c.id,
        jobs.c.id == job_instances.c.job_id,
        *conditions,
    )


def _delivery_of(
    job_id: ColumnElement[int], condition: ColumnElement[bool] | None = None
) -> ColumnElement[bool]:
    """Whether a job has a delivery (for which the condition holds)."""
    wanted = literal(True) if condition is None else condition
    return exists().where(deliveries.c.job_id == job_id, wanted)


def _too_young(before: float) -> ColumnElement[bool]:
    return or_(deliveries.c.finished_at.is_(None), deliveries.c.finished_at > before)
