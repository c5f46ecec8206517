"""PSNR, SSIM and RMSE as AMIR's published evaluation computes them (Yang et al., MICCAI 2024).

Both images are clipped to the task's evaluation window in physical units; the data range R is the
reference slice's maximum minus minimum after clipping. Figures of different protocols do not
compare, so every table carries the protocol's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from restoration.tasks import RestorationTask

Slice = npt.NDArray[np.floating[Any] | np.integer[Any]]

PROTOCOL = (
    "amir/1 (clip CT [-160, 240] HU, PET [0, 20] SUV, MR [0, 4095]; R = slice max - min of the "
    "reference; SSIM 11x11, sigma 1.5, zero-padded; mean over slices)"
)
WINDOWS: dict[RestorationTask, tuple[float, float]] = {
    RestorationTask.MRI_SR: (0.0, 4095.0),
    RestorationTask.CT_DENOISE: (-160.0, 240.0),
    RestorationTask.PET_SYNTHESIS: (0.0, 20.0),
}
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


def score(image: Slice, reference: Slice, task: RestorationTask | str) -> Score | None:
    """Compare a slice (rows, columns), physical units, with its reference.

    None where the clipped reference is constant: it has no range to measure against.
    """
    low, high = WINDOWS[RestorationTask(task)]
    truth = np.clip(reference.astype(np.float64), low, high)
    guess = np.clip(image.astype(np.float64), low, high)
    data_range = float(truth.max() - truth.min())
    if data_range == 0:
        return None
    return Score(psnr(guess, truth, data_range), ssim(guess, truth, data_range), rmse(guess, truth))


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
    """Mean structural similarity over all pixels, borders filled with zeros (Wang et al., 2004)."""
    x, y = (torch.from_numpy(np.ascontiguousarray(a, np.float64)) for a in (image, reference))
    stack = torch.stack([x, y, x * x, y * y, x * y])[:, None]  # (5, 1, H, W)
    mx, my, mxx, myy, mxy = _blur(stack)[:, 0]
    c1, c2 = ((k * data_range) ** 2 for k in SSIM_K)
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    structure = (2 * (mxy - mx * my) + c2) / (mxx - mx**2 + myy - my**2 + c2)
    return float((luminance * structure).mean())


def _blur(images: Tensor) -> Tensor:
    """Gaussian-weighted means (B, 1, H, W); the window is separable."""
    offsets = torch.arange(SSIM_SIZE, dtype=torch.float64) - SSIM_SIZE // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    pad = SSIM_SIZE // 2
    rows = F.conv2d(images, weights.view(1, 1, -1, 1), padding=(pad, 0))
    return F.conv2d(rows, weights.view(1, 1, 1, -1), padding=(0, pad))
