"""What an MR series says about its scan: whether somebody moved, and whether tissue is in it.

Both are looked at in some slices of the input, at the matrix that was acquired: between its pixels
there is nothing but interpolation.

*Ghosting.* Who moves during a scan leaves phase errors from line to line of k-space, and with them
ghosts along that direction: air that is rough along one axis of the image and not along the other,
and a magnitude that spills over the edge of the acquired band along it.

*Texture.* Tissue has some detail everywhere, between edges too. A digital phantom has flat parts
with strong edges: its quiet places are far quieter than its typical ones.

How far both differ among inputs of the training is a `ScanModel`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from restoration.fidelity import images
from restoration.fidelity.calibration import ScanModel
from restoration.kspace import Support

Row = npt.NDArray[np.float64]

MOST = 8  #: slices of a series that are looked at, in the middle half of it
#: Of an axis, in shares of the Nyquist frequency: with more measured, another problem than learnt.
WIDEST = 0.36
_BODY = 60.0  # of an intensity of 1150
_LEAST = 60  # pixels
_AWAY = 2  # pixels from the body, where air is air
_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the pixels of a body
_INSIDE = 0.94  # of the edge of the acquired band: the edge itself is half there
# Rings of frequencies along an axis in shares of the acquired band: three in it, three beyond.
_BANDS = ((0.24, 0.48), (0.48, 0.72), (0.72, 0.92), (1.12, 1.44), (1.44, 2.4), (2.4, 4.0))
_FLOOR = 1e-4  # of the level: without it logarithms of nothing count


def looked_at(slices: int) -> list[int]:
    """The slices of a series that tell of the scan: evenly spread over its middle half."""
    places = np.linspace((slices - 1) / 4, 3 * (slices - 1) / 4, MOST)
    return [int(place) for place in np.unique(places.round())]


def why_not(support: Support | None, shape: tuple[int, int]) -> str:
    """Why nothing can be said of a series of this k-space; empty where something can."""
    if support is None:
        return "no empty band of k-space was found"
    shares = (2 * edge / size for edge, size in zip(_edges(support), shape, strict=True))
    if max(shares) > WIDEST:
        return "more of k-space was measured than in any input of the training"
    return ""


def described(x: Tensor, planes: Tensor, support: Support) -> Row | None:
    """How rough the air is and how the power falls, along rows and columns: (2, 9), logarithms.

    `x` (slices, rows, columns) is at 1150, `planes` are the same `at_acquired_matrix`. None without
    a body and air in the slices.
    """
    body = planes > _BODY
    air = ~_near(body)
    if body.sum() < _LEAST or air.sum() < _LEAST:
        return None
    level = float(planes[body].median())
    power = torch.fft.fft2(x.double()).abs().square()
    found = []
    for axis in (1, 2):
        rough = []
        for order in (1, 2):
            steps = torch.diff(planes, order, axis).abs()
            inside = air.unfold(axis, order + 1, 1).all(-1)
            if inside.sum() < _LEAST:
                return None
            steps = steps[inside]
            rough += [float(steps.square().mean().sqrt()), float(steps.median())]
        logs = [math.log(value / level + _FLOOR) for value in rough]
        falls = _falls(power if axis == 1 else power.transpose(1, 2), _edges(support), axis)
        found.append([*logs, *falls])
    return np.array(found, np.float64)


def ghosting(description: Row, model: ScanModel) -> float:
    """How far a series lies from those without motion, along the worse axis, in SD."""
    return max(
        float((apart(description, axis) - np.asarray(model.still)) @ np.asarray(model.motion))
        for axis in (0, 1)
    )


def apart(description: Row, axis: int) -> Row:
    """What a description says of motion along one axis: against the other one, and of both."""
    own, other = description[axis], description[1 - axis]
    return np.concatenate([own - other, (own + other) / 2])


def texture(planes: Tensor) -> Row | None:
    """How detail is spread over a body, (9,) logarithms; None where the slices show none.

    Of `planes` at the acquired matrix: the median SD of 3 x 3 pixels over the level and four other
    quantiles of it over the median, and of the finest diagonal detail, at this size of pixels and
    the next one, its median over that SD and its RMS over its median. The median of the slices.
    """
    body = planes > _BODY
    inner = ~_near(~body, 1)
    wide = planes[:, None]
    mean, square = (F.avg_pool2d(each, 3, 1, 1)[:, 0] for each in (wide, wide.square()))
    spread = (square - mean.square()).clamp(min=0).sqrt()
    found = []
    for plane, sd, inside, core in zip(planes, spread, body, inner, strict=True):
        if core.sum() < _LEAST:
            continue
        shares = torch.quantile(sd[core], torch.tensor(_SHARES)).double()
        level, typical = float(plane[inside].median()), float(shares[2])
        coarse = images.shrunk(torch.stack([plane, inside.to(plane)]), 2)
        details = [_diagonal(plane, inside), _diagonal(coarse[0], coarse[1] > 0.5)]
        if any(len(detail) < _LEAST for detail in details):
            continue
        middles = [float(detail.median()) for detail in details]
        peaks = [float(detail.square().mean().sqrt()) for detail in details]
        found.append(
            [
                typical / level,
                *(shares[[0, 1, 3, 4]] / typical).tolist(),
                *(middle / typical for middle in middles),
                *(peak / middle for peak, middle in zip(peaks, middles, strict=True)),
            ]
        )
    if not found:
        return None
    logs: Row = np.log(np.maximum(np.nan_to_num(found, posinf=1e9), 1e-9))
    return np.median(logs, axis=0)


def strangeness(texture: Row, model: ScanModel) -> float:
    """The distance of Mahalanobis from the textures of the training per root of their number."""
    away = texture - np.asarray(model.texture)
    return float(np.sqrt(away @ np.asarray(model.precision) @ away / len(away)))


def at_acquired_matrix(x: Tensor, support: Support) -> Tensor:
    """The magnitude of (slices, rows, columns) at about the matrix that was acquired."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
    for axis, edge in zip((1, 2), _edges(support), strict=True):
        reach = max(4, int(_INSIDE * edge))
        middle = spectrum.shape[axis] // 2
        first = max(0, middle - reach)
        spectrum = spectrum.narrow(axis, first, min(2 * reach + 1, spectrum.shape[axis] - first))
    size = spectrum.shape[1] * spectrum.shape[2] / (x.shape[1] * x.shape[2])
    image: Tensor = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).abs() * size
    return image


def _edges(support: Support) -> tuple[float, float]:
    """Half a frequency beyond the last one that was acquired."""
    return support.rows + 0.5, support.columns + 0.5


def _near(mask: Tensor, pixels: int = _AWAY) -> Tensor:
    """Within so many pixels of a mask, diagonals last."""
    near = mask.float()[:, None]
    for _ in range(pixels):
        along = F.max_pool2d(near, (1, 3), 1, (0, 1))
        near = torch.maximum(along, F.max_pool2d(near, (3, 1), 1, (1, 0)))
    inside: Tensor = near[:, 0] > 0
    return inside


def _diagonal(plane: Tensor, inside: Tensor) -> Tensor:
    """|Finest diagonal detail| of a plane inside a mask."""
    detail = (plane[:-1, :-1] + plane[1:, 1:] - plane[:-1, 1:] - plane[1:, :-1]).abs() / 2
    values: Tensor = detail[inside[:-1, :-1] & inside[1:, 1:]]
    return values


def _falls(power: Tensor, edges: tuple[float, float], axis: int) -> list[float]:
    """The mean logarithm of the power (slices, rows, columns) along rows, from ring to ring.

    Of low column frequencies, since columns were truncated too; relative to the innermost ring.
    """
    along, across = edges if axis == 1 else edges[::-1]
    height, width = power.shape[1:]
    low = torch.arange(1, max(2, int(0.48 * across)) + 1)
    columns = torch.cat([low, width - low])
    frequency = torch.fft.fftfreq(height, d=1 / height).abs() / along
    levels = []
    for start, stop in _BANDS:
        rows = torch.nonzero((frequency > start) & (frequency < stop))[:, 0]
        ring = power.index_select(1, rows).index_select(2, columns)
        levels.append(float((ring + 1e-9).log().mean()) if len(rows) else math.nan)
    return [level - levels[0] for level in levels[1:]]
