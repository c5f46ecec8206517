"""The manifest of a prepared folder: what each pair of images is and where it came from.

``DIR/manifest.json`` lists items; each has two ``.npy`` files of shape [slice, row, column] in
physical units (HU, SUV, or MR already scaled by ``restoration.tasks.intensity_scale``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

VERSION = 1
FILE_NAME = "manifest.json"


class ManifestError(ValueError):
    """A prepared folder has no readable manifest; the message names the file and the reason."""


@dataclass(frozen=True)
class Item:
    """One pair of volumes of one subject."""

    name: str
    task: str
    split: str
    """train, val, or calibration: for the levels of the gates alone; no subject is in two."""
    subject: str
    source: str
    licence: str
    units: str
    spacing_mm: tuple[float, float, float]
    """Slice, row and column distance."""
    hq: str
    """File name of the reference, relative to the folder."""
    lq: str
    shape: tuple[int, int, int]
    simulated: bool
    """True when the reference itself is simulated, not only its degradation."""
    sha256: dict[str, str]
    """Hashes of the files hq and lq."""
    contrast: str | None = None
    """MR contrast (T2, T1, FLAIR, …); None for CT and PET."""
    scale: float = 1.0
    """Factor already applied to the stored intensities (MR)."""
    noise_hu: float | None = None
    """Measured noise of the CT reference."""
    acquired_lq: bool = False
    """True when the input was acquired, not made by the operator."""
    weight: float = 1.0
    """How often a part of it is drawn in training, against others of its kind."""


@dataclass(frozen=True)
class PreparedManifest:
    """What ``prepare`` wrote."""

    seed: int
    operators: dict[str, dict[str, Any]]
    """Degradation by task: name, version, params."""
    items: tuple[Item, ...]
    skipped: tuple[str, ...] = ()
    """Series left out, with the reason."""
    version: int = VERSION

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> PreparedManifest:
        """Raises ManifestError when the folder was not written by ``prepare``."""
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ManifestError(f"{folder} is not a prepared folder: no {FILE_NAME}.") from error
        except ValueError as error:
            raise ManifestError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ManifestError(f"{path} is not a prepared manifest of version {VERSION}.")
        try:
            items = tuple(_item(entry) for entry in content.pop("items"))
            skipped = tuple(content.pop("skipped", ()))
            return cls(items=items, skipped=skipped, **content)
        except (TypeError, KeyError) as error:
            raise ManifestError(f"{path} is incomplete: {error}") from error


def _item(entry: dict[str, Any]) -> Item:
    known = {field.name for field in fields(Item)}
    values = {key: value for key, value in entry.items() if key in known}
    values["spacing_mm"], values["shape"] = tuple(entry["spacing_mm"]), tuple(entry["shape"])
    return Item(**values)
