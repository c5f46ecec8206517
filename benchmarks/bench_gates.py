"""What the gates cost beside the restoration they judge, on the same device.

    python -m benchmarks.bench_gates [--device auto] [--slices 32] [--threads 1] [--write]

Phantoms of each task are restored and assessed five times in turns, probes and weights included;
medians are compared, and the ratio should stay below a tenth. `--write` puts the table into
benchmarks/RESULTS.md. On a machine with other work the ratio of CPU seconds says more than that of
wall time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks import report
from restoration.restorer import Restorer
from restoration.tasks import RestorationTask
from training.degrade import truncate_kspace
from training.phantoms import body_pet, brain_t2, chest_ct

_REPETITIONS = 5
Spacing = tuple[float, float, float]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Seconds:
    """What a call took."""

    wall: float
    cpu: float  #: of all threads of this process


def main() -> None:
    """Print a Markdown table of seconds."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--bundle", default="compact")
    words.add_argument("--device", default="auto")
    words.add_argument("--slices", type=int, default=32)
    words.add_argument("--threads", type=int)
    words.add_argument("--task", choices=[task.value for task in RestorationTask], action="append")
    words.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    given = words.parse_args()
    load = os.getloadavg()[0]
    restorer = Restorer.open(given.bundle, device=given.device, threads=given.threads)
    head = [
        f"{restorer.device}, {given.slices} slices. Target: below a tenth.",
        "",
        "| task | matrix | restoration, s | gates, s | gates over restoration | of CPU seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(head))
    rows = []
    for name in given.task or restorer.manifest.tasks:
        rows.append(_row(restorer, RestorationTask(name), given.slices))
        print(rows[-1], flush=True)
    if given.write:
        page = Path(__file__).with_name("RESULTS.md")
        command = f"python -m benchmarks.bench_gates {' '.join(sys.argv[1:])}"
        report.write(page, ["\n".join([*head, *rows])], command, load, report.GATES)


def _row(restorer: Restorer, task: RestorationTask, slices: int) -> str:
    volume, spacing = _volume(task, slices)
    # At the first call kernels are chosen, and tables made of all that hangs on the matrix alone.
    first = restorer.restore(volume[:1], task)
    restorer.assess(volume[:1], first, task, spacing=spacing)
    runs = []
    for _ in range(_REPETITIONS):
        made, restoring = _timed(partial(restorer.restore, volume, task, spacing=spacing))
        _, assessing = _timed(partial(restorer.assess, volume, made, task, spacing=spacing))
        runs.append((restoring, assessing))
    restoring, assessing = (_median(each) for each in zip(*runs, strict=True))
    matrix = " x ".join(str(size) for size in volume.shape[1:])
    return (
        f"| {task.value} | {matrix} | {restoring.wall:.2f} | {assessing.wall:.2f} "
        f"| {100 * assessing.wall / restoring.wall:.1f} % "
        f"| {100 * assessing.cpu / restoring.cpu:.1f} % |"
    )


def _median(seconds: Sequence[Seconds]) -> Seconds:
    return Seconds(median(each.wall for each in seconds), median(each.cpu for each in seconds))


def _volume(task: RestorationTask, slices: int) -> tuple[npt.NDArray[np.float32], Spacing]:
    rng = np.random.default_rng(0)
    if task is RestorationTask.MRI_SR:
        return truncate_kspace(brain_t2(slices, 256).volume.astype(np.float32)), (3.0, 0.8, 0.8)
    if task is RestorationTask.CT_DENOISE:
        clean, spread, spacing = chest_ct(slices, 512).volume, 30.0, (3.0, 0.7, 0.7)
    else:
        clean, spread, spacing = body_pet(slices, 192).volume, 0.2, (3.3, 4.0, 4.0)
    noisy = clean + spread * rng.standard_normal(clean.shape)
    return noisy.astype(np.float32), spacing


def _timed(call: Callable[[], Result]) -> tuple[Result, Seconds]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
