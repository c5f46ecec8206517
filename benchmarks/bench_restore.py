"""The network on this machine by preset, size and precision, beside networks of two peers' size.

    python -m benchmarks.bench_restore [--quick] [--runtimes] [--out FOLDER] [--write]

The same measurements as `diffcode bench`, over all that RESULTS.md shows, with the targets, and how
soon a new process has a result. --runtimes sets the shipped network's form beside ONNX Runtime,
OpenVINO and PyTorch's compiler, as far as these are installed. On a CPU the paper's network and the
peers are measured at 256² alone: 512² would take it half an hour. On a GPU the kernels are checked
against their oracles and timed one by one by `benchmarks.bench_kernels`. --out keeps what was found
as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import runtimes
from restoration.execution import chosen_device
from training import bench
from training.bench import Outcome, Row

_PAGE = Path(__file__).with_name("RESULTS.md")
_SHIPPED = ", ".join(bench.SHIPPED)

_START = """
import json, sys, time
begun = time.perf_counter()
import numpy, torch
from restoration import Restorer
torch.set_num_threads(int(sys.argv[1]))
imported = time.perf_counter()
restorer = Restorer.open("compact", device=sys.argv[2])
opened = time.perf_counter()
volume = numpy.random.default_rng(0).normal(0, 100, (1, 512, 512)).astype(numpy.float32)
restorer.restore(volume, "ct_denoise")
first = time.perf_counter()
restorer.restore(volume, "ct_denoise")
again = time.perf_counter()
print(json.dumps([imported - begun, opened - imported, first - opened, again - first]))
"""


def main() -> None:
    """Run what the command line asks for and print it."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--quick", action="store_true", help="512² and the device's precision alone")
    words.add_argument("--runtimes", action="store_true", help="other runtimes alone, on a CPU")
    words.add_argument("--device", default="auto")
    words.add_argument("--threads", type=int)
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--out", type=Path, help="folder for restore.json and restore.md")
    words.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    given = words.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    command = " ".join(("python -m benchmarks.bench_restore", *sys.argv[1:]))
    busy = f"Load average before the run: {os.getloadavg()[0]:.1f}.\n\n"
    if given.runtimes:
        table = runtimes.compare(512, given.repeats, _tell)
        text = f"## The network in other runtimes\n\n`{command}`\n\n{busy}{table}"
        mark = "bench_runtimes"
    else:
        outcome = bench.run(_plan(given), _tell)
        text = bench.section(outcome, command, busy + _targets(outcome, _start(given)))
        mark = "bench_restore"
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "restore.md").write_text(text)
        if not given.runtimes:
            (given.out / "restore.json").write_text(json.dumps(outcome.to_dict(), indent=1))
    if given.write:
        bench.write(_PAGE, text, mark)


def _plan(given: argparse.Namespace) -> bench.Plan:
    return bench.Plan(
        sizes=(512,) if given.quick else (256, 512),
        precisions=("auto",) if given.quick else ("auto", "fp32"),
        device=given.device,
        peers=True,
        shipped=True,
        large_up_to=None if chosen_device(given.device).type == "cuda" else 256,
        repeats=given.repeats,
    )


def _tell(row: str) -> None:
    print(row, file=sys.stderr, flush=True)


def _start(given: argparse.Namespace) -> list[float]:
    """Seconds of a new process: imports, the shipped bundle, a first slice of 512², another."""
    words = [sys.executable, "-c", _START, str(torch.get_num_threads()), given.device]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _targets(outcome: Outcome, start: list[float]) -> str:
    """What the targets say, and whether this run met them."""
    imports, bundle, first, again = start
    lines = [
        "| what | at least | measured | met |",
        "|---|---|---|---|",
        *(_on_gpu if torch.cuda.is_available() else _on_cpu)(outcome),
        f"| bundle loads | < 2 s | {bundle:.2f} s | {_met(bundle < 2)} |",
        f"| first slice of a new process, beyond the next one's {again:.2f} s | < 60 s "
        f"| {first - again:.2f} s (and {imports:.1f} s of imports before the bundle) "
        f"| {_met(first - again < 60)} |",
    ]
    return "\n".join([*lines, "", ""])


def _on_cpu(outcome: Outcome) -> Iterator[str]:
    plain, ours = _rows(outcome, _SHIPPED)
    ratio = ours.slices_per_second / plain.slices_per_second
    threads = torch.get_num_threads()
    yield (
        f"| shipped network ({_SHIPPED}), 512², on {threads} threads | 2 slices/s "
        f"| {ours.slices_per_second:.2f} slices/s | {_met(ours.slices_per_second >= 2)} |"
    )
    yield (
        f"| the same against plain eager, {ours.precision} | 1.7× | {ratio:.2f}× "
        f"| {_met(ratio >= 1.7)} |"
    )
    yield "| paper preset on a GPU | – | not run: no GPU here | – |"


def _on_gpu(outcome: Outcome) -> Iterator[str]:
    _, ours = _rows(outcome, "paper")
    share = ours.share or 0.0
    yield (
        f"| paper preset, 512², {ours.precision}, batch {ours.batch}: share of the roofline | 60 % "
        f"| {100 * share:.0f} % | {_met(share >= 0.6)} |"
    )
    for name in bench.PEERS:
        # The faster of plain and compiled.
        peer = max(row.slices_per_second for row in _rows(outcome, name))
        ratio = ours.slices_per_second / peer
        yield f"| the same against the {name} network | 2× | {ratio:.2f}× | {_met(ratio >= 2)} |"


def _rows(outcome: Outcome, network: str) -> list[Row]:
    """The rows of a network at 512² in the precision that the device takes by itself."""
    precision = outcome.machines[0].precision
    wanted = (network, 512, precision)
    return [row for row in outcome.rows if (row.network, row.size, row.precision) == wanted]


def _met(is_met: bool) -> str:
    return "yes" if is_met else "no"


if __name__ == "__main__":
    main()
