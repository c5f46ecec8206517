"""Read MEDZ packs: lossless int16/uint16 volumes in one file, numpy and the standard library only.

Layout: ``b"MEDZ1\\n"``, a little-endian uint32 header length, a UTF-8 JSON header
``{"file_meta": {...}, "items": [...]}``, then raw LZMA2 streams. Each item holds a volume
``[slice, row, column]`` coded as the zig-zag residual of the LOCO-I median edge predictor
(Weinberger et al., IEEE TIP 9(8), 2000) and split into three byte planes ``lo``, ``mid``, ``hi``,
whose values are ``[offset, length]`` after the header.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"MEDZ1\n"
PLANES = ("lo", "mid", "hi")
_FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "lc": 0,
        "lp": 0,
        "pb": 0,
        "dict_size": 1 << 23,
    }
]
Stored = npt.NDArray[np.int16] | npt.NDArray[np.uint16]

_DTYPES = ("int16", "uint16")


class MedzError(ValueError):
    """A pack is not readable; the message names the file, the item and the reason."""


@dataclass(frozen=True)
class PackItem:
    """One volume of a pack before it is decoded."""

    path: Path
    index: int
    meta: dict[str, Any]
    """The item's header: name, shape, dtype, sha256, spacing_mm [z, y, x] and free fields."""
    base: int
    """File offset of the first coded stream."""

    @property
    def name(self) -> str:
        return str(self.meta["name"])

    @property
    def shape(self) -> tuple[int, int, int]:
        slices, rows, columns = self.meta["shape"]
        return int(slices), int(rows), int(columns)


def read_items(path: Path) -> tuple[PackItem, ...]:
    """The items of a pack without their pixels. Raises MedzError."""
    header, base = _read_header(path)
    items = header.get("items")
    if not isinstance(items, list):
        raise MedzError(f"{path}: the header has no list of items")
    return tuple(_checked(PackItem(path, i, meta, base)) for i, meta in enumerate(items))


def read_volume(item: PackItem) -> Stored:
    """Decode one item to its stored integers [slice, row, column] and verify its SHA-256.

    Raises MedzError when the streams are truncated or damaged, or the hash differs.
    """
    count = int(np.prod(item.shape))
    coded = np.zeros(count, np.uint32)
    for shift, plane in enumerate(_read_planes(item, count)):
        coded |= plane.astype(np.uint32) << np.uint32(8 * shift)
    residual = np.where(coded & 1, -((coded.astype(np.int64) + 1) >> 1), coded >> 1)
    volume = _undo_prediction(residual.astype(np.int32).reshape(item.shape))
    signed = item.meta["dtype"] == "int16"
    stored: Stored = volume.astype(np.int16) if signed else volume.astype(np.uint16)
    if hashlib.sha256(stored.tobytes()).hexdigest() != item.meta["sha256"]:
        raise MedzError(f"{item.path}: item {item.name!r} is corrupt: its SHA-256 differs")
    return stored


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise MedzError(f"{path}: not a MEDZ pack")
        length = file.read(4)
        if len(length) != 4:
            raise MedzError(f"{path}: the file ends inside its header")
        size = struct.unpack("<I", length)[0]
        text = file.read(size)
    if len(text) != size:
        raise MedzError(f"{path}: the file ends inside its header")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise MedzError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise MedzError(f"{path}: the header is not a JSON object")
    return header, len(MAGIC) + 4 + size


def _checked(item: PackItem) -> PackItem:
    where = f"{item.path}: item {item.index}"
    if not isinstance(item.meta, dict):
        raise MedzError(f"{where} is not a JSON object")
    absent = {"name", "shape", "dtype", "sha256", *PLANES} - item.meta.keys()
    if absent:
        raise MedzError(f"{where} lacks {', '.join(sorted(absent))}")
    shape = item.meta["shape"]
    if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise MedzError(f"{where} has the shape {shape}, not three positive numbers")
    if item.meta["dtype"] not in _DTYPES:
        raise MedzError(f"{where} holds {item.meta['dtype']}, not int16 or uint16")
    return item


def _read_planes(item: PackItem, count: int) -> Iterator[npt.NDArray[np.uint8]]:
    with item.path.open("rb") as file:
        for key in PLANES:
            offset, length = item.meta[key]
            file.seek(item.base + offset)
            coded = file.read(length)
            try:
                plane = lzma.decompress(coded, format=lzma.FORMAT_RAW, filters=_FILTERS)
            except lzma.LZMAError as error:
                raise MedzError(f"{item.path}: item {item.name!r} is corrupt: {error}") from error
            if len(plane) != count:
                raise MedzError(
                    f"{item.path}: item {item.name!r} is corrupt: "
                    f"its {key} plane has {len(plane)} of {count} bytes"
                )
            yield np.frombuffer(plane, np.uint8)


def _undo_prediction(residual: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Invert the median edge predictor along anti-diagonals, every slice of a diagonal at once."""
    slices, rows, columns = residual.shape
    volume = np.zeros((slices, rows, columns), np.int32)
    volume[:, 0, :] = np.cumsum(residual[:, 0, :], axis=1)
    volume[:, :, 0] = np.cumsum(residual[:, :, 0], axis=1)
    for diagonal in range(2, rows + columns - 1):
        y = np.arange(max(1, diagonal - columns + 1), min(rows - 1, diagonal - 1) + 1)
        x = diagonal - y
        left, above, corner = volume[:, y, x - 1], volume[:, y - 1, x], volume[:, y - 1, x - 1]
        high, low = np.maximum(left, above), np.minimum(left, above)
        plane = left + above - corner
        predicted = np.where(corner >= high, low, np.where(corner <= low, high, plane))
        volume[:, y, x] = residual[:, y, x] + predicted
    return volume
