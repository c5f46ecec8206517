"""``diffcode evaluate``: the table that settles arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from training.cli.common import EXISTING, FOLDER, TASKS, progress_bar, refusing, show


@click.command()
@click.option("--data", required=True, type=EXISTING, help="prepared folder, or one of .medz packs")
@click.option("--split", default="val", show_default=True, type=click.Choice(["train", "val"]))
@click.option("--bundle", default="compact", show_default=True, help="built-in name or folder")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="only this; repeat")
@click.option("--all-contrasts", is_flag=True, help="MR beyond T2")
@click.option("--no-classical", is_flag=True, help="leave the classical method out")
@click.option("--csv", "csv_path", type=FOLDER, help="write the values of each slice")
@click.option("--figures", type=FOLDER, help="folder for pictures, one per task")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of the table")
@click.option("--threads", type=click.IntRange(1), help="CPU threads")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda")
@refusing
def evaluate(
    data: Path,
    split: str,
    bundle: str,
    tasks: tuple[str, ...],
    all_contrasts: bool,
    no_classical: bool,
    csv_path: Path | None,
    figures: Path | None,
    as_json: bool,
    threads: int | None,
    device: str,
) -> None:
    """PSNR, SSIM and RMSE of a bundle, its input and the best classical method.

    \b
    diffcode evaluate --data prepared --bundle my-bundle --figures pictures
    diffcode evaluate --data packs --json > evaluation.json
    """
    from restoration.restorer import Restorer
    from restoration.tasks import RestorationTask
    from training import report
    from training.evaluate import MR_CONTRASTS, prepared, tuned_methods
    from training.evaluate import evaluate as judge

    chosen = [RestorationTask(task) for task in tasks or TASKS]
    restorer = Restorer.open(bundle, device=device, threads=threads)

    def restore(volume: Any, item: Any) -> Any:
        return restorer.restore(volume, item.task, spacing=item.spacing_mm).volume

    with progress_bar("preparing") as making, prepared(data, split, making) as dataset:
        methods = {} if no_classical else tuned_methods(dataset, chosen)
        with progress_bar("evaluating") as progress:
            evaluation = judge(
                dataset,
                restore,
                split=split,
                tasks=chosen,
                contrasts=() if all_contrasts else MR_CONTRASTS,
                methods=methods,
                progress=progress,
            )
        if csv_path is not None:
            report.write_csv(evaluation, csv_path)
        if figures is not None:
            report.write_figures(dataset, restore, methods, evaluation.tasks, split, figures)
    summary = evaluation.to_dict()
    show(summary, report.evaluation_table(summary), as_json)
