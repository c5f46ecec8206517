"""``diffcode phantom``: what a physicist measures, before and after restoration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training.cli.common import EXISTING, bundle_option, refusing, threads_option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_VOLUMES = click.argument("volumes", nargs=-1, required=True, type=EXISTING)
_PIXEL = click.option("--pixel", required=True, type=click.FloatRange(0, min_open=True), help="mm")


@click.group()
def phantom() -> None:
    """Measure phantoms: noise power, resolution, detectability, recovery; one JSON object each.

    VOLUMES are .npy or NIfTI files, [slice, row, column] in HU or SUV: give the input and what was
    restored from it, and compare. `digital` makes both without a scanner.

    \b
    diffcode restore water.npy water-restored.npy --task ct_denoise
    diffcode phantom nps water.npy water-restored.npy --pixel 0.7 --roi 128 128
    """


@phantom.command()
@_VOLUMES
@_PIXEL
@click.option("--roi", "rois", nargs=2, type=float, multiple=True, required=True,
              metavar="ROW COLUMN", help="middle of a uniform region; repeat")  # fmt: skip
@click.option("--side", default=64, show_default=True, type=click.IntRange(8), help="pixels")
@refusing
def nps(
    volumes: tuple[Path, ...], pixel: float, rois: tuple[tuple[float, float], ...], side: int
) -> None:
    """Noise power spectrum of uniform regions: SD, peak and mean frequency."""
    from training.image_quality import noise_power

    def measure(volume: npt.NDArray[np.floating]) -> dict[str, Any]:
        found = noise_power(volume, rois, side, pixel)
        return {
            "deviation": found.deviation,
            "mean_frequency_per_mm": found.mean_frequency,
            "peak_frequency_per_mm": float(found.frequency[found.power.argmax()]),
            "frequency_per_mm": found.frequency.tolist(),
            "power": found.power.tolist(),
        }

    _show(volumes, measure)


@phantom.command()
@_VOLUMES
@_PIXEL
@click.option("--rod", nargs=2, type=float, required=True, metavar="ROW COLUMN", help="its middle")
@click.option("--radius", required=True, type=click.FloatRange(0, min_open=True), help="mm")
@refusing
def mtf(volumes: tuple[Path, ...], pixel: float, rod: tuple[float, float], radius: float) -> None:
    """Modulation transfer at the edge of a rod: where it is 50 % and 10 %, at its contrast.

    null where it falls so low at no frequency that the pixels can show.
    """
    from training.image_quality import transfer

    def measure(volume: npt.NDArray[np.floating]) -> dict[str, Any]:
        found = transfer(volume, rod, radius, pixel)
        return {
            "contrast": found.contrast,
            "f50_per_mm": found.at(0.5),
            "f10_per_mm": found.at(0.1),
        }

    _show(volumes, measure)


@phantom.command()
@click.argument("present", type=EXISTING)
@click.argument("absent", type=EXISTING)
@click.option("--place", nargs=2, type=float, required=True, metavar="ROW COLUMN")
@click.option("--side", default=48, show_default=True, type=click.IntRange(16), help="pixels")
@click.option("--width", default=16.0, show_default=True, help="pixels, of the observer's channels")
@refusing
def lcd(present: Path, absent: Path, place: tuple[float, float], side: int, width: float) -> None:
    """Low-contrast detectability d' of a channelised Hotelling observer.

    PRESENT and ABSENT hold at least 40 slices with and without the signal.
    """
    from training import volumes
    from training.image_quality import detectability, regions

    with_signal, without = (
        regions(volumes.load(path).array, place, side) for path in (present, absent)
    )
    _echo({"d_prime": detectability(with_signal, without, width)})


@phantom.command()
@_VOLUMES
@click.option("--spacing", nargs=3, type=float, required=True, metavar="Z Y X", help="mm")
@click.option("--sphere", "spheres", nargs=4, type=float, multiple=True, required=True,
              metavar="MM SLICE ROW COLUMN", help="diameter and middle; repeat")  # fmt: skip
@click.option(
    "--true", "uptake", required=True, type=click.FloatRange(0, min_open=True), help="SUV"
)
@refusing
def recovery(
    volumes: tuple[Path, ...],
    spacing: tuple[float, float, float],
    spheres: tuple[tuple[float, float, float, float], ...],
    uptake: float,
) -> None:
    """Recovery coefficients of hot spheres, with the limits of EARL standard 1."""
    from training.image_quality import EARL_1
    from training.image_quality import recovery as recover

    def measure(volume: npt.NDArray[np.floating]) -> dict[str, Any]:
        rows = {}
        for diameter, *centre in spheres:
            found = recover(volume, (centre[0], centre[1], centre[2]), diameter, uptake, spacing)
            limits = EARL_1.get(round(diameter))
            rows[f"{diameter:g} mm"] = {
                "maximum": found.maximum,
                "mean": found.mean,
                "earl_maximum": limits and list(limits[0]),
                "earl_mean": limits and list(limits[1]),
            }
        return rows

    _show(volumes, measure)


@phantom.command()
@click.argument("kind", type=click.Choice(["ct", "pet"]))
@bundle_option
@click.option("--slices", default=48, show_default=True, type=click.IntRange(2))
@click.option("--seed", default=0, show_default=True, help="of the noise")
@threads_option
@refusing
def digital(kind: str, bundle: str, slices: int, seed: int, threads: int | None) -> None:
    """Degrade and restore a digital phantom, and measure both; of PET the full counts as well."""
    from restoration.restorer import Restorer
    from training import digital_phantom

    restorer = Restorer.open(bundle, device="cpu", threads=threads)
    run = digital_phantom.ct if kind == "ct" else digital_phantom.pet
    _echo(run(restorer, slices, seed))


def _show(paths: tuple[Path, ...], measure: Any) -> None:
    from training import volumes

    _echo({path.name: measure(volumes.load(path).array.astype(float)) for path in paths})


def _echo(found: Any) -> None:
    click.echo(json.dumps(_as_json(found), indent=1, allow_nan=False))


def _as_json(value: Any) -> Any:
    """The same with null for numbers that there are not: JSON has no word for NaN."""
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
