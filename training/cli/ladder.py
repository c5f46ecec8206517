"""``diffcode ladder``: every rung trained alike, and what each step is worth."""

from __future__ import annotations

from pathlib import Path

import click

from training.cli.common import (
    EXISTING,
    FOLDER,
    VARIANTS,
    device_of,
    device_option,
    refusing,
    show,
    threads_option,
)


@click.command()
@click.option("--recipe", default="compact-ladder", show_default=True, help="preset or TOML file")
@click.option("--data", required=True, type=EXISTING, help="prepared folder")
@click.option("--out", required=True, type=FOLDER, help="run folder; finished rungs are used")
@click.option("--seeds", help="comma-separated, as 0,1,2  [default: the recipe's]")
@click.option("--folds", type=click.IntRange(2), help="leave subjects of train and val out in turn")
@click.option("--rungs", default=",".join(VARIANTS), show_default=True, help="comma-separated")
@click.option("--max-seconds", type=click.FloatRange(0), help="train no longer; 0 only evaluates")
@click.option(
    "--past-gates", is_flag=True, help="build upon a stage that failed its gate, and say so"
)
@click.option("--central", type=click.IntRange(1), help="judge so many central slices of a volume")
@click.option("--no-classical", is_flag=True, help="leave the classical method out")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of the tables")
@threads_option
@device_option
@refusing
def ladder(
    recipe: str,
    data: Path,
    out: Path,
    seeds: str | None,
    folds: int | None,
    rungs: str,
    max_seconds: float | None,
    past_gates: bool,
    central: int | None,
    no_classical: bool,
    as_json: bool,
    threads: int | None,
    device: str,
) -> None:
    """Train V1, V2, V3 and DiffCode alike and compare each with the rung below it.

    Every rung has the recipe's steps and learning rates. The same command again resumes; what is
    not finished is named and left out of the table.

    \b
    diffcode ladder --data prepared --out run --seeds 0,1,2 --past-gates
    diffcode ladder --recipe tiny-ladder --data prepared --out folds --folds 4 --max-seconds 1500
    """
    from training import ladder as steps
    from training.allocator import keep_freed_memory
    from training.ladder_report import ladder_report
    from training.recipe import Recipe
    from training.rungs import judge
    from training.slices import PreparedSet

    def say(text: str) -> None:
        click.echo(text, err=True)

    keep_freed_memory()
    chosen = steps.checked_rungs([name.strip() for name in rungs.split(",") if name.strip()])
    settled = Recipe.load(recipe)
    dataset = PreparedSet.open(data)
    numbers = [int(seed) for seed in seeds.split(",")] if seeds else [settled.seed]
    place = device_of(device, threads)
    units = steps.plan(settled, dataset, out, seeds=numbers, folds=folds)
    progress = steps.train(
        units, chosen, device=place, past_gates=past_gates, max_seconds=max_seconds, say=say
    )
    result = judge(
        units,
        chosen,
        progress,
        recipe=recipe,
        folds=folds,
        central=central,
        classical=not no_classical,
        device=str(place),
        threads=threads,
        say=say,
    )
    summary = result.to_dict()
    show(summary, ladder_report(summary), as_json)
