"""``diffcode prepare``: images into training pairs."""

from __future__ import annotations

from pathlib import Path

import click

from training.cli.common import EXISTING, FOLDER, TASKS, progress_bar, refusing


@click.command()
@click.argument("sources", nargs=-1, required=True, type=EXISTING)
@click.option("--out", required=True, type=FOLDER, help="folder to make; must not exist")
@click.option("--seed", default=0, show_default=True, help="of the simulated noise")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="only this; repeat")
@click.option("--max-slices", type=click.IntRange(1), help="at most so many of a series")
@click.option("--central-slices", type=click.IntRange(1), help="so many from the middle of each")
@click.option("--no-simulated-pet", is_flag=True, help="no simulated FDG on the CT anatomy")
@click.option(
    "--val-fraction",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="subjects held out, where no file is marked",
)
@click.option("--source", help="name of the collection, for files that do not tell it")
@click.option("--licence", help="of the images, for files that do not tell it")
@refusing
def prepare(
    sources: tuple[Path, ...],
    out: Path,
    seed: int,
    tasks: tuple[str, ...],
    max_slices: int | None,
    central_slices: int | None,
    no_simulated_pet: bool,
    val_fraction: float,
    source: str | None,
    licence: str | None,
) -> None:
    """Degrade images by physics into training pairs.

    SOURCES are .medz packs, NIfTI files, or folders of those or of DICOM series. Files named
    val_... are held out; without any, a seeded tenth of the subjects is. A low-dose CT series
    beside the full-dose one of the same slices is taken as the input in the place of a simulation.

    \b
    diffcode prepare data/train data/train_ext --out prepared
    diffcode prepare IXI-T2 --out prepared-mr --task mri_sr --central-slices 100 --source IXI
    """
    from restoration.tasks import RestorationTask
    from training.prepare import PrepareOptions
    from training.prepare import prepare as make_pairs

    options = PrepareOptions(
        max_slices=max_slices,
        central_slices=central_slices,
        val_fraction=val_fraction,
        simulated_pet=not no_simulated_pet,
        source=source,
        licence=licence,
    )
    chosen = [RestorationTask(task) for task in tasks or TASKS]
    with progress_bar("preparing") as progress:
        manifest = make_pairs(
            sources, out, seed=seed, tasks=chosen, options=options, progress=progress
        )
    for line in manifest.skipped:
        click.echo(f"left out: {line}", err=True)
    click.echo(f"{len(manifest.items)} pairs in {out}", err=True)
