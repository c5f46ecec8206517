"""Harm planted into finished restorations: what gates must see.

A fault takes a restored series and gives what a reader would get, with the slices that were harmed.
Each slice gets its own fault where faults are local, at a place drawn from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from restoration.bundle import LOW_FREQUENCY
from restoration.fidelity import uptake
from restoration.lowpass import smoothing_matrix
from restoration.tasks import RestorationTask
from training.restored import Series

Volume = npt.NDArray[np.float32]
Plane = npt.NDArray[np.float32]

CT, MR, PET = (
    RestorationTask.CT_DENOISE,
    RestorationTask.MRI_SR,
    RestorationTask.PET_SYNTHESIS,
)
# Where a lesion may lie, in the smoothed reference: HU, share of the 99th percentile, SUV.
_SOFT_HU = (-20.0, 120.0)
_TISSUE_SHARE = (0.15, 0.9)
_TISSUE_SUV = (0.3, 20.0)


@dataclass(frozen=True)
class Planted:
    """A series with harm in it, and the slices that have it."""

    series: Series
    slices: tuple[int, ...]
    intact: bool = True  #: whether the weights in memory are still those that were loaded


@dataclass(frozen=True)
class Fault:
    """A kind of harm at one size; `plant` gives None where a series cannot have it."""

    name: str
    size: str
    tasks: tuple[RestorationTask, ...]
    plant: Callable[[Series, np.random.Generator], Planted | None]
    #: Tasks in which it is a matter of the scan: planted into whole series, which answer as such.
    scans: tuple[RestorationTask, ...] = ()


def finished_faults() -> Iterator[Fault]:
    """Every fault that is planted after the restoration, smallest size first."""
    for diameter in (4, 6, 8, 12):
        for contrast in (15, 30, 60):
            for name in ("lesion added", "lesion removed", "lesion by the network"):
                yield Fault(
                    name, f"{diameter} mm, {contrast} HU", (CT,), _lesion(name, diameter, contrast)
                )
    for diameter in (8, 16):
        for share in (50, 100):
            for name in ("lesion added", "lesion removed", "lesion by the network"):
                yield Fault(
                    name,
                    f"{diameter} mm, {share} % of tissue",
                    (PET,),
                    _lesion(name, diameter, share / 100),
                )
    for diameter in (4, 8, 12):
        for share in (10, 30):
            for name in ("lesion added", "lesion removed"):
                yield Fault(
                    name,
                    f"{diameter} mm, {share} % of tissue",
                    (MR,),
                    _lesion(name, diameter, share / 100),
                )
    for pixels in (1, 2, 4):
        yield Fault("vessel shifted", f"{pixels} px", (CT, MR), _shift(pixels))
    for offset in (2, 5, 10):
        yield Fault("HU offset", f"{offset} HU", (CT,), _whole(partial(np.add, offset)))
    for percent in (1, 3, 5):
        yield Fault("contrast gain", f"{percent} %", (CT, MR, PET), _whole(_gain(percent)))
    for percent in (10, 15, 25):
        for least, most, what in ((5, np.inf, "5 ml and more"), (1, 5, "1 to 5 ml")):
            yield Fault(
                "SUV of a hot spot lowered",
                f"{percent} %, {what}",
                (PET,),
                _cold(percent, least, most),
            )
    for distance in (1, 3, 8):
        yield Fault("slices swapped", f"{distance} apart", (CT, MR, PET), _swap(distance))


def _after(series: Series, volume: Volume, slices: Sequence[int]) -> Planted | None:
    if not slices:
        return None
    made = replace(series.made, planes=volume.astype(np.float32))
    return Planted(replace(series, made=made), tuple(slices))


def _whole(change: Callable[[Volume], Volume]) -> Callable[..., Planted | None]:
    def plant(series: Series, _: np.random.Generator) -> Planted | None:
        return _after(series, change(series.made.volume), range(len(series.lq)))

    return plant


def _gain(percent: float) -> Callable[[Volume], Volume]:
    """Contrast about the mean of each slice, which stays."""

    def change(y: Volume) -> Volume:
        mean = y.mean(axis=(1, 2), keepdims=True)
        gained: Volume = mean + np.float32(1 + percent / 100) * (y - mean)
        return gained

    return change


def _lesion(name: str, diameter: float, contrast: float) -> Callable[..., Planted | None]:
    """A ball of HU, or of a share of the tissue around it, in each slice with a place for it.

    Added: in the output alone. Removed: in the input alone. By the network: added before the low
    frequencies are held, so what a bundle that holds them lets through.
    """

    def plant(series: Series, rng: np.random.Generator) -> Planted | None:
        balls = np.zeros_like(series.lq)
        harmed = []
        for index, truth in enumerate(series.hq):
            place = _place(truth, series.task, diameter, series.spacing_mm, rng)
            if place is None:
                continue
            ball = _ball(truth.shape, place, diameter / 2, series.spacing_mm)
            if series.task is CT:
                ball = ball * np.float32(contrast * rng.choice((-1, 1)))
            else:
                ball = ball * np.float32(contrast * truth[place])
            balls[index] = ball
            harmed.append(index)
        if name == "lesion removed":
            planted = _after(series, series.made.volume, harmed)
            return planted and replace(
                planted, series=replace(planted.series, lq=series.lq + balls)
            )
        if name == "lesion by the network":
            balls -= _held(balls, series.task)
        return _after(series, series.made.volume + balls, harmed)

    return plant


def _held(volume: Volume, task: RestorationTask) -> Volume:
    """The part of a change that a bundle takes back which holds the low frequencies."""
    along, width, _ = LOW_FREQUENCY[task.value]
    if along > 0:
        through = smoothing_matrix(len(volume), along).astype(np.float32)
        volume = np.tensordot(through, volume, axes=1)
    return np.stack([_smooth(plane, width) for plane in volume])


def _shift(pixels: int) -> Callable[..., Planted | None]:
    """The strongest small structure of a slice, moved; its surroundings blend."""

    def plant(series: Series, rng: np.random.Generator) -> Planted | None:
        y = series.made.volume.copy()
        harmed = []
        for index, truth in enumerate(series.hq):
            place = _vessel(truth, series.task, rng)
            if place is None:
                continue
            disc = _ball(truth.shape, place, 8.0, (1.0, 1.0, 1.0))
            moved = np.roll(y[index], pixels, axis=int(rng.integers(2)))
            y[index] = y[index] + disc * (moved - y[index])
            harmed.append(index)
        return _after(series, y, harmed)

    return plant


def _cold(percent: float, least_ml: float, most_ml: float) -> Callable[..., Planted | None]:
    def plant(series: Series, _: np.random.Generator) -> Planted | None:
        truth, y = series.hq, series.made.volume.copy()
        voxel = float(np.prod(series.spacing_mm)) / 1000
        weight = np.zeros(truth.size, np.float32)
        harmed: set[int] = set()
        for where in uptake.components(truth > uptake.HOT_SUV):
            if least_ml <= len(where) * voxel < most_ml:
                weight[where] = 1
                harmed |= set((where // truth[0].size).tolist())
        y *= 1 - np.float32(percent / 100) * weight.reshape(truth.shape)
        return _after(series, y, sorted(harmed))

    return plant


def _swap(distance: int) -> Callable[..., Planted | None]:
    def plant(series: Series, rng: np.random.Generator) -> Planted | None:
        total = len(series.lq)
        if total <= distance:
            return None
        y = series.made.volume.copy()
        harmed = []
        for first in range(int(rng.integers(2)), total - distance, 2 * distance + 2):
            second = first + distance
            y[[first, second]] = y[[second, first]]
            harmed += [first, second]
        return _after(series, y, harmed)

    return plant


def _place(
    truth: Plane,
    task: RestorationTask,
    diameter: float,
    spacing_mm: Sequence[float],
    rng: np.random.Generator,
) -> tuple[int, int] | None:
    """A pixel well inside uniform tissue, or None."""
    smooth = _smooth(truth, 2.0)
    low, high = {CT: _SOFT_HU, PET: _TISSUE_SUV, MR: _TISSUE_SHARE}[task]
    if task is MR:
        top = float(np.percentile(truth, 99))
        low, high = low * top, high * top
    inside = ((smooth > low) & (smooth < high)).astype(np.float32)
    # All of the lesion and its rim lie in the tissue, away from the border of the image.
    margin = int(np.ceil(diameter / 2 / spacing_mm[1])) + 2
    wide: npt.NDArray[np.bool_] = _smooth(inside, max(1.0, margin / 2)) > 0.9
    wide[:margin], wide[-margin:], wide[:, :margin], wide[:, -margin:] = False, False, False, False
    places = np.argwhere(wide)
    if len(places) == 0:
        return None
    row, column = places[rng.integers(len(places))]
    return int(row), int(column)


def _vessel(
    truth: Plane, task: RestorationTask, rng: np.random.Generator
) -> tuple[int, int] | None:
    """One of the places with the most detail of a few pixels, in the body, off the border."""
    detail = np.abs(_smooth(truth, 1.0) - _smooth(truth, 3.0))
    floor = {CT: -900.0, MR: 0.1 * float(truth.max()), PET: 0.1}[task]
    detail[(_smooth(truth, 2.0) < floor) | (truth > 300 if task is CT else False)] = 0
    edge = 12
    detail[:edge], detail[-edge:], detail[:, :edge], detail[:, -edge:] = 0, 0, 0, 0
    if not detail.any():
        return None
    order = np.argsort(detail, axis=None)[-200:]
    row, column = np.unravel_index(int(rng.choice(order)), truth.shape)
    return int(row), int(column)


def _ball(
    shape: tuple[int, ...], place: tuple[int, int], radius_mm: float, spacing_mm: Sequence[float]
) -> Plane:
    """1 inside a disc, with an edge of one pixel."""
    row, column = np.ogrid[: shape[0], : shape[1]]
    apart = np.hypot((row - place[0]) * spacing_mm[1], (column - place[1]) * spacing_mm[2]).astype(
        np.float32
    )
    edge: Plane = np.clip(0.5 - (apart - radius_mm) / spacing_mm[1], 0, 1).astype(np.float32)
    return edge


def _smooth(plane: Plane, sigma: float) -> Plane:
    rows, columns = (smoothing_matrix(size, sigma).astype(np.float32) for size in plane.shape)
    smooth: Plane = (rows @ plane @ columns).astype(np.float32)
    return smooth
