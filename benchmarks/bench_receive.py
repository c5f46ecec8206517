"""C-STORE receivers side by side: rates, CPU, latency and memory of one run.

    python -m benchmarks.bench_receive [--quick] [--only WORD] [--write]

The repetitions of one scenario go round the receivers, so that a machine that is busy for a while
is busy for all; a ratio is the median of the ratios within a repetition.  --write puts the tables
into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import echo, receivers, report, targets
from benchmarks.images import KINDS, instances
from benchmarks.receivers import DCMTK, Receiver, Running


@dataclass(frozen=True)
class Scenario:
    """One table: a sender, what it sends, and to whom; the first two receivers are compared."""

    title: str
    kind: str
    rows: tuple[Receiver, ...]
    count: int
    associations: int = 1
    storescu: bool = False
    no_delay: bool = True


@dataclass
class Sample:
    """One receiver in one repetition."""

    rate: float
    megabytes: float
    cpu_ms: float
    latencies_ms: list[float] = field(default_factory=list)


Samples = dict[str, list[Sample]]

_PEERS = (receivers.STORESCP_ND, receivers.ORTHANC_ND, receivers.PYNETDICOM)
_FORKED = (receivers.STORESCP_FORK, receivers.ORTHANC_ND, receivers.PYNETDICOM)
_BOTH = (receivers.NODE, receivers.NODE_STOCK)

_PLAIN = Scenario(
    targets.PLAIN,
    "CT 512×512",
    (
        receivers.NODE,
        receivers.STORESCP,
        receivers.ORTHANC_PLAIN,
        receivers.PYNETDICOM,
        receivers.DISCARD,
        receivers.DURABLE,
    ),
    120,
    storescu=True,
    no_delay=False,
)
_ONE = Scenario(
    targets.ONE,
    "CT 512×512",
    (*_BOTH, *_PEERS, receivers.DISCARD, receivers.DURABLE),
    250,
    storescu=True,
)
_FOUR = Scenario(
    targets.FOUR,
    "CT 512×512",
    (*_BOTH, *_FORKED, receivers.DISCARD, receivers.DURABLE),
    80,
    associations=4,
    storescu=True,
)

SCENARIOS = (
    _PLAIN,
    _ONE,
    _FOUR,
    Scenario(
        "own sender, TCP_NODELAY, 1 association",
        "CT 512×512",
        (*_BOTH, *_PEERS, receivers.DISCARD, receivers.DURABLE, receivers.LIMIT),
        250,
    ),
    Scenario(
        "own sender, TCP_NODELAY, 4 associations at once",
        "CT 512×512",
        (*_BOTH, *_FORKED, receivers.DISCARD, receivers.DURABLE, receivers.LIMIT),
        80,
        associations=4,
    ),
    *(
        Scenario(
            "own sender, TCP_NODELAY, 1 association",
            kind,
            (receivers.NODE, *_PEERS, receivers.LIMIT),
            150,
        )
        for kind in ("PET 192×192", "MR 256×256", "CT JPEG-LS", "MR RLE")
    ),
)

_LEFT_OUT_WHEN_QUICK = ("MR 256×256", "MR RLE")


def main() -> None:
    """Run what the command line asks for and print it."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--quick", action="store_true", help="fewer instances and repetitions")
    words.add_argument("--only", default="", help="scenarios whose title or kind has this word")
    words.add_argument("--repetitions", type=int, help="default 5, with --quick 2")
    words.add_argument("--folder", type=Path, help="where the receivers store; default: here")
    words.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    given = words.parse_args()
    load = os.getloadavg()[0]
    repetitions = given.repetitions or (2 if given.quick else 5)
    with tempfile.TemporaryDirectory(dir=given.folder or Path.cwd(), prefix=".bench-") as folder:
        tables: list[str] = []
        lines: list[targets.Line] = []
        for scenario in SCENARIOS:
            if given.only not in f"{scenario.title} {scenario.kind}":
                continue
            if given.quick and not given.only and scenario.kind in _LEFT_OUT_WHEN_QUICK:
                continue
            table, reached = measure(scenario, Path(folder), repetitions, quick=given.quick)
            print(table, flush=True)
            tables.append(table)
            lines += reached
        if given.only in "memory":
            table, reached = memory(Path(folder), slices=300 if given.quick else 2000)
            print(table, flush=True)
            tables.append(table)
            lines += reached
        if given.only in "echo":
            heard = echo.measure(Path(folder))
            tables.append(echo.table(heard))
            print(tables[-1], flush=True)
            lines.append(targets.echo(heard.silent, heard.own))
        tables.insert(0, targets.table(lines))
        print(tables[0], flush=True)
    if given.write:
        command = " ".join(("python -m benchmarks.bench_receive", *sys.argv[1:]))
        report.write(Path(__file__).with_name("RESULTS.md"), tables, command, load, report.RECEIVE)


def measure(
    scenario: Scenario, folder: Path, repetitions: int, *, quick: bool
) -> tuple[str, list[targets.Line]]:
    """The table of one scenario, in Markdown, and what it says of the targets."""
    count = max(10, scenario.count // (3 if quick else 1))
    samples: Samples = {row.name: [] for row in scenario.rows}
    with receivers.running(list(scenario.rows), folder) as started:
        for running in started:
            _once(scenario, running, folder, 5)  # what is loaded or made at the first instance
        for repetition in range(repetitions):
            turn = repetition % len(started)
            for running in (*started[turn:], *started[:turn]):
                samples[running.receiver.name].append(_once(scenario, running, folder, count))
        peaks = {running.receiver.name: running.peak_bytes() for running in started}
    table = report.table(
        f"{scenario.kind}: {scenario.title}",
        f"{scenario.associations} × {count} instances, {repetitions} repetitions",
        scenario.rows[0].name,
        samples,
        peaks,
    )
    return table, targets.rates(scenario.title, samples)


def _once(scenario: Scenario, running: Running, folder: Path, count: int) -> Sample:
    before = running.cpu_seconds()
    if scenario.storescu:
        seconds, octets, latencies = _by_storescu(scenario, running, folder, count)
    else:
        seconds, octets, latencies = _by_sender(scenario, running, count)
    total = count * scenario.associations
    # A forked child counts once it is reaped.
    time.sleep(0.05)
    cpu = running.cpu_seconds() - before
    return Sample(total / seconds, octets / seconds / 1e6, 1e3 * cpu / total, latencies)


def _by_storescu(
    scenario: Scenario, running: Running, folder: Path, count: int
) -> tuple[float, int, list[float]]:
    folders = _files(scenario, folder, count)
    octets = sum(path.stat().st_size for each in folders for path in each.iterdir())
    environment = {**os.environ, **({"TCP_NODELAY": "1"} if scenario.no_delay else {})}
    commands = [
        [
            str(DCMTK / "storescu"),
            *("-xe", "+sd", "-aec", running.receiver.title),
            *("127.0.0.1", str(running.port), str(each)),
        ]
        for each in folders
    ]
    begun = time.perf_counter()
    senders = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for command in commands
    ]
    for sender in senders:
        _, words = sender.communicate(timeout=600)
        if sender.returncode:
            raise SystemExit(f"storescu → {running.receiver.name}: {words.decode()[-500:]}")
    return time.perf_counter() - begun, octets, []


def _files(scenario: Scenario, folder: Path, count: int) -> list[Path]:
    """Folders of new instances, one for each association; files of before are written over."""
    folders = [
        folder / f"sent-{scenario.kind}-{count}" / str(number)
        for number in range(scenario.associations)
    ]
    for each in folders:
        each.mkdir(parents=True, exist_ok=True)
        for number, instance in enumerate(instances(KINDS[scenario.kind], count)):
            (each / f"{number:05d}.dcm").write_bytes(instance.file)
    # What was just written is not to be flushed during the measurement.
    os.sync()
    return folders


def _by_sender(scenario: Scenario, running: Running, count: int) -> tuple[float, int, list[float]]:
    how = "raw" if running.receiver.raw else "dicom"
    results = _send(running, scenario.kind, count, scenario.associations, how)
    seconds = max(result["seconds"] for result in results)
    latencies = [1e3 * value for result in results for value in result["latencies"]]
    return seconds, sum(result["octets"] for result in results), latencies


def _send(
    running: Running, kind: str, count: int, associations: int, how: str
) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.sender", "127.0.0.1", str(running.port)]
    command += [running.receiver.title, kind, str(count), how]
    senders = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(associations)
    ]
    for sender in senders:
        assert sender.stdout is not None
        if sender.stdout.readline() != "ready\n":
            raise SystemExit(f"the sender could not associate with {running.receiver.name}")
    os.sync()
    for sender in senders:
        assert sender.stdin is not None
        sender.stdin.write("go\n")
        sender.stdin.flush()
    return [json.loads(sender.communicate(timeout=600)[0]) for sender in senders]


def memory(folder: Path, slices: int) -> tuple[str, list[targets.Line]]:
    """Resident memory of the receive process: idle, during a long series, during a large object."""
    rows = []
    for name, kind, count in (
        (f"{slices} slices of CT 512×512", "CT 512×512", slices),
        ("one multi-frame object of 629 MB", "Enhanced CT 600 MB", 1),
    ):
        with receivers.running([receivers.NODE], folder) as (running,):
            _send(running, "MR 256×256", 5, 1, "dicom")
            idle = running.resident_bytes()
            (result,) = _send(running, kind, count, 1, "dicom")
            rows.append((name, idle, running.peak_bytes(), result["seconds"]))
    lines = [targets.memory(name, idle, peak) for name, idle, peak, _ in rows]
    return report.memory_table(rows), lines


if __name__ == "__main__":
    main()
