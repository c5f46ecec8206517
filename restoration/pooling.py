"""Means over the windows of local pooling, on the coarse grid of its cells, for inference.

A box that slides inwards at the border is a product with a banded matrix along each axis: sums in
fp32, and nothing that runs along a line as the sums of :func:`restoration.blocks.local_mean` do.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def window_means(cells: Tensor, window: int) -> Tensor:
    """Means over `window`×`window` cells at every cell, fp32: (B, h, w, C) → the same."""
    tall, wide = cells.shape[1:3]
    means = torch.matmul(_box_matrix(wide, window, cells.device), cells.float())
    # A small product for each column: a large one would have other bits with other threads.
    down = torch.matmul(_box_matrix(tall, window, cells.device), means.transpose(1, 2))
    return down.transpose(1, 2)


@functools.lru_cache(maxsize=64)
def _box_matrix(size: int, window: int, device: torch.device) -> Tensor:
    """(size, size): row i averages a window around i that slides inwards at the border."""
    window = min(window, size)
    start = (torch.arange(size) - (window - 1) // 2).clamp(0, size - window)[:, None]
    place = torch.arange(size)[None]
    box = ((place >= start) & (place < start + window)).float() / window
    return box.to(device)
