"""Building blocks shared by the encoders, the decoder and the restoration backbone.

The block is NAFNet's (Chen et al., ECCV 2022) with the test-time local converter of Chu et al.
(TLC, ECCV 2022) in the place of its global average pooling.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POOLING_CELL = 8  # image pixels per cell of the coarse pooling grid: one latent position


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of each pixel; statistics in fp32."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)  # NHWC: a view when x is channels_last
        normed = F.layer_norm(
            pixels.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(x.dtype).permute(0, 3, 1, 2)


class Pointwise(nn.Conv2d):
    """1×1 convolution as one matrix product on the NHWC view.

    PyTorch's CPU convolution copies a channels_last input for small 1×1 kernels; the product does
    not, which halves the time of a training step.
    """

    def __init__(self, channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, C, H, W) → (B, C', H, W), each output channel times ``scale`` (1, C', 1, 1)."""
        weight, bias = self.weight[:, :, 0, 0], self.bias
        if scale is not None:
            # On the weights: a pass over the activations is what a NAF block's time goes into.
            weight = weight * scale.view(-1, 1)
            bias = None if bias is None else bias * scale.view(-1)
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def simple_gate(x: Tensor) -> Tensor:
    """Multiply the first half of the channels by the second: (B, 2C, H, W) → (B, C, H, W)."""
    a, b = x.chunk(2, dim=1)
    return a * b


class ChannelAttention(nn.Module):
    """Simplified channel attention: a 1×1 convolution of the mean over the image or a window.

    During training the mean runs over the whole patch. At inference the patch is much smaller than
    the image, so :attr:`window` (pixels of this level) restores the statistics seen in training.
    """

    def __init__(self, channels: int, cell: int, scale: int | None = None) -> None:
        """``cell`` and ``scale``: of this level's pixels in a pooling cell, of image pixels in one.

        Below the level where a cell is one pixel, pixels hold more of the image than a cell does.
        """
        super().__init__()
        self.project = Pointwise(channels, channels)
        self.cell = cell
        self.scale = POOLING_CELL // cell if scale is None else scale
        self.window: int | None = None
        self.exact = False

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors(x)

    def local_window(self, height: int, width: int) -> int | None:
        """:attr:`window`; None where the mean is that of the image, which it may cover."""
        if self.window is None or self.window >= max(height, width):
            return None
        return self.window

    def factors(self, x: Tensor) -> Tensor:
        """What ``x`` is to be multiplied by: (B, C, H, W) → the same, or (B, C, 1, 1)."""
        height, width = x.shape[-2:]
        window = self.local_window(height, width)
        if window is None:
            attention: Tensor = self.project(x.mean(dim=(2, 3), keepdim=True))
        elif self.exact:
            attention = self.project(local_mean(x, window))
        else:
            attention = self._coarse(x, window)
        return attention

    def _coarse(self, x: Tensor, window: int) -> Tensor:
        # The projection is affine and bilinear weights sum to one: it may act on the coarse grid.
        height, width = x.shape[-2:]
        cells = x
        if self.cell > 1:
            # Networks of fewer levels take sides that are no multiple of a cell.
            cells = F.avg_pool2d(x, self.cell, ceil_mode=True, count_include_pad=False)
        attention: Tensor = self.project(local_mean(cells, max(1, window // self.cell)))
        if self.cell == 1:
            return attention
        spread = F.interpolate(attention, scale_factor=self.cell, mode="bilinear")
        return spread[..., :height, :width]


def local_mean(x: Tensor, window: int) -> Tensor:
    """Mean over a ``window``×``window`` box at every pixel; boxes at the border slide inwards.

    (B, C, H, W) → (B, C, H, W). Summed by two one-dimensional running sums in fp64, since a
    low-precision integral image drifts along the line.
    """
    for dim in (2, 3):
        x = _box_mean(x, window, dim)
    return x


def _box_mean(x: Tensor, window: int, dim: int) -> Tensor:
    size = x.shape[dim]
    if window >= size:
        return x.mean(dim=dim, keepdim=True).expand_as(x)
    total = x.double().cumsum(dim)
    zero = torch.zeros_like(total.narrow(dim, 0, 1))
    total = torch.cat([zero, total], dim=dim)
    count = size - window + 1
    means = (total.narrow(dim, window, count) - total.narrow(dim, 0, count)) / window
    index = (torch.arange(size, device=x.device) - (window - 1) // 2).clamp(0, count - 1)
    return means.index_select(dim, index).to(x.dtype)


class NAFBlock(nn.Module):
    """Nonlinear-activation-free block; β and γ start at zero, so the block starts as the identity.

    Parameters 7c² + 33c. ``cell`` is the size of the coarse pooling cell at this level, in pixels.
    """

    def __init__(self, channels: int, cell: int = POOLING_CELL, scale: int | None = None) -> None:
        super().__init__()
        wide = 2 * channels
        self.norm1 = LayerNorm2d(channels)
        self.conv1 = Pointwise(channels, wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.attention = ChannelAttention(channels, cell, scale)
        self.conv3 = Pointwise(channels, channels)
        self.norm2 = LayerNorm2d(channels)
        self.conv4 = Pointwise(channels, wide)
        self.conv5 = Pointwise(channels, channels)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = simple_gate(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.conv3(self.attention(y), self.beta)
        y = simple_gate(self.conv4(self.norm2(x)))
        out: Tensor = x + self.conv5(y, self.gamma)
        return out


class Downsample(nn.Conv2d):
    """2×2 convolution of stride 2: (B, C, H, W) → (B, C', H/2, W/2)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 2, stride=2)


class Upsample(nn.Sequential):
    """1×1 convolution and pixel shuffle: (B, C, H, W) → (B, C', 2H, 2W)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(Pointwise(channels, 4 * out_channels, bias=False), nn.PixelShuffle(2))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """The finer image, and ``skip`` (B, C', 2H, 2W) added to it."""
        out: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return out if skip is None else out + skip


def stack(channels: int, depth: int, level: int) -> nn.Sequential:
    """``depth`` NAF blocks for resolution ``level`` (0 = full resolution)."""
    cell = max(1, POOLING_CELL >> level)
    return nn.Sequential(*(NAFBlock(channels, cell, 1 << level) for _ in range(depth)))


def channel_attentions(module: nn.Module) -> Iterator[ChannelAttention]:
    """All channel attentions below ``module``."""
    return (m for m in module.modules() if isinstance(m, ChannelAttention))


def set_local_pooling(module: nn.Module, window: int | None, *, exact: bool = False) -> None:
    """Pool over ``window`` image pixels (scaled to each level) instead of the whole image.

    ``None`` goes back to global pooling. ``exact`` moves the window pixel by pixel; otherwise it
    moves by the cells of a coarse grid, which costs a tenth and differs by interpolation only.
    """
    for attention in channel_attentions(module):
        attention.window = None if window is None else max(1, window // attention.scale)
        attention.exact = exact
