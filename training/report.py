"""What people see of an evaluation: the tables and the values of each slice."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from restoration.tasks import spec
from training.codebook import CodebookReport
from training.evaluation import CLASSICAL, FIGURES, Evaluation
from training.metrics import AMIR

COLUMNS = (
    "task", "item", "subject", "simulated", "slice", "method", "protocol", "psnr", "ssim", "rmse"
)  # fmt: skip
NOTE = (
    "Differences: PSNR in dB by amir/1, mean over slices [95 % bootstrap interval over subjects]; "
    "with fewer than five subjects each is listed and no significance is claimed."
)


def evaluation_report(summary: Mapping[str, Any]) -> Group:
    """Everything ``diffcode evaluate`` prints: figures, quantities, differences, protocols."""
    parts: list[Any] = [evaluation_table(summary)]
    parts += [table for table in (quantity_table(summary), difference_table(summary)) if table]
    parts += [f"{name}: {text}" for name, text in summary["methods"].items()]
    if slices := summary.get("slices_per_volume"):
        parts.append(f"Only the {slices} central slices of each volume were judged.")
    return Group(*parts)


def evaluation_table(summary: Mapping[str, Any]) -> Table:
    """The shape of the paper's Table 1: PSNR / SSIM / RMSE of each method, task by task.

    A column names the protocol of each row; real and simulated references follow the average.
    """
    columns = list(_columns(summary))
    caption = "\n".join(f"{id}: {text}" for id, text in summary["protocols"].items())
    grid = Table(title=f"{summary['split']}: PSNR dB / SSIM / RMSE", caption=caption)
    for name in ("protocol", "method", *(title for title, _ in columns)):
        grid.add_column(name)
    for protocol in summary["protocols"]:
        for method in summary["methods"]:
            cells = [entry(protocol, method) for _, entry in columns]
            if any(cells):
                grid.add_row(protocol, _name(summary, method), *map(cell, cells))
        grid.add_section()
    return grid


def cell(row: Mapping[str, float] | None) -> str:
    """PSNR / SSIM / RMSE, or a dash."""
    return f"{row['psnr']:.2f} / {row['ssim']:.4f} / {row['rmse']:.4g}" if row else "-"


def _columns(summary: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(title, figures of (protocol, method)) of each column."""

    def of(entry: Mapping[str, Any]) -> Any:
        return lambda protocol, method: entry["protocols"].get(protocol, {}).get(method)

    for task, entry in summary["tasks"].items():
        yield f"{spec(task).label}, {spec(task).units}\n{_size(entry)}", of(entry)
    average = summary["average"]
    yield "average", lambda id, method: average.get(method) if id == AMIR.id else None
    for task, entry in summary["tasks"].items():
        for kind, group in entry.get("groups", {}).items():
            yield f"{spec(task).label}, {kind}\n{_size(group)}", of(group)


def _size(entry: Mapping[str, Any]) -> str:
    return f"{entry['slices']} slices, {entry['subjects']} subjects"


def _name(summary: Mapping[str, Any], method: str) -> str:
    if method != CLASSICAL:
        return method
    used = [entry.get(CLASSICAL, {}).get("method") for entry in summary["tasks"].values()]
    return f"{method} ({'; '.join(name for name in used if name)})"


def quantity_table(summary: Mapping[str, Any]) -> Table | None:
    """Bias of HU, SUV and activity by each method: mean of subjects, and the worst subject."""
    rows = {
        (title, quantity): {m: found.get(quantity) for m, found in entry["quantities"].items()}
        for title, entry in _entries(summary)
        for quantity in dict.fromkeys(q for f in entry["quantities"].values() for q in f)
    }
    if not rows:
        return None
    grid = Table(title="Quantities: mean over subjects (worst subject)")
    for name in ("images", "quantity", "subjects", *summary["methods"]):
        grid.add_column(name)
    for (title, quantity), found in rows.items():
        first = next(value for value in found.values() if value)
        values = [quantity_cell(found.get(method)) for method in summary["methods"]]
        label = f"{quantity}, {first['units']}"
        grid.add_row(title, label, str(first["subjects"]), *values)
    return grid


def quantity_cell(value: Mapping[str, float] | None) -> str:
    """Mean and worst subject, or a dash."""
    return f"{value['mean']:+.2f} ({value['worst']:+.2f})" if value else "-"


def difference_table(summary: Mapping[str, Any]) -> Table | None:
    """PSNR difference of each method to the baseline, with what may be claimed of it."""
    if "baseline" not in summary:
        return None
    grid = Table(title=f"Difference to {summary['baseline']}", caption=NOTE)
    columns = [title for title, _ in _entries(summary)]
    for name in ("method", *columns, "average"):
        grid.add_column(name)
    for method in summary["methods"]:
        if method != summary["baseline"]:
            found = [
                entry["differences"].get(method, {}).get("psnr") for _, entry in _entries(summary)
            ]
            found.append(summary["average_differences"].get(method))
            grid.add_row(method, *map(difference_cell, found))
    return grid


def difference_cell(found: Mapping[str, Any] | None) -> str:
    """Mean with its interval; without one, each subject's difference."""
    if not found:
        return "-"
    text = f"{found['mean']:+.3f}"
    if "interval_95" in found:
        low, high = found["interval_95"]
        return f"{text} [{low:+.3f}, {high:+.3f}]"
    each = ", ".join(f"{name} {value:+.3f}" for name, value in found["subjects"].items())
    return f"{text}, no interval" + (f" ({each})" if each else "")


def _entries(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(title, entry) of each task; the groups instead where a task has both kinds."""
    for task, entry in summary["tasks"].items():
        if "groups" not in entry:
            yield spec(task).label, entry
        for kind, group in entry.get("groups", {}).items():
            yield f"{spec(task).label}, {kind}", group


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
    """One line per slice, method and protocol; refuses to overwrite."""
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for s in evaluation.scores:
            for protocol, score in s.scores.items():
                writer.writerow(
                    [s.task.value, s.item, s.subject, s.simulated, s.index, s.method, protocol]
                    + [f"{getattr(score, figure):.6g}" for figure in FIGURES]
                )
