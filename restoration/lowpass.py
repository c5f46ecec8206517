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

Volume = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]

# As scipy.ndimage.gaussian_filter: the kernel ends at four standard deviations.
_TRUNCATE = 4.0


def low_frequency_change(x: Volume, y: Volume, sigma: Sequence[float]) -> Volume:
    """G(x − y): what `y` needs to have the low frequencies of `x`, both (slices, rows, columns).

    `sigma` is the standard deviation of the Gaussian G in voxels along each axis; with 0 along the
    first, slices do not depend on each other. G keeps the sum of a volume, so
    y + G(x − y) has the total of x. Raises ValueError for a sigma that is negative or not finite.
    """
    if len(sigma) != 3 or not all(0 <= width < np.inf for width in sigma):
        raise ValueError(f"'sigma' must be three widths in voxels, not {tuple(sigma)}.")
    difference = (x - y).astype(np.float64)
    through, rows, columns = (
        smoothing_matrix(size, float(width)) for size, width in zip(x.shape, sigma, strict=True)
    )
    # Plane by plane: a slice's bytes must not depend on how many others come with it.
    for plane in difference:
        plane[:] = rows @ plane @ columns.T
    if sigma[0] > 0:
        difference = np.einsum("ij,jrc->irc", through, difference)
    return difference.astype(np.float32)


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
