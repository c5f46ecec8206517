"""``diffcode evaluate``: the table that settles arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from training.cli.common import (
    EXISTING,
    FOLDER,
    TASKS,
    device_option,
    progress_bar,
    refuse_existing,
    refusing,
    show,
    tasks_option,
    threads_option,
)

if TYPE_CHECKING:
    from training.evaluation import Evaluation


@click.command()
@click.option("--data", required=True, type=EXISTING, help="prepared folder, or one of .medz packs")
@click.option("--split", default="val", show_default=True, type=click.Choice(["train", "val"]))
@click.option(
    "--bundle", "bundles", multiple=True, help="built-in name or folder; repeat  [default: compact]"
)
@click.option("--run", "runs", multiple=True, type=EXISTING, help="run folder, every rung; repeat")
@tasks_option
@click.option("--all-contrasts", is_flag=True, help="MR beyond T2")
@click.option("--central", type=click.IntRange(1), help="only so many central slices of a volume")
@click.option("--no-classical", is_flag=True, help="leave the classical method out")
@click.option("--baseline", help="method that differences are taken to  [default: classical]")
@click.option("--csv", "csv_path", type=FOLDER, help="write the values of each slice")
@click.option("--figures", type=FOLDER, help="folder for pictures, one per task")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of the table")
@threads_option
@device_option
@refusing
def evaluate(
    data: Path,
    split: str,
    bundles: tuple[str, ...],
    runs: tuple[Path, ...],
    tasks: tuple[str, ...],
    all_contrasts: bool,
    central: int | None,
    no_classical: bool,
    baseline: str | None,
    csv_path: Path | None,
    figures: Path | None,
    as_json: bool,
    threads: int | None,
    device: str,
) -> None:
    """PSNR, SSIM and RMSE of models, their input and the best classical method, by protocol.

    Also HU bias by tissue, SUV bias of hot regions and total activity, and differences between
    methods over subjects. A run is evaluated as the bundles its rungs would become.

    \b
    diffcode evaluate --data prepared --bundle my-bundle --figures pictures
    diffcode evaluate --data prepared --run run --baseline v1 --csv slices.csv
    diffcode evaluate --data packs --json > evaluation.json
    """
    from restoration.tasks import RestorationTask
    from training import pictures, report
    from training.allocator import keep_freed_memory
    from training.contenders import contenders, labels
    from training.evaluate import evaluate as judge
    from training.evaluate import prepared, tuned_methods
    from training.validation import MR_CONTRASTS

    keep_freed_memory()
    chosen = [RestorationTask(task) for task in tasks or TASKS]
    refuse_existing(csv_path)
    if figures is not None:
        refuse_existing(*pictures.picture_paths(chosen, figures))
    if not bundles and not runs:
        bundles = ("compact",)
    with progress_bar("preparing") as making, prepared(data, split, making) as dataset:
        found = contenders(bundles, runs, dataset.folder, device=device, threads=threads)
        # What cannot be there is told before methods are tuned, which takes minutes.
        _checked_baseline(baseline, ["input", "classical"], list(labels(found)))
        methods = {} if no_classical else tuned_methods(dataset, chosen)
        untrained = ["input", "classical"] if methods else ["input"]
        against = _checked_baseline(baseline, untrained, list(labels(found)))
        with progress_bar("evaluating") as progress:
            evaluation = judge(
                dataset,
                {contender.name: contender for contender in found},
                labels=labels(found),
                split=split,
                tasks=chosen,
                contrasts=() if all_contrasts else MR_CONTRASTS,
                methods=methods,
                central=central,
                progress=progress,
            )
    _write(evaluation, csv_path, figures)
    summary = evaluation.to_dict(against)
    show(summary, report.evaluation_report(summary), as_json)


def _write(evaluation: Evaluation, csv_path: Path | None, figures: Path | None) -> None:
    from training import pictures, report

    if csv_path is not None:
        report.write_csv(evaluation, csv_path)
    if figures is not None:
        pictures.write_pictures(evaluation, figures)


def _checked_baseline(name: str | None, untrained: list[str], models: list[str]) -> str:
    """The method that differences are taken to: that named, else the best without a model."""
    rows = [*untrained, *models]
    chosen = name or untrained[-1]
    if chosen not in rows:
        raise ValueError(f"--baseline {chosen}: no such method; there are {', '.join(rows)}")
    return chosen
