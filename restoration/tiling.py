"""Sizes the network cannot take: padding to a multiple, and overlapping windows with a blend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor
from torch.nn import functional as F

Crop = tuple[EllipsisType, slice, slice]


@dataclass(frozen=True)
class Window:
    """One tile of an image: its place, and its blend weights along each axis."""

    rows: slice
    columns: slice
    row_weights: Tensor
    column_weights: Tensor

    @property
    def weights(self) -> Tensor:
        """Blend weights of the tile (tile rows, tile columns)."""
        return self.row_weights[:, None] * self.column_weights[None, :]


def pad_to_multiple(x: Tensor, multiple: int, least: int = 1) -> tuple[Tensor, Crop]:
    """Pad (B, C, H, W) at the right and the bottom; `padded[crop]` is `x` again.

    Each side becomes the next multiple of `multiple` that is not below `least`. The padding
    reflects; it replicates the border where a side is too short to reflect.
    """
    height, width = x.shape[-2:]
    below = _missing(height, multiple, least)
    right = _missing(width, multiple, least)
    padded = _pad(x, (0, 0, 0, below), below < height)
    padded = _pad(padded, (0, right, 0, 0), right < width)
    return padded, (..., slice(0, height), slice(0, width))


def windows(height: int, width: int, tile: int, overlap: int) -> list[Window]:
    """Cover (height, width) by tiles that overlap by at least `overlap` pixels.

    The blend weights of all tiles sum to one at every pixel. All offsets are multiples of any
    number that divides height, width, tile and overlap.
    Raises ValueError for an overlap that leaves no progress.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"'overlap' must lie in 0 ... {tile - 1}, not {overlap}.")
    rows = _spans(height, tile, overlap)
    columns = _spans(width, tile, overlap)
    return [
        Window(row, column, row_weights, column_weights)
        for (row, row_weights), (column, column_weights) in itertools.product(rows, columns)
    ]


def restore_tiled(
    fn: Callable[[Tensor, Window], Tensor], x: Tensor, tile: int, overlap: int
) -> Tensor:
    """Apply `fn` to each window of (B, C, H, W) and blend the results to (B, C', H, W).

    `fn` takes a tile and its window (to cut other inputs alike) and keeps the tile's size.
    """
    blended: Tensor | None = None
    for window in windows(x.shape[-2], x.shape[-1], tile, overlap):
        part = fn(x[..., window.rows, window.columns], window)
        if blended is None:
            blended = part.new_zeros(*part.shape[:-2], *x.shape[-2:])
        blended[..., window.rows, window.columns] += part * window.weights.to(part)
    assert blended is not None
    return blended


def _missing(size: int, multiple: int, least: int) -> int:
    return -(-max(size, least) // multiple) * multiple - size


def _pad(x: Tensor, sides: tuple[int, int, int, int], reflects: bool) -> Tensor:
    if not any(sides):
        return x
    return F.pad(x, sides, mode="reflect" if reflects else "replicate")


def _spans(size: int, tile: int, overlap: int) -> list[tuple[slice, Tensor]]:
    """Tiles along one axis with weights that sum to one at every pixel."""
    if size <= tile:
        return [(slice(0, size), torch.ones(size))]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    spans = [slice(start, start + tile) for start in starts]
    raw = [_ramps(tile, overlap, span.start > 0, span.stop < size) for span in spans]
    total = torch.zeros(size, dtype=torch.float64)
    for span, weights in zip(spans, raw, strict=True):
        total[span] += weights
    return [(span, (w / total[span]).float()) for span, w in zip(spans, raw, strict=True)]


def _ramps(tile: int, overlap: int, rises: bool, falls: bool) -> Tensor:
    """A raised-cosine ramp over the overlap at each side that meets another tile (tile,)."""
    weights = torch.ones(tile, dtype=torch.float64)
    phase = (torch.arange(overlap, dtype=torch.float64) + 0.5) / max(overlap, 1)
    ramp = torch.sin(phase * math.pi / 2).square()
    if rises:
        weights[:overlap] *= ramp
    if falls:
        weights[tile - overlap :] *= ramp.flip(0)
    return weights
