"""Files of the spool that no row of an instance or a result names, and how they end.

Review reports go with an age of their own, once their job has ended and waits for nobody.  Of the
quarantine there may be copies for support, and what a crash left before its row was written; of the
results, what a job wrote that was killed before its rows, and then never ended well.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from dicom_node.ledger import retention
from dicom_node.ledger.retention import Ages, Kind
from dicom_node.spool import Spool

# The number of a job. A folder of another name is not ours.
_JOB = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Leftover:
    """A file, or the folder of a review report, that may go."""

    kind: Kind
    path: str
    size: int  #: bytes


def removable(engine: Engine, spool: Spool, ages: Ages) -> list[Leftover]:
    """What may go by *ages*."""
    found: list[Leftover] = []
    if (before := ages.of(Kind.REVIEW)) is not None:
        found.extend(_reviews(engine, spool, before))
    if (before := ages.of(Kind.UNNAMED)) is not None:
        found.extend(_unnamed(engine, spool, before))
    return found


def remove(engine: Engine, spool: Spool, one: Leftover, before: float) -> bool:
    """Remove it; False where it has gone, or was written anew after *before*."""
    if one.kind is Kind.UNNAMED:
        # It lets nothing go that was named within a second before that.
        return spool.remove(one.path, unless_named_after=before + 1.0)
    folder = spool.resolve(one.path)
    # The row first: what a crash leaves after it is found again by its folder.
    retention.forget_review(engine, int(folder.name))
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
        return True
    return False


def _reviews(engine: Engine, spool: Spool, before: float) -> Iterator[Leftover]:
    """The folders whose jobs have ended by *before*, or are of no ledger and as old."""
    found = {
        int(folder.name): folder
        for folder in (spool.root / "review").iterdir()
        if _JOB.fullmatch(folder.name)
    }
    in_use = retention.reviews_in_use(engine, found, before)
    for job_id in sorted(found.keys() - in_use):
        folder = found[job_id]
        # A job that is tried again writes its report before the ledger hears of its end.
        with suppress(FileNotFoundError):
            if folder.stat().st_mtime <= before:
                yield Leftover(Kind.REVIEW, f"review/{job_id}", _size(folder))


def _unnamed(engine: Engine, spool: Spool, before: float) -> Iterator[Leftover]:
    yield from _old(spool, spool.files("quarantine"), retention.quarantined(engine), before)
    # A job names its results when all of them are there: none of one that has yet to end is old.
    since = retention.unfinished_since(engine)
    oldest = before if since is None else min(before, since)
    yield from _old(spool, spool.files("outgoing"), retention.kept_results(engine), oldest)


def _old(
    spool: Spool, paths: Iterable[str], named: Container[str], before: float
) -> Iterator[Leftover]:
    for path in paths:
        if path in named:
            continue
        with suppress(FileNotFoundError):
            status = spool.resolve(path).stat()
            # Naming a file changes its status: since then it lies here.
            if status.st_ctime <= before:
                yield Leftover(Kind.UNNAMED, path, status.st_size)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
