"""The whole training set in the memory of a device, and the CT noise drawn anew there.

A few hundred slices fit into any GPU: patches are then cut, turned and normalised where the
network reads them. With ``fresh_every`` the low-dose CT of the manifest's operator is made again
after so many steps, with other noise, by the same code that ``prepare`` runs on the CPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from restoration.tasks import RestorationTask
from training.degrade import CtNoiseInsertion
from training.manifest import Item, ManifestError
from training.slices import Place, PreparedSet


class ResidentSet:
    """A PreparedSet whose pairs of some tasks and one split lie on a device.

    Good CT stays int16 there and the rest float32, as on the disk. ``fresh_every`` steps share one
    draw of the CT noise; 0 keeps that of ``prepare``. Which noise a step sees follows from the
    seed and the step alone. Raises ManifestError when the manifest's CT operator is unknown here.
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
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for task in tasks:
            for item in dataset.items(task, split):
                lq, hq = (
                    torch.from_numpy(np.array(volume)).to(self.device)
                    for volume in dataset.pair(item)
                )
                self._pairs[item.name] = lq, hq
        self._drawn: dict[str, int] = {}

    @property
    def folder(self) -> Path:
        return self.dataset.folder

    @property
    def bytes(self) -> int:
        """Memory of the pairs."""
        return sum(t.numel() * t.element_size() for pair in self._pairs.values() for t in pair)

    def items(
        self, task: RestorationTask | str | None = None, split: str | None = None
    ) -> tuple[Item, ...]:
        """The items of a task and a split, or of all."""
        return self.dataset.items(task, split)

    def reference(self, item: Item, place: Place) -> Tensor:
        """A part of a good image, on the device: float32, physical units."""
        return self._pairs[item.name][1][place].float()

    def degraded(self, item: Item, place: Place, step: int) -> Tensor:
        """The same part of the bad image, as it is at this step."""
        if self.fresh_every and item.task == RestorationTask.CT_DENOISE.value:
            self._draw_noise(item, step // self.fresh_every)
        return self._pairs[item.name][0][place]

    def _draw_noise(self, item: Item, draw: int) -> None:
        """Make the low-dose CT of an item again unless it has this draw; 0 is that of prepare."""
        if self._drawn.get(item.name, 0) == draw or item.acquired_lq or self._scan is None:
            return
        _, hq = self._pairs[item.name]
        if draw == 0:
            lq = torch.from_numpy(np.array(self.dataset.pair(item)[0])).to(self.device)
        else:
            rng = np.random.default_rng([self.seed, zlib.crc32(item.name.encode()), draw])
            lq = redegraded(hq, item, self._scan, rng)
        self._pairs[item.name] = lq, hq
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
