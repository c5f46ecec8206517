"""Patches from a prepared folder: memory-mapped pairs, and batches that depend on the step alone.

No random state is kept: batch k is drawn from (seed, rank, k), so a run that stops and resumes
sees what an uninterrupted one sees.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restoration.tasks import RestorationTask, normalise, spec
from training.manifest import Item, ManifestError, PreparedManifest

Array = npt.NDArray[np.float32]
Stored = npt.NDArray[np.float32 | np.int16]

CONTRAST_WEIGHTS = {"T2": 3.0}
"""How much more often a slice of this MR contrast is drawn: the task is judged on T2."""

SIMULATED_WEIGHT = 0.5
"""How often a reference that is itself simulated is drawn, against a real one."""

# A patch counts as empty when less than a twentieth of the reference is above this value.
_BACKGROUND = {
    RestorationTask.MRI_SR: 60.0,
    RestorationTask.CT_DENOISE: -900.0,
    RestorationTask.PET_SYNTHESIS: 0.05,
}
_TRIES = 4


@dataclass(frozen=True)
class PreparedSet:
    """A folder that ``prepare`` wrote."""

    folder: Path
    manifest: PreparedManifest

    @classmethod
    def open(cls, folder: Path) -> PreparedSet:
        """Raises ManifestError when the folder is not prepared or a file is missing or damaged."""
        manifest = PreparedManifest.read(folder)
        for item in manifest.items:
            for name in (item.hq, item.lq):
                if not (folder / name).is_file():
                    raise ManifestError(f"{folder}: the file {name} of {item.name} is missing.")
                _mapped(folder / name)  # a file that was cut short is found before the training
        return cls(folder, manifest)

    def items(
        self, task: RestorationTask | str | None = None, split: str | None = None
    ) -> tuple[Item, ...]:
        """The items of a task and a split, or of all."""
        wanted = None if task is None else RestorationTask(task).value
        return tuple(
            item
            for item in self.manifest.items
            if wanted in (None, item.task) and split in (None, item.split)
        )

    def pair(self, item: Item) -> tuple[Stored, Stored]:
        """(lq, hq) memory-mapped, physical units, [slice, row, column]; CT hq may be int16."""
        lq, hq = _mapped(self.folder / item.lq), _mapped(self.folder / item.hq)
        if lq.shape != item.shape or hq.shape != item.shape:
            raise ManifestError(f"{self.folder}: {item.name} does not have the shape it claims.")
        return lq, hq


def _mapped(path: Path) -> Stored:
    try:
        array: Stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{path} cannot be read as a NumPy array: {error}") from error
    return array


@dataclass(frozen=True)
class Batch:
    """Normalised patches (B, 1, P, P), a mask of real pixels, and each patch's task (B,)."""

    lq: Tensor
    hq: Tensor
    mask: Tensor
    task: Tensor


class PatchSampler:
    """Draw equally many patches of each task; ``batch(step)`` is a pure function of the step.

    ``flip`` and ``rotate`` name the tasks with random left-right flips and quarter turns. Images
    below half the patch size share one patch; whatever they do not fill is replicated and masked
    with 0. Values are clipped to the window.
    Raises ValueError when a task has no items in the split or the patch is not a multiple of 8.
    """

    def __init__(
        self,
        dataset: PreparedSet,
        *,
        split: str,
        patch: int,
        per_task: int,
        seed: int,
        tasks: Sequence[RestorationTask | str] = tuple(RestorationTask),
        flip: Collection[str] = (),
        rotate: Collection[str] = (),
        rank: int = 0,
    ) -> None:
        if patch % 8 or patch < 8:
            raise ValueError(f"'patch' must be a multiple of 8, not {patch}.")
        if per_task < 1:
            raise ValueError(f"'per_task' must be at least 1, not {per_task}.")
        self.patch, self.per_task, self.seed, self.rank = patch, per_task, seed, rank
        self.tasks = tuple(RestorationTask(task) for task in tasks)
        self.flip = {RestorationTask(task) for task in flip}
        self.rotate = {RestorationTask(task) for task in rotate}
        self._pools = [_Pool.of(dataset, task, split, patch) for task in self.tasks]

    def batch(self, step: int) -> Batch:
        """The patches of a step: ``per_task`` of each task, in the order of ``tasks``."""
        generator = np.random.Generator(np.random.Philox([self.seed, self.rank, step]))
        drawn = [self._draw(pool, generator) for pool in self._pools for _ in range(self.per_task)]
        lq, hq, mask = (
            torch.from_numpy(np.stack(arrays)[:, None]) for arrays in zip(*drawn, strict=True)
        )
        task = torch.tensor([pool.task.index for pool in self._pools])
        return Batch(lq, hq, mask, task.repeat_interleave(self.per_task))

    def _draw(self, pool: _Pool, generator: np.random.Generator) -> tuple[Array, Array, Array]:
        """One patch (lq, hq, mask); small images share it, each in its own cell."""
        item = pool.pick(generator)
        cells = max(1, self.patch // max(item.shape[1:]))
        size = self.patch // cells
        patch = np.zeros((3, self.patch, self.patch), np.float32)
        for row, column in np.ndindex(cells, cells):
            top, left = row * size, column * size
            # The last cells take what an uneven division leaves over.
            bottom = self.patch if row == cells - 1 else top + size
            right = self.patch if column == cells - 1 else left + size
            crop = self._crop(pool, item, generator)
            patch[:, top:bottom, left:right] = _filled(crop, bottom - top, right - left)
        return patch[0], patch[1], patch[2]

    def _crop(self, pool: _Pool, item: Item, generator: np.random.Generator) -> tuple[Array, Array]:
        """A random, varied and normalised part (lq, hq) of a random slice of an item."""
        lq, hq = pool.crop(item, generator, self.patch)
        for _ in range(_TRIES - 1):
            if (hq > _BACKGROUND[pool.task]).mean() >= 0.05:
                break
            lq, hq = pool.crop(item, generator, self.patch)
        flip = pool.task in self.flip and generator.random() < 0.5
        turns = int(generator.integers(4)) if pool.task in self.rotate else 0
        low, high = spec(pool.task).window
        lq, hq = (
            normalise(np.clip(part, low, high).astype(np.float32), pool.task)
            for part in _vary((lq, hq), flip=flip, turns=turns)
        )
        return lq, hq


@dataclass(frozen=True)
class _Pool:
    """All slices of one task with their chance of being drawn."""

    task: RestorationTask
    dataset: PreparedSet
    items: tuple[Item, ...]
    chances: npt.NDArray[np.float64]
    """Cumulative probability over items."""

    @classmethod
    def of(cls, dataset: PreparedSet, task: RestorationTask, split: str, patch: int) -> _Pool:
        items = dataset.items(task, split)
        if not items:
            raise ValueError(
                f"{dataset.folder} has no {split} items for {task.value}; prepare some first."
            )
        weights = np.array([_weight(item, patch) for item in items])
        return cls(task, dataset, items, np.cumsum(weights) / weights.sum())

    @cached_property
    def pairs(self) -> dict[str, tuple[Stored, Stored]]:
        return {item.name: self.dataset.pair(item) for item in self.items}

    def pick(self, generator: np.random.Generator) -> Item:
        index = int(np.searchsorted(self.chances, generator.random(), side="right"))
        return self.items[min(index, len(self.items) - 1)]

    def crop(self, item: Item, generator: np.random.Generator, patch: int) -> tuple[Stored, Stored]:
        """A random part (lq, hq) of a random slice, at most patch x patch."""
        lq, hq = self.pairs[item.name]
        plane = int(generator.integers(len(lq)))
        top, left = (int(generator.integers(max(n - patch, 0) + 1)) for n in lq.shape[1:])
        window = (plane, slice(top, top + patch), slice(left, left + patch))
        return lq[window], hq[window]


def _weight(item: Item, patch: int) -> float:
    """Patches that cover the item once, times the weights of its contrast and origin."""
    slices, rows, columns = item.shape
    area = min(rows, patch) * min(columns, patch) / patch**2
    weight = SIMULATED_WEIGHT if item.simulated else 1.0
    return slices * area * weight * CONTRAST_WEIGHTS.get(item.contrast or "", 1.0)


def _vary(pair: tuple[Stored, Stored], *, flip: bool, turns: int) -> tuple[Stored, Stored]:
    lq, hq = (np.rot90(patch, turns) for patch in pair)
    return (lq[:, ::-1], hq[:, ::-1]) if flip else (lq, hq)


def _filled(crop: tuple[Array, Array], rows: int, columns: int) -> Array:
    """(lq, hq, mask) replicated to the right and downwards up to a cell, (3, rows, columns)."""
    height, width = crop[0].shape
    border = ((0, rows - height), (0, columns - width))
    mask = np.pad(np.ones((height, width), np.float32), border)
    return np.stack([np.pad(crop[0], border, "edge"), np.pad(crop[1], border, "edge"), mask])
