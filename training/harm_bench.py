"""The bench of planted harm: series that calibration never saw, every fault, one table.

A fault costs a restoration only where the network takes part; those are planted into some series.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from restoration.fidelity import LEAST_SIDE, Calibration
from restoration.fidelity.catalogue import BY_NAME
from restoration.restorer import Manifest, Restorer, bundle_folder, read_manifest
from restoration.tasks import RestorationTask
from training.calibrate import pseudonym
from training.faults import Fault, Planted, finished_faults
from training.harm import Caught, Kind, Rate, Slice, slices_of, table
from training.manifest import Item
from training.network_faults import network_faults
from training.prepare import PrepareOptions
from training.rescans import rescanned
from training.restored import Series, in_domain, part, restored, restored_series
from training.slices import PreparedSet

Progress = Callable[[int, int, str], None]
#: Slices without a fault, and those with each.
Found = tuple[list[Slice], dict[Kind, list[Slice]]]
# Of slices without a fault one in so many is asked again, as the node does it; of those with a
# fault none: `idempotence` and `perturbation` can raise false alarms here, and catch nothing.
_PROBED = 32
_TOLD = 0.1  # of the slices of some fault: a gate that catches less of each has no column


@dataclass(frozen=True)
class Extent:
    """How much the bench looks at."""

    most: int = 8  #: neighbouring slices of an item
    planted: int = 1  #: series of a subject that faults are planted into, long ones first
    network_series: int = 9  #: of a task, for faults that run the network
    scans: int = 5  #: of each series of MR: as it is, and moved between scans with new noise
    network_slices: int = 2  #: of those series, where a fault is no matter of the whole scan
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Alarms without a fault, and what was caught of each."""

    clean: tuple[Slice, ...]
    caught: tuple[Caught, ...]

    def false_alarms(self, task: str) -> Rate:
        """Slices of a task that fail without a fault, by the levels of the manifest."""
        own = [each for each in self.clean if each.task == task]
        return Rate(sum(each.failed for each in own), len(own))

    def warnings(self, task: str) -> Rate:
        """Slices of a task that warn or fail without a fault, by the levels of the manifest."""
        own = [each for each in self.clean if each.task == task]
        return Rate(sum(each.failed or each.warned for each in own), len(own))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; subjects by number, for a table travels further than names."""
        numbers = _numbers([each.subject for each in self.clean])
        tasks = sorted({each.task for each in self.clean})
        return {
            "false_alarms": {task: self.false_alarms(task).to_dict() for task in tasks},
            "warnings": {task: self.warnings(task).to_dict() for task in tasks},
            "clean_subjects": {
                task: {
                    str(numbers[name]): self._alarms_of(task, name).to_dict()
                    for name in sorted({e.subject for e in self.clean if e.task == task})
                }
                for task in tasks
            },
            "faults": [_plain(each, numbers) for each in self.caught],
        }

    def _alarms_of(self, task: str, subject: str) -> Rate:
        own = [e for e in self.clean if e.task == task and e.subject == subject]
        return Rate(sum(each.failed for each in own), len(own))


def run(
    restorer: Restorer,
    sets: Sequence[PreparedSet],
    tasks: Sequence[str],
    *,
    extent: Extent,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Plant every fault into the series of `tasks` that calibration left for testing.

    Those of other tasks are looked at without a fault: a series may be planted on their route.
    Raises ValueError when the bundle has no calibration for a task with series to test.
    """
    return _result(
        _of_task(restorer, sets, RestorationTask(name), name in tasks, extent, cache, progress)
        for name in _looked_at(restorer.manifest, tasks)
    )


def run_side_by_side(
    bundle: str,
    folders: Sequence[Path],
    tasks: Sequence[str],
    *,
    extent: Extent,
    cache: Path | None,
) -> Result:
    """The same on the CPU, each task in a process of its own with one thread."""
    # A fork would inherit the threads of libraries, and not what they hold.
    context = multiprocessing.get_context("spawn")
    names = _looked_at(read_manifest(bundle_folder(bundle)), tasks)
    with ProcessPoolExecutor(len(names), mp_context=context) as pool:
        each = partial(_alone, bundle, folders, tasks, extent, cache)
        return _result(pool.map(each, names))


def _alone(
    bundle: str,
    folders: Sequence[Path],
    tasks: Sequence[str],
    extent: Extent,
    cache: Path | None,
    name: str,
) -> Found:
    restorer = Restorer.open(bundle, device="cpu", threads=1)
    sets = [PreparedSet.open(folder) for folder in folders]
    return _of_task(restorer, sets, RestorationTask(name), name in tasks, extent, cache, None)


def _looked_at(manifest: Manifest, tasks: Sequence[str]) -> list[str]:
    """The given tasks, and the others that have levels."""
    return list(dict.fromkeys([*tasks, *manifest.calibration]))


def _result(parts: Iterable[Found]) -> Result:
    clean: list[Slice] = []
    faulty: dict[Kind, list[Slice]] = {}
    for own, harmed in parts:
        clean += own
        for kind, slices in harmed.items():
            faulty.setdefault(kind, []).extend(slices)
    return Result(tuple(clean), tuple(table(clean, faulty)))


def _of_task(
    restorer: Restorer,
    sets: Sequence[PreparedSet],
    task: RestorationTask,
    harm: bool,
    extent: Extent,
    cache: Path | None,
    progress: Progress | None,
) -> Found:
    """The slices of a task without a fault, and those of its series with one if asked for."""
    clean: list[Slice] = []
    faulty: dict[Kind, list[Slice]] = {}
    calibrations = _calibrations(restorer, task)
    chosen = test_items(restorer, sets, task.value)
    series = _distinct(restored_series(restorer, chosen, most=extent.most, cache=cache))
    if task is RestorationTask.MRI_SR:
        series = [scan for each in series for scan in _scans(restorer, each, extent, cache)]
    for each in series:
        everything = Planted(each, tuple(range(len(each.lq))))
        clean += slices_of(restorer, everything, calibrations[task.value], every=_PROBED)
    if not harm:
        return clean, faulty
    ranked = _ranked(series)
    harmed = [each for rank, each in ranked if rank < extent.planted]
    scans = [each for _, each in ranked[: extent.network_series]]
    some = [_middle(each, extent.network_slices) for each in scans]
    faults = [
        *((fault, harmed) for fault in finished_faults()),
        *(
            (fault, scans if task in fault.scans else some)
            for fault in network_faults(restorer, cache)
        ),
    ]
    for done, (fault, into) in enumerate(faults):
        if progress is not None:
            progress(done, len(faults), f"{task.value}: {fault.name} {fault.size}")
        if task in fault.tasks:
            _plant(restorer, fault, into, calibrations, extent, faulty)
    return clean, faulty


def test_items(
    restorer: Restorer, sets: Sequence[PreparedSet], task: str
) -> list[tuple[PreparedSet, Item]]:
    """Held-out items in the model's domain of subjects that calibration did not learn from.

    A CT whose full dose is noisier than `diffcode prepare` takes for training is no reference.
    """
    made = restorer.manifest.calibration.get(task)
    learnt = set() if made is None else set(made.basis["learnt_from"])
    return [
        (dataset, item)
        for dataset in sets
        for item in dataset.items(task, "val")
        if pseudonym(item.subject) not in learnt
        and in_domain(restorer, item)
        and min(item.shape[1:]) >= LEAST_SIDE
        and (item.noise_hu is None or item.noise_hu <= PrepareOptions().max_noise_hu)
    ]


def _calibrations(restorer: Restorer, task: RestorationTask) -> Mapping[str, Calibration]:
    made = restorer.manifest.calibration
    if task.value not in made:
        raise ValueError(
            f"{restorer.manifest.name} has no calibration of {task.value}; run `diffcode calibrate`"
        )
    return made


def _plant(
    restorer: Restorer,
    fault: Fault,
    series: Sequence[Series],
    calibrations: Mapping[str, Calibration],
    extent: Extent,
    faulty: dict[Kind, list[Slice]],
) -> None:
    for index, each in enumerate(series):
        name = f"{fault.name}|{fault.size}|{each.name}"
        rng = np.random.default_rng([extent.seed, index, zlib.crc32(name.encode())])
        planted = fault.plant(each, rng)
        # A series on the route of a task that is not calibrated has no levels to be judged by.
        if planted is not None and planted.series.task.value in calibrations:
            calibration = calibrations[planted.series.task.value]
            faulty.setdefault((fault.name, fault.size), []).extend(
                slices_of(restorer, planted, calibration)
            )


def _distinct(series: Iterable[Series]) -> list[Series]:
    """Each input once: what is degraded without noise is the same whatever the seed."""
    found: dict[bytes, Series] = {}
    for each in series:
        found.setdefault(hashlib.sha256(each.lq.tobytes()).digest(), each)
    return list(found.values())


def _scans(
    restorer: Restorer, series: Series, extent: Extent, cache: Path | None
) -> Iterator[Series]:
    """A series of MR as it is, and scanned again: its degradation alone has no other seed."""
    yield series
    for number in range(1, extent.scans):
        name = f"{series.name}, scan {number + 1}"
        rng = np.random.default_rng([extent.seed, number, zlib.crc32(series.name.encode())])
        again = partial(restored, restorer, task=series.task, cache=cache)
        yield rescanned(series, again, rng, name)


def _ranked(series: Sequence[Series]) -> list[tuple[int, Series]]:
    """The longest series of each subject first, then the next one of each, with this number."""
    taken: dict[str, int] = {}
    ranked = []
    for each in sorted(series, key=lambda each: -len(each.lq)):
        rank = taken[each.subject] = taken.get(each.subject, -1) + 1
        ranked.append((rank, each))
    return sorted(ranked, key=lambda pair: pair[0])


def _middle(series: Series, most: int) -> Series:
    start = max(0, (len(series.lq) - most) // 2)
    return part(series, slice(start, start + most))


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(set(names)), 1)}


def _plain(caught: Caught, numbers: Mapping[str, int]) -> dict[str, Any]:
    return {
        "fault": caught.name,
        "size": caught.size,
        "task": caught.task,
        "shipped": caught.shipped.to_dict(),
        "at_false_alarms": caught.at_false_alarms.to_dict(),
        "gates": {name: rate.to_dict() for name, rate in caught.gates.items()},
        "subjects": {
            str(numbers.get(name, 0)): rate.to_dict() for name, rate in caught.subjects.items()
        },
    }


def markdown(values: Mapping[str, Any]) -> Iterator[str]:
    """The tables of `Result.to_dict` as lines of Markdown."""
    yield "| task | subjects | slices without a fault | sent | 95 % interval | without a warning |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for task, failing in values["false_alarms"].items():
        sent, quiet = _others(failing), _others(values["warnings"][task])
        yield (
            f"| {task} | {len(values['clean_subjects'][task])} | {sent['total']} "
            f"| {_share(sent)} | {_interval(sent)} | {_share(quiet)} |"
        )
    yield ""
    yield (
        "| task | fault | size | slices | caught as shipped | caught at 1 % false alarms "
        "| 95 % interval | least and most of a subject |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    rows = sorted(values["faults"], key=lambda row: (row["task"], row["fault"]))
    for row in rows:
        at = row["at_false_alarms"]
        yield (
            f"| {row['task']} | {row['fault']} | {row['size']} | {at['total']} "
            f"| {_share(row['shipped'])} | {_share(at)} | {_interval(at)} "
            f"| {_range(row['subjects'])} |"
        )
    for task in values["false_alarms"]:
        yield ""
        yield from _by_gate([row for row in rows if row["task"] == task], task)


def _by_gate(rows: Sequence[Mapping[str, Any]], task: str) -> Iterator[str]:
    """Fault by gate: % of slices that the gate alone catches at 1 % false alarms of its own."""
    shares = [
        {name: rate["hits"] / rate["total"] for name, rate in row["gates"].items() if rate["total"]}
        for row in rows
    ]
    names = [name for name in BY_NAME if any(each.get(name, 0) >= _TOLD for each in shares)]
    yield f"| {task}, % | size | " + " | ".join(f"`{name}`" for name in names) + " |"
    yield "| --- | --- |" + " --- |" * len(names)
    for row, found in zip(rows, shares, strict=True):
        cells = (f"{100 * found[name]:.0f}" if name in found else "" for name in names)
        yield f"| {row['fault']} | {row['size']} | " + " | ".join(cells) + " |"


def _others(rate: Mapping[str, Any]) -> Mapping[str, Any]:
    """The slices that a rate does not count."""
    return Rate(rate["total"] - rate["hits"], rate["total"]).to_dict()


def _share(rate: Mapping[str, Any]) -> str:
    return f"{100 * rate['hits'] / rate['total']:.1f} %" if rate["total"] else "-"


def _interval(rate: Mapping[str, Any]) -> str:
    low, high = rate["interval_95"]
    return f"{100 * low:.1f} ... {100 * high:.1f}"


def _range(subjects: Mapping[str, Mapping[str, Any]]) -> str:
    shares = [100 * rate["hits"] / rate["total"] for rate in subjects.values() if rate["total"]]
    return f"{min(shares):.0f} ... {max(shares):.0f} ({len(shares)})" if shares else "-"
