"""The series that are sent: phantoms whose truth is known, or the files of a folder."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.misc import is_dicom

from examples.main_job.dicom import Scan, suv_to_bqml, write
from training.degrade import (
    CtNoiseInsertion,
    PetThinning,
    simulate_pet,
    soft_tissue_noise,
    truncate_kspace,
)
from training.phantoms import Phantom, body_pet, brain_t2, chest_ct
from training.uptake import WATER_PER_MM

Volume = NDArray[np.float32]

SEED = 20
BODY_SUV = 0.1


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


def make_phantoms(folder: Path, *, quick: bool = False) -> tuple[Source, ...]:
    """Make, degrade and write a chest CT, a brain MR and a body PET; *quick* makes thin slabs."""
    rng = np.random.default_rng(SEED)
    return (
        _chest(folder / "ct", 2 if quick else 6, rng),
        _brain(folder / "mr", 2 if quick else 10),
        _body(folder / "pet", 8 if quick else 96, rng),
    )


def _chest(folder: Path, slices: int, rng: np.random.Generator) -> Source:
    """A quarter of the dose: noise inserted in the projections."""
    phantom = chest_ct(slices, 512, SEED)
    low_dose = CtNoiseInsertion().apply(
        phantom.volume,
        pixel_mm=phantom.spacing_mm[1],
        noise_hu=soft_tissue_noise(phantom.volume),
        rng=rng,
    )
    scan = _scan("CT", "Chest, a quarter of the dose", phantom, low_dose)
    return _written("chest CT", scan, folder, phantom.volume)


def _brain(folder: Path, slices: int) -> Source:
    """A quarter of the resolution along rows and columns: the middle of k-space."""
    phantom = brain_t2(slices, 256, SEED)
    scan = _scan("MR", "Brain T2, a quarter of k-space", phantom, truncate_kspace(phantom.volume))
    return _written("brain MR", scan, folder, phantom.volume)


def _body(folder: Path, slices: int, rng: np.random.Generator) -> Source:
    """A twelfth of the counts, reconstructed like the full scan, which is the truth."""
    phantom = body_pet(slices, 128, SEED)
    attenuation = np.where(phantom.volume > BODY_SUV, WATER_PER_MM, 0).astype(np.float32)
    low_count, full_count = simulate_pet(
        phantom.volume,
        attenuation,
        PetThinning(),
        pixel_mm=phantom.spacing_mm[1],
        psf_fwhm_mm=0.0,  # the phantom is blurred as a scanner would
        rng=rng,
    )
    scan = _scan("PT", "Body FDG, a twelfth of the counts", phantom, low_count)
    return _written("body PET", scan, folder, full_count, suv_to_bqml())


def _scan(modality: str, description: str, phantom: Phantom, volume: Volume) -> Scan:
    return Scan(modality, description, volume, phantom.spacing_mm, datetime.now().astimezone())


def _written(label: str, scan: Scan, folder: Path, truth: Volume, unit: float = 1.0) -> Source:
    uid, files = write(scan, folder)
    return Source(label, uid, files, truth, unit)
