"""``diffcode prepare``: images into training pairs."""

from __future__ import annotations

from pathlib import Path

import click

from training.cli.common import EXISTING, FOLDER, TASKS, progress_bar, refusing, tasks_option


@click.command()
@click.argument("sources", nargs=-1, required=True, type=EXISTING)
@click.option("--out", required=True, type=FOLDER, help="folder to make; must not exist")
@click.option("--seed", default=0, show_default=True, help="of the simulated noise")
@tasks_option
@click.option("--max-slices", type=click.IntRange(1), help="at most so many of a series")
@click.option("--central-slices", type=click.IntRange(1), help="so many from the middle of each")
@click.option(
    "--mr-factor",
    "mr_factors",
    multiple=True,
    type=click.FloatRange(1, min_open=True),
    help="MR cut to this part of k-space too, for training beside 4; repeat",
)
@click.option("--no-simulated-pet", is_flag=True, help="no simulated FDG on the CT anatomy")
@click.option(
    "--pet-draws",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="scans of each PET training series, each with its own noise",
)
@click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(1), help="processes that share it"
)
@click.option(
    "--val-fraction",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="subjects held out, where no file is marked",
)
@click.option(
    "--licence",
    "licences",
    multiple=True,
    metavar="FOLDER=LICENCE",
    help="of the images in a source folder whose files do not tell it; repeat",
)
@refusing
def prepare(
    sources: tuple[Path, ...],
    out: Path,
    seed: int,
    tasks: tuple[str, ...],
    max_slices: int | None,
    central_slices: int | None,
    mr_factors: tuple[float, ...],
    no_simulated_pet: bool,
    pet_draws: int,
    jobs: int,
    val_fraction: float,
    licences: tuple[str, ...],
) -> None:
    """Degrade images by physics into training pairs.

    SOURCES are .medz packs, NIfTI files, or folders of those or of DICOM series. Files named
    val_... are held out; without any, a seeded tenth of the subjects is. A low-dose CT series
    beside the full-dose one of the same slices is taken as the input in the place of a simulation.

    \b
    diffcode prepare data/train data/train_ext --out prepared --jobs 4
    diffcode prepare IXI-T2 --out prepared-mr --task mri_sr --licence "IXI-T2=CC BY-SA 3.0"
    """
    from restoration.tasks import RestorationTask
    from training.prepare import PrepareOptions
    from training.prepare import prepare as make_pairs

    options = PrepareOptions(
        max_slices=max_slices,
        central_slices=central_slices,
        mr_factors=mr_factors,
        val_fraction=val_fraction,
        simulated_pet=not no_simulated_pet,
        pet_draws=pet_draws,
        licences=_pairs(licences),
    )
    chosen = [RestorationTask(task) for task in tasks or TASKS]
    with progress_bar("preparing") as progress:
        manifest = make_pairs(
            sources, out, seed=seed, tasks=chosen, options=options, progress=progress, jobs=jobs
        )
    for line in manifest.skipped:
        click.echo(f"left out: {line}", err=True)
    click.echo(f"{len(manifest.items)} pairs in {out}", err=True)


def _pairs(licences: tuple[str, ...]) -> dict[str, str]:
    for text in licences:
        if not all(text.partition("=")):
            raise ValueError(f"--licence {text!r} is not FOLDER=LICENCE")
    return dict(text.split("=", 1) for text in licences)
