"""The network's parts for a CPU, by the kernels of :mod:`restoration.llvm`: fp32.

Rows of a slice that is alone are shared out among PyTorch's threads; a slice in a thread of its
own has that thread. Bits are the same either way.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restoration.blocks import Downsample, NAFBlock, Upsample
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
from restoration.llvm import means, naf, rows, search
from restoration.llvm.machine import Kernel, kernel, over
from restoration.llvm.product import Product
from restoration.quantizer import CodebookBank, Quantised, sum_codes


class _Packed(nn.Module):
    """The weights of a product as its kernel reads them."""

    def __init__(self, product: Product, linear: Linear) -> None:
        super().__init__()
        packed = product.packed(linear)
        self.weight, self.bias = parameter(packed.weight), parameter(packed.bias)

    def both(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


class CompiledNAFBlock(nn.Module):
    """A NAF block for inference: (B, C, H, W) channels_last, C a multiple of 8."""

    def __init__(self, block: NAFBlock) -> None:
        super().__init__()
        into, project, feed, last = folded(block)
        self.channels, self.eps = into.weight.shape[1], block.norm1.eps
        widths = naf.Widths(self.channels)
        self.into, self.project = _Packed(widths.into, into), _Packed(widths.plain, project)
        self.feed, self.last = _Packed(widths.feed, feed), _Packed(widths.plain, last)
        assert block.conv2.bias is not None
        self.taps = parameter(block.conv2.weight[:, 0].permute(1, 2, 0))  # (3, 3, 2C)
        self.taps_bias = parameter(block.conv2.bias)
        self.attention = copy.deepcopy(block.attention)
        self.attention.project = CompiledPointwise(block.attention.project)  # type: ignore[assignment]
        self.first = kernel(naf.gate, self.channels, self.eps)
        self.rest = kernel(naf.feed, self.channels, self.eps)
        self.means = kernel(means.box, self.channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = _pixels(x)
        out = torch.empty_like(pixels)
        for image, gates in zip(pixels, out, strict=True):
            cells = self._gate(image, gates)
            self._feed(image, gates, self._grid(gates, cells))
        return out.permute(0, 3, 1, 2)

    def _gate(self, image: Tensor, gates: Tensor) -> Tensor:
        """The first half of the block, into `gates`; its sums over cells of pooling."""
        height, width, channels = image.shape
        cell = self.attention.cell
        cells = gates
        if cell > 1:
            cells = image.new_empty(-(-height // cell), -(-width // cell), channels)
        weights = (*self.into.both(), self.taps, self.taps_bias)

        def part(first: int, stop: int) -> None:
            scratch = torch.empty(naf.gate_scratch(channels, width))
            self.first(image, gates, cells, scratch, *weights, height, width, cell, first, stop)

        over(height, part, whole=cell)
        return cells

    def _grid(self, gates: Tensor, cells: Tensor) -> Tensor:
        """What gates are multiplied by: of the image (1, 1, C), of cells, or of each pixel."""
        attention = self.attention
        height, width = gates.shape[:2]
        window = attention.local_window(height, width)
        if window is None or attention.exact:
            factors: Tensor = attention.factors(gates.permute(2, 0, 1)[None])
            return factors[0].permute(1, 2, 0)
        if attention.cell > 1:
            cells.div_(_counts(height, width, attention.cell))
        local = _box_means(cells, self.means, max(1, window // attention.cell))
        grid: Tensor = attention.project(local.permute(2, 0, 1)[None])
        return grid[0].permute(1, 2, 0)

    def _feed(self, image: Tensor, gates: Tensor, grid: Tensor) -> None:
        """The second half of the block, from the first's gates into their place."""
        height, width, channels = image.shape
        cells = grid.shape[1]
        cell = 1 if grid.shape[:2] == image.shape[:2] else self.attention.cell
        grid = grid.contiguous()
        tables = (*_between(height, grid.shape[0], cell), *_between(width, cells, cell))
        weights = (*self.project.both(), *self.feed.both(), *self.last.both())

        def part(first: int, stop: int) -> None:
            scratch = torch.empty(naf.feed_scratch(channels, cells))
            self.rest(image, gates, scratch, grid, *tables, *weights, width, cells, first, stop)

        over(height, part)


def compiled_routing(routing: TaskAdaptiveRouting) -> KnownRouting:
    """A TARM whose experts leave their result in the place of their input."""
    return KnownRouting(routing, _CompiledExpert)


class _CompiledExpert(nn.Module):
    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        inner, outer = expert_layers(expert)
        self.wide, self.channels = inner.weight.shape
        self.inner = _Packed(Product(self.channels, self.wide), inner)
        self.outer = _Packed(Product(self.wide, self.channels), outer)
        self.run = kernel(rows.expert, self.channels, self.wide)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to `x` what the expert makes of it."""
        pixels = _pixels(x)
        weights = (*self.inner.both(), *self.outer.both())

        def part(first: int, stop: int) -> None:
            scratch = torch.empty(rows.expert_scratch(self.channels, self.wide))
            self.run(pixels, scratch, *weights, first, stop)

        over(pixels.numel() // self.channels, part)
        return pixels.permute(0, 3, 1, 2)


class _Convolution(nn.Module):
    """A convolution whose patches do not change from row to row."""

    def __init__(self, patch: rows.Patch, linear: Linear) -> None:
        super().__init__()
        self.outputs = len(linear.bias)
        self.product = _Packed(Product(patch.inputs, self.outputs), linear)
        self.run = kernel(rows.convolve, patch, self.outputs, 1, False)

    def _convolved(self, images: Tensor, height: int, shape: tuple[int, int, int, int]) -> Tensor:
        """(B, C', height, width) of contiguous images; `shape` as of `_rows`."""
        out = images.new_empty(len(images), height, shape[-1], self.outputs)
        for image, target in zip(images, out, strict=True):
            _rows(self.run, image, None, target, self.product, shape)
        return out.permute(0, 3, 1, 2)


class CompiledDownsample(_Convolution):
    """2×2 convolution of stride 2: (B, C, H, W) → (B, C', H/2, W/2), sides even."""

    def __init__(self, conv: Downsample) -> None:
        assert conv.bias is not None
        weight = conv.weight.detach().float().permute(0, 2, 3, 1)  # (C', 2, 2, C)
        wide = 2 * conv.in_channels
        patch = rows.Patch(planes=1, lines=2, width=wide, step=wide)
        super().__init__(patch, Linear(weight.flatten(1), conv.bias.detach().float()))

    def forward(self, x: Tensor) -> Tensor:
        pixels = _pixels(x)
        _, height, width, channels = pixels.shape
        line = width * channels
        return self._convolved(pixels, height // 2, (2 * line, line, 0, width // 2))


class CompiledUpsample(nn.Module):
    """1×1 convolution and pixel shuffle, by a product for each row of the finer image."""

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        top, bottom = upsample_rows(upsample)
        double, channels = top.weight.shape
        self.finer = double // 2
        self.patch = rows.Patch(planes=1, lines=1, width=channels, step=channels)
        product = Product(channels, double)
        self.top, self.bottom = _Packed(product, top), _Packed(product, bottom)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C, H, W) → (B, C', 2H, 2W), with what `skip` adds to it."""
        pixels = _pixels(x)
        images, height, width, channels = pixels.shape
        out = pixels.new_empty(images, 2 * height, 2 * width, self.finer)
        added = None if skip is None else _pixels(skip)
        run = kernel(rows.convolve, self.patch, 2 * self.finer, 2, skip is not None)
        for i, image in enumerate(pixels):
            for place, product in enumerate((self.top, self.bottom)):
                theirs = None if added is None else added[i, place:]
                shape = (width * channels, 0, 0, width)
                _rows(run, image, theirs, out[i, place:], product, shape, height)
        return out.permute(0, 3, 1, 2)


class CompiledPointwise(_Convolution):
    """A 1×1 convolution that stands alone: (B, C, H, W) → (B, C', H, W)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        inputs = conv.in_channels
        super().__init__(rows.Patch(planes=1, lines=1, width=inputs, step=inputs), plain(conv))

    def forward(self, x: Tensor) -> Tensor:
        pixels = _pixels(x)
        _, height, width, channels = pixels.shape
        return self._convolved(pixels, height, (width * channels, 0, 0, width))


class CompiledEmbed(_Convolution):
    """The first convolution of a network, 3×3 of one or two channels: fp32."""

    def __init__(self, conv: nn.Conv2d) -> None:
        assert conv.kernel_size == (3, 3)
        assert conv.bias is not None
        patch = rows.Patch(planes=conv.in_channels, lines=3, width=3, step=1)
        linear = Linear(conv.weight.detach().float().flatten(1), conv.bias.detach().float())
        super().__init__(patch, linear)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 or 2, H, W) → (B, C, H, W)."""
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1)).contiguous()
        line = width + 2
        return self._convolved(padded, height, (line, line, (height + 2) * line, width))


class CompiledBank(nn.Module):
    """The codebooks of all tasks, searched without a tokens × codes matrix."""

    def __init__(self, bank: CodebookBank) -> None:
        super().__init__()
        self.depths, self.weight = bank.depths, parameter(bank.weight)
        _, self.codes, self.dim = bank.weight.shape
        product = Product(self.dim, self.codes)
        # argmin over ½‖Z_m‖² − r·Z_m, as restoration.quantizer has it.
        self.scores = nn.ModuleList(
            _Packed(product, Linear(-codebook, 0.5 * codebook.square().sum(dim=1)))
            for codebook in self.weight
        )
        self.search = kernel(search.nearest, self.dim, self.codes)

    def forward(self, features: Tensor, task: int) -> Quantised:
        """(B, d, h, w), all of one task → their codes, and the sums of these."""
        images, _, height, width = features.shape
        tokens = _pixels(features).reshape(-1, self.dim)
        residual, ids = tokens, []
        for _ in range(self.depths):
            index = self._nearest(residual.contiguous(), task)
            residual = residual - self.weight[task][index]
            ids.append(index)
        codes = torch.stack(ids, dim=1)
        values = sum_codes(codes, self.weight[task]).view(images, height, width, -1)
        codes = codes.view(images, height, width, -1)
        return Quantised(values.permute(0, 3, 1, 2), codes.permute(0, 3, 1, 2))

    def _nearest(self, tokens: Tensor, task: int) -> Tensor:
        found = tokens.new_empty(len(tokens))
        packed = self.scores[task]
        assert isinstance(packed, _Packed)
        weight, bias = packed.both()

        def part(first: int, stop: int) -> None:
            self.search(tokens, torch.empty(search.SCRATCH), weight, bias, found, first, stop)

        over(len(tokens), part)
        return found.long()


class CompiledEmit(nn.Module):
    """The last convolution of a network, 3×3 to one channel: fp32."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.kernel_size == (3, 3)
        assert conv.bias is not None
        self.weight = parameter(conv.weight[0].permute(1, 2, 0))  # (3, 3, C)
        self.bias = parameter(conv.bias)
        self.run = kernel(rows.emit, conv.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 1, H, W), W ≥ 2."""
        pixels = _pixels(x)
        images, height, width, channels = pixels.shape
        out = pixels.new_empty(images, 1, height, width)
        nothing = pixels.new_zeros(width * channels)
        for image, target in zip(pixels, out, strict=True):

            def part(first: int, stop: int, image: Tensor = image, target: Tensor = target) -> None:
                run = self.run
                run(image, nothing, target, self.weight, self.bias, height, width, first, stop)

            over(height, part)
        return out


def _rows(
    run: Kernel,
    source: Tensor,
    skip: Tensor | None,
    target: Tensor,
    product: _Packed,
    shape: tuple[int, int, int, int],
    count: int | None = None,
) -> None:
    """A convolution of all rows, or of `count`: `shape` is advance, line, plane and width."""

    def part(first: int, stop: int) -> None:
        run(
            source,
            skip if skip is not None else source,
            target,
            *product.both(),
            *shape,
            first,
            stop,
        )

    over(len(target) if count is None else count, part)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H, W, C), a view of a channels_last tensor."""
    return x.permute(0, 2, 3, 1).contiguous()


def _box_means(cells: Tensor, run: Kernel, window: int) -> Tensor:
    """Means over `window`×`window` cells, which slide inwards at the border: (h, w, C)."""
    height, width = cells.shape[:2]
    tall, wide = min(window, height), min(window, width)
    across, out = torch.empty_like(cells), torch.empty_like(cells)
    share = cells.new_full((1,), 1 / (tall * wide))
    run(cells, across, out, share, height, width, tall, wide)
    return out


@functools.lru_cache(maxsize=64)
def _counts(height: int, width: int, cell: int) -> Tensor:
    """Pixels of each cell, of which the last ones have what is left: (h, w, 1)."""
    tall, wide = (
        (size - torch.arange(0, size, cell)).clamp(max=cell).float() for size in (height, width)
    )
    return (tall[:, None] * wide)[..., None]


@functools.lru_cache(maxsize=64)
def _between(size: int, cells: int, cell: int) -> tuple[Tensor, Tensor]:
    """For each of `size` places the two cells whose middles are beside it, and how far between.

    As bilinear interpolation by PyTorch has it: (size, 2) int64 and (size,).
    """
    place = ((torch.arange(size) + 0.5) / cell - 0.5).clamp(min=0)
    before = place.long().clamp(max=cells - 1)
    after = (before + 1).clamp(max=cells - 1)
    return torch.stack([before, after], dim=1).contiguous(), (place - before).float()
