"""Where slices lie: order, spacing, gaps, tilt and plane, from position and orientation alone.

Instance Number, Slice Location and the order of arrival say nothing reliable about space
(PS3.3 C.7.6.2.1.1 defines the only frame); none of them is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicom_node.dicom.header import number, numbers
from dicom_node.errors import RefusedError

__all__ = [
    "SAME_GRID",
    "Resampling",
    "SliceFrame",
    "affine",
    "contiguous_runs",
    "has_duplicates",
    "one_orientation",
    "order",
    "plane_name",
    "positions",
    "resampled_position",
    "slice_frame",
    "slice_spacing",
    "tilt_degrees",
]

Vector = NDArray[np.float64]

# A gantry tilts by up to 30 degrees; beyond 35 nobody calls a slice axial.
_COSINE_OF_A_PLANE = float(np.cos(np.deg2rad(35.0)))
_ORIENTATION_TOLERANCE = 1e-3
# Positions rounded to 0.1 mm turn a spacing of 0.625 mm into steps of 0.6 and 0.7.
_STEP_TOLERANCE = 0.20
_SAME_POSITION_MM = 0.01


@dataclass(frozen=True)
class SliceFrame:
    """One slice in patient space: PS3.3 C.7.6.2, millimetres, LPS."""

    position: Vector  # (3,) centre of the first pixel
    row: Vector  # (3,) direction in which the column index grows
    column: Vector  # (3,) direction in which the row index grows
    spacing: tuple[float, float]  # between rows, between columns

    @property
    def normal(self) -> Vector:
        """The unit vector perpendicular to the slice."""
        return np.cross(self.row, self.column)


@dataclass(frozen=True)
class Resampling:
    """A finer grid over the same slice.

    factor: samples for each of the source's, along rows and columns alike. shift: where the
    first new sample lies, in samples of the source from its first: 0 for zero-filled k-space,
    -(factor - 1) / (2 factor) where new samples divide the area of an old one.
    """

    factor: int = 1
    shift: tuple[float, float] = (0.0, 0.0)  # down the rows, along the columns

    @property
    def changes(self) -> bool:
        """Whether it is another grid at all."""
        return self.factor != 1 or any(self.shift)


SAME_GRID = Resampling()


def resampled_position(frame: SliceFrame, by: Resampling) -> Vector:
    """Where the first sample of the finer grid lies (PS3.3 C.7.6.2.1-1), mm."""
    down = by.shift[0] * frame.spacing[0] * frame.column
    along = by.shift[1] * frame.spacing[1] * frame.row
    return np.asarray(frame.position + down + along)


def slice_frame(header: Dataset) -> SliceFrame:
    """The slice's place; RefusedError where position, orientation or spacing is missing or odd."""
    place = _vector(header, "ImagePositionPatient", 3)
    cosines = _vector(header, "ImageOrientationPatient", 6)
    spacing = _vector(header, "PixelSpacing", 2)
    row, column = cosines[:3], cosines[3:]
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    if min(lengths) < 0.9 or max(lengths) > 1.1 or abs(float(row @ column)) > 0.05:
        raise RefusedError("ImageOrientationPatient is not a pair of perpendicular unit vectors")
    if float(spacing.min()) <= 0.0:
        raise RefusedError("PixelSpacing is not positive")
    return SliceFrame(
        place, row / lengths[0], column / lengths[1], (float(spacing[0]), float(spacing[1]))
    )


def _vector(header: Dataset, keyword: str, length: int) -> Vector:
    found = numbers(header, keyword)
    if found is None or len(found) != length:
        raise RefusedError(f"{keyword} is absent or not {length} numbers")
    return np.asarray(found, dtype=np.float64)


def one_orientation(frames: Sequence[SliceFrame]) -> bool:
    """Whether all slices have the same orientation."""
    first = frames[0]
    return all(
        np.abs(frame.row - first.row).max() < _ORIENTATION_TOLERANCE
        and np.abs(frame.column - first.column).max() < _ORIENTATION_TOLERANCE
        for frame in frames
    )


def positions(frames: Sequence[SliceFrame]) -> Vector:
    """Each slice's distance in mm along the first slice's normal, from the patient origin."""
    normal = frames[0].normal
    return np.asarray([float(frame.position @ normal) for frame in frames])


def order(frames: Sequence[SliceFrame], tie_breakers: Sequence[str]) -> tuple[int, ...]:
    """The indices of the slices from the lowest position to the highest.

    tie_breakers (one per slice, the SOP Instance UID) make the order of slices at one position
    the same in every run.
    """
    along = positions(frames)
    return tuple(sorted(range(len(frames)), key=lambda i: (float(along[i]), tie_breakers[i])))


def has_duplicates(sorted_positions: Vector) -> bool:
    """Whether two slices lie at one position."""
    return bool(np.any(np.diff(sorted_positions) < _SAME_POSITION_MM))


def contiguous_runs(sorted_positions: Vector) -> list[range]:
    """Split slices in order into runs of one spacing; a missing slice or a new step ends a run.

    A slice between two spacings goes to the longer run, or to the finer one of two equals, so
    that a gap never counts as the spacing of a run.
    """
    count = len(sorted_positions)
    if count < 3:
        return [range(count)] if count else []
    segments = _segments(np.diff(sorted_positions))
    starts = [0]
    for (first, stop, step), (_, next_stop, next_step) in pairwise(segments):
        left, right = stop - first, next_stop - stop
        keeps_left = (left, -step) >= (right, -next_step)
        starts.append(stop + 1 if keeps_left else stop)
    stops = [*starts[1:], count]
    return [range(a, b) for a, b in zip(starts, stops, strict=True) if b > a]


def _segments(steps: Vector) -> list[tuple[int, int, float]]:
    """Maximal stretches of equal steps as (first step, step after the last, size in mm)."""
    found: list[tuple[int, int, float]] = []
    first = 0
    for i in range(1, len(steps) + 1):
        if i == len(steps) or not _same_step(float(steps[i]), float(steps[first])):
            found.append((first, i, float(steps[first])))
            first = i
    return found


def _same_step(one: float, other: float) -> bool:
    return abs(one - other) <= max(_STEP_TOLERANCE * min(one, other), _SAME_POSITION_MM)


def slice_spacing(sorted_positions: Vector, header: Dataset) -> float:
    """The distance of neighbouring slices in mm; of one slice alone, what its header says."""
    if len(sorted_positions) > 1:
        return float(np.median(np.diff(sorted_positions)))
    stated = number(header, "SpacingBetweenSlices") or number(header, "SliceThickness")
    return abs(stated) if stated else 1.0


def plane_name(frame: SliceFrame) -> str:
    """'axial', 'coronal', 'sagittal' or 'oblique', from the direction of the normal."""
    x, y, z = (abs(float(component)) for component in frame.normal)
    named = {"sagittal": x, "coronal": y, "axial": z}
    best = max(named, key=lambda name: named[name])
    return best if named[best] >= _COSINE_OF_A_PLANE else "oblique"


def tilt_degrees(frames: Sequence[SliceFrame]) -> float:
    """The angle between the stacking direction and the slices' normal (gantry tilt), in degrees.

    frames are in order; fewer than two slices have no stacking direction and no tilt.
    """
    step = frames[-1].position - frames[0].position
    length = float(np.linalg.norm(step))
    if len(frames) < 2 or length < _SAME_POSITION_MM:
        return 0.0
    cosine = min(1.0, abs(float(step @ frames[0].normal)) / length)
    return float(np.rad2deg(np.arccos(cosine)))


def affine(frames: Sequence[SliceFrame], spacing_z: float) -> NDArray[np.float64]:
    """The 4×4 matrix from (slice, row, column) indices to LPS millimetres (PS3.3 C.7.6.2.1-1).

    frames are in order. The slice axis follows the positions, so a tilted stack stays sheared.
    """
    first, last = frames[0], frames[-1]
    matrix = np.eye(4)
    several = len(frames) > 1
    step = (last.position - first.position) / (len(frames) - 1) if several else None
    matrix[:3, 0] = first.normal * spacing_z if step is None else step
    matrix[:3, 1] = first.column * first.spacing[0]
    matrix[:3, 2] = first.row * first.spacing[1]
    matrix[:3, 3] = first.position
    return matrix
