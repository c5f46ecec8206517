"""From the last slice of a CT to the last acknowledged restored one, and what the way costs.

    python -m benchmarks.bench_end_to_end [--slices 300] [--rate 1] [--only WORD] [--write]

A series is sent to a node at so many slices a second by one association; the node's deliveries go
to DCMTK's storescp. It is done with early restoration and without, and by a naive loop: pynetdicom,
and the same model slice by slice once the association ends. The latter two, who only begin with the
last slice, get the slices as fast as they take them. --only takes early, late, naive,
memory. The network has the form of a preset and is not trained: no time hangs on that, and its
gates are set to pass. --write puts the tables into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, func, select

from benchmarks import naive, report
from benchmarks.receivers import free_port
from benchmarks.restored_series import Series, write_bundle_of
from dicom_node.ledger import tables
from dicom_node.ledger.tables import open_ledger, reading

QUIET_S = 5.0
_TARGET_S, _OVERHEAD, _MEMORY = 1.5, 0.10, 1.1
_SIZES = (200, 2000)
_PROGRAM = (sys.executable, "-m", "dicom_node.cli.main")
Line = tuple[str, str, str, bool]


@dataclass(frozen=True)
class Run:
    """One way of one series through a node, in seconds."""

    after_last: float  # last C-STORE answered → last restored instance acknowledged
    waited: float  # last C-STORE answered → job queued: the quiet time and the assembler
    claimed: float  # job queued → claimed
    steps: dict[str, float]  # of the worker: load, restore, derive
    job: float  # job claimed → done
    delivered: float  # job done → last acknowledged
    early: int
    peak_mb: float  # of the restore process: VmHWM


def main() -> None:
    """Run what the command line asks for and print it."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--slices", type=int, default=300)
    words.add_argument("--rate", type=float, default=1.0, help="slices a second")
    words.add_argument("--size", type=int, default=512, help="rows and columns")
    # So large that every array of the shorter series lies in a mapped file too.
    words.add_argument("--memory-size", type=int, default=416)
    words.add_argument("--preset", default="tiny")
    words.add_argument("--threads", type=int, default=os.cpu_count())
    words.add_argument("--only", default="", help="early, late, naive or memory")
    words.add_argument("--folder", type=Path, help="where the node stores; default: here")
    words.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    given = words.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=given.folder or Path.cwd(), prefix=".bench-") as folder:
        pages, lines = measured(given, Path(folder))
    pages.insert(0, targets(lines))
    print("\n".join(pages), flush=True)
    if given.write:
        command = " ".join(("python -m benchmarks.bench_end_to_end", *sys.argv[1:]))
        page = Path(__file__).with_name("RESULTS.md")
        report.write(page, pages, command, load, report.END_TO_END)


def measured(given: argparse.Namespace, folder: Path) -> tuple[list[str], list[Line]]:
    """All that --only leaves, as tables and lines of targets."""
    bundle = write_bundle_of(given.preset, folder / "bundle")
    series = Series(given.slices, given.size)
    rows: list[tuple[str, Run | naive.Run]] = []
    for name, is_early in (("early", True), ("late", False)):
        if given.only in name:
            rows.append((name, through_node(given, folder / name, bundle, series, is_early)))
            print(f"{name}: {rows[-1][1]}", file=sys.stderr, flush=True)
    if given.only in "naive":
        made = naive.measure(folder, bundle, series, given.threads)
        rows.append(("naive", made))
        print(f"naive: {made}", file=sys.stderr, flush=True)
    lines = list(_lines(dict(rows)))
    pages = [_table(rows, given)] if rows else []
    if given.only in "memory":
        small = write_bundle_of("small", folder / "small")
        peaks = [memory(small, count, given.memory_size, folder) for count in _SIZES]
        pages.append(_memory_table(peaks, given.memory_size))
        few, many = (peak["anonymous"] for peak in peaks)
        resident = peaks[1]["resident"] / peaks[0]["resident"]
        lines.append(
            (
                f"memory of the restore process, {_SIZES[1]} slices against {_SIZES[0]}",
                f"≤ {_MEMORY}×",
                f"{many / few:.2f}× (resident with mapped files: {resident:.2f}×)",
                many / few <= _MEMORY,
            )
        )
    return pages, lines


def _lines(rows: dict[str, Any]) -> Generator[Line]:
    if (early := rows.get("early")) is not None:
        seconds = early.after_last - QUIET_S
        yield (
            "last slice in → last restored slice acknowledged, minus the quiet time",
            f"≤ {_TARGET_S} s",
            f"{seconds:.1f} s",
            seconds <= _TARGET_S,
        )
    if (late := rows.get("late")) is not None and (loop := rows.get("naive")) is not None:
        overhead = late.job / loop.model - 1
        yield (
            "overhead of the node's job against bare model time",
            f"≤ {_OVERHEAD:.0%}",
            f"{overhead:.0%} ({late.job:.1f} s, {loop.model:.1f} s)",
            overhead <= _OVERHEAD,
        )


def targets(lines: Sequence[Line]) -> str:
    """The table of targets."""
    head = ["### Targets", "", "| what | at least | measured | met |", "|---|---|---|---|"]
    rows = [
        f"| {what} | {wanted} | {found} | {'yes' if met else 'no'} |"
        for what, wanted, found, met in lines
    ]
    return "\n".join([*head, *rows, ""])


def _table(rows: Sequence[tuple[str, Any]], given: argparse.Namespace) -> str:
    names = {
        "early": "node, slices restored while they come",
        "late": "node, `engine.early = false`",
        "naive": "naive loop",
    }
    lines = [
        f"### {given.slices} slices of CT {given.size}×{given.size} at {given.rate:g} a second",
        "",
        f"Preset {given.preset}, {given.threads} threads, quiet time {QUIET_S:g} s. Seconds.",
        "",
        "| way | last slice in → last result acknowledged | minus quiet time | of it: job waits "
        "| load | restore and judge | derive, write | deliver | made early | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in rows:
        if isinstance(run, naive.Run):
            lines.append(
                f"| {names[name]} | {run.after_last:.1f} | – | – | {run.load:.1f} "
                f"| {run.model:.1f} | {run.derive:.1f} | {run.send:.1f} | – | – |"
            )
            continue
        waits = run.waited - QUIET_S + run.claimed
        lines.append(
            f"| {names[name]} | {run.after_last:.1f} | {run.after_last - QUIET_S:.1f} "
            f"| {waits:.1f} | {run.steps['load']:.1f} | {run.steps['restore']:.1f} "
            f"| {run.steps['derive']:.1f} | {run.delivered:.1f} | {run.early} "
            f"| {run.peak_mb:.0f} |"
        )
    return "\n".join([*lines, ""])


def _memory_table(peaks: Sequence[dict[str, float]], size: int) -> str:
    lines = [
        f"### Memory of a process that restores CT {size}×{size}",
        "",
        "The highest of samples while `restore_series` and every instance are made, by a network of"
        " the least size. Mapped files are pages that the kernel may take back.",
        "",
        "| slices | anonymous MB at start | anonymous MB | resident MB | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {int(peak['slices'])} | {peak['start'] / 1e6:.0f} | {peak['anonymous'] / 1e6:.0f} "
            f"| {peak['resident'] / 1e6:.0f} | {peak['seconds']:.0f} |"
            for peak in peaks
        ),
    ]
    return "\n".join([*lines, ""])


def memory(bundle: Path, slices: int, size: int, folder: Path) -> dict[str, float]:
    """Peak memory of a process of its own that restores a series of so many slices."""
    command = [sys.executable, "-m", "benchmarks.restored_series", str(bundle), str(slices)]
    done = subprocess.run(
        [*command, str(size), str(folder / f"memory-{slices}")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    names = ("slices", "start", "anonymous", "resident", "seconds")
    found = dict(zip(names, map(float, done.stdout.split()[-5:]), strict=True))
    print(f"memory: {found}", file=sys.stderr, flush=True)
    return found


def through_node(
    given: argparse.Namespace, folder: Path, bundle: Path, series: Series, is_early: bool
) -> Run:
    """Send a series through a node of its own and take the times from its ledger."""
    paths = series.write(folder / "sent")
    with naive.storescp(folder / "archive") as archive:
        config = _configured(folder / "node", bundle, archive.port, given.threads, is_early)
        with _served(config) as process:
            port = int(tomllib.loads(config.read_text())["node"]["port"])
            # A node that restores nothing early does nothing with a slice before the last comes.
            last = naive.send(paths, port, "DIFFCODE", given.rate if is_early else None)
            ledger = open_ledger(f"sqlite:///{config.parent / 'ledger.sqlite'}")
            try:
                times = _delivered(ledger, process)
            finally:
                ledger.dispose()
            peak = max(map(_peak, _children(process.pid)))
        log = (config.parent / "serve.log").read_text()
    judged = next(
        record
        for line in log.splitlines()
        if line.startswith("{") and (record := json.loads(line)).get("action") == "job_judged"
    )
    return Run(
        after_last=times.arrived - last,
        waited=times.created - last,
        claimed=times.claimed - times.created,
        steps=times.steps,
        job=times.done - times.claimed,
        delivered=times.arrived - times.done,
        early=judged["early"],
        peak_mb=peak / 1e6,
    )


@dataclass(frozen=True)
class _Times:
    """When the ledger says that things happened, in seconds since 1970."""

    created: float
    claimed: float
    done: float
    arrived: float
    steps: dict[str, float]


def _configured(folder: Path, bundle: Path, archive: int, threads: int, is_early: bool) -> Path:
    """A node of `dicom-node init` with a quiet time, a bundle, and gates that let all pass."""
    port = str(free_port())
    to = f"archive=ARCHIVE@127.0.0.1:{archive}"
    command = [*_PROGRAM, "init", str(folder), "--port", port, "--bundle", str(bundle), "--to", to]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = folder / "node.toml"
    text = config.read_text()
    for key, value in {
        "quiet_s": f"{QUIET_S}",
        "threads": str(threads),
        "early": str(is_early).lower(),
        "min_free_bytes": "0",
        "min_free_percent": "0",
        "on_fail": '"pass"',
        "on_warn": '"pass"',
        "uncalibrated": '"pass"',
        "actions": "{}",
        "highest": "0.99",
        "domain": '"warn"',
    }.items():
        text, found = re.subn(rf"(?m)^#?{key} = .*$", f"{key} = {value}", text, count=1)
        if not found:
            raise SystemExit(f"node.toml has no {key}")
    config.write_text(text)
    return config


@contextmanager
def _served(config: Path) -> Generator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "DICOM_NODE__LOG__FORMAT": "json"}
    log = config.parent / "serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*_PROGRAM, "serve", "-c", str(config)], stdout=stream, stderr=stream, env=environment
        )
    try:
        while b"node_ready" not in log.read_bytes():
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def _delivered(ledger: Engine, process: subprocess.Popen[bytes]) -> _Times:
    """Wait until the one job is delivered."""
    jobs, deliveries, events = tables.jobs, tables.deliveries.c, tables.events.c
    claims = select(func.min(events.at)).where(events.entity == "job", events.to_state == "running")
    while process.poll() is None:
        with reading(ledger) as connection:
            job = connection.execute(select(jobs)).first()
            arrived = connection.scalar(
                select(deliveries.finished_at).where(deliveries.state == "delivered")
            )
            if job is not None and job.state not in ("queued", "running", "done"):
                raise SystemExit(f"the job is {job.state}: {job.reason}")
            if job is not None and arrived is not None:
                claimed = connection.scalar(claims)
                assert claimed is not None
                return _Times(job.created_at, claimed, job.finished_at, arrived, job.seconds)
        time.sleep(0.25)
    raise SystemExit("the node has ended")


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def _peak(pid: int) -> int:
    """The highest resident memory of a process (VmHWM); the one that restores has the most."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
