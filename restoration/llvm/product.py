"""Products of pixels and weights in registers: the inner loop of every kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from restoration.folding import Linear
from restoration.llvm.emit import LANES, Function, Number, Value

# Of the sixteen vector registers of AVX2; the others hold weights and a value.
_SUMS = 12


@dataclass(frozen=True)
class Product:
    """A 1×1 convolution of `inputs` → `outputs` channels, blocked for registers.

    With `gated` the outputs are two halves, of which a tile has the same columns: their product
    can be made before anything is stored.
    """

    inputs: int
    outputs: int
    gated: bool = False

    @property
    def halves(self) -> int:
        return 2 if self.gated else 1

    @property
    def tile(self) -> tuple[int, int]:
        """Vectors of each half, and pixels: the most multiplications for what is loaded."""
        vectors = self.outputs // LANES // self.halves
        fitting = [
            (each, min(_SUMS // (each * self.halves), 6))
            for each in range(1, _SUMS // self.halves + 1)
            if vectors % each == 0
        ]

        def gain(tile: tuple[int, int]) -> float:
            columns = tile[0] * self.halves
            return columns * tile[1] / (columns + tile[1])

        return max(fitting, key=gain)

    @property
    def block(self) -> int:
        """Columns of a block, of both halves."""
        return self.tile[0] * self.halves * LANES

    def packed(self, linear: Linear) -> Linear:
        """Weight (blocks, inputs, columns) and bias (blocks, columns) as the kernel reads them."""
        weight = self._blocked(linear.weight.t())  # (inputs, blocks, columns)
        return Linear(weight.transpose(0, 1).contiguous(), self._blocked(linear.bias[None])[0])

    def _blocked(self, columns: Tensor) -> Tensor:
        rows = columns.shape[0]
        parts = columns.reshape(rows, self.halves, -1, self.block // self.halves)
        return parts.transpose(1, 2).reshape(rows, -1, self.block).to(torch.float32).contiguous()


@dataclass(frozen=True)
class Source:
    """Where a product's pixels lie: pixel i has `width` inputs from offset i·`step` on."""

    array: Value
    width: int
    step: int


Put = Callable[[Number, Value, list[Value]], None]


def multiply(
    f: Function,
    product: Product,
    sources: Sequence[Source],
    weights: tuple[Value, Value],
    count: Value,
    put: Put,
) -> None:
    """put(pixel, block, its vectors) of bias + Σ sources·weight, for `count` pixels.

    Inputs are those of all sources, one after the other. A block of weights stays in the first
    cache over all pixels; sums run over the inputs in their order, whatever the tile.
    """
    weight, bias = weights
    vectors, pixels = product.tile
    vectors *= product.halves

    def block(number: Value) -> None:
        rows = f.at(weight, f.mul(number, product.inputs * product.block))
        shift = f.at(bias, f.mul(number, product.block))

        def tile(first: Number, size: int) -> None:
            sums = [f.load(shift, v * LANES) for v in range(vectors)] * size
            place = rows
            for source in sources:
                starts = [
                    f.at(source.array, f.mul(f.add(first, pixel), source.step))
                    for pixel in range(size)
                ]
                sums = _added(f, sums, starts, source.width, place, product.block)
                place = f.at(place, source.width * product.block)
            for pixel in range(size):
                mine = sums[pixel * vectors : (pixel + 1) * vectors]
                put(f.add(first, pixel), number, mine)

        f.tiles(count, pixels, tile)

    with f.loop(0, product.outputs // product.block) as number:
        block(number)


def _added(
    f: Function, sums: list[Value], starts: list[Value], width: int, rows: Value, block: int
) -> list[Value]:
    unrolled = next(step for step in (4, 3, 2, 1) if width % step == 0)
    vectors = block // LANES

    def step(first: Value, kept: Sequence[Value]) -> list[Value]:
        kept = list(kept)
        row, places = f.at(rows, f.mul(first, block)), [f.at(start, first) for start in starts]
        for k in range(unrolled):
            weights = [f.load(row, k * block + v * LANES) for v in range(vectors)]
            for pixel, place in enumerate(places):
                value = f.everywhere(place, k)
                for v, weight in enumerate(weights):
                    at = pixel * vectors + v
                    kept[at] = f.fma(value, weight, kept[at])
        return kept

    return f.fold(width, unrolled, sums, step)


def adding(f: Function, product: Product, skip: Value, target: Value) -> Put:
    """Stores a product with what `skip` adds to it; the two must not be one."""

    def put(pixel: Number, block: Value, values: list[Value]) -> None:
        place = f.add(f.mul(pixel, product.outputs), f.mul(block, product.block))
        for v, value in enumerate(values):
            there = f.add(place, v * LANES)
            f.store(f.plus(value, f.load(skip, there)), target, there)

    return put
