"""The series that are sent: phantoms whose truth is known, or the files of a folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.misc import is_dicom

from examples.main_job.dicom import Scan, suv_to_bqml, write
from training import degrade, phantoms

Volume = NDArray[np.float32]

SEED = 20


@dataclass(frozen=True)
class Source:
    """One series to send. *truth* has a slice for each file, in the units of the task; *unit* is
    how much of the stored physical unit makes one of them (Bq/ml per SUV, else 1)."""

    label: str
    series_instance_uid: str
    files: tuple[Path, ...]
    truth: Volume | None = None
    unit: float = 1.0


def read_folder(folder: Path) -> tuple[Source, ...]:
    """The series of a folder of DICOM files; ValueError where there are none."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    found: dict[str, list[Path]] = defaultdict(list)
    labels: dict[str, str] = {}
    for path in paths:
        if not path.is_file() or not is_dicom(path):
            continue
        header = dcmread(path, specific_tags=["SeriesInstanceUID", "SeriesNumber", "Modality"])
        uid = str(header.get("SeriesInstanceUID", ""))
        found[uid].append(path)
        labels[uid] = f"{header.get('Modality', '??')} series {header.get('SeriesNumber', '?')}"
    found.pop("", None)
    if not found:
        raise ValueError(f"{folder}: no DICOM series in it")
    return tuple(Source(labels[uid], uid, tuple(files)) for uid, files in found.items())
