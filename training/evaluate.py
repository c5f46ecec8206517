"""How good a model is: figures of a stage while training, and the table of a finished bundle."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restoration.diffcode import DiffCode
from restoration.tasks import RestorationTask, denormalise, normalise, spec
from restoration.tiling import pad_to_multiple
from training.classical import Classical, tune
from training.manifest import FILE_NAME, Item
from training.metrics import PROTOCOL, Score, mean_score, score
from training.prepare import PrepareOptions, prepare
from training.slices import PreparedSet
from training.stages import Stage, seeded_noise

Volume = npt.NDArray[np.float32]
Restore = Callable[[Volume, Item], Volume]
Progress = Callable[[int, int, str], None]
Figures = dict[str, dict[str, float]]
MR_CONTRASTS = ("T2",)  # the contrasts the MR task is judged on
TUNING_SLICES = 6
METHODS = ("input", "restored", "classical")


@dataclass(frozen=True)
class Pair:
    """One slice of the evaluation set in physical units, (rows, columns)."""

    task: RestorationTask
    item: str
    index: int
    lq: Volume
    hq: Volume


@dataclass(frozen=True)
class SliceScore:
    """Quality of one slice by one method: input, restored or classical."""

    task: RestorationTask
    item: str
    subject: str
    simulated: bool
    index: int
    method: str
    score: Score


@dataclass(frozen=True)
class Evaluation:
    """Scores of every slice and how the classical method of each task was set."""

    split: str
    scores: tuple[SliceScore, ...]
    classical: Mapping[RestorationTask, str]

    def select(
        self, task: RestorationTask, method: str, simulated: bool | None = None
    ) -> list[SliceScore]:
        """The scores of a task and a method, of all references or of real or simulated ones."""
        return [
            s
            for s in self.scores
            if s.task is task and s.method == method and simulated in (None, s.simulated)
        ]

    @property
    def tasks(self) -> list[RestorationTask]:
        """The tasks that were evaluated, in order."""
        found = {s.task for s in self.scores}
        return [task for task in RestorationTask if task in found]

    def to_dict(self) -> dict[str, Any]:
        """What ``diffcode evaluate --json`` prints."""
        tasks = {task.value: self._task(task) for task in self.tasks}
        return {"protocol": PROTOCOL, "split": self.split, "tasks": tasks}

    def _task(self, task: RestorationTask) -> dict[str, Any]:
        entry = self._group(task, None)
        if task in self.classical:
            entry["classical"]["method"] = self.classical[task]
        kinds = {s.simulated for s in self.select(task, "input")}
        if len(kinds) > 1:
            entry["groups"] = {
                name: self._group(task, kind)
                for name, kind in (("real", False), ("simulated", True))
            }
        return entry

    def _group(self, task: RestorationTask, simulated: bool | None) -> dict[str, Any]:
        rows = self.select(task, "input", simulated)
        entry: dict[str, Any] = {
            "slices": len(rows), "subjects": len({row.subject for row in rows})
        }  # fmt: skip
        for method in METHODS:
            scores = [row.score for row in self.select(task, method, simulated)]
            if scores:
                entry[method] = asdict(mean_score(scores))
        return entry


def evaluate(
    dataset: PreparedSet,
    restore: Restore,
    *,
    split: str = "val",
    tasks: Sequence[RestorationTask] = tuple(RestorationTask),
    contrasts: Sequence[str] = MR_CONTRASTS,
    methods: Mapping[RestorationTask, Classical] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the input, the restored image and the task's classical method on every slice.

    ``restore`` takes a degraded volume (slices, rows, columns) in physical units and its item.
    Raises ValueError when the split has no items of any of the tasks.
    """
    items = [
        (task, item) for task in tasks for item in evaluation_items(dataset, task, split, contrasts)
    ]
    if not items:
        names = ", ".join(task.value for task in tasks)
        raise ValueError(f"{dataset.folder} has no {split} items of {names}")
    methods = methods or {}
    scores: list[SliceScore] = []
    for done, (task, item) in enumerate(items, start=1):
        scores += _score_item(dataset, task, item, restore, methods.get(task))
        if progress is not None:
            progress(done, len(items), item.name)
    return Evaluation(split, tuple(scores), {task: m.label for task, m in methods.items()})


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
) -> dict[RestorationTask, Classical]:
    """The best classical method of each task on a few training slices.

    A data set without training slices is tuned on the slices it has: to the classical methods'
    advantage.
    """
    factor = float(_operator(dataset, RestorationTask.MRI_SR).get("factor", 4.0))
    methods = {}
    for task in tasks:
        split = "train" if dataset.items(task, "train") else "val"
        pairs = [
            (pair.lq, pair.hq)
            for pair in evaluation_pairs(dataset, [task], split, limit=TUNING_SLICES)
        ]
        if pairs:
            methods[task] = tune(task, pairs, factor)
    return methods


def _operator(dataset: PreparedSet, task: RestorationTask) -> Mapping[str, Any]:
    parameters: Mapping[str, Any] = dataset.manifest.operators.get(task.value, {}).get("params", {})
    return parameters


def _score_item(
    dataset: PreparedSet,
    task: RestorationTask,
    item: Item,
    restore: Restore,
    classical: Classical | None,
) -> Iterator[SliceScore]:
    # Copies: the stored arrays are mapped read-only.
    lq, hq = (np.array(volume, np.float32) for volume in dataset.pair(item))
    images = {"input": lq, "restored": restore(lq, item)}
    if classical is not None:
        images["classical"] = np.stack([classical.apply(plane) for plane in lq])
    for index, truth in enumerate(hq):
        for method, volume in images.items():
            found = score(volume[index], truth, task)
            if found is not None:
                yield SliceScore(
                    task, item.name, item.subject, item.simulated, index, method, found
                )


def evaluation_items(
    dataset: PreparedSet, task: RestorationTask, split: str, contrasts: Sequence[str]
) -> tuple[Item, ...]:
    """The items a task is judged on; MR items of the given contrasts, or all when none are."""
    items = dataset.items(task, split)
    if task is not RestorationTask.MRI_SR or not contrasts:
        return items
    return tuple(item for item in items if item.contrast in contrasts) or items


def evaluation_pairs(
    dataset: PreparedSet,
    tasks: Iterable[RestorationTask],
    split: str = "val",
    limit: int | None = None,
) -> Iterator[Pair]:
    """Slices of a split, task by task; ``limit`` takes so many, evenly spread, of each task."""
    for task in tasks:
        items = evaluation_items(dataset, task, split, MR_CONTRASTS)
        places = [(item, index) for item in items for index in range(item.shape[0])]
        if limit is not None and len(places) > limit:
            chosen = np.linspace(0, len(places) - 1, limit).round().astype(int)
            places = [places[i] for i in chosen]
        for item, index in places:
            lq, hq = (np.asarray(volume[index], np.float32) for volume in dataset.pair(item))
            yield Pair(task, item.name, index, lq, hq)


def stage_figures(
    stage: Stage,
    model: DiffCode,
    pairs: Iterable[Pair],
    others: dict[str, DiffCode] | None = None,
) -> Figures:
    """Mean figures of each task for the log and the gate of a stage, from whole slices.

    ``others`` are rungs measured on the same slices, their name becoming part of the figure's.
    """
    measure = _MEASURES[stage]
    device = next(model.parameters()).device
    sums: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode():
        for pair in pairs:
            values = measure(model, pair, device)
            for name, other in (others or {}).items():
                values[f"{name}_psnr"] = _restoration(other, pair, device)["restored_psnr"]
            for name, value in values.items():
                sums.setdefault(pair.task.value, {}).setdefault(name, []).append(value)
    return {
        task: {name: float(np.nanmean(values)) for name, values in columns.items()}
        for task, columns in sums.items()
    }


def _codebook(model: DiffCode, pair: Pair, device: torch.device) -> dict[str, float]:
    assert model.vq_encoder is not None
    hq, task = _padded(model, pair.hq, pair.task, device)
    latent = model.vq_encoder(hq)
    reference, _, _ = model.lookup(latent, task)
    return {
        "input_psnr": _psnr(pair.lq, pair),
        "reconstruction_psnr": _psnr(_physical(reference, pair), pair),
    }


def _diffusion(model: DiffCode, pair: Pair, device: torch.device) -> dict[str, float]:
    assert model.vq_encoder is not None
    lq, task = _padded(model, pair.lq, pair.task, device)
    hq, _ = _padded(model, pair.hq, pair.task, device)
    target = model.vq_encoder(hq)
    latent = model.estimate(lq, _noise(model, lq, pair))
    assert latent is not None
    reference, _, _ = model.lookup(latent, task)
    return {
        "input_psnr": _psnr(pair.lq, pair),
        "reference_psnr": _psnr(_physical(reference, pair), pair),
        "latent_l1": float((target - latent).abs().mean()),
        "plain_latent_l1": float((target - model.vq_encoder(lq)).abs().mean()),
    }


def _restoration(model: DiffCode, pair: Pair, device: torch.device) -> dict[str, float]:
    lq, task = _padded(model, pair.lq, pair.task, device)
    restored = model(lq, task, _noise(model, lq, pair)).restored
    return {
        "input_psnr": _psnr(pair.lq, pair),
        "restored_psnr": _psnr(_physical(restored, pair), pair),
    }


_MEASURES: dict[Stage, Callable[[DiffCode, Pair, torch.device], dict[str, float]]] = {
    Stage.CODEBOOK: _codebook,
    Stage.DIFFUSION: _diffusion,
    Stage.RESTORATION: _restoration,
}


def _padded(
    model: DiffCode, image: Volume, task: RestorationTask, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A slice as the network takes it, (1, 1, H, W), and its task (1,)."""
    low, high = spec(task).window
    x = normalise(torch.from_numpy(image.clip(low, high))[None, None], task)
    padded, _ = pad_to_multiple(x, model.config.factor, least=2 * model.config.factor)
    padded = padded.contiguous(memory_format=torch.channels_last)
    return padded.to(device), torch.tensor([task.index], device=device)


def _noise(model: DiffCode, lq: Tensor, pair: Pair) -> Tensor | None:
    if model.prior is None:
        return None
    return seeded_noise(model.noise_shape(lq), 0, pair.index, 0).to(lq.device)


def _physical(image: Tensor | None, pair: Pair) -> Volume:
    assert image is not None
    rows, columns = pair.hq.shape
    physical: Volume = denormalise(image[0, 0, :rows, :columns].float().cpu(), pair.task).numpy()
    return physical


def _psnr(image: Volume, pair: Pair) -> float:
    found = score(image, pair.hq, pair.task)
    return float("nan") if found is None else found.psnr
