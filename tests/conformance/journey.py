"""What becomes of files that the node receives, without network and ledger.

The way is the node's own: the header is read and judged as at C-STORE, the series divided and
routed as by the assembler, each job restored and derived as by the worker.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.dicom.derived import DerivedInstance
from dicom_node.dicom.header import instance_summary, read_header, why_ignored
from dicom_node.errors import PermanentError, RefusedError, UnreadableInstanceError
from dicom_node.inference import Engine
from dicom_node.ledger.queue import NewJob
from dicom_node.ledger.tables import JobState
from dicom_node.planning import plan
from dicom_node.restoring import restore_series
from dicom_node.routing import Titles, parse_routes
from dicom_node.settings import NodeSettings

ROUTES = parse_routes(tomllib.loads(DEFAULT_ROUTES), ["pacs"])
CREATED = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@dataclass(frozen=True)
class Outcome:
    """What became of one volume, or of files that no job came from."""

    state: str  # derived, ignored, rejected, held, refused or failed
    said: str  # the reason, or what the restored series is warned of
    sources: tuple[Path, ...]
    made: tuple[DerivedInstance, ...] = ()


def go_through(
    paths: Iterable[Path], engine: Engine, settings: NodeSettings | None = None
) -> list[Outcome]:
    """Every outcome, in an order that depends on nothing but names and contents."""
    settings = settings or NodeSettings()
    series: dict[str, dict[str, Path]] = {}
    left: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(paths):
        state, said = _arrival(path, series)
        if state:
            left.setdefault((state, said), []).append(path)
    outcomes = [Outcome(state, said, tuple(files)) for (state, said), files in left.items()]
    for members in series.values():
        outcomes += _restored(members, engine, settings)
    return outcomes


def _arrival(path: Path, series: dict[str, dict[str, Path]]) -> tuple[str, str]:
    """Put an instance to its series; or what is done instead, and why."""
    try:
        header = read_header(path, whole=True)
        summary = instance_summary(header)
    except UnreadableInstanceError as error:
        return "rejected", error.message
    if ignored := why_ignored(header):
        return "ignored", ignored
    known = series.setdefault(summary.series_instance_uid, {})
    if summary.sop_instance_uid in known:
        return "ignored", "a duplicate"
    known[summary.sop_instance_uid] = path
    return "", ""


def _restored(
    members: Mapping[str, Path], engine: Engine, settings: NodeSettings
) -> Iterator[Outcome]:
    headers = {uid: read_header(path) for uid, path in members.items()}
    decided = plan(Titles(), headers, routes=ROUTES, policy=settings.policy)
    if not decided.jobs:
        yield Outcome("ignored", decided.reason or "", tuple(members.values()))
    for job in decided.jobs:
        paths = [members[uid] for uid in job.instance_uids]
        if job.state is JobState.QUEUED:
            yield _worked(job, paths, engine, settings)
        else:
            yield Outcome(str(job.state), job.reason or "", tuple(paths))


def _worked(job: NewJob, paths: Sequence[Path], engine: Engine, settings: NodeSettings) -> Outcome:
    try:
        done = restore_series(paths, job.task, engine, settings, created=CREATED, note=job.reason)
        made = tuple(done.instances)
    except RefusedError as error:
        return Outcome("refused", error.message, tuple(paths))
    except PermanentError as error:
        return Outcome("failed", error.message, tuple(paths))
    return Outcome("derived", "; ".join(done.warnings), tuple(paths), made)
