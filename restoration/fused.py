"""NAF blocks and experts that run as Triton kernels (:mod:`restoration.kernels`).

Each is made from the module whose place it takes, with the weights folded and padded once.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restoration.blocks import ChannelAttention, NAFBlock
from restoration.experts import TaskAdaptiveRouting
from restoration.folding import KnownRouting, expert_layers, folded, parameter, plain
from restoration.kernels import naf
from restoration.pooling import window_means


class FusedNAFBlock(nn.Module):
    """A NAF block for inference, (B, C, H, W) channels_last in `dtype`; sides whole cells."""

    def __init__(self, block: NAFBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = copy.deepcopy(block.attention)
        self.eps = block.norm1.eps
        channels = len(block.norm1.weight)
        wide = naf.padded_width(channels)
        into, project, feed, last = folded(block)
        self.into = parameter(_padded(into.weight, 2 * channels, wide), dtype)
        self.into_bias = parameter(into.bias)
        taps = block.conv2.weight.detach().float()[:, 0]
        self.taps = parameter(taps.permute(1, 2, 0).reshape(9, -1))
        assert block.conv2.bias is not None
        self.taps_bias = parameter(block.conv2.bias)
        halves = zip(feed.weight.chunk(2), feed.bias.chunk(2), strict=True)
        self.matrices = nn.ParameterList()
        for weight, bias in (project, *halves, last):
            self.matrices.append(parameter(_padded(weight, wide, wide), dtype))
            self.matrices.append(parameter(_padded(bias[None], 1, wide)[0]))
        attention = plain(block.attention.project)
        self.project = parameter(attention.weight, dtype)
        self.project_bias = parameter(attention.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).contiguous()  # NHWC: a view of a channels_last tensor
        y = naf.norm_pointwise(pixels, self.into, self.into_bias, self.eps)
        cell = self.attention.cell
        y, cells = naf.depthwise_gate(y, self.taps, self.taps_bias, cell)
        matrices = tuple(self.matrices)
        out = naf.attend_feed_forward(y, pixels, self.factors(cells), matrices, self.eps, cell)
        return out.permute(0, 3, 1, 2)

    def factors(self, cells: Tensor) -> Tensor:
        """What pixels are multiplied by, on the grid of the cells' means: (B, h, w, C)."""
        means = _local_means(cells, self.attention).to(self.project.dtype)
        return F.linear(means, self.project, self.project_bias)


def fused_routing(routing: TaskAdaptiveRouting, dtype: torch.dtype) -> KnownRouting:
    """A TARM whose experts are one kernel each."""
    return KnownRouting(routing, lambda expert: _FusedExpert(expert, dtype))


class _FusedExpert(nn.Module):
    def __init__(self, expert: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        inner, outer = expert_layers(expert)
        middle, wide = inner.weight.shape
        wide, middle = naf.padded_width(wide), -(-middle // 16) * 16
        self.inner = parameter(_padded(inner.weight, middle, wide), dtype)
        self.inner_bias = parameter(_padded(inner.bias[None], 1, middle)[0])
        self.outer = parameter(_padded(outer.weight, wide, middle), dtype)
        self.outer_bias = parameter(_padded(outer.bias[None], 1, wide)[0])

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).contiguous()
        out = naf.pixel_mlp(pixels, self.inner, self.inner_bias, self.outer, self.outer_bias)
        return out.permute(0, 3, 1, 2)


def _local_means(cells: Tensor, attention: ChannelAttention) -> Tensor:
    """Means over the window of `attention` on the grid of cells, fp32: (B, h, w, C)."""
    height, width = (size * attention.cell for size in cells.shape[1:3])
    window = attention.local_window(height, width)
    if window is None:
        return cells.mean(dim=(1, 2), keepdim=True)
    return window_means(cells, max(1, window // attention.cell))


def _padded(weight: Tensor, rows: int, columns: int) -> Tensor:
    out = weight.new_zeros(rows, columns)
    out[: weight.shape[0], : weight.shape[1]] = weight.detach()
    return out
