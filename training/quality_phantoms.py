"""Digital test objects with known truth: water with rods, and spheres as those of NEMA NU 2.

They stand in where no scanner is at hand; a site scans its own and measures that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]

RODS_HU = (-100.0, 30.0, 120.0, 900.0)
ROD_MM = 12.0  # radius
DISC_MM = 4.0  # radius of the low-contrast signal
DISC_HU = 10.0
SPHERES_MM = (10, 13, 17, 22, 28, 37)
CT_PIXEL_MM = 0.7
PET_VOXEL_MM = (3.3, 4.0, 4.0)
_HOT, _BACKGROUND = 8.0, 2.0  # SUV; 4:1
_WATER_PER_MM = 0.0096  # linear attenuation at 511 keV (NIST XCOM)


@dataclass(frozen=True)
class Rods:
    """A water cylinder with four rods about its middle; place in pixels, radius in mm."""

    volume: Volume
    places: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Spheres:
    """Hot spheres in a warm body; place (slice, row, column) in voxels."""

    activity: Volume
    attenuation: Volume  #: per mm at 511 keV
    places: tuple[tuple[float, float, float], ...]
    hot: float = _HOT


def rods(slices: int, size: int = 256) -> Rods:
    """HU, the same in every slice: uniform in the middle, rods on a circle."""
    middle = (size - 1) / 2
    plane = np.where(_disc(size, (middle, middle), 0.46 * size), 0.0, -1000.0)
    angles = np.pi / 4 + np.arange(4) * np.pi / 2
    places = tuple(
        (middle + 0.3 * size * np.sin(a), middle + 0.3 * size * np.cos(a)) for a in angles
    )
    for place, hu in zip(places, RODS_HU, strict=True):
        plane[_disc(size, place, ROD_MM / CT_PIXEL_MM)] = hu
    return Rods(np.repeat(plane[None], slices, 0).astype(np.float32), places)


def with_disc(volume: Volume) -> Volume:
    """The low-contrast signal in the middle of each slice."""
    size = volume.shape[1]
    middle = (size - 1) / 2
    signal = _disc(size, (middle, middle), DISC_MM / CT_PIXEL_MM) * np.float32(DISC_HU)
    return volume + signal


def spheres(slices: int = 24, size: int = 96) -> Spheres:
    """SUV: six spheres on a circle of 57 mm in one slice of an elliptic body."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in (slices, size, size)), indexing="ij")
    middle = (slices // 2, (size - 1) / 2, (size - 1) / 2)
    dz, dy, dx = PET_VOXEL_MM
    body = ((y - middle[1]) * dy / 115) ** 2 + ((x - middle[2]) * dx / 150) ** 2 < 1
    activity = np.where(body, _BACKGROUND, 0.0)
    places = []
    for number, diameter in enumerate(SPHERES_MM):
        angle = number * np.pi / 3
        place = (
            float(middle[0]),
            middle[1] + 57 / dy * np.sin(angle),
            middle[2] + 57 / dx * np.cos(angle),
        )
        distance = np.sqrt(
            ((z - place[0]) * dz) ** 2 + ((y - place[1]) * dy) ** 2 + ((x - place[2]) * dx) ** 2
        )
        # Voxels that a sphere cuts hold their share of it, to first order.
        share = np.clip(0.5 - (distance - diameter / 2) / dx, 0, 1)
        activity = activity + share * (_HOT - activity)
        places.append(place)
    attenuation = np.where(body, _WATER_PER_MM, 0.0)
    return Spheres(activity.astype(np.float32), attenuation.astype(np.float32), tuple(places))


def _disc(size: int, place: tuple[float, float], radius: float) -> npt.NDArray[np.bool_]:
    rows, columns = np.ogrid[:size, :size]
    inside: npt.NDArray[np.bool_] = np.hypot(rows - place[0], columns - place[1]) <= radius
    return inside
