"""NAF blocks and experts for a CPU, by the fused products of oneDNN, band by band.

PyTorch's own 1×1 convolution hands narrow products to a library that is slow at them and makes a
pass over memory for each bias, residual and activation; oneDNN's takes all of these in. A block
works on bands of rows that stay in the cache, so main memory sees each activation a few times and
not some thirty. docs/decisions/0024-cpu-path.md
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restoration.blocks import NAFBlock, Pointwise
from restoration.experts import TaskAdaptiveRouting
from restoration.folding import KnownRouting, Linear, expert_layers, folded, parameter, plain

BAND = 1 << 19  # octets of an activation of a block in one band


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

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """The residual and the product."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self.weight, self.bias, "add"
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
        gated = torch.empty_like(pixels)
        bands = _bands(pixels)
        for rows in bands:
            gated[:, rows] = self._gated(pixels, rows)
        factors = self.attention.factors(gated.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = torch.empty_like(pixels)
        for rows in bands:
            scale = factors[:, rows] if factors.shape[1] > 1 else factors
            out[:, rows] = self._fed(pixels[:, rows], gated[:, rows] * scale)
        return out.permute(0, 3, 1, 2)

    def _gated(self, pixels: Tensor, rows: slice) -> Tensor:
        """Norm, 1×1, 3×3 depthwise and gate of some rows, from those and one row on each side."""
        first, end = max(0, rows.start - 1), min(pixels.shape[1], rows.stop + 1)
        y = self.into(self._normed(pixels[:, first:end]))
        y = F.conv2d(
            y.permute(0, 3, 1, 2), self.taps, self.taps_bias, padding=1, groups=len(self.taps)
        )
        # Rows beside the band lack neighbours of their own: the image's border has none.
        y = y.permute(0, 2, 3, 1)[:, rows.start - first : rows.stop - first]
        return _gate(y)

    def _fed(self, pixels: Tensor, gated: Tensor) -> Tensor:
        x = self.project.added_to(pixels.contiguous(), gated)
        return self.last.added_to(x, _gate(self.feed(self._normed(x))))

    def _normed(self, pixels: Tensor) -> Tensor:
        return F.layer_norm(pixels, pixels.shape[-1:], eps=self.eps)


def banded_routing(routing: TaskAdaptiveRouting, dtype: torch.dtype) -> KnownRouting:
    """A TARM whose experts go through an image in bands."""
    return KnownRouting(routing, lambda expert: _BandedExpert(expert, dtype))


class _BandedExpert(nn.Module):
    def __init__(self, expert: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.outer = (_Product(layer, dtype) for layer in expert_layers(expert))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).contiguous()
        out = torch.empty_like(pixels)
        for rows in _bands(pixels):
            band = pixels[:, rows].contiguous()
            out[:, rows] = self.outer.added_to(band, self.inner.gelu(band))
        return out.permute(0, 3, 1, 2)


class ProductPointwise(nn.Module):
    """A 1×1 convolution that stands alone: (B, C, H, W) → (B, C', H, W)."""

    def __init__(self, conv: Pointwise, dtype: torch.dtype) -> None:
        super().__init__()
        self.product = _Product(plain(conv), dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(x.permute(0, 2, 3, 1).contiguous())
        return out.permute(0, 3, 1, 2)


def _bands(pixels: Tensor) -> list[slice]:
    """Rows of (B, H, W, C) in bands of about BAND octets."""
    height = pixels.shape[1]
    row = max(1, pixels[:, :1].numel() * pixels.element_size())
    size = max(4, BAND // row)
    return [slice(start, min(start + size, height)) for start in range(0, height, size)]


def _gate(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return a * b
