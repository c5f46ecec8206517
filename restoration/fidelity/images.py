"""Filters and statistics of stacks of slices, the same on a CPU and an accelerator.

A stack is float32 (slices, rows, columns). Statistics are one value for each slice, (slices,), NaN
where a slice gives nothing to measure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from restoration.lowpass import bands, kept_of_modes

_PLANE = (-2, -1)
_NEARLY_NOTHING = 2e-4  # of a mode: the square of it is beyond single precision
# The median of |x| of a normal distribution of SD 1.
_NORMAL_MEDIAN = 0.6745


def gaussian(stack: Tensor, sigma: float) -> Tensor:
    """Each slice smoothed by a Gaussian of `sigma` pixels, mirrored at the edges."""
    slices, rows, columns = stack.shape
    # Rows of all slices beside each other: products are few and large, so threads seldom meet.
    beside = stack.transpose(0, 1).contiguous()
    along = torch.empty_like(beside)
    lines, smoothed = beside.view(-1, columns), along.view(-1, columns)
    for part, near, weights in _bands(columns, sigma, stack.device):
        torch.mm(lines[:, near], weights.T, out=smoothed[:, part])
    down = along.view(rows, -1)
    smooth = torch.empty_like(down)
    for part, near, weights in _bands(rows, sigma, stack.device):
        torch.mm(weights, down[near], out=smooth[part])
    return smooth.view(rows, slices, columns).transpose(0, 1).contiguous()


def wide_gaussian(stack: Tensor, sigma: float) -> Tensor:
    """As `gaussian`, to four digits: what hardly any mode of an image is left of costs less so."""
    rows, columns = (_modes(size, sigma, stack.device) for size in stack.shape[-2:])
    back = [
        _modes(size, 0.0, stack.device)[: len(some)] * math.sqrt(size)
        for size, some in zip(stack.shape[-2:], (rows, columns), strict=True)
    ]
    modes = rows @ (stack @ columns.T) * math.sqrt(stack.shape[-2] * stack.shape[-1])
    return back[0].T @ modes @ back[1]


def smooth_modes(stack: Tensor, sigma: float) -> Tensor:
    """What `gaussian` leaves of the cosine modes of each slice: (slices, rows, columns), double.

    The modes (DCT-II, orthonormal) are those of a Gaussian that is mirrored at the edges: it scales
    each by a factor. Those it leaves nearly nothing of are left out, so there are few. The first
    is the mean; the squares sum to the mean square of what is smoothed.
    """
    rows, columns = (_modes(size, sigma, stack.device) for size in stack.shape[-2:])
    return (rows @ (stack @ columns.T)).double()


def mean(stack: Tensor) -> Tensor:
    """Mean, in double precision: of sums of rows in single precision, which lose no digit of it."""
    return total(stack) / (stack.shape[-2] * stack.shape[-1])


def total(stack: Tensor) -> Tensor:
    """Sum, in double precision of those of rows."""
    return stack.sum(-1).sum(-1, dtype=torch.float64)


def norm(modes: Tensor) -> Tensor:
    """The RMS of the slices that have these modes."""
    return modes.square().sum(_PLANE).sqrt()


def gradient(stack: Tensor) -> Tensor:
    """Magnitude of the central differences, per pixel; 0 across the edges."""
    padded = F.pad(stack[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    along = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    return torch.hypot(along, down)


def shrunk(stack: Tensor, step: int) -> Tensor:
    """Means of step x step pixels; what is left over at the right and the bottom is left out."""
    if step == 1:
        return stack
    if step == 2:  # sums of whole rows, then of every other pixel: faster than any pooling
        rows, columns = (size - size % 2 for size in stack.shape[-2:])
        pairs = stack[..., 0:rows:2, :columns] + stack[..., 1:rows:2, :columns]
        return (pairs[..., 0::2] + pairs[..., 1::2]).mul_(0.25)
    rows, columns = (size // step for size in stack.shape[-2:])
    cut = stack[..., : rows * step, : columns * step]
    lines = cut.reshape(*stack.shape[:-2], rows, step, columns * step).mean(-2)
    small: Tensor = lines.reshape(*lines.shape[:-1], columns, step).mean(-1)
    return small


def extremes(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of each pixel and its eight neighbours, where there are."""
    padded = F.pad(stack[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    along = padded[:, :, :-2], padded[:, :, 1:-1], padded[:, :, 2:]
    low = torch.minimum(torch.minimum(*along[:2]), along[2])
    high = torch.maximum(torch.maximum(*along[:2]), along[2])
    low = torch.minimum(torch.minimum(low[:, :-2], low[:, 1:-1]), low[:, 2:])
    high = torch.maximum(torch.maximum(high[:, :-2], high[:, 1:-1]), high[:, 2:])
    return low, high


def masked_mean(stack: Tensor, mask: Tensor, least: int = 1) -> Tensor:
    """Mean of finite pixels inside the mask; NaN where it has fewer than `least` of them."""
    inside = mask.to(stack.dtype)
    count = total(inside)
    return torch.where(count >= max(1, least), total(stack * inside) / count, torch.nan)


def masked_median(stack: Tensor, mask: Tensor, least: int = 1) -> Tensor:
    """Median inside the mask, the lower of two middles; NaN where it has fewer than `least`."""
    if stack.device.type == "cpu":  # each slice by itself: a look at what is inside alone
        found = [
            _median(plane[inside], max(1, least))
            for plane, inside in zip(stack.numpy(), mask.numpy(), strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64)
    values = torch.where(mask, stack, torch.nan).flatten(1)
    enough = mask.flatten(1).sum(1) >= max(1, least)
    return torch.where(enough, values.nanmedian(dim=1).values, torch.nan).double()


def _median(values: npt.NDArray[np.float32], least: int) -> float:
    if len(values) < least:
        return math.nan
    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle])


def rms(stack: Tensor) -> Tensor:
    """Root of the mean square."""
    return mean(stack.square()).sqrt()


def deviation(stack: Tensor) -> Tensor:
    """Standard deviation."""
    # About the rounded mean, and what that lacks taken off: no copy in double precision.
    apart = stack - stack.mean(_PLANE, keepdim=True)
    left = mean(apart)
    return (mean(apart.square_()) - left.square()).clamp(min=0).sqrt()


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over all pixels; NaN where one of them is flat."""
    a = a - a.mean(_PLANE, keepdim=True)
    b = b - b.mean(_PLANE, keepdim=True)
    cross = mean(a * b)
    spread = rms(a) * rms(b)
    return torch.where(spread > 0, cross / spread, torch.nan)


def noise(stack: Tensor, mask: Tensor, step: int = 1, least: int = 50) -> Tensor:
    """Robust SD of the finest diagonal detail inside the mask: the median of |differences|.

    White noise of SD s gives s; smooth structure and the few pixels of edges hardly count. The
    mask is that of `shrunk(stack, step)`, and one detail of each of its pixels is looked at; NaN
    where it has fewer than `least`.
    """
    lines = stack[:, :-1:step] - stack[:, 1::step]
    detail = (lines[..., :-1:step] - lines[..., 1::step]).abs_()
    rows = min(detail.shape[1], mask.shape[1])
    columns = min(detail.shape[2], mask.shape[2])
    found = masked_median(detail[:, :rows, :columns], mask[:, :rows, :columns], least)
    return found / (2 * _NORMAL_MEDIAN)


def power(stack: Tensor) -> Tensor:
    """Power of the right half of the frequencies, (slices, rows, columns // 2 + 1), mean left out.

    Slices are windowed (Hann), so that opposite borders make no cross.
    """
    height, width = stack.shape[-2:]
    window = _window(height, width, stack.device)
    mean = stack.mean(_PLANE, keepdim=True)
    return squared(torch.fft.rfft2((stack - mean) * window))


def squared(spectrum: Tensor) -> Tensor:
    """|z|² of complex values."""
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)


def spectrum(power: Tensor, shape: Sequence[int], rings: int) -> Tensor:
    """Mean of `power` of slices of `shape` in equal rings up to the Nyquist frequency.

    (slices, rings); the first ring lacks 0.
    """
    ring, counts = _rings(shape[0], shape[1], rings, power.device)
    sums: Tensor = power.new_zeros(len(power), rings + 1).index_add_(1, ring, power.flatten(1))
    means: Tensor = sums / counts
    return means[:, :rings]


@functools.lru_cache(maxsize=64)
def _bands(
    size: int, sigma: float, device: torch.device
) -> tuple[tuple[slice, slice, Tensor], ...]:
    """`lowpass.bands` in single precision."""
    return tuple(
        (part, near, torch.from_numpy(weights).float().to(device))
        for part, near, weights in bands(size, sigma)
    )


@functools.lru_cache(maxsize=32)
def _modes(size: int, sigma: float, device: torch.device) -> Tensor:
    places, orders = np.arange(size), np.arange(size)[:, None]
    modes = np.cos(np.pi / size * (places + 0.5) * orders) * np.sqrt(2 / size)
    modes[0] /= np.sqrt(2)
    left = kept_of_modes(size, sigma)
    known = int(np.flatnonzero(np.abs(left) > _NEARLY_NOTHING)[-1]) + 1
    scaled = modes[:known] * left[:known, None] / np.sqrt(size)
    return torch.from_numpy(scaled).float().to(device)


@functools.lru_cache(maxsize=16)
def _window(height: int, width: int, device: torch.device) -> Tensor:
    rows, columns = (torch.hann_window(size, periodic=False) for size in (height, width))
    return torch.outer(rows, columns).to(device)


@functools.lru_cache(maxsize=16)
def _rings(height: int, width: int, rings: int, device: torch.device) -> tuple[Tensor, Tensor]:
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    ring = (radius * 2 * rings).long().clamp(max=rings)
    ring[0, 0] = rings  # the mean, and what lies beyond the circle, are in no ring
    counts = torch.bincount(ring.flatten(), minlength=rings + 1).clamp(min=1)
    return ring.flatten().to(device), counts.to(device)
