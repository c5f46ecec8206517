"""Slices as pictures: windows, the colours of a difference, PNG, and the montage of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset

from dicom_node.dicom.header import number
from dicom_node.review.sheet import Picture, Plane

_UNITS = {"CT": "HU", "PT": "SUV", "MR": "a.u."}
# Abdominal soft tissue, where the header asks for no window.
_CT_WINDOW = (-160.0, 240.0)
_SHARE = 0.995
_LARGE, _SMALL = 512, 256
_GAP, _LINE = 8, 22
_DARK, _LIGHT = (17, 20, 24), (222, 226, 230)


@dataclass(frozen=True)
class Panels:
    """One slice as three pictures of one size, with what their greys and colours stand for."""

    index: int
    source: Image.Image
    restored: Image.Image
    difference: Image.Image
    window: tuple[float, float]
    limit: float  #: the difference of the strongest colour
    unit: str

    @property
    def captions(self) -> tuple[str, str, str]:
        """A line for each picture."""
        low, high = self.window
        span = f"{low:.4g} ... {high:.4g} {self.unit}"
        return (
            f"input, {span}",
            f"restored, {span}",
            f"restored - input, ±{self.limit:.3g} {self.unit}",
        )


def panels(picture: Picture, modality: str, header: Dataset, *, large: bool) -> Panels:
    """The pictures of one slice; *large* at its own size, else small."""
    finer = picture.restored.shape[0] // picture.source.shape[0]
    source = np.kron(picture.source, np.ones((finer, finer), np.float32))
    difference = picture.restored - source
    window = _window(source, modality, header)
    limit = _limit(difference)
    side = _LARGE if large else _SMALL
    return Panels(
        index=picture.index,
        source=_sized(_greys(source, window, modality), side),
        restored=_sized(_greys(picture.restored, window, modality), side),
        difference=_sized(_colours(difference, limit), side),
        window=window,
        limit=limit,
        unit=_UNITS.get(modality, "a.u."),
    )


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = BytesIO()
    # A difference is mostly noise, which no effort makes smaller.
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def montage(rows: Sequence[Panels], title: str, timeline: Image.Image | None) -> Image.Image:
    """Every slice as a row of three pictures under a title, and the gates over the slices."""
    font = ImageFont.load_default(size=14)
    cell = max(each.source.width for each in rows)
    heights = [each.source.height + _LINE for each in rows]
    foot = 0 if timeline is None else timeline.height + _GAP
    width = max(3 * cell + 4 * _GAP, 0 if timeline is None else timeline.width + 2 * _GAP)
    height = _LINE + _GAP + sum(heights) + _GAP * len(rows) + foot + _GAP
    sheet = Image.new("RGB", (width, height), _DARK)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, _LIGHT, font=font)
    top = _LINE + _GAP
    for each, tall in zip(rows, heights, strict=True):
        for column, (picture, words) in enumerate(
            zip((each.source, each.restored, each.difference), each.captions, strict=True)
        ):
            left = _GAP + column * (cell + _GAP)
            pen.text((left, top + 2), f"slice {each.index + 1}: {words}", _LIGHT, font=font)
            sheet.paste(picture, (left, top + _LINE))
        top += tall + _GAP
    if timeline is not None:
        sheet.paste(timeline, (_GAP, top))
    return sheet


def _window(values: Plane, modality: str, header: Dataset) -> tuple[float, float]:
    """What black and white stand for: the header's window for CT, else what the slice holds."""
    if modality == "CT":
        center, width = number(header, "WindowCenter"), number(header, "WindowWidth")
        if center is None or width is None or not width > 1:
            return _CT_WINDOW
        return center - width / 2, center + width / 2
    low, high = np.quantile(values, [1 - _SHARE, _SHARE])
    low = 0.0 if modality == "PT" else float(low)
    return low, max(float(high), low + 1e-6)


def _limit(difference: Plane) -> float:
    finite = np.abs(difference[np.isfinite(difference)])
    return max(float(np.quantile(finite, _SHARE)) if finite.size else 0.0, 1e-6)


def _greys(values: Plane, window: tuple[float, float], modality: str) -> Image.Image:
    low, high = window
    scaled = np.clip((values - low) / (high - low), 0.0, 1.0)
    if modality == "PT":
        scaled = 1.0 - scaled  # uptake is dark, as PET is read
    grey = np.nan_to_num(scaled * 255.0).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2), "RGB")


def _colours(difference: Plane, limit: float) -> Image.Image:
    """Blue where the result is lower, red where it is higher, dark where nothing changed."""
    t = np.nan_to_num(np.clip(difference / limit, -1.0, 1.0))[..., None]
    base, low, high = (np.array(c, np.float32) for c in (_DARK, (80, 160, 255), (255, 110, 70)))
    colours: NDArray[Any] = base + np.abs(t) * (np.where(t < 0, low, high) - base)
    return Image.fromarray(colours.astype(np.uint8), "RGB")


def _sized(picture: Image.Image, longest: int) -> Image.Image:
    """At most so many pixels long; what is small is enlarged by a whole number, never blurred."""
    side = max(picture.size)
    if side > longest:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return picture
    times = max(1, longest // side)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
