"""Networks of the size and form of two peers, written afresh, to compare speed with.

Restormer (Zamir et al., CVPR 2022): a U-net of transformer blocks whose attention runs over
channels. AMIR (Yang et al., MICCAI 2024): such blocks with spatial routing between experts before
the first three levels of the encoder. Neither holds trained weights: what is compared is work of
that kind, not quality.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        normed = F.layer_norm(pixels, self.weight.shape, self.weight, self.bias)
        return normed.permute(0, 3, 1, 2)


class ChannelAttention(nn.Module):
    """Self-attention between channels: queries, keys and values by 1×1 and 3×3 depthwise."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.into = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.near = nn.Conv2d(
            3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False
        )
        self.out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        parts = self.near(self.into(x)).chunk(3, dim=1)
        query, key, value = (part.reshape(b, self.heads, c // self.heads, h * w) for part in parts)
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        weights = (query @ key.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        out: Tensor = self.out((weights @ value).reshape(b, c, h, w))
        return out


class GatedFeedForward(nn.Module):
    """1×1, 3×3 depthwise, GELU gate, 1×1."""

    def __init__(self, channels: int, expansion: float = 2.66) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.into = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.near = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.near(self.into(x)).chunk(2, dim=1)
        out: Tensor = self.out(F.gelu(gate) * value)
        return out


class TransformerBlock(nn.Module):
    """Attention over channels and a gated feed-forward layer, each behind a norm."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = _Norm(channels), ChannelAttention(channels, heads)
        self.norm2, self.feed_forward = _Norm(channels), GatedFeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class SpatialRouting(nn.Module):
    """Each pixel adds what the two best of four experts make of it; weights by a 1×1 gate."""

    def __init__(self, channels: int, experts: int = 4, used: int = 2) -> None:
        super().__init__()
        hidden = int(2.66 * channels)
        self.used = used
        self.gate = nn.Linear(channels, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(-1, c)
        values, chosen = self.gate(tokens).topk(self.used, dim=1)
        weights = values.softmax(dim=1)
        out = tokens
        for number, expert in enumerate(self.experts):
            rows, place = torch.nonzero(chosen == number, as_tuple=True)
            update = expert(tokens[rows]) * weights[rows, place, None]
            out = out.index_add(0, rows, update.to(out.dtype))
        return out.view(b, h, w, c).permute(0, 3, 1, 2)


class TransformerUNet(nn.Module):
    """(B, 1, H, W) → the same, H and W multiples of 8: four levels, a residual of the input."""

    def __init__(
        self,
        width: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        *,
        routed: bool = False,
    ) -> None:
        super().__init__()
        widths = [width << level for level in range(4)]

        def stack(channels: int, level: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(TransformerBlock(channels, heads[level]) for _ in range(count)))

        self.embed = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.routings = nn.ModuleList(
            SpatialRouting(widths[level]) if routed and level < 3 else nn.Identity()
            for level in range(4)
        )
        self.encoder = nn.ModuleList(stack(widths[i], i, blocks[i]) for i in range(4))
        self.downs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[i], widths[i] // 2, 3, padding=1, bias=False),
                nn.PixelUnshuffle(2),
            )
            for i in range(3)
        )
        self.ups = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[i], 2 * widths[i], 3, padding=1, bias=False),
                nn.PixelShuffle(2),
            )
            for i in (3, 2, 1)
        )
        # The first level of the decoder keeps both halves, as there is nothing to merge for.
        self.merges = nn.ModuleList(
            nn.Conv2d(2 * widths[i], widths[i], 1, bias=False) for i in (2, 1)
        )
        self.decoder = nn.ModuleList(
            stack(channels, level, blocks[level])
            for channels, level in ((widths[2], 2), (widths[1], 1), (widths[1], 0))
        )
        self.refinement = stack(widths[1], 0, refinement)
        self.emit = nn.Conv2d(widths[1], 1, 3, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x, skips = self.embed(image), []
        for i, (routing, level) in enumerate(zip(self.routings, self.encoder, strict=True)):
            x = level(routing(x))
            if i < 3:
                skips.append(x)
                x = self.downs[i](x)
        for i, level in enumerate(self.decoder):
            x = torch.cat([self.ups[i](x), skips.pop()], dim=1)
            x = level(self.merges[i](x) if i < 2 else x)
        out: Tensor = image + self.emit(self.refinement(x))
        return out


def restormer_sized() -> TransformerUNet:
    """Restormer's published configuration on one channel: 26.1 M parameters."""
    return TransformerUNet()


def amir_sized() -> TransformerUNet:
    """Within 1 % of AMIR's size and work: 23.3 M of 23.5 M parameters, 138 of 139 GMAC at 256²."""
    return TransformerUNet(blocks=(4, 6, 6, 6), refinement=2, routed=True)
