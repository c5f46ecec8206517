"""What neighbouring slices say about each other: order and continuity along the series.

They look at thumbnails: means of blocks of pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from restoration.fidelity import images

REACH = 3  # slices before and after that a slice is compared with
_BLOCK = 8  # pixels that one of a thumbnail stands for


def thumbnail(stack: Tensor) -> Tensor:
    """Means of blocks of (slices, rows, columns), of 8 x 8 pixels where there are enough."""
    step = max(1, min(_BLOCK, min(stack.shape[-2:]) // 8))
    return images.shrunk(stack, step).contiguous()


def slice_order(before: Tensor, after: Tensor) -> Tensor:
    """How much nearer a result is to its own input than to a neighbour's: below 1 where it is.

    Thumbnails (slices, h, w) → (slices,); NaN for a single slice, and where neighbours are equal.
    """
    total = len(before)
    own = _distance(after, before)
    nearest = torch.full((total,), torch.inf, dtype=torch.float64)
    for step in range(1, min(REACH, total - 1) + 1):
        # after[i] against before[i + step], and after[i + step] against before[i]
        nearest[:-step] = torch.minimum(nearest[:-step], _distance(after[:-step], before[step:]))
        nearest[step:] = torch.minimum(nearest[step:], _distance(after[step:], before[:-step]))
    known = nearest.isfinite() & (nearest > 0)
    return torch.where(known, own / nearest, torch.nan)


def continuity(before: Tensor, after: Tensor) -> Tensor:
    """How much more a slice of the result jumps against its neighbours than its input does.

    Thumbnails (slices, h, w) → (slices,); NaN for fewer than three slices.
    """
    if len(before) < 3:
        return torch.full((len(before),), torch.nan, dtype=torch.float64)
    jumps = [_jumps(stack) for stack in (before, after)]
    return torch.where(jumps[0] > 0, jumps[1] / jumps[0], torch.nan)


def _jumps(stack: Tensor) -> Tensor:
    """RMS difference of each slice and the mean of its neighbours; the ends have one neighbour."""
    mean = torch.empty_like(stack)
    mean[1:-1] = (stack[:-2] + stack[2:]) / 2
    mean[0], mean[-1] = stack[1], stack[-2]
    return _distance(stack, mean)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return images.rms(a - b).cpu()
