"""The whole training set in the memory of a device, and the CT noise drawn anew there.

A few hundred slices fit into any GPU: all patches of a batch are then cut by one gather where the
network reads them. With ``fresh_every`` the low-dose CT of the manifest's operator is made again
after so many steps, with other noise, by the same code that ``prepare`` runs on the CPU.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from restoration.tasks import RestorationTask
from training.degrade import CtNoiseInsertion
from training.manifest import Item, ManifestError
from training.patches import cut
from training.slices import Draw, Patches, Place, PreparedSet, Stored


class ResidentSet:
    """A PreparedSet whose pairs of some tasks and one split lie on a device, as float32.

    ``fresh_every`` steps share one draw of the CT noise; 0 keeps that of ``prepare``. Which noise
    a step sees follows from the seed and the step alone. Raises ManifestError when the manifest's
    CT operator is unknown here.
    """

    def __init__(
        self,
        dataset: PreparedSet,
        device: torch.device | str,
        *,
        tasks: Sequence[RestorationTask | str] = tuple(RestorationTask),
        split: str = "train",
        fresh_every: int = 0,
        seed: int = 0,
    ) -> None:
        self.dataset, self.device = dataset, torch.device(device)
        self.fresh_every, self.seed = fresh_every, seed
        self._scan = _ct_operator(dataset) if fresh_every else None
        held = [item for task in tasks for item in dataset.items(task, split)]
        ends = np.cumsum([math.prod(item.shape) for item in held])
        self._start = dict(zip((i.name for i in held), (0, *ends[:-1].tolist()), strict=True))
        pixels = int(ends[-1]) if held else 0
        self._lq, self._hq = (torch.empty(pixels, device=self.device) for _ in range(2))
        for item in held:
            for buffer, volume in zip((self._lq, self._hq), dataset.pair(item), strict=True):
                self._part(buffer, item).copy_(torch.from_numpy(np.array(volume)))
        self._drawn: dict[str, int] = {}

    @property
    def folder(self) -> Path:
        return self.dataset.folder

    @property
    def bytes(self) -> int:
        """Memory of the pairs."""
        return sum(t.numel() * t.element_size() for t in (self._lq, self._hq))

    def items(
        self, task: RestorationTask | str | None = None, split: str | None = None
    ) -> tuple[Item, ...]:
        """The items of a task and a split, or of all."""
        return self.dataset.items(task, split)

    def reference(self, item: Item, place: Place) -> Stored:
        """A part of a good image, on the host: (rows, columns), physical units."""
        return self.dataset.reference(item, place)

    def patches(self, draws: Sequence[Draw], count: int, size: int, step: int) -> Patches:
        """The patches that are drawn, on the device, with the noise of this step."""
        if self.fresh_every:
            for item in {draw.item.name: draw.item for draw in draws}.values():
                if item.task == RestorationTask.CT_DENOISE.value:
                    self._draw_noise(item, step // self.fresh_every)
        crops = [draw.crop(self._first_pixel(draw), draw.item.shape[2]) for draw in draws]
        (lq, hq), mask = cut(crops, (self._lq, self._hq), count, size)
        return lq, hq, mask

    def _first_pixel(self, draw: Draw) -> int:
        (_, rows, columns), (plane, down, along) = draw.item.shape, draw.place
        offset = (plane * rows + down.start) * columns + along.start
        return int(self._start[draw.item.name] + offset)

    def _part(self, buffer: Tensor, item: Item) -> Tensor:
        """The volume of an item inside a buffer: a view (slices, rows, columns)."""
        return buffer.narrow(0, self._start[item.name], math.prod(item.shape)).view(item.shape)

    def _draw_noise(self, item: Item, draw: int) -> None:
        """Make the low-dose CT of an item again unless it has this draw; 0 is that of prepare."""
        if self._drawn.get(item.name, 0) == draw or item.acquired_lq or self._scan is None:
            return
        if draw == 0:
            lq = torch.from_numpy(np.array(self.dataset.pair(item)[0]))
        else:
            rng = np.random.default_rng([self.seed, zlib.crc32(item.name.encode()), draw])
            lq = redegraded(self._part(self._hq, item), item, self._scan, rng)
        self._part(self._lq, item).copy_(lq)
        self._drawn[item.name] = draw


def redegraded(hq: Tensor, item: Item, scan: CtNoiseInsertion, rng: np.random.Generator) -> Tensor:
    """Low-dose CT (slices, rows, columns) in HU of a good one, on the device where that lies."""
    if item.noise_hu is None:
        raise ManifestError(f"{item.name} has no measured noise: prepare it again.")
    return scan.insert(hq.float(), pixel_mm=item.spacing_mm[1], noise_hu=item.noise_hu, rng=rng)


def _ct_operator(dataset: PreparedSet) -> CtNoiseInsertion:
    record = dataset.manifest.operators.get(RestorationTask.CT_DENOISE.value, {})
    known = (CtNoiseInsertion.name, CtNoiseInsertion.version)
    if (record.get("name"), record.get("version")) != known:
        raise ManifestError(f"{dataset.folder}: the CT operator is not {known[0]} {known[1]}.")
    return CtNoiseInsertion(**record["params"])
