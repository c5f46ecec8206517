"""Low frequencies of an image: where noise averages out, the measurement knows better than a net.

A network that was trained on absolute errors shifts means: regions of one tissue drift by some HU,
hot regions and total activity fall. At low spatial frequencies the degraded image has hardly any
noise and no bias, so there the result may be held to it, as MR is held to measured k-space
(:mod:`restoration.kspace`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Volume = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
#: What is smoothed along an axis, from which voxels, and by which weights.
Band = tuple[slice, slice, Matrix]

# As scipy.ndimage.gaussian_filter: the kernel ends at four standard deviations.
_TRUNCATE = 4.0
_BLOCK = 48  # voxels along an axis that are smoothed at once


def low_frequency_change(x: Volume, y: Volume, sigma: Sequence[float]) -> Volume:
    """G(x − y): what `y` needs to have the low frequencies of `x`, both (slices, rows, columns).

    `sigma` is the standard deviation of the Gaussian G in voxels along each axis; with 0 along the
    first, slices do not depend on each other. G keeps the sum of a volume, so
    y + G(x − y) has the total of x. Raises ValueError for a sigma that is negative or not finite.
    """
    if len(sigma) != 3 or not all(0 <= width < np.inf for width in sigma):
        raise ValueError(f"'sigma' must be three widths in voxels, not {tuple(sigma)}.")
    difference = torch.from_numpy((x - y).astype(np.float64))
    rows, columns = (
        _weights(size, float(width)) for size, width in zip(x.shape[1:], sigma[1:], strict=True)
    )
    along = torch.empty(x.shape[1:], dtype=torch.float64)
    # Plane by plane: a slice's bytes must not depend on how many others come with it.
    for plane in difference:
        for part, near, weights in columns:
            torch.mm(plane[:, near], weights.T, out=along[:, part])
        for part, near, weights in rows:
            torch.mm(weights, along[near], out=plane[part])
    if sigma[0] > 0:
        through = torch.from_numpy(smoothing_matrix(len(x), float(sigma[0])))
        difference = torch.tensordot(through, difference, 1)
    change: Volume = difference.float().numpy()
    return change


@functools.lru_cache(maxsize=64)
def bands(size: int, sigma: float) -> tuple[Band, ...]:
    """`smoothing_matrix` in blocks of rows: the kernel ends somewhere, so most of it is zero."""
    matrix = smoothing_matrix(size, sigma)
    found = []
    for start in range(0, size, _BLOCK):
        part = slice(start, min(size, start + _BLOCK))
        places = np.flatnonzero(matrix[part].any(axis=0))
        near = slice(int(places[0]), int(places[-1]) + 1)
        found.append((part, near, np.ascontiguousarray(matrix[part, near])))
    return tuple(found)


def _weights(size: int, sigma: float) -> list[tuple[slice, slice, torch.Tensor]]:
    return [(part, near, torch.from_numpy(weights)) for part, near, weights in bands(size, sigma)]


@functools.lru_cache(maxsize=32)
def smoothing_matrix(size: int, sigma: float) -> Matrix:
    """The Gaussian along an axis as a (size, size) matrix, mirrored at both ends.

    It is symmetric with rows that sum to 1, hence so do its columns: totals are kept.
    """
    if sigma == 0:
        return np.eye(size)
    steps, weights = _kernel(sigma)
    # Index k of the axis continued by reflection about its outer edges: d c b a | a b c d | d c b a
    places = (np.arange(size)[:, None] + steps) % (2 * size)
    mirrored = np.where(places < size, places, 2 * size - 1 - places)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], mirrored), weights)
    return matrix


def reach(sigma: float) -> int:
    """Voxels to either side that the Gaussian of `smoothing_matrix` takes in."""
    return int(_TRUNCATE * sigma + 0.5)


def kept_of_modes(size: int, sigma: float) -> npt.NDArray[np.float64]:
    """By what `smoothing_matrix` multiplies each cosine mode of an axis, (size,).

    Those modes (DCT-II) are its eigenvectors: at mirrored ends a shift forth and one back, of which
    a symmetric kernel has as much, leave of a cosine the cosine.
    """
    if sigma == 0:
        return np.ones(size)
    steps, weights = _kernel(sigma)
    kept: npt.NDArray[np.float64] = (
        np.cos(np.pi / size * np.arange(size)[:, None] * steps) @ weights
    )
    return kept


def _kernel(sigma: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The steps of the kernel along an axis, and their weights, which sum to 1."""
    steps = np.arange(-reach(sigma), reach(sigma) + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    return steps, weights / weights.sum()
