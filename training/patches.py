"""A batch of patches, and how all of them are cut at once, where the images lie.

A patch is made of one crop, or of several crops of small images, each in its own cell. What the
crops are is decided on the host (``training.slices``); here they become one gather, so that a GPU
neither waits for the host nor the host for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Normalised patches (B, 1, P, P), a mask of real pixels, and each patch's task (B,)."""

    lq: Tensor
    hq: Tensor
    mask: Tensor
    task: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device, which a GPU need not wait for."""
        return self._each(lambda values: values.to(device, non_blocking=True))

    def rows(self, rows: Tensor) -> Batch:
        """The patches of these indices."""
        return self._each(lambda values: values[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(change(self.lq), change(self.hq), change(self.mask), change(self.task))


@dataclass(frozen=True)
class Crop:
    """A part of a slice in a flat buffer, how it is turned, and the cell of the patch it fills."""

    start: int  #: index of its first pixel in the buffer
    stride: int  #: pixels from one row to the next
    rows: int
    columns: int
    turns: int  #: quarter turns, as of ``torch.rot90``
    flip: bool  #: left-right, after the turns
    patch: int  #: index of the patch in the batch
    cell: tuple[int, int, int, int]  #: top, left, height and width inside the patch


def cut(
    crops: Sequence[Crop], images: Sequence[Tensor], patches: int, size: int
) -> tuple[list[Tensor], Tensor]:
    """Patches (patches, size, size) of each of ``images``, float32, and the mask of real pixels.

    ``images`` are flat buffers on one device. Cells beyond a crop repeat its last row and column,
    with 0 in the mask. The cells must cover every patch.
    """
    device = images[0].device
    reach = max(max(crop.cell[2:]) for crop in crops)
    table = torch.tensor(np.array([_numbers(crop) for crop in crops]), device=device)
    start, stride, rows, columns, turns, flip, patch, top, left, height, width = (
        column[:, None, None] for column in table.unbind(1)
    )
    i = torch.arange(reach, device=device)[None, :, None]
    j = torch.arange(reach, device=device)[None, None, :]
    turned = turns % 2 == 1
    high, wide = torch.where(turned, columns, rows), torch.where(turned, rows, columns)
    row, column = _before_turns(i.minimum(high - 1), j.minimum(wide - 1), turns, flip, high, wide)
    index = start + row * stride + column
    # One pixel more than needed takes what lies outside the cells: no index depends on the data.
    pixels = patches * size * size
    inside = (i < height) & (j < width)
    target = torch.where(inside, (patch * size + top + i) * size + left + j, pixels)
    real = (i < high) & (j < wide)
    *found, mask = (
        torch.empty(pixels + 1, device=device).scatter_(0, target.flatten(), values.flatten())
        for values in (*(image.take(index).float() for image in images), real.float())
    )
    return [_square(image, patches, size) for image in found], _square(mask, patches, size)


def _numbers(crop: Crop) -> tuple[int, ...]:
    turn = (crop.turns % 4, int(crop.flip))
    return (crop.start, crop.stride, crop.rows, crop.columns, *turn, crop.patch, *crop.cell)


def _square(flat: Tensor, patches: int, size: int) -> Tensor:
    return flat[:-1].view(patches, size, size)


def _before_turns(
    i: Tensor, j: Tensor, turns: Tensor, flip: Tensor, high: Tensor, wide: Tensor
) -> tuple[Tensor, Tensor]:
    """Row and column in the part from which pixel (i, j) of the turned, then flipped one comes.

    ``high`` and ``wide`` are the rows and columns of the turned one.
    """
    j = torch.where(flip == 1, wide - 1 - j, j)
    rows = (i, j, high - 1 - i, wide - 1 - j)
    columns = (j, high - 1 - i, wide - 1 - j, i)
    row, column = rows[0], columns[0]
    for turn in (1, 2, 3):
        row = torch.where(turns == turn, rows[turn], row)
        column = torch.where(turns == turn, columns[turn], column)
    return row, column
