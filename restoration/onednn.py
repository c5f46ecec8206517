"""The network's parts for a CPU, by the fused products of oneDNN, band by band.

PyTorch's own 1×1 convolution hands narrow products to a library that is slow at them and makes a
pass over memory for each bias and activation; oneDNN's takes these in. Parts work on bands of rows
that stay in the cache, so main memory sees each activation a few times and not some thirty, and
write over what nobody reads any more: memory that is new to a process costs more than the work on
it. docs/decisions/0026-a-cpu-by-fused-products.md
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restoration.blocks import NAFBlock, Pointwise, Upsample
from restoration.experts import TaskAdaptiveRouting
from restoration.folding import (
    KnownRouting,
    Linear,
    expert_layers,
    folded,
    parameter,
    plain,
    upsample_rows,
)
from restoration.pooling import window_means

BAND = 1 << 21  # octets of an activation of a block in one band


def available(device: torch.device) -> bool:
    """Whether this PyTorch has the fused products, as what its compiler makes for a CPU calls."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _Product(nn.Module):
    """A 1×1 convolution of pixels (…, C) → (…, C'), with what follows it taken in."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(linear.weight, dtype)
        self.bias = parameter(linear.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def gelu(self, x: Tensor) -> Tensor:
        """GELU, exact, of the product."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "gelu", [], "none"
        )
        return out


class BandedNAFBlock(nn.Module):
    """A NAF block for inference on a CPU: (B, C, H, W) channels_last in `dtype`."""

    def __init__(self, block: NAFBlock, dtype: torch.dtype) -> None:
        super().__init__()
        into, project, feed, last = folded(block)
        self.into, self.project = _Product(into, dtype), _Product(project, dtype)
        self.feed, self.last = _Product(feed, dtype), _Product(last, dtype)
        assert block.conv2.bias is not None
        self.taps = parameter(block.conv2.weight.to(memory_format=torch.channels_last), dtype)
        self.taps_bias = parameter(block.conv2.bias, dtype)
        self.attention = copy.deepcopy(block.attention)
        self.eps = block.norm1.eps

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).contiguous()  # NHWC: a view of a channels_last tensor
        out = torch.empty_like(pixels)
        bands = _bands(pixels, self.attention.cell)
        cells = [self._gate(pixels, rows, out[:, rows]) for rows in bands]
        grid = self._grid(out, cells)
        for rows in bands:
            self._feed(pixels[:, rows], self._factors(grid, rows, out), out[:, rows])
        return out.permute(0, 3, 1, 2)

    def _gate(self, pixels: Tensor, rows: slice, out: Tensor) -> Tensor:
        """Norm, 1×1, 3×3 depthwise and gate of some rows, from those and one row on each side.

        Into `out`; what comes back are its means over the cells of pooling.
        """
        first, end = max(0, rows.start - 1), min(pixels.shape[1], rows.stop + 1)
        y = self.into(_normed(pixels[:, first:end], self.eps))
        y = F.conv2d(
            y.permute(0, 3, 1, 2), self.taps, self.taps_bias, padding=1, groups=len(self.taps)
        )
        # Rows beside the band lack neighbours of their own: the image's border has none.
        a, b = y.permute(0, 2, 3, 1)[:, rows.start - first : rows.stop - first].chunk(2, dim=-1)
        torch.mul(a, b, out=out)
        cell = self.attention.cell
        if cell == 1:
            return out
        means = F.avg_pool2d(out.permute(0, 3, 1, 2), cell, ceil_mode=True, count_include_pad=False)
        return means.permute(0, 2, 3, 1)

    def _grid(self, gated: Tensor, cells: list[Tensor]) -> Tensor:
        """What pixels are multiplied by: of the image (B, 1, 1, C), of cells, or of each pixel."""
        attention = self.attention
        height, width = gated.shape[1:3]
        window = attention.local_window(height, width)
        if window is None or attention.exact:
            return attention.factors(gated.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        means = window_means(torch.cat(cells, dim=1), max(1, window // attention.cell))
        grid: Tensor = attention.project(means.to(gated.dtype).permute(0, 3, 1, 2))
        return grid.permute(0, 2, 3, 1)

    def _factors(self, grid: Tensor, rows: slice, pixels: Tensor) -> Tensor:
        """The rows' part of a grid, bilinear between the middles of its cells."""
        height, width = pixels.shape[1:3]
        if grid.shape[1:3] == (1, 1):
            return grid
        if grid.shape[1:3] == (height, width):
            return grid[:, rows]
        cell = self.attention.cell
        # A row between two cells' middles needs both: one more cell on each side.
        first, end = max(0, rows.start // cell - 1), -(-rows.stop // cell) + 1
        spread = F.interpolate(
            grid[:, first:end].permute(0, 3, 1, 2), scale_factor=cell, mode="bilinear"
        ).permute(0, 2, 3, 1)
        return spread[:, rows.start - first * cell : rows.stop - first * cell, :width]

    def _feed(self, pixels: Tensor, factors: Tensor, gated: Tensor) -> None:
        """The rest of the block for some rows, over what is `gated`."""
        x = self.project(gated.mul_(factors)).add_(pixels)
        a, b = self.feed(_normed(x, self.eps)).chunk(2, dim=-1)
        torch.add(x, self.last(a * b), out=gated)


def banded_routing(routing: TaskAdaptiveRouting, dtype: torch.dtype) -> KnownRouting:
    """A TARM whose experts go through an image in bands, and leave their result in its place."""
    return KnownRouting(routing, lambda expert: _BandedExpert(expert, dtype))


class _BandedExpert(nn.Module):
    def __init__(self, expert: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.outer = (_Product(layer, dtype) for layer in expert_layers(expert))

    def forward(self, x: Tensor) -> Tensor:
        """Adds to `x` what the expert makes of it."""
        pixels = x.permute(0, 2, 3, 1)
        for rows in _bands(pixels):
            band = pixels[:, rows]
            band.add_(self.outer(self.inner.gelu(band)))
        return x


class ProductUpsample(nn.Module):
    """1×1 convolution and pixel shuffle by a product for each row of the finer image."""

    def __init__(self, upsample: Upsample, dtype: torch.dtype) -> None:
        super().__init__()
        self.top, self.bottom = (_Product(row, dtype) for row in upsample_rows(upsample))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C, H, W) → (B, C', 2H, 2W), with what `skip` adds to it."""
        pixels = x.permute(0, 2, 3, 1).contiguous()
        images, height, width, _ = pixels.shape
        shape = (images, height, 2, width, -1)
        out = pixels.new_empty(images, height, 2, width, len(self.top.weight))
        added = None if skip is None else skip.permute(0, 2, 3, 1).reshape(shape)
        for rows in _bands(pixels):
            for place, product in enumerate((self.top, self.bottom)):
                values = product(pixels[:, rows])
                if added is None:
                    out[:, rows, place] = values
                else:
                    torch.add(values, added[:, rows, place], out=out[:, rows, place])
        return out.view(images, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


class ProductEmbed(nn.Module):
    """The first convolution, 3×3 of one or two channels, as a product of patches; fp32."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.kernel_size == (3, 3)
        assert conv.bias is not None
        weight = conv.weight.detach().float().flatten(1)
        self.product = _Product(Linear(weight, conv.bias.detach().float()), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or 2, H, W) → (B, C, H, W)."""
        images, _, height, width = x.shape
        wide, patch = self.product.weight.shape
        out = x.new_empty(images, height, width, wide)
        padded = F.pad(x, (1, 1, 1, 1))
        for rows in _bands(out):
            patches = F.unfold(padded[:, :, rows.start : rows.stop + 2], 3)
            values = self.product(patches.transpose(1, 2).reshape(images, -1, width, patch))
            out[:, rows] = values
        return out.permute(0, 3, 1, 2)


class ProductPointwise(nn.Module):
    """A 1×1 convolution that stands alone: (B, C, H, W) → (B, C', H, W)."""

    def __init__(self, conv: Pointwise, dtype: torch.dtype) -> None:
        super().__init__()
        self.product = _Product(plain(conv), dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(x.permute(0, 2, 3, 1).contiguous())
        return out.permute(0, 3, 1, 2)


def _normed(x: Tensor, eps: float) -> Tensor:
    """Layer normalisation of the last axis without scale and shift, statistics in fp32.

    By whole passes in the cache: PyTorch's own goes pixel by pixel, which for 24 or 48 channels
    takes twice the time.
    """
    if x.dtype != torch.float32:
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    y = x - x.mean(dim=-1, keepdim=True)
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return y.mul_(norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_())


def _bands(pixels: Tensor, cell: int = 1) -> list[slice]:
    """Rows of (B, H, W, C) in bands of about BAND octets and whole cells."""
    height = pixels.shape[1]
    row = max(1, pixels[:, :1].numel() * pixels.element_size())
    size = max(8, BAND // row // cell * cell)
    return [slice(start, min(start + size, height)) for start in range(0, height, size)]
