"""PET: whether total activity and the uptake of hot regions came through.

Regions are drawn on the mean of input and output, so that neither's noise chooses them; SUVpeak is
the largest mean over one millilitre.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from restoration.fidelity import images
from restoration.lowpass import reach, smoothing_matrix

Volume = npt.NDArray[np.float32]
Voxels = npt.NDArray[np.int64]
Spacing = tuple[float, float, float]

HOT_SUV = 2.5
LEAST_MM3 = 1000.0
LARGE_MM3 = 5000.0  # from here on the mean of a region is hardly noise
CONTOUR = 0.5  # of the region's maximum
# The Gaussian with the second moment of a sphere of one millilitre (radius 6.2 mm): r / sqrt(5).
_PEAK_MM = 6.2035 / np.sqrt(5)
_DRAWN = 1.0  # voxels, smoothing of what regions are drawn on
# Of the Gaussian under which uptake of a small region is compared: its own mean is mostly noise.
_WIDE = 2.0  # voxels
# Of the Gaussian over which activity is to stay where it was, in voxels, and the least uptake that
# a change is compared with: less of it is noise.
_NEAR, _LEAST_SUV = 4.0, 0.5


@dataclass(frozen=True)
class HotRegion:
    """A region above HOT_SUV, and how its uptake changed."""

    slices: tuple[int, ...]
    volume_mm3: float
    mean_change: float  #: % of SUVmean within half of the maximum
    peak_change: float  #: % of SUVpeak, of regions of LARGE_MM3
    wide_change: float  #: % of the mean under a Gaussian of 2 voxels, of smaller ones


def activity_change(before: Volume, after: Volume) -> float | None:
    """Change of the total activity in %; None for a volume without any."""
    total = float(before.sum(dtype=np.float64))
    return 100 * (float(after.sum(dtype=np.float64)) / total - 1) if total > 0 else None


def local_change(before: Volume, after: Volume) -> npt.NDArray[np.float64]:
    """The largest change of the activity around any voxel of each slice in %, (slices,).

    Around: under a Gaussian of 4 voxels in all three directions; uptake below 0.5 SUV counts as
    that. The total of a long scan hides a region whose activity changes, its surroundings do not.
    """
    x, y = (torch.from_numpy(np.ascontiguousarray(volume)) for volume in (before, after))
    through = _matrix(len(before), _NEAR)
    moved, known = (
        torch.tensordot(through, images.gaussian(stack, _NEAR), 1) for stack in (y - x, x)
    )
    share = moved.abs_().div_(known.clamp_(min=_LEAST_SUV)).amax((1, 2))
    found: npt.NDArray[np.float64] = 100 * share.double().numpy()
    return found


def injected_share(volume: Volume, spacing_mm: Spacing, weight_kg: float) -> float:
    """The activity in a volume of body-weight SUV, in % of the injected one.

    SUVbw is concentration times weight over injected activity, decayed alike: its sum over the
    volume in ml is at most the weight in g.
    """
    volume_ml = float(np.prod(spacing_mm)) / 1000
    return 100 * float(volume.sum(dtype=np.float64)) * volume_ml / (1000 * weight_kg)


def hot_regions(before: Volume, after: Volume, spacing_mm: Spacing) -> list[HotRegion]:
    """Connected regions above HOT_SUV and one millilitre of volumes (slices, rows, columns)."""
    between = (before + after) / np.float32(2)
    # A mean of its surroundings: no voxel is hot that has no hotter one within the kernel.
    box = _around(between > HOT_SUV, reach(_DRAWN))
    if box is None:
        return []
    drawn = np.zeros_like(between)
    drawn[box] = _smoothed(between, (_DRAWN,) * 3, box)
    voxel = float(np.prod(spacing_mm))
    widths = tuple(float(_PEAK_MM / size) for size in spacing_mm)
    regions = [where for where in components(drawn > HOT_SUV) if len(where) * voxel >= LEAST_MM3]
    return [_changed(where, (before, after), drawn, widths, voxel) for where in regions]


def _around(mask: npt.NDArray[np.bool_], margin: int) -> tuple[slice, ...] | None:
    """The smallest box around what is in a mask, with a margin; None for an empty one."""
    box = []
    for axis, size in enumerate(mask.shape):
        places = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        if not len(places):
            return None
        box.append(slice(max(0, int(places[0]) - margin), min(size, int(places[-1]) + 1 + margin)))
    return tuple(box)


def worst_by_slice(
    changes: Iterable[tuple[HotRegion, float]], slices: int
) -> tuple[float | None, ...]:
    """The change furthest from zero among the regions that each slice cuts; None without any."""
    worst: list[float | None] = [None] * slices
    for region, change in changes:
        for index in region.slices:
            old = worst[index]
            worst[index] = change if old is None or abs(change) > abs(old) else old
    return tuple(worst)


def components(mask: npt.NDArray[np.bool_]) -> Iterator[Voxels]:
    """Flat indices of each face-connected component of a mask (slices, rows, columns)."""
    places = np.flatnonzero(mask)
    if places.size == 0:
        return
    label = np.arange(len(places))
    first, second = _neighbours(mask, places)
    while True:
        lowest = np.minimum(label[first], label[second])
        merged = label.copy()
        np.minimum.at(merged, label[first], lowest)
        np.minimum.at(merged, label[second], lowest)
        merged = merged[merged[merged]]
        merged = np.minimum(merged, merged[label])
        if np.array_equal(merged, label):
            break
        label = merged
    order = np.argsort(label, kind="stable")
    starts = np.flatnonzero(np.diff(label[order])) + 1
    yield from np.split(places[order], starts)


def _neighbours(mask: npt.NDArray[np.bool_], places: Voxels) -> tuple[Voxels, Voxels]:
    """Pairs of neighbours as positions in `places`, each pair once."""
    number = np.full(mask.size, -1)
    number[places] = np.arange(len(places))
    pairs = []
    for axis, at in enumerate(np.unravel_index(places, mask.shape)):
        inside = np.flatnonzero(at < mask.shape[axis] - 1)
        step = int(np.prod(mask.shape[axis + 1 :]))
        beyond = number[places[inside] + step]
        pairs.append((inside[beyond >= 0], beyond[beyond >= 0]))
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])


def _changed(
    where: Voxels,
    volumes: tuple[Volume, Volume],
    drawn: Volume,
    peak_widths: tuple[float, ...],
    voxel_mm3: float,
) -> HotRegion:
    level = drawn.ravel()[where]
    inner = where[level >= CONTOUR * level.max()]
    places = np.unravel_index(where, drawn.shape)
    box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in places)
    inside = tuple(at - part.start for at, part in zip(places, box, strict=True))
    means = [float(volume.ravel()[inner].mean(dtype=np.float64)) for volume in volumes]
    large = len(where) * voxel_mm3 >= LARGE_MM3
    widths = peak_widths if large else (_WIDE,) * 3
    around = [_smoothed(volume, widths, box)[inside] for volume in volumes]
    peaks = [float(part.max()) if large else math.nan for part in around]
    wide = [math.nan if large else float(part.mean()) for part in around]
    return HotRegion(
        tuple(int(index) for index in np.unique(places[0])),
        len(where) * voxel_mm3,
        *(100 * (now / then - 1) if then > 0 else math.nan for then, now in (means, peaks, wide)),
    )


def _smoothed(volume: Volume, widths: Sequence[float], box: tuple[slice, ...]) -> Volume:
    """A part of a volume smoothed by a Gaussian of these widths in voxels; mirrored at its ends."""
    through, rows, columns = (
        _matrix(size, float(width))[part]
        for size, width, part in zip(volume.shape, widths, box, strict=True)
    )
    # What is further away than the kernel reaches has a weight of zero.
    near = tuple(
        slice(max(0, part.start - reach(width)), min(size, part.stop + reach(width)))
        for size, width, part in zip(volume.shape, widths, box, strict=True)
    )
    part = torch.from_numpy(np.ascontiguousarray(volume[near]))
    planes = rows[:, near[1]] @ (part @ columns[:, near[2]].T)
    smooth: Volume = torch.tensordot(through[:, near[0]], planes, 1).numpy()
    return smooth


@functools.lru_cache(maxsize=64)
def _matrix(size: int, sigma: float) -> torch.Tensor:
    return torch.from_numpy(smoothing_matrix(size, sigma)).float()
