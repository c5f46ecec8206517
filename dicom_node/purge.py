"""Files that leave the spool: by their age, or early where the disk is short.

The ledger decides what may go (`ledger.retention`); what has not arrived at every destination, or
is promised to somebody, never does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Engine

from dicom_node import leftovers
from dicom_node.ledger import intake, retention
from dicom_node.ledger.retention import Ages, Kind, Removable
from dicom_node.leftovers import Leftover
from dicom_node.settings import RetentionSettings
from dicom_node.spool import Spool

# So many rows in one transaction: others write between two of them.
_BATCH = 200

Progress = Callable[[int, int], None]


@dataclass
class Purged:
    """What has left the spool, or would: files and bytes by kind."""

    files: Counter[Kind] = field(default_factory=Counter)
    bytes: Counter[Kind] = field(default_factory=Counter)

    def add(self, removed: Sequence[Removable | Leftover]) -> None:
        """Count files."""
        for one in removed:
            self.files[one.kind] += 1
            self.bytes[one.kind] += one.size

    def __bool__(self) -> bool:
        return bool(self.files)


def ages(settings: RetentionSettings, now: float, *, early: bool = False) -> Ages:
    """Up to when each kind goes; *early*: what has been delivered goes whatever its age."""

    def until(age_s: float | None) -> float | None:
        return None if age_s is None else now - age_s

    return Ages(
        delivered=now if early else until(settings.delivered_s),
        unrestored=until(settings.unrestored_s),
        quarantined=until(settings.quarantine_s),
        reviewed=until(settings.review_s),
    )


def preview(engine: Engine, spool: Spool, until: Ages) -> Purged:
    """What `purge` would remove."""
    found = Purged()
    found.add(retention.removable(engine, until))
    found.add(leftovers.removable(engine, spool, until))
    return found


def purge(
    engine: Engine,
    spool: Spool,
    until: Ages,
    now: float,
    *,
    wanted_bytes: float | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Purged:
    """Remove what may go by *until*: row first, then the file; with nothing half done.

    Args:
        engine: The ledger.
        spool: The files.
        until: The latest moment for each kind.
        now: Seconds since 1970 UTC.
        wanted_bytes: Stop once so much is free, and leave what no row names; None: all that may go.
        limit: At most so many files of each kind.
        progress: Called with (done, total) files.
    """
    purged = Purged()
    chosen = retention.removable(engine, until, limit=limit)
    for at in range(0, len(chosen), _BATCH):
        if wanted_bytes is not None and purged.bytes.total() >= wanted_bytes:
            break
        removed = retention.mark(engine, chosen[at : at + _BATCH], until, now)
        purged.add([one for one in removed if spool.remove(one.path, unless_named_after=now)])
        if progress is not None:
            progress(min(at + _BATCH, len(chosen)), len(chosen))
    if wanted_bytes is None:
        _purge_leftovers(engine, spool, until, purged, limit)
    return purged


def _purge_leftovers(
    engine: Engine, spool: Spool, until: Ages, purged: Purged, limit: int | None
) -> None:
    for one in leftovers.removable(engine, spool, until)[:limit]:
        before = until.of(one.kind)
        if before is not None and leftovers.remove(engine, spool, one, before):
            purged.add([one])


def finish(engine: Engine, spool: Spool, now: float) -> int:
    """Remove the files whose rows say that they are gone, left by a crash; how many.

    One that was stored again after its row was marked is kept, as an instance that has come anew.
    """
    received, made = intake.known_paths(engine), retention.kept_results(engine)
    # A file that no row names belongs to nobody yet, or to a job that has not ended.
    suspects = [
        *spool.orphans(received),
        *(path for path in spool.files("quarantine") if path not in received),
        *(path for path in spool.files("outgoing") if path not in made),
    ]
    removed = 0
    for path, since in retention.marked(engine, suspects).items():
        if spool.remove(path, unless_named_after=since):
            removed += 1
        else:
            retention.keep(engine, path, now)
    return removed
