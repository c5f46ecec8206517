"""Run the main job: `make run`, or `make run SERIES=path` for a folder of DICOM files."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
from rich.console import Console

from examples.main_job import report
from examples.main_job.node import AE_TITLE, Node, NodeCommandError, open_node
from examples.main_job.peers import Archive, SendError, open_archive, send
from examples.main_job.series import Source, make_phantoms, read_folder
from examples.main_job.watch import Outcome, wait

# What a run leaves in its folder, and the next run clears.
_PARTS = ("archive", "node", "sent", "fetched", "pictures")


@dataclass(frozen=True)
class Run:
    """What one run is asked to do."""

    console: Console
    folder: Path | None
    out: Path
    bundle: str | None
    own_archive: bool
    timeout_s: float
    quick: bool
    gates: str | None
    ended: threading.Event

    def check(self) -> None:
        """Raise SystemExit if this program has been told to end."""
        if self.ended.is_set():
            sys.exit(128 + signal.SIGTERM)


def _listen_to_sigterm() -> threading.Event:
    """End by SystemExit, so that the programs around us end with this one."""
    ended = threading.Event()

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        # An exception that falls into a fork hook or a finalizer is lost; the flag is not.
        ended.set()
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, end)
    return ended


@click.command()
@click.option(
    "--series",
    "folder",
    type=click.Path(exists=True, path_type=Path),
    help="A DICOM file or folder to restore in place of the phantoms.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/main_job"),
    show_default=True,
    help="Where pictures, logs, spool and ledger of this run are left to look at.",
)
@click.option("--bundle", help="A model bundle other than the one that is shipped.")
@click.option("--own-archive", is_flag=True, help="Deliver to our own storage SCP, not Orthanc.")
@click.option("--timeout", type=float, default=1800.0, show_default=True, help="Seconds.")
@click.option("--quick", is_flag=True, help="Phantoms of a few slices.")
@click.option(
    "--gates",
    type=click.Choice(["hold", "warn"]),
    help="What a failed gate leads to.  [default: warn for phantoms, else hold]",
)
def main(
    folder: Path | None,
    out: Path,
    bundle: str | None,
    own_archive: bool,
    timeout: float,
    quick: bool,
    gates: str | None,
) -> None:
    """Send series through the node into an archive and show what came out."""
    ended = _listen_to_sigterm()
    console = Console(width=None if sys.stdout.isatty() else 100)
    run = Run(console, folder, out, bundle, own_archive, timeout, quick, gates, ended)
    try:
        arrived = _run(run)
    except (NodeCommandError, SendError, RuntimeError, TimeoutError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0 if arrived else 1)


def _run(run: Run) -> bool:
    """Do the whole job; True when everything that could be restored has arrived."""
    _clear(run.out)
    sources = _sources(run)
    with open_archive(run.out / "archive", own=run.own_archive) as archive:
        run.console.print(f"Archive: {archive.name}, {archive.ae_title} on port {archive.port}")
        outcomes = _restore(run, sources, archive)
        ended = zip(sources, outcomes, strict=True)
        rows = [row for source, outcome in ended for row in _rows(run, archive, source, outcome)]
    run.console.print(report.table(rows, archive.name))
    for words in _reasons(run, sources, outcomes):
        run.console.print(words, markup=False, highlight=False)
    if any((run.out / "pictures").iterdir()):
        run.console.print(f"Before, after and difference: {run.out / 'pictures'}/*.png")
    return _well(outcomes)


def _clear(out: Path) -> None:
    for part in _PARTS:
        shutil.rmtree(out / part, ignore_errors=True)
    (out / "pictures").mkdir(parents=True)


def _sources(run: Run) -> tuple[Source, ...]:
    if run.folder is not None:
        return read_folder(run.folder)
    with run.console.status("Making a chest CT, a brain MR and a body PET, and degrading them"):
        return make_phantoms(run.out / "sent", quick=run.quick)


def _restore(run: Run, sources: Sequence[Source], archive: Archive) -> tuple[Outcome, ...]:
    # Phantoms are drawn: a gate may well find them unlike patients.
    gates = run.gates or ("warn" if run.folder is None else "hold")
    with open_node(run.out / "node", archive, run.bundle, gates=gates) as node:
        run.console.print(f"Node: {AE_TITLE} on port {node.port}")
        _send(run, sources, node)
        labels = {source.series_instance_uid: source.label for source in sources}
        return wait(node, labels, run.console, run.timeout_s, run.check)


def _send(run: Run, sources: Sequence[Source], node: Node) -> None:
    for source in sources:
        run.check()
        sender = send(source.files, ae_title=AE_TITLE, port=node.port)
        run.console.print(f"Sent {source.label}: {len(source.files)} instances by {sender}")


def _rows(
    run: Run, archive: Archive, source: Source, outcome: Outcome
) -> Iterator[tuple[str, ...]]:
    """One line of the table per job of a series, and one picture per job that arrived."""
    if not outcome.jobs:
        yield report.unrestored(source.label, outcome.state)
    for job in outcome.jobs:
        if not outcome.arrived:
            yield report.unrestored(source.label, str(job["state"]), job)
            continue
        uid = str(job["derived_series_instance_uid"])
        restored = report.collect(source, job, archive.fetch(uid, run.out / "fetched" / uid))
        report.draw(restored, run.out / "pictures" / f"{restored.task}-{job['id']}.png")
        yield report.row(restored)


def _reasons(run: Run, sources: Sequence[Source], outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A sentence for each job that has nothing in the archive: a column would be too narrow."""
    for source, outcome in zip(sources, outcomes, strict=True):
        for job in () if outcome.arrived else outcome.jobs:
            if job["state"] != "done":
                yield report.why(source.label, job, run.out / "node")


def _well(outcomes: Sequence[Outcome]) -> bool:
    """Whether something was restored, and nothing that should have been was lost."""
    lost = [job for outcome in outcomes for job in outcome.jobs if job["state"] == "failed"]
    undelivered = [outcome for outcome in outcomes if outcome.undelivered]
    return any(outcome.arrived for outcome in outcomes) and not lost and not undelivered


if __name__ == "__main__":
    main()
