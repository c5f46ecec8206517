"""``diffcode train``: one stage at a time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training.cli.common import (
    FOLDER,
    VARIANTS,
    Command,
    device_of,
    device_option,
    refusing,
    threads_option,
)

if TYPE_CHECKING:
    from training.recipe import Recipe
    from training.stages import Stage


@click.group()
def train() -> None:
    """Train one stage; the same command again resumes it.

    \b
    diffcode train codebook    --recipe compact --data prepared --out run     Stage I
    diffcode train diffusion   --recipe compact --data prepared --out run     Stage II
    diffcode train restoration --recipe compact --data prepared --out run     Stage III
    diffcode train restoration --recipe compact --variant v2 --data prepared --out run

    The variants v1 and v2 need Stage III alone. SIGTERM, SIGINT and --max-seconds save and exit 0.
    """


def _train_options(command: Command) -> Command:
    options = [
        click.option("--recipe", default="compact", show_default=True, help="preset or TOML file"),
        click.option("--data", required=True, type=FOLDER, help="prepared folder"),
        click.option("--out", required=True, type=FOLDER, help="run folder"),
        click.option("--variant", type=click.Choice(VARIANTS), help="rung of the ladder"),
        click.option("--steps", type=click.IntRange(1), help="planned steps of the stage, in all"),
        click.option("--max-seconds", type=click.FloatRange(0), help="save and stop after this"),
        click.option("--seed", type=int, help="instead of the recipe's"),
        threads_option,
        device_option,
        click.option("--init-from", type=FOLDER, help="run or bundle that Stage III starts from"),
        click.option("--force", is_flag=True, help="go on past a gate or a changed schedule"),
    ]
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def _register(name: str, text: str) -> None:
    @train.command(name, help=text, short_help=text)
    @_train_options
    @refusing
    def command(**options: Any) -> None:
        from training.stages import Stage

        _train(Stage(name), **options)


_register("codebook", "Stage I: VQ autoencoder and codebook bank, Eq. 3")
_register("diffusion", "Stage II: condition encoder and latent diffusion, Eq. 6")
_register("restoration", "Stage III: backbone, routing and classifier, Eq. 7")


def _train(
    stage: Stage,
    *,
    recipe: str,
    data: Path,
    out: Path,
    variant: str | None,
    steps: int | None,
    max_seconds: float | None,
    seed: int | None,
    threads: int | None,
    device: str,
    init_from: Path | None,
    force: bool,
) -> None:
    from rich.console import Console

    from training import run
    from training.allocator import keep_freed_memory
    from training.loop import Limits

    keep_freed_memory()
    chosen = device_of(device, threads)
    settled = _settle(recipe, stage, variant, steps, seed, init_from)
    console = Console(stderr=True)
    outcome, checks = run.train(
        stage,
        settled,
        data,
        out,
        device=chosen,
        limits=Limits(max_seconds=max_seconds),
        force=force,
        console=console,
    )
    done = "finished" if outcome.finished else "paused; the same command goes on"
    console.print(f"{stage.value}: step {outcome.step} of {stage.settings(settled).steps}, {done}")
    for check in checks:
        console.print(str(check), markup=False)
    if checks and stage.value == "codebook":
        console.print(f"rate  {settled.arch.bits_per_pixel:.2f} bits per pixel")


def _settle(
    source: str,
    stage: Stage,
    variant: str | None,
    steps: int | None,
    seed: int | None,
    init_from: Path | None,
) -> Recipe:
    """The recipe with the command line's changes, checked again."""
    from training.recipe import Recipe

    values = Recipe.load(source).to_dict()
    if variant is not None:
        values["arch"]["variant"] = variant
    if steps is not None:
        values[stage.table]["steps"] = steps
    if seed is not None:
        values["seed"] = seed
    if init_from is not None:
        values["stage3"]["init_from"] = str(init_from)
    return Recipe.from_dict(values, source=source)
