"""The digital phantoms through degradation and restoration, and what is measured in each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from restoration.restorer import Restorer
from training import quality_phantoms as phantoms
from training.degrade import CtNoiseInsertion, PetThinning
from training.image_quality import (
    EARL_1,
    detectability,
    noise_power,
    recovery,
    transfer,
)

Volume = npt.NDArray[np.float32]
_NOISE_HU = 10.0  # of the full dose that the quarter dose is made from
_SIDE = 64  # pixels of a region


def ct(restorer: Restorer, slices: int, seed: int) -> dict[str, Any]:
    """Noise power, modulation transfer of each rod, and detectability of the disc."""
    rng = np.random.default_rng(seed)
    made = phantoms.rods(slices)
    middle = ((made.volume.shape[1] - 1) / 2,) * 2
    dose = CtNoiseInsertion()
    pixel = phantoms.CT_PIXEL_MM
    absent, present = (
        dose.apply(volume, pixel_mm=pixel, noise_hu=_NOISE_HU, rng=rng)
        for volume in (made.volume, phantoms.with_disc(made.volume))
    )
    found = {}
    restored = (restorer.restore(volume, "ct_denoise").volume for volume in (absent, present))
    for name, (without, with_signal) in (("degraded", (absent, present)), ("restored", restored)):
        power = noise_power(without, [middle], _SIDE, pixel)
        curves = [transfer(without, place, phantoms.ROD_MM, pixel) for place in made.places]
        found[name] = {
            "deviation_hu": power.deviation,
            "nps_mean_frequency_per_mm": power.mean_frequency,
            "mtf50_per_mm": {
                f"{hu:+.0f} HU": curve.at(0.5)
                for hu, curve in zip(phantoms.RODS_HU, curves, strict=True)
            },
            "d_prime": _d_prime(without, with_signal, middle),
        }
    return found


def pet(restorer: Restorer, slices: int, seed: int) -> dict[str, Any]:
    """Recovery coefficients of the spheres, beside the limits of EARL standard 1."""
    made = phantoms.spheres(slices)
    full, thinned = PetThinning().apply(
        made.activity,
        made.attenuation,
        pixel_mm=phantoms.PET_VOXEL_MM[1],
        rng=np.random.default_rng(seed),
    )
    images = {
        "full": full,
        "degraded": thinned,
        "restored": restorer.restore(thinned, "pet_synthesis").volume,
    }
    return {
        name: {
            f"{diameter} mm": _recovered(volume, place, diameter, made.hot)
            for diameter, place in zip(phantoms.SPHERES_MM, made.places, strict=True)
        }
        for name, volume in images.items()
    }


def _recovered(
    volume: Volume, place: tuple[float, float, float], diameter: int, hot: float
) -> dict[str, Any]:
    found = recovery(volume, place, diameter, hot, phantoms.PET_VOXEL_MM)
    maximum, mean = EARL_1[diameter]
    return {
        "maximum": found.maximum,
        "mean": found.mean,
        "earl_maximum": list(maximum),
        "earl_mean": list(mean),
    }


def _d_prime(absent: Volume, present: Volume, middle: tuple[float, float]) -> float | None:
    """None where there are too few slices for the observer."""
    top, left = (round(at) - _SIDE // 2 for at in middle)
    part = (slice(None), slice(top, top + _SIDE), slice(left, left + _SIDE))
    width = 4 * phantoms.DISC_MM / phantoms.CT_PIXEL_MM
    try:
        return detectability(present[part].astype(float), absent[part].astype(float), width)
    except ValueError:
        return None
