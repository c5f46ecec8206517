"""Kernels of the convolutions between the blocks, and of the experts: (H, W, C), row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from restoration.llvm.emit import LANES, Function, Module, Number, Value
from restoration.llvm.naf import CHUNK
from restoration.llvm.product import Product, Source, adding, multiply

# erf x ≈ x·P(x²)/Q(x²) for |x| ≤ 4, where it is 1 in fp32: least squares of the relative error,
# 2.5·10⁻⁸ at most before rounding; highest power first.
_ERF_P = (
    1.986819665e-06, 2.845556678e-04, 3.882982205e-03, 5.310063471e-02, 1.935369289e-01,
    1.128379140e00,
)  # fmt: skip
_ERF_Q = (
    3.742002115e-05, 1.185479223e-03, 1.520653288e-02, 1.153466044e-01, 5.048501958e-01, 1.0,
)  # fmt: skip
_ERF_END = 4.0

CONVOLVE = (
    ("pixels", "skip", "out", "weight", "bias"),
    ("advance", "line", "plane", "width", "first", "stop"),
)
EXPERT = (("pixels", "scratch", "inner", "inner_bias", "outer", "outer_bias"), ("first", "stop"))
EMIT = (("pixels", "nothing", "out", "weight", "bias"), ("height", "width", "first", "stop"))


@dataclass(frozen=True)
class Patch:
    """What a pixel of the result sees: from `planes` and `lines` of each, `width` values.

    The next pixel of a row sees what lies `step` values on.
    """

    planes: int
    lines: int
    width: int
    step: int

    @property
    def inputs(self) -> int:
        return self.planes * self.lines * self.width


def convolve(module: Module, patch: Patch, outputs: int, spread: int, skipped: bool) -> Function:
    """A convolution whose patches do not change from row to row, for rows first … stop − 1.

    Row r begins `advance` values after the one before it; its lines are `line` values apart, the
    planes `plane`. It becomes row `spread`·r of `out`, with that of `skip` added where `skipped`.
    """
    f = Function(module, "convolve", *CONVOLVE)
    product = Product(patch.inputs, outputs)
    with f.loop(f["first"], f["stop"]) as row:
        begin = f.mul(row, f["advance"])
        sources = [
            Source(
                f.at(f["pixels"], f.add(begin, f.add(f.mul(f["plane"], p), f.mul(f["line"], i)))),
                patch.width,
                patch.step,
            )
            for p in range(patch.planes)
            for i in range(patch.lines)
        ]
        there = f.mul(f.mul(row, spread), f.mul(f["width"], outputs))

        def put(pixel: Number, block: Value, values: list[Value], there: Number = there) -> None:
            place = f.add(there, f.add(f.mul(pixel, outputs), f.mul(block, product.block)))
            for v, value in enumerate(values):
                at = f.add(place, v * LANES)
                f.store(f.plus(value, f.load(f["skip"], at)) if skipped else value, f["out"], at)

        multiply(f, product, sources, (f["weight"], f["bias"]), f["width"], put)
    f.end()
    return f


def expert_scratch(channels: int, wide: int) -> int:
    """Values that :func:`expert` works on beside its arrays."""
    return CHUNK * (channels + wide)


def expert(module: Module, channels: int, wide: int) -> Function:
    """Adds to pixels first … stop − 1 what the expert makes of them: 1×1, GELU, 1×1."""
    f = Function(module, "expert", *EXPERT)
    inner, outer = Product(channels, wide), Product(wide, channels)
    # Tiles may do a pixel twice: what is added to must not be what is written over.
    before, hidden = f["scratch"], f.at(f["scratch"], CHUNK * channels)
    with f.loop(f["first"], f["stop"], CHUNK) as start:
        count = f.least(f.sub(f["stop"], start), CHUNK)
        pixels = f.at(f["pixels"], f.mul(start, channels))
        with f.loop(0, f.mul(count, channels), LANES) as place:
            f.store(f.load(pixels, place), before, place)

        def activated(pixel: Number, block: Value, values: list[Value]) -> None:
            place = f.add(f.mul(pixel, wide), f.mul(block, inner.block))
            for v, value in enumerate(values):
                f.store(gelu(f, value), hidden, f.add(place, v * LANES))

        source = [Source(before, channels, channels)]
        multiply(f, inner, source, (f["inner"], f["inner_bias"]), count, activated)
        source = [Source(hidden, wide, wide)]
        put = adding(f, outer, before, pixels)
        multiply(f, outer, source, (f["outer"], f["outer_bias"]), count, put)
    f.end()
    return f


def emit(module: Module, channels: int) -> Function:
    """A 3×3 convolution of C channels to one, for rows first … stop − 1, with zeros outside."""
    f = Function(module, "emit", *EMIT)
    line = f.mul(f["width"], channels)
    end = f.sub(f["width"], 1)
    with f.loop(f["first"], f["stop"]) as row:
        above, here, beneath = (f.at(f["pixels"], f.mul(f.add(row, i), line)) for i in (-1, 0, 1))
        above = f.either(f.below(0, row), above, f["nothing"])
        is_last = f.below(f["height"], f.add(row, 2))
        beneath = f.either(is_last, f["nothing"], beneath)
        out = f.at(f["out"], f.mul(row, f["width"]))
        lines = (above, here, beneath)

        def tile(
            first: Number,
            size: int,
            columns: range,
            lines: Sequence[Value] = lines,
            out: Value = out,
        ) -> None:
            sums = _seen(f, lines, first, size, channels, columns)
            for pixel, vector in enumerate(sums):
                value = f.plus(f.total(vector), f.everywhere(f["bias"]))
                f.store_one(value, out, f.add(first, pixel))

        inner = f.sub(f["width"], 2)
        f.tiles(inner, 4, lambda first, size: tile(f.add(first, 1), size, range(3)))
        tile(0, 1, range(1, 3))
        tile(end, 1, range(2))
    f.end()
    return f


def _seen(
    f: Function,
    lines: Sequence[Value],
    first: Number,
    size: int,
    channels: int,
    columns: range,
) -> list[Value]:
    """Per pixel a vector whose lanes sum to the convolution, of the columns that the image has."""

    def step(channel: Value, kept: Sequence[Value]) -> list[Value]:
        sums = list(kept)
        for row, line in enumerate(lines):
            values = {
                x: f.load(line, f.add(f.mul(f.add(first, x - 1), channels), channel))
                for x in range(columns.start, size - 1 + columns.stop)
            }
            for column in columns:
                weight = f.load(f["weight"], f.add(channel, (3 * row + column) * channels))
                sums = [f.fma(values[x + column], weight, sums[x]) for x in range(size)]
        return sums

    return f.fold(channels, LANES, [f.splat(0.0)] * size, step)


def gelu(f: Function, x: Value) -> Value:
    """x·Φ(x), by the error function."""
    half = f.times(x, f.splat(0.5))
    return f.fma(half, erf(f, f.times(x, f.splat(0.7071067811865476))), half)


def erf(f: Function, x: Value) -> Value:
    """The error function as a quotient of polynomials, odd and within ±1."""
    x = f.clamp(x, _ERF_END)
    square = f.times(x, x)
    return f.quotient(f.times(x, _polynomial(f, square, _ERF_P)), _polynomial(f, square, _ERF_Q))


def _polynomial(f: Function, x: Value, coefficients: tuple[float, ...]) -> Value:
    value = f.splat(coefficients[0])
    for each in coefficients[1:]:
        value = f.fma(value, x, f.splat(each))
    return value
