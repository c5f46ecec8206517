"""Learn from MR inputs what their texture is like, and how motion would show in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from restoration.fidelity import ScanModel, scans
from restoration.kspace import empty_band
from restoration.tasks import RestorationTask, intensity_scale
from training.motion import breathing, restless

Volume = npt.NDArray[np.float32]
Row = npt.NDArray[np.float64]
_SHRINKAGE = 0.1  # of the covariance towards its diagonal
_SEED = 0
_LEAST = 20  # parts of series


def parts(x: Volume) -> Iterator[Volume]:
    """Short parts of a series: what a gate may get is as short, and each is another example."""
    middle = len(x) // 2
    for start, many in (
        (middle - 1, 2),
        (len(x) // 4, 2),
        (3 * len(x) // 4 - 1, 2),
        (middle - 4, 8),
    ):
        part = x[max(0, start) : max(0, start) + many]
        if len(part):
            yield part


def learn(series: Sequence[Volume]) -> ScanModel:
    """The model of inputs (slices, rows, columns) in the units of their own.

    Motion is simulated along either axis: each line of k-space at a place of its own, or breathing.
    Raises ValueError where fewer than 20 of them show a body.
    """
    rng = np.random.default_rng(_SEED)
    textures, still, shifts = [], [], []
    for x in series:
        seen = _seen(x)
        if seen is None:
            continue
        texture, before = seen
        textures.append(texture)
        still += list(before)
        for axis, move in itertools.product((0, 1), (restless, breathing)):
            after = _lines(move(x, rng, axis=axis + 1))
            if after is not None:
                shifts.append(after[axis] - before[axis])
    if len(textures) < _LEAST or not shifts:
        raise ValueError(f"{len(textures)} parts of series are too few to say what scans are like")
    precision = np.linalg.inv(_covariance(textures))
    spread = _covariance(still)
    weights = np.linalg.solve(spread, np.mean(shifts, axis=0))
    weights /= np.sqrt(weights @ spread @ weights)
    return ScanModel(
        tuple(np.mean(textures, axis=0).tolist()),
        tuple(tuple(row) for row in precision.tolist()),
        tuple(np.mean(still, axis=0).tolist()),
        tuple(weights.tolist()),
    )


def _seen(x: Volume) -> tuple[Row, Row] | None:
    """Texture and `scans.lines` of a series; None where one of them cannot be had."""
    support = empty_band(torch.from_numpy(x))
    rows, columns = x.shape[1:]
    if support is None or scans.why_not(support, (rows, columns)):
        return None
    spectrum = _spectrum(x)
    texture = scans.texture(scans.at_acquired_matrix(spectrum, support))
    lines = scans.lines(spectrum, support)
    return None if texture is None or lines is None else (texture, lines)


def _lines(x: Volume) -> Row | None:
    """The same of a series with motion, whose magnitude may fill all of k-space."""
    return scans.lines(_spectrum(x), empty_band(torch.from_numpy(x)))


def _spectrum(x: Volume) -> torch.Tensor:
    scale = intensity_scale(x, RestorationTask.MRI_SR)
    return scans.spectra(torch.from_numpy(x[scans.looked_at(len(x))]) * scale)


def _covariance(rows: Sequence[Row]) -> Row:
    covariance = np.cov(np.array(rows).T)
    shrunk: Row = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * np.diag(np.diag(covariance))
    return shrunk
