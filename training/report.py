"""What people see of an evaluation: the table, the values per slice, the pictures."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from restoration.tasks import RestorationTask, spec
from training.classical import Classical
from training.codebook import CodebookReport
from training.evaluate import (
    METHODS,
    MR_CONTRASTS,
    Evaluation,
    Restore,
    Volume,
    evaluation_items,
)
from training.metrics import WINDOWS
from training.slices import PreparedSet

COLUMNS = ("task", "item", "subject", "simulated", "slice", "method", "psnr", "ssim", "rmse")
AVERAGE = "average"
# Reading windows: lung and soft tissue together for CT, inverted grey up to SUV 5 for PET.
DISPLAY: dict[RestorationTask, tuple[float, float, str]] = {
    RestorationTask.MRI_SR: (0.0, 1200.0, "gray"),
    RestorationTask.CT_DENOISE: (-160.0, 240.0, "gray"),
    RestorationTask.PET_SYNTHESIS: (0.0, 5.0, "gray_r"),
}


def evaluation_table(summary: Mapping[str, Any]) -> Table:
    """The shape of the paper's Table 1: PSNR / SSIM / RMSE of each method, task by task."""
    tasks = list(summary["tasks"])
    grid = Table(title=f"{summary['split']}: PSNR dB / SSIM / RMSE", caption=summary["protocol"])
    grid.add_column("method")
    for task in tasks:
        entry = summary["tasks"][task]
        label = f"{spec(task).label}, {spec(task).units}"
        grid.add_column(f"{label}\n{entry['slices']} slices, {entry['subjects']} subjects")
    grid.add_column(AVERAGE)
    for method in METHODS:
        rows = [summary["tasks"][task].get(method) for task in tasks]
        if any(rows):
            grid.add_row(_name(summary, method), *map(_cell, rows), _cell(_mean(rows)))
    return grid


def _name(summary: Mapping[str, Any], method: str) -> str:
    used = (e.get(method, {}).get("method") for e in summary["tasks"].values())
    names = [name for name in used if name]
    return f"{method} ({', '.join(names)})" if names else method


def _cell(row: Mapping[str, float] | None) -> str:
    return f"{row['psnr']:.2f} / {row['ssim']:.4f} / {row['rmse']:.4g}" if row else "-"


def _mean(rows: list[Mapping[str, float] | None]) -> dict[str, float] | None:
    """The mean over tasks; RMSE mixes units, as it does in the paper."""
    present = [row for row in rows if row]
    if len(present) < len(rows):
        return None
    return {k: float(np.mean([row[k] for row in present])) for k in ("psnr", "ssim", "rmse")}


def codebook_dict(reports: Sequence[CodebookReport]) -> dict[str, Any]:
    """What ``diffcode codebook inspect --json`` prints."""
    return {r.task: {k: v for k, v in asdict(r).items() if k != "task"} for r in reports}


def codebook_table(reports: Sequence[CodebookReport]) -> Table:
    """Usage and perplexity of each codebook, usage and remaining error at each depth."""
    grid = Table(title="codebooks")
    for column in ("task", "tokens", "usage", "perplexity", "usage by depth", "error by depth"):
        grid.add_column(column)
    for r in reports:
        usages = " ".join(f"{u:.0%}" for u in r.depth_usage)
        errors = " ".join(f"{e:.3f}" for e in r.relative_error)
        grid.add_row(r.task, str(r.tokens), f"{r.usage:.1%}", f"{r.perplexity:.0f}", usages, errors)
    return grid


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """One line per slice and method; refuses to overwrite."""
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for s in evaluation.scores:
            writer.writerow(
                [s.task.value, s.item, s.subject, s.simulated, s.index, s.method]
                + [f"{value:.6g}" for value in (s.score.psnr, s.score.ssim, s.score.rmse)]
            )


def write_figures(
    dataset: PreparedSet,
    restore: Restore,
    methods: Mapping[RestorationTask, Classical],
    tasks: list[RestorationTask],
    split: str,
    folder: Path,
) -> list[Path]:
    """One PNG per task: the middle slice of the largest item by each method, and its error."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in tasks:
        items = evaluation_items(dataset, task, split, MR_CONTRASTS)
        item = max(items, key=lambda item: item.shape[1] * item.shape[2])
        lq, hq = (np.array(volume, np.float32) for volume in dataset.pair(item))
        middle = len(lq) // 2
        images = {"input": lq[middle]}
        if task in methods:
            images[methods[task].label] = methods[task].apply(lq[middle])
        images["restored"] = restore(lq, item)[middle]
        path = folder / f"{task.value}.png"
        _draw(task, images, hq[middle], path)
        written.append(path)
    return written


def _draw(task: RestorationTask, images: Mapping[str, Volume], truth: Volume, path: Path) -> None:
    """Images above, their difference from the reference below; refuses to overwrite."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low, high, palette = DISPLAY[task]
    span = 0.25 * (high - low)
    columns = [*images.items(), ("reference", truth)]
    figure = Figure(figsize=(3.2 * len(columns), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, image) in enumerate(columns):
        above = figure.add_subplot(2, len(columns), i + 1, title=name)
        above.imshow(image, cmap=palette, vmin=low, vmax=high)
        below = figure.add_subplot(2, len(columns), len(columns) + i + 1)
        below.imshow(_error(image, truth, task), cmap="seismic", vmin=-span, vmax=span)
        for axes in (above, below):
            axes.set_axis_off()
    units = spec(task).units
    figure.suptitle(f"{spec(task).label}; below: error, ±{span:g} {units}")
    with path.open("xb") as file:
        figure.savefig(file, dpi=100)


def _error(image: Volume, truth: Volume, task: RestorationTask) -> Volume:
    low, high = WINDOWS[task]
    difference: Volume = image.clip(low, high) - truth.clip(low, high)
    return difference
