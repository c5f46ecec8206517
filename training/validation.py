"""Figures of a stage on held-out slices, for the log while it trains and for its gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restoration.diffcode import DiffCode
from restoration.tasks import RestorationTask, denormalise, normalise, spec
from restoration.tiling import pad_to_multiple
from training.manifest import Item
from training.metrics import score
from training.slices import PreparedSet
from training.stages import Stage, seeded_noise

Volume = npt.NDArray[np.float32]
Figures = dict[str, dict[str, float]]
MR_CONTRASTS = ("T2",)  # the contrasts the MR task is judged on


@dataclass(frozen=True)
class Pair:
    """One slice of the evaluation set in physical units, (rows, columns)."""

    task: RestorationTask
    item: str
    index: int
    lq: Volume
    hq: Volume


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
