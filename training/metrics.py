"""PSNR, SSIM and RMSE by stated protocols, of which AMIR's published one is the first.

`amir/1` is Yang et al., MICCAI 2024, as their evaluation code computes it: both images clipped to
the task's window in physical units, data range R = the reference slice's maximum minus minimum
after clipping. The other protocols change one thing each. Figures of different protocols do not
compare, so every table carries the protocol's id.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from restoration.tasks import MR_REFERENCE_INTENSITY, RestorationTask

Slice = npt.NDArray[np.floating[Any] | np.integer[Any]]
Mask = npt.NDArray[np.bool_]
Windows = dict[RestorationTask, tuple[float, float]]

PROTOCOL = (
    "amir/1 (clip CT [-160, 240] HU, PET [0, 20] SUV, MR [0, 4095]; R = slice max - min of the "
    "reference; SSIM 11x11, sigma 1.5, zero-padded; mean over slices)"
)
WINDOWS: Windows = {
    RestorationTask.MRI_SR: (0.0, 4095.0),
    RestorationTask.CT_DENOISE: (-160.0, 240.0),
    RestorationTask.PET_SYNTHESIS: (0.0, 20.0),
}
LUNG_WINDOW = (-1350.0, 150.0)
SSIM_SIZE = 11
SSIM_SIGMA = 1.5
SSIM_K = (0.01, 0.03)
HIGHEST_PSNR = 200.0  # of an image equal to its reference


@dataclass(frozen=True)
class Score:
    """Quality of one slice, or the mean over slices; RMSE in the task's units."""

    psnr: float
    ssim: float
    rmse: float


@dataclass(frozen=True)
class Protocol:
    """A way to compare two slices; ``id`` stands beside each figure it gives."""

    id: str
    description: str
    windows: Windows  #: what both images are clipped to, physical units; other tasks have no figure
    ranges: dict[RestorationTask, float] | None = None  #: R by task; None: of the reference slice
    where: Literal["slice", "body"] = "slice"  #: pixels that count


AMIR = Protocol("amir/1", PROTOCOL, WINDOWS)
PROTOCOLS = (
    AMIR,
    Protocol(
        "fixed-range/1",
        "as amir/1 with the same R for every slice: CT 400 HU, PET 20 SUV, MR 1150, which is the "
        "99.9th percentile of each MR series",
        WINDOWS,
        ranges={
            RestorationTask.MRI_SR: MR_REFERENCE_INTENSITY,
            RestorationTask.CT_DENOISE: 400.0,
            RestorationTask.PET_SYNTHESIS: 20.0,
        },
    ),
    Protocol(
        "body-mask/1",
        "as amir/1 over the pixels of the body alone, R the range of the reference among them; the "
        "body is what the smoothed reference encloses above -500 HU, 0.1 SUV or MR 60",
        WINDOWS,
        where="body",
    ),
    Protocol(
        "lung-window/1",
        "as amir/1 with CT clipped to [-1350, 150] HU; no figure for MR and PET",
        {RestorationTask.CT_DENOISE: LUNG_WINDOW},
    ),
)


def score(
    image: Slice,
    reference: Slice,
    task: RestorationTask | str,
    protocol: Protocol = AMIR,
    body: Mask | None = None,
) -> Score | None:
    """Compare a slice (rows, columns), physical units, with its reference.

    ``body`` marks the pixels of the body for the protocols that need them. None where the protocol
    has no figure: another task, no body, or a clipped reference that is constant.
    """
    task = RestorationTask(task)
    if task not in protocol.windows:
        return None
    truth, guess = (
        np.clip(each.astype(np.float64), *protocol.windows[task]) for each in (reference, image)
    )
    chosen = np.ones(truth.shape, bool)
    if protocol.where == "body":
        if body is None or not body.any():
            return None
        chosen = body
    data_range = float(np.ptp(truth[chosen]))
    if data_range == 0:
        return None
    if protocol.ranges is not None:
        data_range = protocol.ranges[task]
    similarity = ssim_map(guess, truth, data_range)[chosen]
    return Score(
        psnr(guess[chosen], truth[chosen], data_range),
        float(similarity.mean()),
        rmse(guess[chosen], truth[chosen]),
    )


def mean_score(scores: Sequence[Score]) -> Score:
    """Mean of each figure over slices; ValueError for none."""
    if not scores:
        raise ValueError("no slice could be scored")
    columns = zip(*((s.psnr, s.ssim, s.rmse) for s in scores), strict=True)
    return Score(*(sum(column) / len(scores) for column in columns))


def rmse(image: Slice, reference: Slice) -> float:
    """Root of the mean square difference, in the images' units."""
    return float(np.sqrt(np.mean((image - reference) ** 2)))


def psnr(image: Slice, reference: Slice, data_range: float) -> float:
    """10·log₁₀(R²/MSE), at most HIGHEST_PSNR."""
    mse = float(np.mean((image - reference) ** 2))
    if mse == 0:
        return HIGHEST_PSNR
    return min(HIGHEST_PSNR, 10 * math.log10(data_range**2 / mse))


def ssim(image: Slice, reference: Slice, data_range: float) -> float:
    """Mean of :func:`ssim_map` over all pixels."""
    return float(ssim_map(image, reference, data_range).mean())


def ssim_map(image: Slice, reference: Slice, data_range: float) -> npt.NDArray[np.float64]:
    """Structural similarity at each pixel, borders filled with zeros (Wang et al., 2004)."""
    x, y = (torch.from_numpy(np.ascontiguousarray(a, np.float64)) for a in (image, reference))
    stack = torch.stack([x, y, x * x, y * y, x * y])[:, None]  # (5, 1, H, W)
    mx, my, mxx, myy, mxy = _blur(stack)[:, 0]
    c1, c2 = ((k * data_range) ** 2 for k in SSIM_K)
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    structure = (2 * (mxy - mx * my) + c2) / (mxx - mx**2 + myy - my**2 + c2)
    similarity: npt.NDArray[np.float64] = (luminance * structure).numpy()
    return similarity


def _blur(images: Tensor) -> Tensor:
    """Gaussian-weighted means (B, 1, H, W); the window is separable."""
    offsets = torch.arange(SSIM_SIZE, dtype=torch.float64) - SSIM_SIZE // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    pad = SSIM_SIZE // 2
    rows = F.conv2d(images, weights.view(1, 1, -1, 1), padding=(pad, 0))
    return F.conv2d(rows, weights.view(1, 1, 1, -1), padding=(0, pad))
