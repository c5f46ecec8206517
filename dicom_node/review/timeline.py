"""Every gate over the slices of a result: as SVG for the page, as a picture for the montage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

from dicom_node.readings import GateReading, Level

#: Told apart by lightness too: black and white print, colour-blind eyes.
COLOURS = {
    Level.NOT_APPLICABLE: "#3a4047",
    Level.PASS: "#7fb8a4",
    Level.WARN: "#f0b429",
    Level.FAIL: "#e02f44",
}
WORDS = {
    Level.NOT_APPLICABLE: "not measured",
    Level.PASS: "inside",
    Level.WARN: "past the warning level",
    Level.FAIL: "past the limit",
}
_ROW, _LABEL, _WIDTH, _HEIGHT = 18, 170, 980, 15


@dataclass(frozen=True)
class Bar:
    """Neighbouring slices of one gate at one level; in pixels from the left of the chart."""

    left: float
    width: float
    level: Level
    words: str


@dataclass(frozen=True)
class Row:
    """One gate over the slices."""

    gate: str
    level: Level
    bars: tuple[Bar, ...]


def rows(readings: Sequence[GateReading], slices: int) -> list[Row]:
    """One row for each reading, the gravest first, then in the order of the gates."""
    ordered = sorted(readings, key=lambda each: -each.level.severity)
    return [Row(each.gate, each.level, tuple(_bars(each, slices))) for each in ordered]


def _bars(reading: GateReading, slices: int) -> Iterator[Bar]:
    step = _WIDTH / max(1, slices)
    if not reading.slices:
        value = "" if reading.worst_value is None else f" {reading.worst_value:.4g} {reading.unit}"
        yield Bar(0, _WIDTH, reading.level, f"the volume:{value} {WORDS[reading.level]}")
        return
    at = sorted(zip(reading.slices, reading.levels, strict=True))
    for level, run in groupby(enumerate(at), key=lambda pair: (pair[1][1], pair[1][0] - pair[0])):
        members = [index for _, (index, _) in run]
        first, last = members[0], members[-1]
        place = f"slice {first + 1}" if first == last else f"slices {first + 1} ... {last + 1}"
        width = max(2.0, step * len(members))
        yield Bar(round(first * step, 1), round(width, 1), level[0], f"{place}: {WORDS[level[0]]}")


def svg_size(count: int) -> tuple[int, int]:
    """Width and height of the chart of so many rows."""
    return _LABEL + _WIDTH, _ROW * count + _ROW


def picture(readings: Sequence[GateReading], slices: int) -> Image.Image | None:
    """The same chart as a picture; None where no gate was measured."""
    table = rows(readings, slices)
    if not table:
        return None
    width, height = svg_size(len(table))
    chart = Image.new("RGB", (width, height), (17, 20, 24))
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(size=12)
    for number, row in enumerate(table):
        top = number * _ROW
        pen.text((0, top), row.gate, (222, 226, 230), font=font)
        for bar in row.bars:
            left = _LABEL + bar.left
            box = (left, top + 1, left + bar.width - 1, top + _HEIGHT)
            pen.rectangle(box, fill=COLOURS[bar.level])
    scale = f"slices 1 ... {slices}; " + ", ".join(
        f"{name}: {WORDS[level]}" for level, name in _NAMES.items()
    )
    pen.text((_LABEL, height - _ROW), scale, (160, 168, 176), font=font)
    return chart


_NAMES = {
    Level.PASS: "green",
    Level.WARN: "amber",
    Level.FAIL: "red",
    Level.NOT_APPLICABLE: "grey",
}
