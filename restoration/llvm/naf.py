"""Kernels of a NAF block of C channels, row by row: activations (H, W, C), C a multiple of 8.

A row's intermediate results never leave the caches of its core: of the block, memory sees its
input twice, and its gates and its result once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from restoration.llvm.emit import LANES, Function, Module, Number, Value
from restoration.llvm.means import cell_sums
from restoration.llvm.product import Product, Source, adding, multiply

CHUNK = 24  # pixels that go through a sequence of products at once; whole tiles of all widths
_PIXELS = 4  # of a tile of the 3×3 convolution: one row of it, input and sums, in registers


@dataclass(frozen=True)
class Widths:
    """The products of a block of C channels."""

    channels: int

    @property
    def into(self) -> Product:
        return Product(self.channels, 2 * self.channels)

    @property
    def plain(self) -> Product:
        return Product(self.channels, self.channels)

    @property
    def feed(self) -> Product:
        return Product(self.channels, 2 * self.channels, gated=True)


GATE = (
    ("pixels", "gates", "cells", "scratch", "into", "into_bias", "taps", "taps_bias"),
    ("height", "width", "cell", "first", "stop"),
)
FEED = (
    (
        "pixels", "gates", "scratch", "grid", "rows", "row_parts", "columns", "column_parts",
        "project", "project_bias", "feed", "feed_bias", "last", "last_bias",
    ),
    ("width", "cells", "first", "stop"),
)  # fmt: skip


def gate_scratch(channels: int, width: int) -> int:
    """Values that :func:`gate` works on beside its arrays: three rows, and a chunk's norms."""
    return 3 * (width + 2) * 2 * channels + CHUNK * channels


def feed_scratch(channels: int, cells: int) -> int:
    """Values that :func:`feed` works on beside its arrays: a row of factors, and four chunks."""
    return cells * channels + 4 * CHUNK * channels


def gate(module: Module, channels: int, eps: float) -> Function:
    """Norm, 1×1, 3×3 depthwise and gate of rows first … stop − 1, into `gates`.

    Three rows before the 3×3 convolution are kept, the oldest of which each new one replaces.
    Gates are summed into `cells` of `cell`×`cell` pixels, where a cell is more than a pixel; the
    first row then has to be the first of a cell.
    """
    into, taps = _into(module, channels, eps), _taps(module, channels)
    sums = cell_sums(module, channels)
    f = Function(module, "gate", *GATE)
    wide = 2 * channels
    line = f.mul(f.add(f["width"], 2), wide)  # with a pixel of zeros at each end
    norms = f.at(f["scratch"], f.mul(line, 3))
    nothing = f.splat(0.0)

    def kept(row: Number) -> Value:
        return f.at(f["scratch"], f.mul(f.rest(f.add(row, 3), 3), line))

    with f.loop(f.sub(f["first"], 1), f.add(f["stop"], 1)) as row:
        here = kept(row)
        with f.branches(f.within(row, f["height"])) as (image, border):
            with image:
                source = f.at(f["pixels"], f.mul(f.mul(row, f["width"]), channels))
                given = [source, f.at(here, wide), norms, f["into"], f["into_bias"], f["width"]]
                f.call(into, given)
                for v in range(0, wide, LANES):
                    f.store(nothing, here, v)
                    f.store(nothing, here, f.add(f.sub(line, wide), v))
            with border, f.loop(0, line, LANES) as place:
                f.store(nothing, here, place)
        with f.when(f.below(f["first"], row)):
            target = f.at(f["gates"], f.mul(f.mul(f.sub(row, 1), f["width"]), channels))
            rows = [kept(f.sub(row, 2)), kept(f.sub(row, 1)), here]
            f.call(taps, [*rows, target, f["taps"], f["taps_bias"], f["width"]])
            with f.when(f.below(1, f["cell"])):
                f.call(sums, [target, f["cells"], f["width"], f["cell"], f.sub(row, 1)])
    f.end()
    return f


def feed(module: Module, channels: int, eps: float) -> Function:
    """The rest of the block for rows first … stop − 1, over `gates`.

    Factors are bilinear in the grid's `cells` columns; its rows and columns beside a pixel's, and
    how far it is between them, come in tables.
    """
    f = Function(module, "feed", *FEED)
    widths = Widths(channels)
    factors = f["scratch"]
    chunks = f.at(factors, f.mul(f["cells"], channels))
    scaled, mixed, normed, gated = (f.at(chunks, i * CHUNK * channels) for i in range(4))

    def project(pixels: Value, count: Value) -> None:
        source = [Source(scaled, channels, channels)]
        put = adding(f, widths.plain, pixels, mixed)
        multiply(f, widths.plain, source, (f["project"], f["project_bias"]), count, put)

    def gates(count: Value) -> None:
        columns = widths.feed.block // 2

        def put(pixel: Number, block: Value, values: list[Value]) -> None:
            half = len(values) // 2
            place = f.add(f.mul(pixel, channels), f.mul(block, columns))
            for v in range(half):
                product = f.times(values[v], values[half + v])
                f.store(product, gated, f.add(place, v * LANES))

        source = [Source(normed, channels, channels)]
        multiply(f, widths.feed, source, (f["feed"], f["feed_bias"]), count, put)

    def last(target: Value, count: Value) -> None:
        source = [Source(gated, channels, channels)]
        put = adding(f, widths.plain, mixed, target)
        multiply(f, widths.plain, source, (f["last"], f["last_bias"]), count, put)

    with f.loop(f["first"], f["stop"]) as row:
        _row_of_factors(f, row, channels, factors)

        def chunk(start: Value, count: Value, row: Value = row) -> None:
            place = f.mul(f.add(f.mul(row, f["width"]), start), channels)
            pixels, target = f.at(f["pixels"], place), f.at(f["gates"], place)
            _scale(f, target, start, count, factors, scaled, channels)
            project(pixels, count)
            normalise(f, mixed, normed, count, channels, eps)
            gates(count)
            last(target, count)

        by_chunks(f, f["width"], chunk)
    f.end()
    return f


def by_chunks(f: Function, width: Value, body: Callable[[Value, Value], None]) -> None:
    """body(first, how many) over the pixels of a row."""
    with f.loop(0, width, CHUNK) as start:
        body(start, f.least(f.sub(width, start), CHUNK))


def normalise(
    f: Function, source: Value, target: Value, count: Value, channels: int, eps: float
) -> None:
    """Layer normalisation of pixels without scale and shift, as two passes over a pixel do it."""
    share = f.splat(1.0 / channels)
    with f.loop(0, count) as pixel:
        place = f.mul(pixel, channels)
        places = [f.add(place, v) for v in range(0, channels, LANES)]
        mean = f.times(f.total(_sum(f, [f.load(source, each) for each in places])), share)
        apart = [f.minus(f.load(source, each), mean) for each in places]
        squares = f.times(apart[0], apart[0])
        for each in apart[1:]:
            squares = f.fma(each, each, squares)
        scale = f.inverse_root(f.fma(f.total(squares), share, f.splat(eps)))
        for there, value in zip(places, apart, strict=True):
            f.store(f.times(value, scale), target, there)


def _into(module: Module, channels: int, eps: float) -> Function:
    """Norm and 1×1 convolution of a row."""
    f = Function(module, "into", ("pixels", "row", "norms", "weight", "bias"), ("width",))
    product = Widths(channels).into

    def chunk(start: Value, count: Value) -> None:
        source = f.at(f["pixels"], f.mul(start, channels))
        target = f.at(f["row"], f.mul(start, 2 * channels))
        normalise(f, source, f["norms"], count, channels, eps)

        def put(pixel: Number, block: Value, values: list[Value]) -> None:
            place = f.add(f.mul(pixel, 2 * channels), f.mul(block, product.block))
            for v, value in enumerate(values):
                f.store(value, target, f.add(place, v * LANES))

        sources = [Source(f["norms"], channels, channels)]
        multiply(f, product, sources, (f["weight"], f["bias"]), count, put)

    by_chunks(f, f["width"], chunk)
    f.end()
    return f


def _taps(module: Module, channels: int) -> Function:
    """3×3 depthwise convolution of a row of 2C channels with its neighbours, and the gate."""
    f = Function(
        module,
        "taps",
        ("above", "here", "beneath", "gates", "taps", "bias"),
        ("width",),
    )
    wide = 2 * channels
    lines = [f["above"], f["here"], f["beneath"]]

    def half(first: Number, size: int, channel: Number) -> list[Value]:
        sums = [f.load(f["bias"], channel)] * size
        for row, line in enumerate(lines):
            # Rows begin with a pixel of zeros: pixel i − 1 of the image is pixel i of the row.
            places = [f.mul(f.add(first, x), wide) for x in range(size + 2)]
            values = [f.load(line, f.add(place, channel)) for place in places]
            for column in range(3):
                weight = f.load(f["taps"], f.add(channel, (3 * row + column) * wide))
                sums = [f.fma(values[x + column], weight, sums[x]) for x in range(size)]
        return sums

    def tile(first: Number, size: int) -> None:
        with f.loop(0, channels, LANES) as channel:
            a, b = half(first, size, channel), half(first, size, f.add(channel, channels))
            for x in range(size):
                place = f.add(f.mul(f.add(first, x), channels), channel)
                f.store(f.times(a[x], b[x]), f["gates"], place)

    f.tiles(f["width"], _PIXELS, tile)
    f.end()
    return f


def _row_of_factors(f: Function, row: Value, channels: int, factors: Value) -> None:
    """The grid at the height of a row: (cells, C)."""
    length = f.mul(f["cells"], channels)
    above, beneath = (
        f.at(f["grid"], f.mul(f.index(f["rows"], f.add(f.mul(row, 2), i)), length)) for i in (0, 1)
    )
    part = f.everywhere(f["row_parts"], row)
    with f.loop(0, length, LANES) as place:
        f.store(f.between(f.load(above, place), f.load(beneath, place), part), factors, place)


def _scale(
    f: Function,
    gates: Value,
    start: Value,
    count: Value,
    factors: Value,
    target: Value,
    channels: int,
) -> None:
    """Gates times their factors."""
    with f.loop(0, count) as pixel:
        column = f.add(pixel, start)
        left, right = (
            f.at(factors, f.mul(f.index(f["columns"], f.add(f.mul(column, 2), i)), channels))
            for i in (0, 1)
        )
        part = f.everywhere(f["column_parts"], column)
        place = f.mul(pixel, channels)
        for v in range(0, channels, LANES):
            factor = f.between(f.load(left, v), f.load(right, v), part)
            f.store(f.times(f.load(gates, f.add(place, v)), factor), target, f.add(place, v))


def _sum(f: Function, values: list[Value]) -> Value:
    total = values[0]
    for value in values[1:]:
        total = f.plus(total, value)
    return total
