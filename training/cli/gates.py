"""``diffcode gates``, ``calibrate`` and ``harm``: judge a result, learn how, prove it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training.cli.common import (
    EXISTING,
    FOLDER,
    TASKS,
    bundle_option,
    device_option,
    progress_bar,
    refusing,
    tasks_option,
    threads_option,
)

if TYPE_CHECKING:
    from restoration.fidelity import Fidelity
    from training.slices import PreparedSet

_DATA = click.option(
    "--data", "folders", required=True, multiple=True, type=EXISTING, help="prepared folder; repeat"
)
_CACHE = click.option("--cache", type=FOLDER, help="keep restored series here")


@click.command()
@click.argument("source", metavar="IN", type=EXISTING)
@click.argument("result", metavar="OUT", type=EXISTING)
@click.option("--task", required=True, type=click.Choice(TASKS))
@bundle_option
@click.option(
    "--spacing", nargs=3, type=float, metavar="Z Y X", help="mm; a NIfTI file tells it itself"
)
@click.option("--json", "as_json", is_flag=True, help="values of every slice on stdout")
@refusing
def gates(
    source: Path,
    result: Path,
    task: str,
    bundle: str,
    spacing: tuple[float, float, float] | None,
    as_json: bool,
) -> None:
    """Judge a restored volume OUT beside its input IN, by the levels of a bundle.

    Both are .npy of shape (slices, rows, columns) or NIfTI files in physical units. Gates that
    need the network itself (routing, probes, weights) do not apply to a pair of files and say so.
    Exit code 1 when a gate fails.

    \b
    diffcode gates low-dose.npy restored.npy --task ct_denoise --spacing 2.5 0.7 0.7
    """
    import numpy as np

    from restoration.fidelity import Evidence, Verdict, assess
    from restoration.restorer import bundle_folder, read_manifest
    from training import volumes

    before, after = (volumes.load(path) for path in (source, result))
    manifest = read_manifest(bundle_folder(bundle))
    found = assess(
        before.array.astype(np.float32),
        after.array.astype(np.float32),
        task,
        evidence=Evidence(
            spacing_mm=spacing or before.spacing_mm, domain=manifest.domain.get(task)
        ),
        calibration=manifest.calibration.get(task),
    )
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found)
    if found.verdict is Verdict.FAIL:
        raise SystemExit(1)


def _print(found: Fidelity) -> None:
    for gate in found.gates:
        known = [value for value in gate.values if value is not None]
        unit = "" if gate.unit == "1" else f" {gate.unit}"
        span = f"{min(known):.4g} ... {max(known):.4g}{unit}" if known else ""
        # From 1, as the node and its report for the reviewer count; the JSON counts from 0.
        where = "" if gate.worst_slice is None else f"slice {gate.worst_slice + 1}"
        line = f"{gate.name:18}{gate.verdict.value:16}{span:34}{where:11}{gate.reason}"
        click.echo(line.rstrip())
    source = "calibrated for the model" if found.calibrated else "not calibrated: defaults"
    click.echo(f"{found.verdict.value}; levels {source}")


@click.command()
@click.argument("bundle")
@click.argument("out", type=FOLDER)
@_DATA
@tasks_option
@click.option("--slices", default=12, show_default=True, type=click.IntRange(1), help="of an item")
@click.option("--items", default=2, show_default=True, type=click.IntRange(1), help="of a subject")
@click.option(
    "--probe-every",
    default=2,
    show_default=True,
    type=click.IntRange(0),
    help="one series in so many goes through the network again; 0: none",
)
@click.option(
    "--least-subjects",
    default=19,
    show_default=True,
    type=click.IntRange(2),
    help="a gate of fewer keeps the program's level",
)
@click.option("--plots", type=FOLDER, help="draw the distributions into this folder")
@_CACHE
@threads_option
@device_option
@click.option("--overwrite", is_flag=True, help="replace the bundle in OUT")
@refusing
def calibrate(
    bundle: str,
    out: Path,
    folders: tuple[Path, ...],
    tasks: tuple[str, ...],
    slices: int,
    items: int,
    probe_every: int,
    least_subjects: int,
    plots: Path | None,
    cache: Path | None,
    threads: int | None,
    device: str,
    overwrite: bool,
) -> None:
    """Learn the levels of the gates and write BUNDLE with them as OUT; the weights stay.

    Levels are quantiles over slices, 0.99 to warn and 0.999 to fail, moved outwards until subjects
    that were left out of the learning raise few alarms, and at least to the tolerance limit over
    subjects. With too few subjects the levels of the program stay, and the card says so. Subjects
    with the split "calibration" in a prepared manifest are learnt from where there are any.
    Otherwise every other validation subject is (with four or more), and training subjects widen the
    levels; the manifest counts both.

    \b
    diffcode calibrate compact compact-calibrated --data prepared --plots docs/gates
    """
    from restoration.restorer import Restorer
    from training import calibrated
    from training.calibrate import calibrate as learn

    restorer = Restorer.open(bundle, device=device, threads=threads)
    sets = _open(folders)
    outcomes = {}
    with progress_bar("calibrating") as progress:
        for task in tasks or restorer.manifest.tasks:
            outcomes[task] = learn(
                restorer,
                sets,
                task,
                most=slices,
                items=items,
                probe_every=probe_every,
                least_subjects=least_subjects,
                cache=cache,
                progress=progress,
            )
    if plots is not None:
        for task, outcome in outcomes.items():
            calibrated.draw(outcome, task, plots / f"{task}.png")
    manifest = calibrated.write(bundle, out, outcomes, overwrite=overwrite)
    for task, outcome in outcomes.items():
        click.echo(f"{task}: {_learnt_from(outcome.calibration.basis)}", err=True)
    click.echo(f"{out}: {manifest.name} {manifest.version}, {manifest.sha256}")


def _learnt_from(basis: Mapping[str, Any]) -> str:
    """Of how many subjects the levels of a task are, and how they did on those left out."""
    alarms = basis["left_out_alarms"]
    end = (
        f"left out, {100 * alarms['fail']:.2f} % of slices fail"
        if alarms
        else f"fewer than {basis['least_subjects']}: the levels of the program stay"
    )
    return (
        f"{basis['slices']} slices of {basis['subjects']} subjects, "
        f"{basis['kept_out']} not trained on; {end}"
    )


@click.command()
@bundle_option
@_DATA
@tasks_option
@click.option("--json", "json_path", type=FOLDER, help="everything, for each gate and subject")
@click.option("--slices", default=8, show_default=True, type=click.IntRange(1), help="of an item")
@click.option("--series", default=9, show_default=True, help="for faults that run the network")
@click.option("--seed", default=0, show_default=True, help="of the faults")
@click.option("--side-by-side", is_flag=True, help="each task in a process, on the CPU")
@_CACHE
@threads_option
@device_option
@refusing
def harm(
    bundle: str,
    folders: tuple[Path, ...],
    tasks: tuple[str, ...],
    json_path: Path | None,
    slices: int,
    series: int,
    seed: int,
    side_by_side: bool,
    cache: Path | None,
    threads: int | None,
    device: str,
) -> None:
    """Plant faults into restored series and print how many of them the gates catch.

    Only validation subjects that calibration did not learn from are used. Prepare the validation
    packs with several seeds for more noise: each folder adds its own.

    \b
    diffcode harm --data prepared --data prepared-seed-1 --json harm.json > harm.md
    """
    from restoration.restorer import Restorer, bundle_folder, read_manifest
    from training import harm_bench

    extent = harm_bench.Extent(most=slices, network_series=series, seed=seed)
    wanted = tasks or read_manifest(bundle_folder(bundle)).tasks
    if side_by_side:
        result = harm_bench.run_side_by_side(bundle, folders, wanted, extent=extent, cache=cache)
    else:
        restorer = Restorer.open(bundle, device=device, threads=threads)
        with progress_bar("planting") as progress:
            result = harm_bench.run(
                restorer, _open(folders), wanted, extent=extent, cache=cache, progress=progress
            )
    values = result.to_dict()
    if json_path is not None:
        json_path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for line in harm_bench.markdown(values):
        click.echo(line)


def _open(folders: tuple[Path, ...]) -> list[PreparedSet]:
    from training.slices import PreparedSet

    return [PreparedSet.open(folder) for folder in folders]
