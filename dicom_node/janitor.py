"""Tidying up: expired leases, files without a row, temporary files, a disk that is short."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

from sqlalchemy import Engine

from dicom_node import observability, purge
from dicom_node.dicom.header import instance_summary, read_header, why_ignored
from dicom_node.early_results import EarlyResults
from dicom_node.errors import UnreadableInstanceError
from dicom_node.ledger import intake, open_series, queue
from dicom_node.ledger.retention import Ages
from dicom_node.observability import get_logger
from dicom_node.purge import Purged
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool

# Of each kind in one turn, so that the receive process has its other work done in between.
_AT_ONCE = 1000

log = get_logger(__name__)


@dataclass(frozen=True)
class Recovered:
    """What `recover` found after a stop that was not clean."""

    adopted: int
    quarantined: int
    temporary: int
    purged: int = 0


def recover(engine: Engine, spool: Spool, *, stale_file_s: float, now: float) -> Recovered:
    """Repair what a killed receive process left; call once, before listening.

    A file without a row was stored: its row was never committed, or a loss of power took it. It is
    recorded as if it had just come, by the association that was left open if its series came by
    it, or quarantined when it is cut short or does not parse. Old temporary files are removed.
    Associations stay open until `StorageSCP.start` has told of them and closes them. A file whose
    removal was begun is removed.
    """
    purged = purge.finish(engine, spool, now)
    orphans = list(spool.orphans(intake.known_paths(engine)))
    adopted = sum(_adopt(engine, spool, path, now) for path in orphans)
    recovered = Recovered(
        adopted=adopted,
        quarantined=len(orphans) - adopted,
        temporary=spool.remove_temporary(older_than=now - stale_file_s),
        purged=purged,
    )
    if recovered != Recovered(0, 0, 0):
        log.warning("recovered after a stop that was not clean", **vars(recovered))
    return recovered


def sweep(engine: Engine, *, max_attempts: int, now: float) -> int:
    """Give jobs and deliveries with an expired lease back to the queue; return how many."""
    jobs = queue.expire_leases(engine, now, max_attempts=max_attempts)
    deliveries = queue.expire_delivery_leases(engine, now)
    if jobs or deliveries:
        log.warning("leases expired", jobs=jobs, deliveries=deliveries)
    return jobs + deliveries


class Janitor:
    """What a running node tidies up, a little at each turn."""

    def __init__(self, settings: NodeSettings, engine: Engine, spool: Spool) -> None:
        self._settings = settings
        self._engine = engine
        self._spool = spool
        self._early = EarlyResults(spool)
        self._next_sweep = self._next_purge = 0.0

    def turn(self, now: float) -> bool:
        """Give back expired leases and look at the disk, when it is time; whether it was."""
        if now < self._next_sweep:
            return False
        given = self._settings.janitor
        self._next_sweep = now + given.interval_s
        sweep(self._engine, max_attempts=self._settings.engine.max_attempts, now=now)
        self._early.sweep(partial(open_series.in_hand, self._engine), now - given.stale_file_s)
        self._make_room(now)
        if now >= self._next_purge:
            until = purge.ages(self._settings.retention, now)
            more = self._purge(until, now)
            # Where there was more than one turn's worth, the next follows soon.
            is_all = max(more.files.values(), default=0) < _AT_ONCE
            self._next_purge = now + (given.purge_interval_s if is_all else 0.0)
        return True

    def _make_room(self, now: float) -> None:
        """Where the disk is short, let go what has arrived everywhere, before its age."""
        try:
            space = self._spool.disk.space()
        except OSError as error:
            log.error("disk not readable", action="disk_gone", error=error.strerror)
            return
        observability.FREE_BYTES.set(space.free)
        if space.short:
            self._early.sweep(lambda _: frozenset(), now)
        if not space.short or not self._settings.retention.early:
            return
        until = purge.ages(self._settings.retention, now, early=True)
        log.warning("disk short", action="disk_short", missing_bytes=int(space.short))
        self._purge(until, now, wanted_bytes=space.short)

    def _purge(self, until: Ages, now: float, *, wanted_bytes: float | None = None) -> Purged:
        gone = purge.purge(
            self._engine, self._spool, until, now, wanted_bytes=wanted_bytes, limit=_AT_ONCE
        )
        if gone:
            kinds = {str(kind): count for kind, count in gone.files.items()}
            log.info("files removed", action="purged", bytes=gone.bytes.total(), **kinds)
        return gone


def _adopt(engine: Engine, spool: Spool, path: str, now: float) -> bool:
    try:
        instance = _received(engine, spool, path)
    except UnreadableInstanceError as error:
        reason = f"found after a stop: {error.message}"
        kept = spool.quarantine(path, reason)
        intake.reject_instance(
            engine,
            sop_instance_uid=None,
            path=kept.path,
            reason=reason,
            association_id=None,
            now=now,
        )
        return False
    intake.record_instance(engine, instance, now, spool.set_aside)
    return True


def _received(engine: Engine, spool: Spool, path: str) -> intake.ReceivedInstance:
    if not spool.secure(path):
        raise UnreadableInstanceError("its bytes are not those that were received")
    file = spool.resolve(path)
    header = read_header(file)
    summary = instance_summary(header)
    return intake.ReceivedInstance(
        **asdict(summary),
        path=path,
        # The name is the digest of the bytes: `Spool.write`.
        sha256=file.stem,
        size=file.stat().st_size,
        association_id=intake.lost_association(engine, summary.series_instance_uid),
        ignored_reason=why_ignored(header),
    )
