"""Patches from a prepared folder: pairs on disk or on the device, and batches by the step alone.

No random state is kept: batch k is drawn from (seed, rank, k), so a run that stops and resumes
sees what an uninterrupted one sees. A patch is cut where its pair lies: on a GPU that holds the
whole set nothing is moved to it during the training.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restoration.tasks import RestorationTask, normalise, spec
from training.manifest import Item, ManifestError, PreparedManifest

Place = tuple[int, slice, slice]
"""Slice, rows and columns."""

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

    def reference(self, item: Item, place: Place) -> Tensor:
        """A part of a good image, read from the disk: float32, physical units."""
        return torch.from_numpy(np.array(self._open_pairs(item)[1][place], np.float32))

    def degraded(self, item: Item, place: Place, step: int) -> Tensor:
        """The same part of the bad image; the same at every step."""
        return torch.from_numpy(np.array(self._open_pairs(item)[0][place], np.float32))

    def _open_pairs(self, item: Item) -> tuple[Stored, Stored]:
        if item.name not in self._opened:
            self._opened[item.name] = self.pair(item)
        return self._opened[item.name]

    @cached_property
    def _opened(self) -> dict[str, tuple[Stored, Stored]]:
        return {}


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


class Pairs(Protocol):
    """Where pairs lie: a PreparedSet on disk, a ResidentSet in the memory of a device."""

    @property
    def folder(self) -> Path: ...

    def items(
        self, task: RestorationTask | str | None = None, split: str | None = None
    ) -> tuple[Item, ...]: ...

    def reference(self, item: Item, place: Place) -> Tensor:
        """A part of a slice of the good image: (rows, columns), physical units, float32."""

    def degraded(self, item: Item, place: Place, step: int) -> Tensor:
        """The same part of the bad image, as it is at this step of the training."""


class PatchSampler:
    """Draw equally many patches of each task; ``batch(step)`` is a pure function of the step.

    ``flip`` and ``rotate`` name the tasks with random left-right flips and quarter turns. Images
    below half the patch size share one patch; whatever they do not fill is replicated and masked
    with 0. Values are clipped to the window. At least the share ``simulated_pet`` of the PET
    patches comes from simulated whole bodies.
    Raises ValueError when a task has no items in the split, PET has none that are simulated
    though some are asked for, or the patch is not a multiple of 8.
    """

    def __init__(
        self,
        dataset: Pairs,
        *,
        split: str,
        patch: int,
        per_task: int,
        seed: int,
        tasks: Sequence[RestorationTask | str] = tuple(RestorationTask),
        flip: Collection[str] = (),
        rotate: Collection[str] = (),
        simulated_pet: float = 0.0,
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
        self._pools = [_Pool.of(dataset, task, split, patch, simulated_pet) for task in self.tasks]

    def batch(self, step: int) -> Batch:
        """The patches of a step: ``per_task`` of each task, in the order of ``tasks``."""
        generator = np.random.Generator(np.random.Philox([self.seed, self.rank, step]))
        drawn = [
            self._draw(pool, generator, step) for pool in self._pools for _ in range(self.per_task)
        ]
        lq, hq, mask = torch.stack(drawn)[:, :, None].unbind(1)
        task = torch.tensor([pool.task.index for pool in self._pools])
        return Batch(lq, hq, mask, task.repeat_interleave(self.per_task))

    def _draw(self, pool: _Pool, generator: np.random.Generator, step: int) -> Tensor:
        """One patch (lq, hq, mask); small images share it, each in its own cell."""
        item = pool.pick(generator)
        cells = max(1, self.patch // max(item.shape[1:]))
        size = self.patch // cells
        # The last cells take what an uneven division leaves over.
        ends = [*range(size, cells * size, size), self.patch]
        rows = []
        for row in range(cells):
            crops = [self._crop(pool, item, generator, step) for _ in range(cells)]
            height = ends[row] - row * size
            parts = [
                _filled(crop, height, ends[column] - column * size)
                for column, crop in enumerate(crops)
            ]
            rows.append(torch.cat(parts, 2))
        return torch.cat(rows, 1)

    def _crop(
        self, pool: _Pool, item: Item, generator: np.random.Generator, step: int
    ) -> tuple[Tensor, Tensor]:
        """A random, varied and normalised part (lq, hq) of a random slice of an item."""
        place = pool.place(item, generator, self.patch)
        hq = pool.dataset.reference(item, place)
        for _ in range(_TRIES - 1):
            if not _is_background(hq, pool.task):
                break
            place = pool.place(item, generator, self.patch)
            hq = pool.dataset.reference(item, place)
        lq = pool.dataset.degraded(item, place, step)
        flip = pool.task in self.flip and generator.random() < 0.5
        turns = int(generator.integers(4)) if pool.task in self.rotate else 0
        low, high = spec(pool.task).window
        lq, hq = (
            normalise(part.clamp(low, high), pool.task)
            for part in _vary((lq, hq), flip=flip, turns=turns)
        )
        return lq, hq


@dataclass(frozen=True)
class _Pool:
    """All slices of one task with their chance of being drawn."""

    task: RestorationTask
    dataset: Pairs
    items: tuple[Item, ...]
    chances: npt.NDArray[np.float64]
    """Cumulative probability over items."""

    @classmethod
    def of(
        cls,
        dataset: Pairs,
        task: RestorationTask,
        split: str,
        patch: int,
        simulated_pet: float,
    ) -> _Pool:
        items = dataset.items(task, split)
        if not items:
            raise ValueError(
                f"{dataset.folder} has no {split} items for {task.value}; prepare some first."
            )
        weights = np.array([_weight(item, patch) for item in items])
        if task is RestorationTask.PET_SYNTHESIS:
            simulated = np.array([item.simulated for item in items])
            if simulated_pet > 0 and not simulated.any():
                raise ValueError(
                    f"{dataset.folder} has no simulated PET, and the recipe asks for a share of "
                    f"{simulated_pet:g}: prepare it from CT, or set data.simulated_pet = 0."
                )
            weights = _with_share(weights, simulated, simulated_pet)
        return cls(task, dataset, items, np.cumsum(weights) / weights.sum())

    def pick(self, generator: np.random.Generator) -> Item:
        index = int(np.searchsorted(self.chances, generator.random(), side="right"))
        return self.items[min(index, len(self.items) - 1)]

    def place(self, item: Item, generator: np.random.Generator, patch: int) -> Place:
        """A random part of a random slice, at most patch x patch."""
        slices, *shape = item.shape
        plane = int(generator.integers(slices))
        top, left = (int(generator.integers(max(n - patch, 0) + 1)) for n in shape)
        return plane, slice(top, top + patch), slice(left, left + patch)


def _is_background(hq: Tensor, task: RestorationTask) -> bool:
    return int((hq > _BACKGROUND[task]).sum()) < 0.05 * hq.numel()


def _weight(item: Item, patch: int) -> float:
    """Patches that cover the item once, times the weights of its contrast and origin."""
    slices, rows, columns = item.shape
    area = min(rows, patch) * min(columns, patch) / patch**2
    weight = SIMULATED_WEIGHT if item.simulated else 1.0
    return slices * area * weight * CONTRAST_WEIGHTS.get(item.contrast or "", 1.0)


def _with_share(
    weights: npt.NDArray[np.float64], chosen: npt.NDArray[np.bool_], share: float
) -> npt.NDArray[np.float64]:
    """The weights, those of ``chosen`` raised until they are at least ``share`` of the sum."""
    within, others = weights[chosen].sum(), weights[~chosen].sum()
    if others == 0 or within >= share * (within + others):
        return weights
    return np.where(chosen, weights * (share / (1 - share) * others / within), weights)


def _vary(pair: tuple[Tensor, Tensor], *, flip: bool, turns: int) -> tuple[Tensor, Tensor]:
    lq, hq = (torch.rot90(patch, turns) for patch in pair)
    return (lq.flip(1), hq.flip(1)) if flip else (lq, hq)


def _filled(crop: tuple[Tensor, Tensor], rows: int, columns: int) -> Tensor:
    """(lq, hq, mask) replicated to the right and downwards up to a cell, (3, rows, columns)."""
    height, width = crop[0].shape
    if (height, width) == (rows, columns):
        return torch.stack([*crop, torch.ones_like(crop[0])])
    down = torch.arange(rows, device=crop[0].device)
    along = torch.arange(columns, device=crop[0].device)
    mask = ((down < height)[:, None] & (along < width)[None, :]).float()
    down, along = down.clamp(max=height - 1), along.clamp(max=width - 1)
    lq, hq = (part[down][:, along] for part in crop)
    return torch.stack([lq, hq, mask])
