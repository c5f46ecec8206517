"""Image encoder (E_vq and E_lq) and decoder (G_vq): DiffCode Sec. 2.2, four levels, f = 8.

There are no skip connections and no global residual: the bottleneck must carry all that the
codebook is to describe.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from restoration.blocks import Downsample, Upsample, stack


class Encoder(nn.Module):
    """(B, 1, H, W) → (B, latent_dim, H/8, W/8) with ``channels`` and ``blocks`` per level."""

    def __init__(self, channels: Sequence[int], blocks: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(
            stack(c, n, level) for level, (c, n) in enumerate(zip(channels, blocks, strict=True))
        )
        self.downs = nn.ModuleList(Downsample(a, b) for a, b in itertools.pairwise(channels))
        self.project = nn.Conv2d(channels[-1], latent_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels[0](self.embed(x))  # (B, c0, H, W)
        for down, level in zip(self.downs, list(self.levels)[1:], strict=True):
            x = level(down(x))
        out: Tensor = self.project(x)  # (B, latent_dim, H/8, W/8)
        return out


class Decoder(nn.Module):
    """(B, latent_dim, h, w) → (B, 1, 8h, 8w): the mirror of :class:`Encoder`."""

    def __init__(self, channels: Sequence[int], blocks: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        wide, deep = list(channels)[::-1], list(blocks)[::-1]
        top = len(wide) - 1
        self.expand = nn.Conv2d(latent_dim, wide[0], 1)
        self.levels = nn.ModuleList(
            stack(c, n, top - i) for i, (c, n) in enumerate(zip(wide, deep, strict=True))
        )
        self.ups = nn.ModuleList(Upsample(a, b) for a, b in itertools.pairwise(wide))
        self.emit = nn.Conv2d(wide[-1], 1, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.levels[0](self.expand(z))
        for up, level in zip(self.ups, list(self.levels)[1:], strict=True):
            x = level(up(x))
        out: Tensor = self.emit(x)  # (B, 1, H, W)
        return out
