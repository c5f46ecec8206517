"""What people see of a ladder: the table of its rungs, what each step is worth, what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from training.report import NOTE, difference_cell, evaluation_report


def ladder_report(summary: Mapping[str, Any]) -> Group:
    """Everything ``diffcode ladder`` prints."""
    return Group(
        evaluation_report(summary["evaluation"]), step_table(summary), "\n".join(notes(summary))
    )


def step_table(summary: Mapping[str, Any]) -> Table:
    """Each rung minus the one below it; the last column has the average of each seed."""
    steps = summary["steps"]
    tasks = list(dict.fromkeys(task for step in steps for task in step["tasks"]))
    grid = Table(title="Steps of the ladder", caption=NOTE)
    for name in ("step", *tasks, "average", "average by seed"):
        grid.add_column(name)
    for step in steps:
        cells = [difference_cell(step["tasks"].get(task)) for task in tasks]
        seeds = " ".join(f"{seed}: {mean:+.3f}" for seed, mean in step.get("by_seed", {}).items())
        grid.add_row(
            f"{step['from']} → {step['to']}", *cells, difference_cell(step["average"]), seeds or "-"
        )
    return grid


def notes(summary: Mapping[str, Any]) -> Iterator[str]:
    """Budget, seeds, gates and what is not finished, one line each."""
    for stage, given in summary["budget"].items():
        yield (
            f"{stage}: {given['steps']} steps of {given['patches_per_step']} patches of "
            f"{given['patch']} pixels, learning rate {given['lr']:g} to {given['lr_final']:g}"
        )
    for rung, seeds in summary["seeds"].items():
        yield f"{rung}: {len(seeds)} seed(s), {', '.join(map(str, seeds))}"
    if summary["folds"]:
        yield f"{summary['folds']} folds: every subject of train and val was held out once"
    for gate in summary["passed_gates"]:
        yield f"gate passed over: {gate}"
    for name, reason in summary["unfinished"].items():
        yield f"not in the table: {name}: {reason}"
