"""Series of a prepared folder, restored once and kept: what calibration and the harm bench look at.

Slices are taken whole: a part of a CT slice has less air and no table, fewer pixels of each tissue
and fewer chances of a strong blob, and levels learnt from parts fail whole slices.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from restoration.domain import outside
from restoration.kspace import SAME_GRID
from restoration.restorer import Restoration, Restorer
from restoration.tasks import RestorationTask
from training.manifest import Item
from training.slices import PreparedSet

Volume = npt.NDArray[np.float32]
VERSION = 1  # of what is kept


@dataclass(frozen=True)
class Series:
    """A degraded series, its reference, and what the model made of it; physical units."""

    name: str
    task: RestorationTask
    subject: str
    kept_out: bool  #: not of the split that was trained on
    spacing_mm: tuple[float, float, float]
    lq: Volume
    hq: Volume
    made: Restoration


def in_domain(restorer: Restorer, item: Item) -> bool:
    """Whether the model states that it may be used at the spacing of an item."""
    domain = restorer.manifest.domain.get(item.task)
    spacing, thickness = item.spacing_mm[1:], item.spacing_mm[0]
    facts = {"pixel_spacing_mm": spacing, "slice_thickness_mm": thickness}
    return domain is None or not outside(domain, facts)


def restored_series(
    restorer: Restorer,
    chosen: Sequence[tuple[PreparedSet, Item]],
    *,
    most: int,
    cache: Path | None = None,
) -> Iterator[Series]:
    """Restore at most `most` neighbouring slices of each item, or read them where they are kept."""
    for dataset, item in chosen:
        lq, hq = _part(dataset, item, most)
        task = RestorationTask(item.task)
        made = restored(restorer, lq, task, cache)
        yield Series(
            name=item.name,
            task=task,
            subject=item.subject,
            kept_out=item.split != "train",
            spacing_mm=item.spacing_mm,
            lq=lq,
            hq=hq,
            made=made,
        )


def part(series: Series, slices: slice) -> Series:
    """Some neighbouring slices of a series, as they were restored in it."""
    said = {
        name: value[slices] if isinstance(value, list) else value
        for name, value in series.made.diagnostics.items()
    }
    made = replace(series.made, planes=series.made.volume[slices], diagnostics=said)
    return replace(series, lq=series.lq[slices], hq=series.hq[slices], made=made)


def _part(dataset: PreparedSet, item: Item, most: int) -> tuple[Volume, Volume]:
    start = max(0, (item.shape[0] - most) // 2)
    lq, hq = (np.array(volume[start : start + most], np.float32) for volume in dataset.pair(item))
    return lq, hq


def restored(
    restorer: Restorer, lq: Volume, task: RestorationTask, cache: Path | None
) -> Restoration:
    """What the model makes of a series by itself, or what it made of it before."""
    if cache is None:
        return restorer.restore(lq, task)
    parts = (restorer.manifest.sha256, task.value, str(VERSION), str(lq.shape))
    key = hashlib.sha256("|".join(parts).encode() + lq.tobytes()).hexdigest()
    path = cache / f"{key[:32]}.npz"
    if path.is_file():
        return _read(path)
    made = restorer.restore(lq, task)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.npz")
    said = json.dumps({"flags": made.flags, "seconds": made.seconds, "said": made.diagnostics})
    np.savez(unfinished, volume=made.volume, said=np.array(said))
    os.replace(unfinished, path)
    return made


def _read(path: Path) -> Restoration:
    with np.load(path, allow_pickle=False) as stored:
        values: dict[str, Any] = json.loads(str(stored["said"]))
        volume = stored["volume"]
    flags = tuple(values["flags"])
    return Restoration(volume, flags, values["seconds"], values["said"], SAME_GRID)
