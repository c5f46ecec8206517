"""Packs, DICOM folders and a prepared folder made from phantoms."""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from training.medz import MAGIC, PLANES
from training.phantoms import Phantom, body_pet, brain_t2, chest_ct
from training.prepare import prepare

_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 0, "lc": 0, "lp": 0, "pb": 0}]

PackWriter = Callable[..., Path]


def median_edge_residual(volume: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """The forward predictor, pixel by pixel as LOCO-I is published: slow and plain."""
    stored = volume.astype(np.int32)
    residual = np.zeros_like(stored)
    for z, y, x in np.ndindex(*stored.shape):
        left = stored[z, y, x - 1] if x else 0
        above = stored[z, y - 1, x] if y else 0
        corner = stored[z, y - 1, x - 1] if x and y else 0
        if not x or not y:
            predicted = left if x else above
        elif corner >= max(left, above):
            predicted = min(left, above)
        elif corner <= min(left, above):
            predicted = max(left, above)
        else:
            predicted = left + above - corner
        residual[z, y, x] = stored[z, y, x] - predicted
    return residual


def fast_residual(volume: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """The same in whole arrays, for volumes too large to loop over."""
    v = volume.astype(np.int32)
    left, above, corner = np.zeros_like(v), np.zeros_like(v), np.zeros_like(v)
    left[:, :, 1:], above[:, 1:], corner[:, 1:, 1:] = v[:, :, :-1], v[:, :-1], v[:, :-1, :-1]
    high, low = np.maximum(left, above), np.minimum(left, above)
    inner = np.where(corner >= high, low, np.where(corner <= low, high, left + above - corner))
    inner[:, 0], inner[:, :, 0] = left[:, 0], above[:, :, 0]
    return np.asarray(v - inner, np.int32)


@pytest.fixture(scope="session")
def write_pack() -> PackWriter:
    """write_pack(path, [(int16 volume, meta)], residual=…) -> path."""

    def write(
        path: Path,
        volumes: list[tuple[npt.NDArray[Any], dict[str, Any]]],
        residual: Callable[[npt.NDArray[Any]], npt.NDArray[np.int32]] = fast_residual,
    ) -> Path:
        items, blobs, offset = [], [], 0
        for volume, meta in volumes:
            error = residual(volume)
            coded = np.where(error >= 0, 2 * error, -2 * error - 1).astype(np.uint32)
            entry = dict(meta, shape=list(volume.shape), dtype=str(volume.dtype))
            entry["sha256"] = hashlib.sha256(volume.tobytes()).hexdigest()
            for shift, plane in enumerate(PLANES):
                raw = ((coded >> (8 * shift)) & 255).astype(np.uint8).tobytes()
                blob = lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_FILTERS)
                entry[plane] = [offset, len(blob)]
                offset += len(blob)
                blobs.append(blob)
            items.append(entry)
        header = json.dumps({"file_meta": {}, "items": items}).encode()
        path.write_bytes(MAGIC + struct.pack("<I", len(header)) + header + b"".join(blobs))
        return path

    return write


def pack_meta(phantom: Phantom, name: str, modality: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "patient": name,
        "modality": modality,
        "spacing_mm": list(phantom.spacing_mm),
        "licence": "Apache-2.0",
        "source": "phantom",
        **more,
    }


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory, write_pack: PackWriter) -> Path:
    """A folder of packs: two subjects for each task, one of them held out."""
    folder = tmp_path_factory.mktemp("packs")
    for prefix, seed in (("", 1), ("val_", 2)):
        ct, mr = chest_ct(3, 128, seed), brain_t2(3, 136, seed)
        stored = ct.volume.round().astype(np.int16)
        meta = pack_meta(ct, f"CT{seed}", "CT", noise_hu=10.0)
        write_pack(folder / f"{prefix}ct.medz", [(stored, meta)])
        meta = pack_meta(mr, f"MR{seed}", "MR", contrast="T2")
        t1 = pack_meta(mr, f"MR{seed}-T1", "MR", contrast="anat-T1w") | {"patient": f"MR{seed}"}
        stored = mr.volume.round().astype(np.int16)
        write_pack(folder / f"{prefix}mr.medz", [(stored, meta), (stored[:2], t1)])
        pet = body_pet(3, 48, seed)
        crop = pet.volume[:, 12:36, 10:32]
        meta = pack_meta(pet, f"PET{seed}", "PT", slope=[0.001] * 3, intercept=[0.0] * 3)
        write_pack(folder / f"{prefix}pet.medz", [((crop * 1000).astype(np.int16), meta)])
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, packs: Path) -> Path:
    """The packs, prepared with seed 7."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    prepare([packs], out, seed=7)
    return out
