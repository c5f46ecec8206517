"""A CT that comes, a worker that restores ahead of its job, and what both leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from sqlalchemy import delete, update

from dicom_node.early import EarlySlices
from dicom_node.kept_slices import BESIDE
from dicom_node.ledger.tables import (
    JobState,
    deliveries,
    delivery_items,
    jobs,
    outputs,
    verdicts,
    writing,
)
from dicom_node.restore_worker import RestoreWorker
from dicom_node.routing import Routes
from tests.factories import make_series
from tests.unit.dicom_node.bench import ROUTES, Bench, Gain

SLICES = 5
#: A table of routes that wants nothing.
NOTHING = """
[[route]]
name = "nothing"
task = "ignore"
match = {}
"""


def worker(node: Bench, engine: Any, routes: Routes = ROUTES) -> RestoreWorker:
    early = EarlySlices(node.settings, node.spool, node.ledger, engine, routes)
    return node.worker(engine, early=early)


def turn_until_idle(worker: RestoreWorker, node: Bench) -> int:
    turns = 0
    while worker.run_once(node.clock()):
        turns += 1
        assert turns < 200
    return turns


def ct(**options: Any) -> list[Dataset]:
    return make_series("CT", **{"slices": SLICES, "rows": 16, **options})


def early_files(node: Bench) -> list[Path]:
    """The early results; what belongs to one that is gone would count as one."""
    files = [path for path in (node.spool.root / "early").rglob("*") if path.is_file()]
    beside = [path for path in files if path.name.endswith(BESIDE)]
    return [path for path in files if path not in beside] or beside


def run_again(node: Bench, job_id: int) -> None:
    """Put a job back into the queue as if nothing had come of it; its files stay."""
    with writing(node.ledger) as connection:
        for table in (delivery_items, deliveries, outputs, verdicts):
            connection.execute(delete(table))
        connection.execute(
            update(jobs).where(jobs.c.id == job_id).values(state=JobState.QUEUED, attempts=0)
        )


def tried(node: Bench, engine: Gain, restore: RestoreWorker) -> int:
    """Let a series be calm; of how many slices it was restored and judged as a whole."""
    before = len(engine.requests)
    node.clock.advance(3.0)
    turn_until_idle(restore, node)
    made = engine.requests[before:]
    return len(made[0].array) if made else 0
