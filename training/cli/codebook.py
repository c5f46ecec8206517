"""``diffcode codebook``: look into codebooks, make them anew, add one for another task."""

from __future__ import annotations

from pathlib import Path

import click

from training.cli.common import EXISTING, FOLDER, TASKS, refusing, show, tasks_option


@click.group()
def codebook() -> None:
    """Look into a run's codebooks, make them anew, or add one for another task."""


_PASSES = click.option(
    "--passes", default=4, show_default=True, type=click.IntRange(0), help="refinements"
)
_TOKENS = click.option(
    "--tokens", default=200_000, show_default=True, type=click.IntRange(1), help="per task"
)


@codebook.command()
@click.argument("run", type=EXISTING)
@click.option("--data", required=True, type=EXISTING, help="prepared folder")
@_TOKENS
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of a table")
@refusing
def inspect(run: Path, data: Path, tokens: int, as_json: bool) -> None:
    """Usage, perplexity and what each depth leaves over, on training images.

    \b
    diffcode codebook inspect run --data prepared
    """
    from training import report
    from training import run as runs
    from training.slices import PreparedSet
    from training.stages import Stage

    model, recipe = runs.trained_model(run / Stage.CODEBOOK.folder("full"))
    found = runs.inspect_codebooks(model, recipe, PreparedSet.open(data), tokens)
    show(report.codebook_dict(found), report.codebook_table(found), as_json)


@codebook.command()
@click.argument("run", type=EXISTING)
@click.option("--data", required=True, type=EXISTING, help="prepared folder")
@click.option("--out", required=True, type=FOLDER, help="run folder to make")
@tasks_option
@_TOKENS
@_PASSES
@refusing
def build(
    run: Path, data: Path, out: Path, tasks: tuple[str, ...], tokens: int, passes: int
) -> None:
    """Make codebooks anew by residual k-means, the networks of Stage I unchanged.

    \b
    diffcode codebook build run --data prepared --out run-new --task ct_denoise
    """
    from rich.console import Console

    from restoration.tasks import RestorationTask
    from training import banks, report

    chosen = [RestorationTask(task) for task in tasks or TASKS]
    found, checks = banks.rebuild_codebooks(
        run, data, out, tasks=chosen, tokens=tokens, passes=passes
    )
    show({}, report.codebook_table(found), as_json=False)
    for check in checks:
        Console(stderr=True).print(str(check), markup=False)


@codebook.command()
@click.argument("run", type=EXISTING)
@click.option("--data", required=True, type=EXISTING, help="prepared folder with the new task")
@click.option("--out", required=True, type=FOLDER, help="run folder to make")
@click.option("--task", required=True, type=click.Choice(TASKS), help="which RUN does not have")
@_TOKENS
@_PASSES
@refusing
def add(run: Path, data: Path, out: Path, task: str, tokens: int, passes: int) -> None:
    """Add the codebook of another task to a trained bank; all else keeps its bytes.

    \b
    diffcode codebook add run --data prepared-pet --out run-pet --task pet_synthesis
    """
    from rich.console import Console

    from restoration.tasks import RestorationTask
    from training import banks, report

    found, checks = banks.add_codebook(
        run, data, out, task=RestorationTask(task), tokens=tokens, passes=passes
    )
    show({}, report.codebook_table(found), as_json=False)
    for check in checks:
        Console(stderr=True).print(str(check), markup=False)
