"""True activity for PET simulation: 18F-FDG on CT anatomy, and real PET crops in a larger body.

Uptake values are typical SUVs of an adult 60 min after injection (Wang et al., J Nucl Med 2007;
Zincirkeser et al., J Int Med Res 2007). Activity is SUV, attenuation 1/mm at 511 keV, both
float32 [slice, n, n] on one square grid, as ``training.degrade.simulate_pet`` takes them.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad

Volume = npt.NDArray[np.float32]

WATER_PER_MM = 0.0096
"""Linear attenuation of water at 511 keV (NIST XCOM)."""

# Lung, fat, muscle, enhanced blood and organs, marrow, cortical bone: uptake changes with density.
_HU = (-1000, -850, -500, -250, -120, -50, 10, 60, 130, 200, 400, 1000)
_SUV = (0.25, 0.45, 0.6, 0.35, 0.25, 0.35, 0.8, 1.1, 1.6, 1.5, 1.1, 0.5)


def fdg_from_ct(
    hu: Volume,
    spacing_mm: tuple[float, float, float],
    *,
    size: int,
    pixel_mm: float,
    rng: np.random.Generator,
) -> tuple[Volume, Volume]:
    """Simulated FDG (activity, attenuation) [slice, size, size] of a CT [slice, row, column].

    Tissue uptake follows CT density, varied smoothly as organs vary; a liver, hot organs, a
    heart wall and lesions are drawn at random into the tissue that can hold them.
    """
    zoom = spacing_mm[1] / pixel_mm, spacing_mm[2] / pixel_mm
    anatomy = _on_grid(torch.from_numpy(np.maximum(hu, -1000)), zoom, size)
    body = _body(anatomy)
    density = anatomy.numpy()
    activity = np.interp(density, _HU, _SUV).astype(np.float32)
    activity *= _smooth_field(density.shape, spacing_mm[0], pixel_mm, 30, 0.2, rng)
    activity *= _smooth_field(density.shape, spacing_mm[0], pixel_mm, 8, 0.12, rng)
    grid = _millimetres(density.shape, spacing_mm[0], pixel_mm)
    for centre, radii, wall, suv in _foci(density, body, grid, rng):
        distance = _ellipsoid_distance(grid, centre, radii)
        inside = _edge(distance * min(radii), pixel_mm)
        if wall > 0:
            inside = inside - _edge((distance + wall / min(radii)) * min(radii), pixel_mm)
        weight = inside * (density > -650 if suv > 2.5 else density > -20)
        activity = activity * (1 - weight) + suv * weight
    return (activity * body).astype(np.float32), _attenuation(density, body)


def largest_extent_mm(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> float:
    """Diagonal of a slice in mm: the field of view that surely holds it."""
    return math.hypot(shape[1] * spacing_mm[1], shape[2] * spacing_mm[2])


def embed_crop(
    suv: Volume, *, pixel_mm: float, size: int
) -> tuple[Volume, Volume, tuple[slice, slice]]:
    """A real PET image inside a larger field: (activity, attenuation, where the image lies).

    An image with air all round is a whole body and stays alone. A crop out of a body is mirrored
    outwards up to a circle, so counts and attenuation around it are like those of a limb or a
    trunk. What takes up tracer attenuates like water. Raises ValueError for an image beyond the
    grid.
    """
    rows, columns = suv.shape[1:]
    top, left = (size - rows) // 2, (size - columns) // 2
    radius = max(math.hypot(rows, columns) / 2 + 2, 110 / pixel_mm)
    if min(top, left) < 0 or radius > size / 2:
        raise ValueError(f"A PET image of {rows} x {columns} does not fit a field of {size}.")
    border = ((0, 0), (top, size - rows - top), (left, size - columns - left))
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    disc = (np.hypot(y, x) <= radius).astype(np.float32)
    mode: Literal["constant", "symmetric"] = "constant" if _is_whole(suv) else "symmetric"
    activity = (np.pad(np.maximum(suv, 0), border, mode=mode) * disc).astype(np.float32)
    body = _outline(torch.from_numpy(activity)) * disc
    return activity, WATER_PER_MM * body, (slice(top, top + rows), slice(left, left + columns))


def body_box(suv: Volume, margin: int = 8) -> tuple[slice, slice]:
    """Rows and columns that a whole-body PET needs; all of them where the image cuts the body.

    A scanner's field of 800 mm is mostly air, and projecting air costs as much as tissue.
    """
    everything = slice(0, suv.shape[1]), slice(0, suv.shape[2])
    tissue = (suv > 0.3).mean(axis=0) > 0.02
    if not _is_whole(suv) or not tissue.any():
        return everything
    found = (np.flatnonzero(tissue.any(axis=axis)) for axis in (1, 0))
    rows, columns = (
        slice(max(0, int(hits[0]) - margin), min(size, int(hits[-1]) + 1 + margin))
        for hits, size in zip(found, suv.shape[1:], strict=True)
    )
    return rows, columns


def _is_whole(suv: Volume) -> bool:
    edges = (suv[:, 0], suv[:, -1], suv[:, :, 0], suv[:, :, -1])
    return float(np.percentile(np.concatenate([edge.ravel() for edge in edges]), 90)) < 0.1


def _outline(activity: Tensor) -> Volume:
    """Tissue with tracer and whatever it encloses (lungs), 0 or 1."""
    smooth = avg_pool2d(activity[:, None], 3, 1, 1)
    outline: Volume = _filled((smooth > 0.08).float())[:, 0].numpy()
    return outline


def _on_grid(hu: Tensor, zoom: tuple[float, float], size: int) -> Tensor:
    """Resample to square pixels and centre in air, (S, size, size)."""
    rows, columns = (min(size, round(n * z)) for n, z in zip(hu.shape[1:], zoom, strict=True))
    small = interpolate(hu[:, None], (rows, columns), mode="bilinear", antialias=True)[:, 0]
    top, left = (size - rows) // 2, (size - columns) // 2
    return pad(small, (left, size - columns - left, top, size - rows - top), value=-1000.0)


def _body(hu: Tensor) -> npt.NDArray[np.float32]:
    """The body without table and air: what air from the border cannot reach, opened by 4 pixels."""
    filled = _filled((hu > -350).float()[:, None])
    core = 1 - max_pool2d(1 - filled, 7, 1, 3)
    body: npt.NDArray[np.float32] = (max_pool2d(core, 9, 1, 4) * filled)[:, 0].numpy()
    return body


def _filled(tissue: Tensor) -> Tensor:
    """Tissue (S, 1, n, n) and the air it encloses: all that air from the border cannot reach."""
    air = 1 - tissue
    outside = torch.zeros_like(tissue)
    outside[..., 0, :] = outside[..., -1, :] = outside[..., :, 0] = outside[..., :, -1] = 1
    outside = outside * air
    while True:
        grown = max_pool2d(outside, 3, 1, 1) * air
        if torch.equal(grown, outside):
            return 1 - outside
        outside = grown


def _smooth_field(
    shape: tuple[int, ...],
    slice_mm: float,
    pixel_mm: float,
    scale_mm: float,
    strength: float,
    rng: np.random.Generator,
) -> Volume:
    """exp(strength * a unit Gaussian field) whose details are about ``scale_mm`` wide."""
    coarse = [max(2, math.ceil(n * step / scale_mm) + 1) for n, step in
              zip(shape, (slice_mm, pixel_mm, pixel_mm), strict=True)]  # fmt: skip
    nodes = torch.from_numpy(rng.standard_normal(coarse, dtype=np.float32))[None, None]
    field = interpolate(nodes, tuple(shape), mode="trilinear", align_corners=True)[0, 0]
    smooth: Volume = torch.exp(strength * field).numpy()
    return smooth


def _millimetres(
    shape: tuple[int, ...], slice_mm: float, pixel_mm: float
) -> tuple[npt.NDArray[np.float64], ...]:
    steps = zip(shape, (slice_mm, pixel_mm, pixel_mm), strict=True)
    return tuple(np.ogrid[tuple(slice(n) for n in shape)][i] * step
                 for i, (n, step) in enumerate(steps))  # fmt: skip


def _foci(
    hu: Volume,
    body: npt.NDArray[np.float32],
    grid: tuple[npt.NDArray[np.float64], ...],
    rng: np.random.Generator,
) -> list[tuple[npt.NDArray[np.float64], tuple[float, float, float], float, float]]:
    """Random hot structures: (centre mm, radii mm, wall mm or 0 when solid, SUV)."""
    soft = np.argwhere((hu > -20) & (hu < 250) & (body > 0))
    tissue = np.argwhere((hu > -900) & (body > 0))
    if len(soft) == 0:
        return []
    steps = np.array([float(axis.ravel()[1]) if axis.size > 1 else 1.0 for axis in grid])

    def at(points: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return np.asarray(points[rng.integers(len(points))] * steps)

    def radii(low: float, high: float) -> tuple[float, float, float]:
        a, b, c = rng.uniform(low, high) * rng.uniform(0.7, 1.3, 3)
        return float(a), float(b), float(c)

    foci = []
    if rng.random() < 0.6:  # liver or spleen
        foci.append((at(soft), radii(40, 80), 0.0, rng.uniform(1.6, 2.6)))
    if rng.random() < 0.35:  # heart muscle
        central = np.hypot(*((soft - soft.mean(0)) * steps)[:, 1:].T) < 80
        centre = at(soft[central] if central.any() else soft)
        foci.append((centre, radii(30, 40), rng.uniform(9, 13), rng.uniform(2.6, 9)))
    kidneys_and_bowel = rng.poisson(0.8)
    foci += [(at(soft), radii(12, 28), 0.0, rng.uniform(3, 14)) for _ in range(kidneys_and_bowel)]
    for _ in range(rng.poisson(1.5 + len(hu) / 8)):  # lesions
        size = float(np.exp(rng.uniform(np.log(3.5), np.log(18))))
        foci.append((at(tissue), radii(size, size), 0.0, float(np.exp(rng.uniform(0.95, 2.75)))))
    return foci


def _ellipsoid_distance(
    grid: tuple[npt.NDArray[np.float64], ...],
    centre: npt.NDArray[np.float64],
    radii: tuple[float, float, float],
) -> npt.NDArray[np.float64]:
    """Distance from the surface in units of the radii, negative inside."""
    squares = sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radii, strict=True))
    return np.asarray(np.sqrt(squares) - 1)


def _edge(distance_mm: npt.NDArray[np.float64], pixel_mm: float) -> npt.NDArray[np.float64]:
    return np.asarray(np.clip(0.5 - distance_mm / pixel_mm, 0, 1))


def _attenuation(hu: Volume, body: npt.NDArray[np.float32]) -> Volume:
    """Bilinear HU to 1/mm at 511 keV (Carney et al., Med Phys 33(4), 2006)."""
    relative = np.where(hu < 0, 1 + hu / 1000, 1 + 0.53 * hu / 1000)
    return (WATER_PER_MM * np.maximum(relative, 0) * body).astype(np.float32)
