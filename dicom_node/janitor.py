"""Tidying up: expired leases, files without a row, temporary files."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import Engine

from dicom_node.dicom.header import instance_summary, read_header, why_ignored
from dicom_node.errors import UnreadableInstanceError
from dicom_node.ledger import intake, queue
from dicom_node.observability import get_logger
from dicom_node.spool import Spool

log = get_logger(__name__)


@dataclass(frozen=True)
class Recovered:
    """What `recover` found after a stop that was not clean."""

    adopted: int
    quarantined: int
    temporary: int


def recover(engine: Engine, spool: Spool, *, stale_file_s: float, now: float) -> Recovered:
    """Repair what a killed receive process left; call once, before listening.

    A file without a row was stored: its row was never committed, or a loss of power took it. It is
    recorded as if it had just come, by the association that was left open if its series came by
    it, or quarantined when it is cut short or does not parse. Old temporary files are removed.
    Associations stay open until `StorageSCP.start` has told of them and closes them.
    """
    orphans = list(spool.orphans(intake.known_paths(engine)))
    adopted = sum(_adopt(engine, spool, path, now) for path in orphans)
    recovered = Recovered(
        adopted=adopted,
        quarantined=len(orphans) - adopted,
        temporary=spool.remove_temporary(older_than=now - stale_file_s),
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
