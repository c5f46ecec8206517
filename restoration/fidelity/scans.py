"""What an MR series says about its scan: whether somebody moved, whether tissue is in it, and
whether it was restored before.

All slices of a series come from one scan, so that some of them answer together.

*Ghosting.* Who moves between two lines of k-space leaves lines that do not belong together. The
displacement alone is a phase; with the magnitude it becomes a level that jumps from line to line,
at all frequencies along the line alike. An analysis of variance finds it: the mean over a line
varies more than the variance within lines explains. It needs no air beside the body.

*Texture*, at the acquired matrix: between its pixels there is nothing but interpolation. Tissue has
some detail everywhere, between edges too. A digital phantom has flat parts with strong edges: its
quiet places are far quieter than its typical ones.

*Detail that was there.* Beyond the acquired band an input has next to nothing, and what is there
has nothing to do with what the network puts there. In one that was restored before, it has.

How far the first two differ among inputs of the training is a `ScanModel`.
"""

from __future__ import annotations

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
_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the pixels of a body
_INSIDE = 0.94  # of the edge of the acquired band: the edge itself is half there
_LEARNT = (
    0.25  # of an axis, in shares of the Nyquist frequency: lines further out are not looked at
)
# Shares of the lines of an axis, from the centre: the innermost hold the shape of the head alone.
_LINES = (0.2, 0.95)
_ALONG = 0.9  # of the other axis; of it the frequencies 0 and 1 hold the borders of the image
_FEWEST_LINES = 12
_DEGREES = (2, 4, 6)  # of polynomials that take the fall of the power away
_OUTSIDE = 1.12  # of the acquired band: beyond the frequency that is half there


def looked_at(slices: int) -> list[int]:
    """The slices of a series that tell of the scan: spread over its middle half, or over more of it
    where that has fewer than there may be."""
    reach = max((slices - 1) / 2, min(slices, MOST) - 1)
    places = np.linspace((slices - 1 - reach) / 2, (slices - 1 + reach) / 2, MOST)
    return [int(place) for place in np.unique(places.round())]


def why_not(support: Support | None, shape: tuple[int, int]) -> str:
    """Why nothing can be said of the texture of a series of this k-space; empty where it can."""
    if support is None:
        return "no empty band of k-space was found"
    shares = (2 * edge / size for edge, size in zip(_edges(support), shape, strict=True))
    if max(shares) > WIDEST:
        return "more of k-space was measured than in any input of the training"
    return ""


def spectra(x: Tensor) -> Tensor:
    """The k-space of (slices, rows, columns) at an intensity of 1150, uncentred and complex."""
    spectrum: Tensor = torch.fft.fft2(x)
    return spectrum


def lines(spectrum: Tensor, support: Support | None) -> Row | None:
    """How much lines of k-space differ, over what chance explains: (2, 5) logarithms of F.

    Along rows, then columns: of the first and second differences from line to line, and of what is
    left of the log power beside polynomials of three degrees. Chance is the variance within lines.
    Inside the acquired band, at most the quarter of each axis that inputs of the training have.
    None where these are too few.
    """
    height, width = spectrum.shape[1:]
    edges = [min(_LEARNT * size / 2 + 0.5, edge) for size, edge in zip(
        (height, width), (height, width) if support is None else _edges(support), strict=True
    )]  # fmt: skip
    found = []
    for axis, (along, across) in ((1, edges), (2, edges[::-1])):
        reach, wide = int(_LINES[1] * along), int(_ALONG * across)
        first = 1 + int(_LINES[0] * reach)
        if reach - first < _FEWEST_LINES - 1 or wide < _FEWEST_LINES:
            return None
        # Of a real image half of k-space says all: lines of positive frequency, whole.
        chosen = (spectrum if axis == 1 else spectrum.transpose(1, 2))[:, first : reach + 1]
        inside = torch.cat([chosen[..., 2 : wide + 1], chosen[..., -wide:-1]], 2)
        table = (inside.abs().square() + 1).log().double().numpy()
        steps = [np.diff(table, order, axis=1) for order in (1, 2)]
        steps = [step - step.mean((1, 2), keepdims=True) for step in steps]
        rests = [_without(table, degree) for degree in _DEGREES]
        found.append([_over_chance(each) for each in (*steps, *rests)])
    return np.array(found, np.float64)


def ghosting(lines: Row, model: ScanModel) -> float:
    """How far a series lies from those without motion, along the worse axis, in SD."""
    away = (lines - np.asarray(model.lines)) @ np.asarray(model.motion)
    return float(away.max())


def detail_before(spectrum: Tensor, change: Tensor, support: Support) -> float | None:
    """The correlation of an input and of what was done to it, beyond the acquired k-space.

    `spectrum` is that of the input (slices, rows, columns), `change` the image of result - input.
    How strongly the change was blended in does not matter. None where nothing is there.
    """
    height, width = change.shape[1:]
    beyond = ~_within(height, width, support)
    half = width // 2 + 1  # the rest is the conjugate of it
    added = torch.fft.rfft2(change)[:, beyond[:, :half]]
    there = spectrum[..., :half][:, beyond[:, :half]]
    size = float(added.abs().square().sum().sqrt() * there.abs().square().sum().sqrt())
    return float((there * added.conj()).real.sum()) / size if size > 0 else None


def texture(planes: Tensor) -> Row | None:
    """How detail is spread over a body, (9,) logarithms; None where the slices show none.

    Of `planes` at the acquired matrix: the median SD of 3 x 3 pixels over the level and four other
    quantiles of it over the median, and of the finest diagonal detail, at this size of pixels and
    the next one, its median over that SD and its RMS over its median. The median of the slices.
    """
    body = planes > _BODY
    inner = ~_near(~body)
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


def at_acquired_matrix(spectra: Tensor, support: Support) -> Tensor:
    """The magnitude of the slices of these k-spaces at about the matrix that was acquired."""
    spectrum = torch.fft.fftshift(spectra, dim=(-2, -1))
    for axis, edge in zip((1, 2), _edges(support), strict=True):
        reach = max(4, int(_INSIDE * edge))
        middle = spectrum.shape[axis] // 2
        first = max(0, middle - reach)
        spectrum = spectrum.narrow(axis, first, min(2 * reach + 1, spectrum.shape[axis] - first))
    size = spectrum.shape[1] * spectrum.shape[2] / (spectra.shape[1] * spectra.shape[2])
    image: Tensor = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).abs() * size
    return image


def _edges(support: Support) -> tuple[float, float]:
    """Half a frequency beyond the last one that was acquired."""
    return support.rows + 0.5, support.columns + 0.5


def _within(height: int, width: int, support: Support) -> Tensor:
    """Frequencies up to a little beyond the acquired band: (height, width), uncentred."""
    inside = [
        torch.fft.fftfreq(size, d=1 / size).abs() <= _OUTSIDE * edge
        for size, edge in zip((height, width), _edges(support), strict=True)
    ]
    both: Tensor = inside[0][:, None] & inside[1][None]
    return both


def _without(table: Row, degree: int) -> Row:
    """(slices, lines, frequencies) without the polynomial along the lines that fits best."""
    places = np.linspace(-1, 1, table.shape[1])
    basis = np.linalg.qr(np.vander(places, degree + 1))[0]
    rest: Row = table - np.einsum("lk,mk,smf->slf", basis, basis, table, optimize=True)
    return rest


def _over_chance(table: Row) -> float:
    """log F: the variance of the means of lines over what that within lines makes of them."""
    means = table.mean(2)
    within = (table - means[:, :, None]).var() / (table.shape[2] - 1)
    return float(np.log((np.square(means).mean() + 1e-12) / (within + 1e-12)))


def _near(mask: Tensor) -> Tensor:
    """A mask and the four neighbours of each of its pixels."""
    near = mask.float()[:, None]
    along = F.max_pool2d(near, (1, 3), 1, (0, 1))
    grown: Tensor = torch.maximum(along, F.max_pool2d(near, (3, 1), 1, (1, 0)))[:, 0] > 0
    return grown


def _diagonal(plane: Tensor, inside: Tensor) -> Tensor:
    """|Finest diagonal detail| of a plane inside a mask."""
    detail = (plane[:-1, :-1] + plane[1:, 1:] - plane[:-1, 1:] - plane[1:, :-1]).abs() / 2
    values: Tensor = detail[inside[:-1, :-1] & inside[1:, 1:]]
    return values
