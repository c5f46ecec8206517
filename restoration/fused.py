"""NAF blocks, expert layers and codebooks that run as Triton kernels (:mod:`restoration.kernels`).

Each is made from the module whose place it takes, with the weights folded once: the norm's scale
and shift into the 1×1 convolution behind it, β and γ into the one before them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restoration.blocks import ChannelAttention, LayerNorm2d, NAFBlock, Pointwise
from restoration.experts import TaskAdaptiveRouting
from restoration.kernels import naf


class FusedNAFBlock(nn.Module):
    """A NAF block for inference, (B, C, H, W) channels_last in `dtype`; sides whole cells."""

    def __init__(self, block: NAFBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = block.attention
        self.eps = block.norm1.eps
        channels = len(block.norm1.weight)
        wide = naf.padded_width(channels)
        weight, bias = _behind_norm(block.norm1, block.conv1)
        self.into = _parameter(_padded(weight, 2 * channels, wide), dtype)
        self.into_bias = _parameter(bias)
        taps = block.conv2.weight.detach().float()[:, 0]
        self.taps = _parameter(taps.permute(1, 2, 0).reshape(9, -1).contiguous())
        self.taps_bias = _parameter(_bias(block.conv2))
        project, project_bias = _before_scale(block.conv3, block.beta)
        feed, feed_bias = _behind_norm(block.norm2, block.conv4)
        last, last_bias = _before_scale(block.conv5, block.gamma)
        parts = [(project, project_bias)]
        parts += list(zip(feed.chunk(2), feed_bias.chunk(2), strict=True))
        parts += [(last, last_bias)]
        self.matrices = nn.ParameterList()
        for weight, bias in parts:
            self.matrices.append(_parameter(_padded(weight, wide, wide), dtype))
            self.matrices.append(_parameter(_padded(bias[None], 1, wide)[0]))
        self.project = _parameter(block.attention.project.weight[:, :, 0, 0], dtype)
        self.project_bias = _parameter(_bias(block.attention.project), dtype)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).contiguous()  # NHWC: a view of a channels_last tensor
        y = naf.norm_pointwise(pixels, self.into, self.into_bias, self.eps)
        cell = self.attention.cell
        y, cells = naf.depthwise_gate(y, self.taps, self.taps_bias, cell)
        means = _local_means(cells, self.attention).to(self.project.dtype)
        attention = torch.nn.functional.linear(means, self.project, self.project_bias)
        out = naf.attend_feed_forward(y, pixels, attention, tuple(self.matrices), self.eps, cell)
        return out.permute(0, 3, 1, 2)


class FusedRouting(nn.Module):
    """A TARM whose image all has one expert, which is known before the pass."""

    def __init__(self, routing: TaskAdaptiveRouting, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_FusedExpert(expert, dtype) for expert in routing.experts)

    def forward(self, features: Tensor, expert: int) -> Tensor:
        out: Tensor = self.experts[expert](features)
        return out


class _FusedExpert(nn.Module):
    def __init__(self, expert: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(expert, nn.Sequential)
        first, _, last = expert
        assert isinstance(first, Pointwise)
        assert isinstance(last, Pointwise)
        wide = naf.padded_width(first.in_channels)
        middle = -(-first.out_channels // 16) * 16
        self.inner = _parameter(_padded(first.weight[:, :, 0, 0], middle, wide), dtype)
        self.inner_bias = _parameter(_padded(_bias(first)[None], 1, middle)[0])
        self.outer = _parameter(_padded(last.weight[:, :, 0, 0], wide, middle), dtype)
        self.outer_bias = _parameter(_padded(_bias(last)[None], 1, wide)[0])

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).contiguous()
        out = naf.pixel_mlp(pixels, self.inner, self.inner_bias, self.outer, self.outer_bias)
        return out.permute(0, 3, 1, 2)


def _local_means(cells: Tensor, attention: ChannelAttention) -> Tensor:
    """Means over the window of `attention` on the grid of cells, fp32: (B, h, w, C)."""
    tall, wide = cells.shape[1:3]
    window = attention.window
    if window is None or window >= max(tall, wide) * attention.cell:
        return cells.mean(dim=(1, 2), keepdim=True)
    size = max(1, window // attention.cell)
    across = box_matrix(wide, size, cells.device)
    down = box_matrix(tall, size, cells.device)
    # Two products with banded matrices: exact sums in fp32, and nothing that runs along a line.
    means = torch.matmul(across, cells)  # (B, h, w, C)
    return torch.matmul(down, means.flatten(2)).view_as(means)


_BOXES: dict[tuple[int, int, torch.device], Tensor] = {}


def box_matrix(size: int, window: int, device: torch.device) -> Tensor:
    """(size, size): row i averages a window around i that slides inwards at the border."""
    key = (size, window, device)
    if key not in _BOXES:
        window = min(window, size)
        start = (torch.arange(size) - (window - 1) // 2).clamp(0, size - window)[:, None]
        place = torch.arange(size)[None]
        box = ((place >= start) & (place < start + window)).float() / window
        _BOXES[key] = box.to(device)
    return _BOXES[key]


def _behind_norm(norm: LayerNorm2d, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    weight = conv.weight.detach().float()[:, :, 0, 0]
    bias = _bias(conv) + weight @ norm.bias.detach().float()
    return weight * norm.weight.detach().float(), bias


def _before_scale(conv: nn.Conv2d, scale: Tensor) -> tuple[Tensor, Tensor]:
    factor = scale.detach().float().view(-1)
    return conv.weight.detach().float()[:, :, 0, 0] * factor[:, None], _bias(conv) * factor


def _bias(conv: nn.Conv2d) -> Tensor:
    if conv.bias is None:
        return conv.weight.new_zeros(conv.out_channels)
    return conv.bias.detach().float()


def _padded(weight: Tensor, rows: int, columns: int) -> Tensor:
    out = weight.new_zeros(rows, columns)
    out[: weight.shape[0], : weight.shape[1]] = weight.detach()
    return out


def _parameter(values: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(values.detach().to(dtype).contiguous(), requires_grad=False)
