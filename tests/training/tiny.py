"""A prepared set of small phantoms and a recipe that trains on it within seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from restoration.tasks import RestorationTask, spec
from training.degrade import truncate_kspace
from training.manifest import Item, PreparedManifest
from training.phantoms import body_pet, brain_t2, chest_ct
from training.recipe import Recipe
from training.slices import PreparedSet

Volume = npt.NDArray[np.float32]
CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS
SPLITS = {"train": 1, "val": 2}


def tiny_recipe(**tables: dict[str, Any]) -> Recipe:
    """A network of a few thousand weights; ``arch``, ``stage1`` … change single values."""
    stage = {"steps": 6, "lr": 2e-3, "per_task": 1, "patch": 32, "log_every": 2}
    values: dict[str, Any] = {
        "arch": {
            "channels": [4, 8, 8, 8], "blocks": [1, 1, 1, 1], "latent_dim": 8, "codes": 16,
            "depths": 2, "tlc_train": 32,
        },
        "stage1": stage
        | {"ae_warmup": 2, "init_tokens": 60, "restart_every": 2, "gate_tokens": 100},
        "stage2": stage,
        "stage3": stage,
        "data": {"validation_slices": 1, "flip": ["ct_denoise"], "rotate": ["mri_sr"]},
    }  # fmt: skip
    for name, table in tables.items():
        values[name] = values[name] | table
    return Recipe.from_dict(values)


def recipe_file(folder: Path, recipe: Recipe) -> Path:
    """The recipe as TOML: numbers, texts and lists are written as JSON writes them."""
    tables = recipe.to_dict()
    text = [f"{k} = {json.dumps(v)}" for k, v in tables.items() if not isinstance(v, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            text += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    path = folder / "recipe.toml"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    assert Recipe.load(path) == recipe
    return path


def tiny_set(folder: Path, size: int = 64) -> PreparedSet:
    """Two slices of each phantom for training and two for validation.

    MR is truncated in k-space; CT and PET get white noise, which is enough to learn from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items = [
        _write(folder, task, split, *_pair(task, size, seed))
        for split, seed in SPLITS.items()
        for task in RestorationTask
    ]
    operators = {"mri_sr": {"name": "kspace-truncation", "version": 1, "params": {"factor": 4.0}}}
    PreparedManifest(seed=0, operators=operators, items=tuple(items)).write(folder)
    return PreparedSet.open(folder)


def _pair(task: RestorationTask, size: int, seed: int) -> tuple[Volume, Volume]:
    noise = np.random.default_rng(seed)
    if task is MR:
        hq = brain_t2(2, size, seed).volume
        return truncate_kspace(hq), hq
    if task is CT:
        hq = chest_ct(2, size, seed).volume
        return (hq + noise.normal(0, 60, hq.shape)).astype(np.float32), hq
    hq = body_pet(2, size, seed).volume
    noisy = hq + noise.normal(0, 1, hq.shape) * np.sqrt(0.2 * hq)
    return noisy.astype(np.float32), hq


def _write(folder: Path, task: RestorationTask, split: str, lq: Volume, hq: Volume) -> Item:
    name = f"{split}-{task.value}"
    np.save(folder / f"{name}.lq.npy", lq)
    np.save(folder / f"{name}.hq.npy", hq)
    slices, rows, columns = hq.shape
    return Item(
        name=name,
        task=task.value,
        split=split,
        subject=name,
        source="phantom (made by code)",
        licence="Apache-2.0",
        units=spec(task).units,
        spacing_mm=(3.0, 1.0, 1.0),
        hq=f"{name}.hq.npy",
        lq=f"{name}.lq.npy",
        shape=(slices, rows, columns),
        simulated=True,
        sha256={},
        contrast="T2" if task is MR else None,
    )
