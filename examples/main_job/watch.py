"""Waiting, visibly, until every series has arrived or the node has said why not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from examples.main_job.node import Node

Row = Mapping[str, Any]

# One bar per series, one step per hand-over.
STEPS = ("receiving", "queued", "running", "delivering", "acknowledged")
_JOB_STEP = {"queued": 1, "running": 2, "held": 2, "done": 3}
_ENDED_WELL = frozenset({"delivered", "committed"})


@dataclass(frozen=True)
class Outcome:
    """What became of one series: its jobs, or the reason why it has none."""

    series_instance_uid: str
    jobs: tuple[Row, ...] = ()
    reason: str | None = None
    ended: bool = False
    step: int = 0

    @property
    def arrived(self) -> bool:
        """True when the restored instances of every job are in the archive."""
        return bool(self.jobs) and all(_job_arrived(job) for job in self.jobs)

    @property
    def undelivered(self) -> bool:
        """True when something was restored and a destination did not take it."""
        return any(job["state"] == "done" and not _job_arrived(job) for job in self.jobs)

    @property
    def state(self) -> str:
        """One word or sentence for a person."""
        if self.reason:
            return self.reason
        return STEPS[self.step]


def wait(
    node: Node,
    series: Mapping[str, str],
    console: Console,
    timeout_s: float,
    check: Callable[[], None],
) -> tuple[Outcome, ...]:
    """Watch the ledger until each of *series* (UID to label) has ended; TimeoutError if not.

    *check* is called at every look and may raise to end the wait.
    """
    deadline = time.monotonic() + timeout_s
    with _progress(console) as progress:
        bars = {uid: progress.add_task(name, total=4, at="") for uid, name in series.items()}
        while True:
            outcomes = look(node, tuple(series))
            for outcome in outcomes:
                bar = bars[outcome.series_instance_uid]
                progress.update(bar, completed=outcome.step, at=outcome.state)
            if all(outcome.ended for outcome in outcomes):
                return outcomes
            _check_time(outcomes, deadline)
            node.check()
            check()
            time.sleep(0.5)


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[at]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def _check_time(outcomes: Iterable[Outcome], deadline: float) -> None:
    if time.monotonic() > deadline:
        late = [outcome.series_instance_uid for outcome in outcomes if not outcome.ended]
        raise TimeoutError(f"not finished in time: series {', '.join(late)}")


def look(node: Node, series: Sequence[str]) -> tuple[Outcome, ...]:
    """The outcome of each series by now."""
    jobs, rows = node.rows("jobs"), node.rows("series")
    known = {str(row["series_instance_uid"]): row for row in rows}
    return tuple(outcome(uid, known.get(uid), jobs) for uid in series)


def outcome(uid: str, series: Row | None, jobs: Iterable[Row]) -> Outcome:
    """The outcome of one series from its row and the job rows of the ledger."""
    own = tuple(job for job in jobs if job["series_instance_uid"] == uid)
    if own:
        step = min(_job_step(job) for job in own)
        reasons = [str(job["reason"]) for job in own if job["reason"] and job["state"] != "done"]
        return Outcome(uid, own, "; ".join(reasons) or None, all(map(_job_ended, own)), step)
    if series is not None and series["state"] == "ignored":
        return Outcome(uid, reason=f"ignored: {series['reason']}", ended=True, step=4)
    return Outcome(uid)


def _job_ended(job: Row) -> bool:
    if job["state"] in {"queued", "running"}:
        return False
    return all(row["state"] in _ENDED_WELL | {"dead"} for row in job["deliveries"])


def _job_arrived(job: Row) -> bool:
    deliveries = job["deliveries"]
    return bool(deliveries) and all(row["state"] in _ENDED_WELL for row in deliveries)


def _job_step(job: Row) -> int:
    return 4 if _job_arrived(job) else _JOB_STEP.get(str(job["state"]), 4)
