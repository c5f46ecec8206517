"""Kernels of local pooling: sums over cells of pixels, means over boxes of cells; (h, w, C)."""

from __future__ import annotations

from collections.abc import Sequence

from restoration.llvm.emit import LANES, Function, Module, Number, Value

BOX = (("cells", "across", "out", "share"), ("height", "width", "tall", "wide"))
_TOGETHER = 12 * LANES  # channels whose sums are in registers


def cell_sums(module: Module, channels: int) -> Function:
    """Adds a row of pixels to its row of cells, which the first row of a cell begins."""
    f = Function(module, "cell_sums", ("pixels", "cells"), ("width", "cell", "row"))
    units = f.divided(f.add(f["width"], f.sub(f["cell"], 1)), f["cell"])
    cells = f.at(f["cells"], f.mul(f.divided(f["row"], f["cell"]), f.mul(units, channels)))
    begins = f.below(f.rest(f["row"], f["cell"]), 1)
    with f.loop(0, units) as unit:
        first = f.mul(unit, f["cell"])
        count = f.least(f.sub(f["width"], first), f["cell"])
        pixels, cell = f.at(f["pixels"], f.mul(first, channels)), f.at(cells, f.mul(unit, channels))
        for channel in range(0, channels, _TOGETHER):
            places = range(channel, min(channel + _TOGETHER, channels), LANES)
            known = [f.either(begins, f.splat(0.0), f.load(cell, v)) for v in places]
            for v, value in zip(
                places, _sums(f, pixels, count, channels, known, places), strict=True
            ):
                f.store(value, cell, v)
    f.end()
    return f


def box(module: Module, channels: int) -> Function:
    """Means over `tall`×`wide` cells at every cell; boxes at the border slide inwards.

    Along rows into `across`, then along columns; `share` is 1/(tall·wide).
    """
    f = Function(module, "box", *BOX)
    share = f.everywhere(f["share"])
    line = f.mul(f["width"], channels)

    def slide(source: Value, target: Value, across: bool) -> None:
        size, window = (f["width"], f["wide"]) if across else (f["height"], f["tall"])
        step = f.add(channels, 0) if across else line
        with f.loop(0, f["height"]) as row, f.loop(0, f["width"]) as column:
            middle = f.sub(column if across else row, f.halved(f.sub(window, 1)))
            begin = f.least(f.most(middle, 0), f.sub(size, window))
            start = f.add(f.mul(row, line), f.mul(begin, channels))
            if not across:
                start = f.add(f.mul(begin, line), f.mul(column, channels))
            there = f.add(f.mul(row, line), f.mul(column, channels))
            for channel in range(0, channels, _TOGETHER):
                places = range(channel, min(channel + _TOGETHER, channels), LANES)
                nothing = [f.splat(0.0) for _ in places]
                sums = _sums(f, f.at(source, start), window, step, nothing, places)
                for v, value in zip(places, sums, strict=True):
                    f.store(value if across else f.times(value, share), target, f.add(there, v))

    slide(f["cells"], f["across"], across=True)
    slide(f["across"], f["out"], across=False)
    f.end()
    return f


def _sums(
    f: Function,
    source: Value,
    count: Value,
    step: Number,
    known: Sequence[Value],
    places: Sequence[int],
) -> list[Value]:
    """`known` and `count` pixels that lie `step` values apart."""

    def more(index: Value, kept: Sequence[Value]) -> list[Value]:
        pixel = f.at(source, f.mul(index, step))
        return [f.plus(sum_, f.load(pixel, v)) for sum_, v in zip(kept, places, strict=True)]

    return f.fold(count, 1, known, more)
