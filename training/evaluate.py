"""The evaluation of restored images: every method on the same held-out slices, in one pass.

Figures by every protocol of :mod:`training.metrics` and quantities of :mod:`training.quantities`;
the methods are the degraded input, the best classical method, and the models that are given.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from restoration.tasks import RestorationTask, spec
from training.classical import Classical, tune
from training.evaluation import (
    CLASSICAL,
    INPUT,
    Evaluation,
    Group,
    Sample,
    SliceScore,
    Tuning,
    Volume,
    VolumeMeasure,
)
from training.manifest import FILE_NAME, Item
from training.metrics import AMIR, PROTOCOLS, score
from training.prepare import PrepareOptions, prepare
from training.quantities import body_masks, measures
from training.slices import PreparedSet
from training.validation import MR_CONTRASTS, evaluation_items

Restore = Callable[[Volume, Item], Volume]
Progress = Callable[[int, int, str], None]
TUNING_SLICES = 12  # of each group
TUNING_SIZE = 256  # pixels; the centre of larger slices
# Intensities a task's images cannot have: another modality, or another unit.
_POSSIBLE = {
    RestorationTask.CT_DENOISE: (-10_000.0, 70_000.0),
    RestorationTask.MRI_SR: (-1.0, 1e6),
    RestorationTask.PET_SYNTHESIS: (-1.0, 1e4),
}


def evaluate(
    dataset: PreparedSet,
    models: Mapping[str, Restore],
    *,
    labels: Mapping[str, str] | None = None,
    split: str = "val",
    tasks: Sequence[RestorationTask] = tuple(RestorationTask),
    contrasts: Sequence[str] = MR_CONTRASTS,
    methods: Mapping[Group, Classical] | None = None,
    central: int | None = None,
    baselines: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the input, the classical method and each of ``models`` on every slice of the split.

    A model takes a degraded volume (slices, rows, columns) in physical units and its item, and
    returns the restored one; ``labels`` describe models to readers; ``central`` keeps so many
    slices in the middle of each volume; without ``baselines`` the input has no rows. Raises
    ValueError for a split without items, and for an item that is no such image, with its name.
    """
    items = [
        (task, item) for task in tasks for item in evaluation_items(dataset, task, split, contrasts)
    ]
    if not items:
        names = ", ".join(task.value for task in tasks)
        raise ValueError(f"{dataset.folder} has no {split} items of {names}")
    methods = methods or {}
    drawn = _drawn(items)
    scores: list[SliceScore] = []
    found: list[VolumeMeasure] = []
    samples: list[Sample] = []
    for done, (task, item) in enumerate(items, start=1):
        lq, truth = checked_pair(dataset, item, central)
        images = _images(lq, item, models, methods.get((task, item.simulated)), baselines)
        scores += _scores(task, item, images, truth)
        found += _measures(task, item, images, truth, lq)
        if item.name in drawn:
            middle = len(truth) // 2
            chosen = {name: volume[middle] for name, volume in images.items()}
            samples.append(Sample(task, item.simulated, chosen, truth[middle]))
        if progress is not None:
            progress(done, len(items), item.name)
    rows = {INPUT: "degraded input"} if baselines else {}
    if methods:
        rows[CLASSICAL] = "best classical method, tuned on training subjects"
    rows |= {name: (labels or {}).get(name, name) for name in models}
    tuned = {group: Tuning(method.label, method.tried) for group, method in methods.items()}
    return Evaluation(
        split, tuple(scores), tuple(found), rows, tuple(models), tuned, tuple(samples), central
    )


@contextlib.contextmanager
def prepared(data: Path, split: str, progress: Progress | None = None) -> Iterator[PreparedSet]:
    """The prepared folder ``data``, or one made of its packs for as long as it is needed."""
    if (data / FILE_NAME).exists():
        yield PreparedSet.open(data)
        return
    options = PrepareOptions(splits=(split,))
    with tempfile.TemporaryDirectory(prefix="diffcode-") as folder:
        out = Path(folder) / "prepared"
        prepare([data], out, seed=0, options=options, progress=progress)
        yield PreparedSet.open(out)


def tuned_methods(
    dataset: PreparedSet, tasks: Sequence[RestorationTask] = tuple(RestorationTask)
) -> dict[Group, Classical]:
    """The best classical method of each task on a few training slices, never on those judged.

    Real and simulated references are tuned apart. A group without training subjects has none.
    """
    factor = float(_operator(dataset, RestorationTask.MRI_SR).get("factor", 4.0))
    methods = {}
    for task in tasks:
        for simulated in (False, True):
            pairs = _tuning_pairs(dataset, task, simulated)
            if pairs:
                methods[task, simulated] = tune(task, pairs, factor)
    return methods


def checked_pair(
    dataset: PreparedSet, item: Item, central: int | None = None
) -> tuple[Volume, Volume]:
    """Degraded and true volume (slices, rows, columns) of an item, ``central`` slices of it or all.

    Raises ValueError, with the item's name, for a file that is damaged, not the one that was
    prepared, of 8 bits, not finite, or with values that its task cannot have.
    """
    for kind, name in (("lq", item.lq), ("hq", item.hq)):
        _refuse_changed(dataset.folder / name, item.sha256.get(kind))
    try:
        stored = dataset.pair(item)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{dataset.folder}: {item.name} cannot be read: {error}") from error
    low, high = _POSSIBLE[RestorationTask(item.task)]
    part = _central(item.shape[0], central)
    volumes = []
    for name, volume in zip((item.lq, item.hq), stored, strict=True):
        path = dataset.folder / name
        if volume.dtype.itemsize < 2:
            raise ValueError(f"{path}: {volume.dtype} is a picture, not {item.units}")
        # A copy: the stored arrays are mapped read-only.
        values = np.array(volume[part], np.float32)
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values).all(axis=(1, 2)))[0]) + part.start
            raise ValueError(f"{path}: slice {bad} holds a value that is not finite")
        if values.min() < low or values.max() > high:
            task = spec(item.task)
            raise ValueError(
                f"{path}: values from {values.min():g} to {values.max():g} cannot be "
                f"{task.units} of {task.label}"
            )
        volumes.append(values)
    return volumes[0], volumes[1]


def _refuse_changed(path: Path, sha256: str | None) -> None:
    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"{path}: SHA-256 is {found}, the manifest says {sha256}")


def _central(slices: int, wanted: int | None) -> slice:
    kept = slices if wanted is None else min(wanted, slices)
    start = (slices - kept) // 2
    return slice(start, start + kept)


def _drawn(items: Sequence[tuple[RestorationTask, Item]]) -> set[str]:
    """The largest item of each group."""
    largest: dict[Group, Item] = {}
    for task, item in items:
        held = largest.get((task, item.simulated))
        if held is None or np.prod(item.shape[1:]) > np.prod(held.shape[1:]):
            largest[task, item.simulated] = item
    return {item.name for item in largest.values()}


def _images(
    lq: Volume,
    item: Item,
    models: Mapping[str, Restore],
    classical: Classical | None,
    baselines: bool,
) -> dict[str, Volume]:
    images = {INPUT: lq} if baselines else {}
    if classical is not None:
        images[CLASSICAL] = np.stack([classical.apply(plane) for plane in lq])
    for name, restore in models.items():
        images[name] = restore(lq, item)
    return images


def _scores(
    task: RestorationTask, item: Item, images: Mapping[str, Volume], truth: Volume
) -> Iterator[SliceScore]:
    bodies = body_masks(truth, task)
    for index, (plane, body) in enumerate(zip(truth, bodies, strict=True)):
        for method, volume in images.items():
            each = {p.id: score(volume[index], plane, task, p, body) for p in PROTOCOLS}
            found = {name: value for name, value in each.items() if value is not None}
            if AMIR.id in found:
                yield SliceScore(
                    task, item.name, item.subject, item.simulated, index, method, found
                )


def _measures(
    task: RestorationTask, item: Item, images: Mapping[str, Volume], truth: Volume, lq: Volume
) -> Iterator[VolumeMeasure]:
    for method, volume in images.items():
        for measure in measures(task, volume, truth, lq, item.spacing_mm):
            yield VolumeMeasure(task, item.name, item.subject, item.simulated, method, measure)


def _tuning_pairs(
    dataset: PreparedSet, task: RestorationTask, simulated: bool
) -> list[tuple[Volume, Volume]]:
    """Slices (lq, hq) evenly spread over the training items of a group, their centre if large."""
    items = evaluation_items(dataset, task, "train", MR_CONTRASTS)
    places = [(i, k) for i in items if i.simulated is simulated for k in range(i.shape[0])]
    chosen = np.linspace(0, len(places) - 1, min(TUNING_SLICES, len(places))).round().astype(int)
    pairs = []
    for item, index in (places[i] for i in chosen):
        rows, columns = (_central(size, TUNING_SIZE) for size in item.shape[1:])
        lq, hq = (np.array(v[index, rows, columns], np.float32) for v in dataset.pair(item))
        pairs.append((lq, hq))
    return pairs


def _operator(dataset: PreparedSet, task: RestorationTask) -> Mapping[str, Any]:
    parameters: Mapping[str, Any] = dataset.manifest.operators.get(task.value, {}).get("params", {})
    return parameters
