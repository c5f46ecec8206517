"""What an input says about itself: its units, its noise and texture, and double contours.

No gate here looks at the result. `describe` measures a slice; what training inputs are like is an
`InputModel`, and `unlikeness` compares the two.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restoration.fidelity import images
from restoration.fidelity.calibration import InputModel
from restoration.tasks import RestorationTask

_PLANE = (-2, -1)
_CT, _PET = RestorationTask.CT_DENOISE, RestorationTask.PET_SYNTHESIS
RINGS = 6  # of the spectrum that says what an input is like
#: Times that pixels are halved for another look at the noise: PET has too few of them for more.
_SCALES = {_CT: 2, _PET: 1, RestorationTask.MRI_SR: 1}
LEAST = 20  # pixels of a body at a scale
#: HU that most of a slice reads, whatever it shows: air and lung, and fat to muscle.
_AIR, _SOFT = (-1100.0, -500.0), (-150.0, 150.0)
_INTERCEPT = 1024.0  # HU: what CT values are stored above
_BODY_SHARE = 0.15  # of soft tissue in a slice that shows a body, at least; cortical bone is less
_BESIDE = 0.95  # of air in a slice that shows none
#: Lags of a double contour in pixels; nearer ones are those of any smooth image.
_LAGS = (2.5, 20.0)
# Share of the mean power below which a frequency is empty: without it logarithms of nothing count.
_EMPTY = 1e-6
#: Names of what `covariates` gives; the constant comes first.
COVARIATES = ("1", "log slice spacing", "log row spacing", "log level")


def intercept_doubt(smooth: Tensor) -> Tensor:
    """By how much another intercept explains a CT better than the stated one, (slices,): -1 … 1.

    Most of any slice is air, lung or soft tissue. The share of the smoothed pixels (slices, rows,
    columns) in HU that read as one of them is taken from that after moving all of them by the
    usual intercept, up or down, if the slice then shows a body: all air would be no slice of one.
    Above 0 the values are not HU. NaN for a slice beside the body.
    """
    air, soft = _shares(smooth)
    moved = []
    for shift in (-_INTERCEPT, _INTERCEPT):
        other, body = _shares(smooth + shift)
        moved.append(torch.where(body >= _BODY_SHARE, other + body, 0.0))
    doubt = torch.maximum(*moved) - (air + soft)
    return torch.where((air > _BESIDE) & (soft < 1 - _BESIDE), torch.nan, doubt)


def _shares(smooth: Tensor) -> tuple[Tensor, Tensor]:
    """Of air and lung, and of soft tissue."""
    air, soft = (
        images.mean(((smooth >= low) & (smooth <= high)).float()) for low, high in (_AIR, _SOFT)
    )
    return air, soft


def uptake_level(x: Tensor) -> Tensor:
    """Median SUV of what takes part (slices,): the same share of the pixels at any scale.

    Pixels above a share of the mean uptake that is weighted with itself. A mask drawn at an SUV
    grows with a wrong scale, and the median in it hardly moves.
    """
    wide = images.gaussian(x, 2.0).clamp(min=0)
    total = images.total(wide)
    weighted = images.total(wide.square()) / total.clamp(min=1e-12)
    inside = wide > (0.15 * weighted)[:, None, None]
    return torch.where(total > 0, images.masked_median(x, inside, LEAST), torch.nan)


def echo(power: Tensor, shape: Sequence[int]) -> Tensor:
    """The strongest echo of a slice at a lag of some pixels: 0 without any, 1 of two equal images.

    `power` is of `images.power`, `shape` (rows, columns). The inverse transform of log power (the
    power cepstrum: Bogert, Healy and Tukey, 1963) has a peak at the distance between two
    superimposed copies, as a patient leaves who moved in the middle of a rotation. The typical
    value of each lag's length is taken off: a kernel and round things are the same in all
    directions.
    """
    height, width = shape
    reach = min(24, height // 2, width // 2)
    floor = _EMPTY * power.mean(_PLANE, keepdim=True)
    near = _cepstrum((power + floor).clamp_(min=1e-30).log_(), height, width, reach)
    near = near.flatten(1)
    found = [
        near[:, slanted].amax(1) - near[:, ring].median(1).values
        for ring, slanted in _lags(reach, near.device)
    ]
    if not found:
        return torch.full((len(near),), torch.nan, dtype=torch.float64)
    return torch.stack(found).amax(0).double()


@functools.lru_cache(maxsize=8)
def _lags(reach: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
    """Of each length: the lags of it, and those that may be an echo; places in a cepstrum."""
    down = torch.arange(reach)[:, None]
    along = torch.cat([torch.arange(reach), torch.arange(1 - reach, 0)])[None]
    lag = torch.hypot(down.float(), along.float())
    # Rows and columns have peaks of their own: a table, a matrix that was enlarged.
    slant = (down != 0) & (along != 0) & (lag >= _LAGS[0])
    rings = [
        (lag - length).abs() <= 0.5
        for length in range(math.floor(_LAGS[0]), min(reach, math.ceil(_LAGS[1])) + 1)
    ]
    places = [[torch.nonzero(m.flatten())[:, 0].to(device) for m in (r, r & slant)] for r in rings]
    return tuple((ring, slanted) for ring, slanted in places if len(slanted))


def _cepstrum(logs: Tensor, height: int, width: int, reach: int) -> Tensor:
    """The inverse transform of half a spectrum at lags below `reach`: (slices, reach, 2 reach - 1).

    Columns are lags 0, 1, … and then the negative ones. A few of the lags cost less as sums of
    cosines than all of them by a fast transform.
    """
    across, down = _waves(height, width, reach, logs.device)
    halves = logs @ across  # (slices, height, 2 (2 reach - 1)): cosine and sine of the columns
    cosines, sines = halves.chunk(2, -1)
    return down[0] @ cosines - down[1] @ sines


@functools.lru_cache(maxsize=8)
def _waves(height: int, width: int, reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    lags = torch.cat([torch.arange(reach), torch.arange(1 - reach, 0)]).double()
    columns = torch.arange(width // 2 + 1).double()
    # All but the first, and the last of an even width, stand for two frequencies.
    share = torch.full_like(columns, 2.0)
    share[0] = 1
    if width % 2 == 0:
        share[-1] = 1
    angle = 2 * math.pi / width * columns[:, None] * lags
    across = torch.cat([angle.cos(), angle.sin()], 1) * share[:, None] / (height * width)
    angle = 2 * math.pi / height * torch.arange(reach).double()[:, None] * torch.arange(height)
    down = torch.stack([angle.cos(), angle.sin()])
    return across.float().to(device), down.float().to(device)


def describe(
    x: Tensor,
    power: Tensor,
    body: Tensor,
    step: int,
    noise: Tensor,
    level: Tensor,
    task: RestorationTask,
) -> Tensor:
    """What an input is like, as natural logarithms (slices, n), and its level, the last column.

    The outer rings of its spectrum, its noise over the level, and by how much that falls from one
    size of pixels to the next: the texture of the noise, which a kernel or a filter changes. The
    innermost ring holds nearly all of the power: one minus the others, it tells nothing more.
    `power` is of `images.power(x)`, `body` of `images.shrunk(x, step)`, `noise` of `images.noise`.
    """
    rings = images.spectrum(power, x.shape[-2:], RINGS).double() + 1e-12
    shares = (rings / rings.sum(1, keepdim=True))[:, 1:].clamp(min=1e-9).log()
    scales = [noise, *_coarser_noise(x, body, step, task)]
    falls = [_logs(a) - _logs(b) for a, b in itertools.pairwise(scales)]
    columns = [_logs(scales[0] / level), *falls, _logs(level)]
    return torch.cat([shares, torch.stack(columns, 1)], 1)


def _coarser_noise(x: Tensor, body: Tensor, step: int, task: RestorationTask) -> list[Tensor]:
    found, drawn = [], body.float()
    for scale in range(1, _SCALES[task] + 1):
        size = 2**scale
        # The body is drawn at `step` already; what is half outside is outside.
        inside = images.shrunk(drawn, size // step) > 0.5 if size > step else body
        x = images.shrunk(x, 2)
        found.append(images.noise(x, inside, 1, LEAST))
    return found


def unlikeness(
    features: npt.NDArray[np.float64], spacing_mm: tuple[float, float, float], model: InputModel
) -> dict[str, npt.NDArray[np.float64]]:
    """How far inputs lie from those of the training, in SD; (slices,) by the name of the gate.

    `features` (slices, n + 1) are those of `describe`. What they are expected to be follows the
    spacing (z, y, x) and the level; `likeness` is the distance of Mahalanobis per root of their
    number, the others are the component along each direction of the model.
    """
    logs, known = features[:, :-1], covariates(features[:, -1], spacing_mm)
    apart = logs - known @ np.asarray(model.coefficients)
    precision = np.asarray(model.precision)
    squares = np.einsum("si,ij,sj->s", apart, precision, apart)
    found = {"likeness": np.sqrt(np.maximum(squares, 0) / apart.shape[1])}
    for name, direction in model.directions.items():
        found[name] = apart @ np.asarray(direction)
    return found


def covariates(
    log_level: npt.NDArray[np.float64], spacing_mm: tuple[float, float, float]
) -> npt.NDArray[np.float64]:
    """COVARIATES of slices, (slices, 4): what the noise of an input depends on."""
    ones = np.ones_like(log_level)
    slices, rows, _ = spacing_mm
    return np.stack([ones, math.log(slices) * ones, math.log(rows) * ones, log_level], 1)


def _logs(values: Tensor) -> Tensor:
    return values.double().clamp(min=1e-9).log()
