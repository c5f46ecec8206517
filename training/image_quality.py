"""What a physicist measures in phantoms: noise power, resolution, detectability, recovery.

Pure functions of volumes [slice, row, column] in HU or SUV; the same for an input and what was
restored from it, so that two columns stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.floating]
Curve = npt.NDArray[np.float64]
Place = tuple[float, float]  # row, column

#: EARL standard 1 (2010): sphere in mm → limits of the recovery of SUVmax and of the mean within
#: half of the maximum (EANM, "EARL accreditation specifications").
EARL_1 = {
    37: ((0.95, 1.16), (0.76, 0.89)),
    28: ((0.91, 1.13), (0.72, 0.85)),
    22: ((0.83, 1.09), (0.63, 0.78)),
    17: ((0.73, 1.01), (0.57, 0.73)),
    13: ((0.59, 0.85), (0.44, 0.60)),
    10: ((0.34, 0.57), (0.27, 0.43)),
}
CHANNELS = 10  # of the observer


@dataclass(frozen=True)
class NoisePower:
    """Radial noise power spectrum of uniform regions."""

    frequency: Curve  #: per mm
    power: Curve  #: HU² mm²
    deviation: float  #: HU; its square is the integral of the two-dimensional spectrum

    @property
    def mean_frequency(self) -> float:
        """The centre of the spectrum over frequencies of the plane, per mm: lower is blotchier."""
        weight = self.power * self.frequency
        return float((weight * self.frequency).sum() / weight.sum())


@dataclass(frozen=True)
class Transfer:
    """Modulation transfer at the edge of a rod, which depends on its contrast."""

    frequency: Curve  #: per mm
    modulation: Curve  #: 1 at frequency 0
    contrast: float  #: HU

    def at(self, share: float) -> float:
        """The first frequency per mm where the modulation has fallen to `share`; NaN if nowhere."""
        below = np.flatnonzero(self.modulation < share)
        if below.size == 0 or below[0] == 0:
            return float("nan")
        last, first = below[0] - 1, below[0]
        high, low = self.modulation[last], self.modulation[first]
        part = (high - share) / (high - low)
        return float(self.frequency[last] + part * (self.frequency[first] - self.frequency[last]))


@dataclass(frozen=True)
class Recovery:
    """How much of a sphere's true uptake is measured."""

    diameter_mm: float
    maximum: float
    mean: float  #: within half of the maximum


def noise_power(volume: Volume, rois: Sequence[Place], side: int, pixel_mm: float) -> NoisePower:
    """Of square regions of `side` pixels about `rois` in every slice (ICRU 87, 4.3).

    A plane is taken off each region. Raises ValueError for regions beyond the image.
    """
    parts = [_square(plane, place, side) for plane in volume for place in rois]
    flat = [_detrended(part) for part in parts]
    spectra = [np.abs(np.fft.fft2(part)) ** 2 for part in flat]
    power = np.mean(spectra, axis=0) * pixel_mm**2 / side**2
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(side, pixel_mm)] * 2, indexing="ij"))
    rings = np.round(frequency * side * pixel_mm).astype(int)
    most = side // 2
    counts = np.bincount(rings.ravel(), minlength=most + 1)[1 : most + 1]
    sums = np.bincount(rings.ravel(), power.ravel(), minlength=most + 1)[1 : most + 1]
    radius = np.arange(1, most + 1) / (side * pixel_mm)
    deviation = float(np.sqrt(np.mean([part.var() for part in flat])))
    return NoisePower(radius, sums / counts, deviation)


def transfer(
    volume: Volume, centre: Place, radius_mm: float, pixel_mm: float, reach_mm: float = 8.0
) -> Transfer:
    """At the circular edge of a rod along the slices (Richard et al., Med Phys 39, 2012).

    Pixels of all slices are binned by their distance from the edge; the derivative's Fourier
    transform is the modulation. Raises ValueError for a rod without contrast or beyond the image.
    """
    _square(volume[0], centre, 2 * math.ceil(radius_mm / pixel_mm))
    rows, columns = np.ogrid[: volume.shape[1], : volume.shape[2]]
    distance = np.hypot(rows - centre[0], columns - centre[1]) * pixel_mm - radius_mm
    step = pixel_mm / 4
    reach = min(reach_mm, radius_mm * 0.8)
    near = np.abs(distance) < reach
    bins = np.floor((distance[near] + reach) / step).astype(int)
    profile = volume.mean(axis=0)[near]
    counts = np.bincount(bins)
    edge = np.bincount(bins, profile) / np.maximum(counts, 1)
    known = np.flatnonzero(counts)
    edge = np.interp(np.arange(len(counts)), known, edge[known])
    quarter = len(edge) // 4
    contrast = float(edge[:quarter].mean() - edge[-quarter:].mean())
    if abs(contrast) < 1e-6:
        raise ValueError("the rod has no contrast against its surroundings")
    line = -np.gradient(edge) / contrast * np.hanning(len(edge))
    spectrum = np.abs(np.fft.rfft(line, 8 * len(line))).astype(np.float64)
    frequency = np.fft.rfftfreq(8 * len(line), step).astype(np.float64)
    inside = frequency <= 0.5 / pixel_mm
    return Transfer(frequency[inside], spectrum[inside] / spectrum[0], contrast)


def detectability(present: Volume, absent: Volume, width_px: float) -> float:
    """d' of a channelised Hotelling observer for regions [region, side, side] with and without.

    Channels are Laguerre-Gauss of `width_px` (Gallas and Barrett, J Opt Soc Am A 20, 2003). One
    half of the regions trains the template, the other is scored, and the other way round. Raises
    ValueError for fewer regions of each kind than twice the channels.
    """
    if min(len(present), len(absent)) < 4 * CHANNELS:
        raise ValueError(f"at least {4 * CHANNELS} regions of each kind are needed")
    channels = _laguerre_gauss(present.shape[1], width_px)
    with_signal, without = (stack.reshape(len(stack), -1) @ channels for stack in (present, absent))
    scores = []
    for half in (0, 1):
        train = with_signal[half::2], without[half::2]
        test = with_signal[1 - half :: 2], without[1 - half :: 2]
        spread = (np.cov(train[0].T) + np.cov(train[1].T)) / 2
        template = np.linalg.solve(spread, train[0].mean(0) - train[1].mean(0))
        a, b = (values @ template for values in test)
        scores.append((a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))
    return float(np.mean(scores))


def recovery(
    volume: Volume,
    centre: tuple[float, float, float],
    diameter_mm: float,
    true: float,
    spacing_mm: tuple[float, float, float],
) -> Recovery:
    """Of a hot sphere of known uptake, within half of the maximum and a sphere around it.

    Raises ValueError for a middle beyond the volume.
    """
    if not all(0 <= middle < size for middle, size in zip(centre, volume.shape, strict=True)):
        raise ValueError(f"the middle {centre} of the sphere lies beyond the volume")
    axes = np.ogrid[tuple(slice(size) for size in volume.shape)]
    squares = sum(
        ((axis - middle) * size) ** 2
        for axis, middle, size in zip(axes, centre, spacing_mm, strict=True)
    )
    near = volume[np.sqrt(squares) <= diameter_mm / 2 + max(spacing_mm)]
    top = float(near.max())
    return Recovery(diameter_mm, top / true, float(near[near >= 0.5 * top].mean()) / true)


def regions(volume: Volume, place: Place, side: int) -> Volume:
    """The square of `side` pixels about a place in every slice; ValueError beyond the image."""
    return np.stack([_square(plane, place, side) for plane in volume])


def _square(plane: Volume, place: Place, side: int) -> Volume:
    top, left = (round(at - side / 2) for at in place)
    if min(top, left) < 0 or top + side > plane.shape[0] or left + side > plane.shape[1]:
        raise ValueError(f"a region of {side} pixels about {place} leaves the image")
    return plane[top : top + side, left : left + side].astype(np.float64)


def _detrended(part: Volume) -> Curve:
    rows, columns = np.indices(part.shape).reshape(2, -1)
    base = np.stack([rows, columns, np.ones_like(rows)], 1).astype(float)
    fit, *_ = np.linalg.lstsq(base, part.ravel(), rcond=None)
    flat: Curve = (part.ravel() - base @ fit).reshape(part.shape)
    return flat


def _laguerre_gauss(side: int, width: float) -> Curve:
    """Columns are channels: (side², CHANNELS)."""
    rows, columns = np.indices((side, side)) - (side - 1) / 2
    x = 2 * np.pi * (rows**2 + columns**2) / width**2
    series = [np.ones_like(x), 1 - x]
    for n in range(1, CHANNELS - 1):
        series.append(((2 * n + 1 - x) * series[n] - n * series[n - 1]) / (n + 1))
    channels = np.stack([np.exp(-x / 2) * each for each in series[:CHANNELS]], -1)
    flat: Curve = channels.reshape(side * side, CHANNELS)
    unit: Curve = flat / np.linalg.norm(flat, axis=0)
    return unit
