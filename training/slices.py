"""Patches from a prepared folder: pairs on disk or on the device, and batches by the step alone.

No random state is kept: batch k is drawn from (seed, rank, k), so a run that stops and resumes
sees what an uninterrupted one sees. What is drawn is decided on the host; the patches are cut where
the pairs lie, so on a GPU that holds the whole set nothing but the draw is moved to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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
from training.patches import Batch, Crop, cut

Place = tuple[int, slice, slice]
"""Slice, rows and columns."""

Stored = npt.NDArray[np.float32 | np.int16]

Patches = tuple[Tensor, Tensor, Tensor]
"""lq, hq and mask (patches, rows, columns), physical units."""

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
class Draw:
    """A part of a slice that was drawn, how it is varied, and where in the batch it goes."""

    item: Item
    place: Place
    turns: int  #: quarter turns
    flip: bool  #: left-right, after the turns
    patch: int  #: index in the batch
    cell: tuple[int, int, int, int]  #: top, left, height and width inside the patch

    def crop(self, start: int, stride: int) -> Crop:
        """The same in a buffer where its first pixel has the index ``start``."""
        (rows, columns), (_, down, along) = self.item.shape[1:], self.place
        shape = (min(down.stop, rows) - down.start, min(along.stop, columns) - along.start)
        return Crop(start, stride, *shape, self.turns, self.flip, self.patch, self.cell)


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

    def reference(self, item: Item, place: Place) -> Stored:
        """A part of a good image: (rows, columns), physical units."""
        return self._open_pairs(item)[1][place]

    def patches(self, draws: Sequence[Draw], count: int, size: int, step: int) -> Patches:
        """The patches that are drawn, read from the disk; the same at every step."""
        parts = [
            [np.array(volume[draw.place], np.float32) for volume in self._open_pairs(draw.item)]
            for draw in draws
        ]
        starts = np.cumsum([0, *(lq.size for lq, _ in parts)])
        crops = [
            draw.crop(int(start), lq.shape[1])
            for draw, start, (lq, _) in zip(draws, starts, parts, strict=False)
        ]
        images = [
            torch.from_numpy(np.concatenate([part[which].reshape(-1) for part in parts]))
            for which in (0, 1)
        ]
        (lq, hq), mask = cut(crops, images, count, size)
        return lq, hq, mask

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


class Pairs(Protocol):
    """Where pairs lie: a PreparedSet on disk, a ResidentSet in the memory of a device."""

    @property
    def folder(self) -> Path: ...

    def items(
        self, task: RestorationTask | str | None = None, split: str | None = None
    ) -> tuple[Item, ...]: ...

    def reference(self, item: Item, place: Place) -> Stored:
        """A part of a slice of the good image, on the host: (rows, columns), physical units."""

    def patches(self, draws: Sequence[Draw], count: int, size: int, step: int) -> Patches:
        """The ``count`` patches that the draws make up, as they are at this step."""


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
        self._dataset = dataset
        self._pools = [_Pool.of(dataset, task, split, patch, simulated_pet) for task in self.tasks]
        index = torch.tensor([task.index for task in self.tasks])
        self._tasks = index.repeat_interleave(per_task)

    def batch(self, step: int) -> Batch:
        """The patches of a step: ``per_task`` of each task, in the order of ``tasks``."""
        generator = np.random.Generator(np.random.Philox([self.seed, self.rank, step]))
        pools = [pool for pool in self._pools for _ in range(self.per_task)]
        draws = [
            draw for patch, pool in enumerate(pools) for draw in self._draw(pool, patch, generator)
        ]
        found = self._dataset.patches(draws, len(pools), self.patch, step)
        lq, hq, mask = (image[:, None] for image in found)
        return Batch(self._normalised(lq), self._normalised(hq), mask, self._tasks)

    def _draw(self, pool: _Pool, patch: int, generator: np.random.Generator) -> Iterator[Draw]:
        """The parts of one patch; small images share it, each in its own cell."""
        item = pool.pick(generator)
        cells = max(1, self.patch // max(item.shape[1:]))
        size = self.patch // cells
        # The last cells take what an uneven division leaves over.
        ends = [*range(size, cells * size, size), self.patch]
        starts = [0, *ends[:-1]]
        for top, bottom in zip(starts, ends, strict=True):
            for left, right in zip(starts, ends, strict=True):
                place = self._place(pool, item, generator)
                flip = pool.task in self.flip and generator.random() < 0.5
                turns = int(generator.integers(4)) if pool.task in self.rotate else 0
                cell = (top, left, bottom - top, right - left)
                yield Draw(item, place, turns, flip, patch, cell)

    def _place(self, pool: _Pool, item: Item, generator: np.random.Generator) -> Place:
        """A random part of a random slice; one of background only is drawn again."""
        place = pool.place(item, generator, self.patch)
        for _ in range(_TRIES - 1):
            if not _is_background(self._dataset.reference(item, place), pool.task):
                break
            place = pool.place(item, generator, self.patch)
        return place

    def _normalised(self, images: Tensor) -> Tensor:
        parts = images.split(self.per_task)  # type: ignore[no-untyped-call]
        return torch.cat(
            [
                normalise(part.clamp(*spec(task).window), task)
                for task, part in zip(self.tasks, parts, strict=True)
            ]
        )


@dataclass(frozen=True)
class _Pool:
    """All slices of one task with their chance of being drawn."""

    task: RestorationTask
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
        return cls(task, items, np.cumsum(weights) / weights.sum())

    def pick(self, generator: np.random.Generator) -> Item:
        index = int(np.searchsorted(self.chances, generator.random(), side="right"))
        return self.items[min(index, len(self.items) - 1)]

    def place(self, item: Item, generator: np.random.Generator, patch: int) -> Place:
        """A random part of a random slice, at most patch x patch."""
        slices, *shape = item.shape
        plane = int(generator.integers(slices))
        top, left = (int(generator.integers(max(n - patch, 0) + 1)) for n in shape)
        return plane, slice(top, top + patch), slice(left, left + patch)


def _is_background(hq: Stored, task: RestorationTask) -> bool:
    return bool(np.count_nonzero(hq > _BACKGROUND[task]) < 0.05 * hq.size)


def _weight(item: Item, patch: int) -> float:
    """Patches that cover the item once, times its weight and those of its contrast and origin."""
    slices, rows, columns = item.shape
    area = min(rows, patch) * min(columns, patch) / patch**2
    weight = item.weight * (SIMULATED_WEIGHT if item.simulated else 1.0)
    return slices * area * weight * CONTRAST_WEIGHTS.get(item.contrast or "", 1.0)


def _with_share(
    weights: npt.NDArray[np.float64], chosen: npt.NDArray[np.bool_], share: float
) -> npt.NDArray[np.float64]:
    """The weights, those of ``chosen`` raised until they are at least ``share`` of the sum."""
    within, others = weights[chosen].sum(), weights[~chosen].sum()
    if others == 0 or within >= share * (within + others):
        return weights
    return np.where(chosen, weights * (share / (1 - share) * others / within), weights)
