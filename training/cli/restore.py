"""``diffcode restore``: one volume, without a node."""

from __future__ import annotations

from pathlib import Path

import click

from training.cli.common import (
    EXISTING,
    FOLDER,
    TASKS,
    bundle_option,
    device_option,
    progress_bar,
    refusing,
    threads_option,
)


@click.command()
@click.argument("source", metavar="IN", type=EXISTING)
@click.argument("out", metavar="OUT", type=FOLDER)
@click.option("--task", required=True, type=click.Choice(TASKS))
@bundle_option
@click.option("--strength", default=1.0, show_default=True, type=click.FloatRange(0, 1))
@click.option(
    "--upsample",
    default=1,
    show_default=True,
    type=click.IntRange(1, 4),
    help="MR at its acquired matrix: zero fill to so many times its rows and columns first",
)
@threads_option
@device_option
@refusing
def restore(
    source: Path,
    out: Path,
    task: str,
    bundle: str,
    strength: float,
    upsample: int,
    threads: int | None,
    device: str,
) -> None:
    """Restore a volume in physical units: HU, SUV or MR arbitrary units.

    IN is a .npy of shape (slices, rows, columns) or a NIfTI file; OUT is the same kind.

    \b
    diffcode restore low-dose.npy restored.npy --task ct_denoise
    diffcode restore t2-128.nii.gz t2-256.nii.gz --task mri_sr --upsample 2
    """
    from restoration.restorer import Restorer
    from restoration.tasks import RestorationTask, why_no_magnitude
    from training import volumes

    volume = volumes.read(source, out)
    if RestorationTask(task) is RestorationTask.MRI_SR:
        reason = why_no_magnitude(volume.array)
        if reason:
            raise ValueError(f"{source}: {reason}")
    restorer = Restorer.open(bundle, device=device, threads=threads)
    try:
        with progress_bar("restoring") as progress:
            result = restorer.restore(
                volume.array,
                task,
                spacing=volume.spacing_mm,
                strength=strength,
                upsample=upsample,
                progress=lambda done, total: progress(done, total, source.name),
            )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error
    volumes.write(out, volume, result.volume, result.grid)
    for flag in result.flags:
        click.echo(f"diffcode: warning: {flag}", err=True)
    click.echo(f"{out}: {len(result.volume)} slices in {result.seconds:.1f} s", err=True)
