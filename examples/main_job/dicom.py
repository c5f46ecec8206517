"""Phantom volumes as a scanner would store them: CT, MR and PET Image Storage.

Attributes follow PS3.3 A.3 (CT), A.4 (MR) and A.21 (PET); a test holds them against dciodvfy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

Volume = NDArray[np.float32]

WEIGHT_KG = 75.0
INJECTED_BQ = 3.0e8
UPTAKE = timedelta(minutes=60)
FLUORINE_HALF_LIFE_S = 6586.2
STORED_MAX = 32767


@dataclass(frozen=True)
class Scan:
    """One series before it is written: a volume in physical units (HU, SUV or MR a.u.)."""

    modality: str
    description: str
    volume: Volume  # slices, rows, columns
    spacing_mm: tuple[float, float, float]  # slice, row, column
    acquired: datetime


def suv_to_bqml() -> float:
    """Bq/ml per SUVbw, decay corrected to the start of the acquisition (PS3.3 C.8.9.1)."""
    remaining = math.pow(0.5, UPTAKE.total_seconds() / FLUORINE_HALF_LIFE_S)
    return INJECTED_BQ * remaining / (WEIGHT_KG * 1000)


def write(scan: Scan, folder: Path) -> tuple[str, tuple[Path, ...]]:
    """Write one file per slice; return the Series Instance UID and the files in slice order."""
    folder.mkdir(parents=True, exist_ok=True)
    common = _common(scan)
    describe, store = _MODALITIES[scan.modality]
    paths = []
    for index, plane in enumerate(scan.volume):
        dataset = Dataset()
        dataset.update(common)
        describe(dataset, scan, index)
        store(dataset, scan, plane)
        _place(dataset, scan, index)
        path = folder / f"{scan.modality}{index + 1:04d}.dcm"
        _save(dataset, path)
        paths.append(path)
    return str(common.SeriesInstanceUID), tuple(paths)


def _save(dataset: Dataset, path: Path) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    dataset.save_as(path, enforce_file_format=True)


def _common(scan: Scan) -> Dataset:
    """The Patient, Study, Series, Frame of Reference and Equipment modules."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName = f"Phantom^{scan.modality}"
    dataset.PatientID = f"PHANTOM-{scan.modality}"
    dataset.PatientBirthDate = ""
    dataset.PatientSex = "O"
    dataset.PatientWeight = WEIGHT_KG
    dataset.StudyInstanceUID = generate_uid()
    dataset.StudyID = "1"
    dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = ""
    for part in ("Study", "Series", "Acquisition", "Content"):
        setattr(dataset, f"{part}Date", f"{scan.acquired:%Y%m%d}")
        setattr(dataset, f"{part}Time", f"{scan.acquired:%H%M%S}")
    dataset.Modality = scan.modality
    dataset.SeriesInstanceUID = generate_uid()
    dataset.SeriesNumber = 1
    dataset.SeriesDescription = scan.description
    dataset.PatientPosition = "HFS"
    dataset.FrameOfReferenceUID = generate_uid()
    dataset.PositionReferenceIndicator = ""
    dataset.Manufacturer = "Phantom"
    dataset.ManufacturerModelName = "Phantom scanner"
    dataset.SoftwareVersions = "1"
    return dataset


def _place(dataset: Dataset, scan: Scan, index: int) -> None:
    """The General Image, Image Plane and Image Pixel modules: axial slices, head to feet."""
    slices, rows, columns = scan.volume.shape
    thickness, row_mm, column_mm = scan.spacing_mm
    dataset.SOPInstanceUID = generate_uid()
    dataset.InstanceNumber = index + 1
    dataset.AcquisitionNumber = 1
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    corner = (-columns * column_mm / 2, -rows * row_mm / 2, (slices / 2 - index) * thickness)
    dataset.ImagePositionPatient = [round(value, 3) for value in corner]
    dataset.SliceThickness = thickness
    dataset.PixelSpacing = [row_mm, column_mm]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = rows, columns
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1


def _describe_ct(dataset: Dataset, scan: Scan, index: int) -> None:
    dataset.SOPClassUID = CTImageStorage
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.BodyPartExamined = "CHEST"
    dataset.KVP = 120
    dataset.XRayTubeCurrent = 40
    dataset.ExposureTime = 500
    dataset.Exposure = 20
    dataset.ConvolutionKernel = "STANDARD"
    dataset.WindowCenter, dataset.WindowWidth = 40, 400


def _store_ct(dataset: Dataset, scan: Scan, plane: Volume) -> None:
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = -1024, 1, "HU"
    _store(dataset, plane + 1024)


def _describe_mr(dataset: Dataset, scan: Scan, index: int) -> None:
    dataset.SOPClassUID = MRImageStorage
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    dataset.BodyPartExamined = "BRAIN"
    dataset.ScanningSequence = "SE"
    dataset.SequenceVariant = "SK"
    dataset.ScanOptions = ""
    dataset.MRAcquisitionType = "2D"
    dataset.RepetitionTime, dataset.EchoTime, dataset.EchoTrainLength = 5000, 100, 12
    dataset.MagneticFieldStrength = 1.5
    dataset.ImagedNucleus = "1H"
    dataset.SpacingBetweenSlices = scan.spacing_mm[0]
    high = float(np.percentile(scan.volume, 99.5))
    dataset.WindowCenter, dataset.WindowWidth = round(high / 2), round(high)


def _store_mr(dataset: Dataset, scan: Scan, plane: Volume) -> None:
    _store(dataset, plane)


def _describe_pet(dataset: Dataset, scan: Scan, index: int) -> None:
    dataset.SOPClassUID = PositronEmissionTomographyImageStorage
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.BodyPartExamined = "CHEST"
    dataset.SeriesType = ["WHOLE BODY", "IMAGE"]
    dataset.Units = "BQML"
    dataset.CountsSource = "EMISSION"
    dataset.NumberOfSlices = len(scan.volume)
    dataset.ImageIndex = index + 1
    dataset.CorrectedImage = ["DECY", "ATTN", "SCAT", "RADL", "DTIM", "NORM"]
    dataset.DecayCorrection = "START"
    dataset.DecayFactor = 1.0
    dataset.RandomsCorrectionMethod = "DLYD"
    dataset.AttenuationCorrectionMethod = "known map"
    dataset.ScatterCorrectionMethod = "known fraction"
    dataset.ReconstructionMethod = "OSEM"
    dataset.CollimatorType = "NONE"
    dataset.FrameReferenceTime = 0
    dataset.ActualFrameDuration = 15000
    dataset.RadiopharmaceuticalInformationSequence = [_tracer(scan)]
    # PS3.3 C.7.3.1.1.2: these codes take the place of Patient Position.
    del dataset.PatientPosition
    orientation = _code("102538003", "recumbent")
    orientation.PatientOrientationModifierCodeSequence = [_code("40199007", "supine")]
    dataset.PatientOrientationCodeSequence = [orientation]
    dataset.PatientGantryRelationshipCodeSequence = [_code("102540008", "headfirst")]


def _tracer(scan: Scan) -> Dataset:
    tracer = Dataset()
    injected = scan.acquired - UPTAKE
    tracer.Radiopharmaceutical = "Fluorodeoxyglucose"
    tracer.RadiopharmaceuticalStartTime = f"{injected:%H%M%S}"
    tracer.RadiopharmaceuticalStartDateTime = f"{injected:%Y%m%d%H%M%S}"
    tracer.RadionuclideTotalDose = INJECTED_BQ
    tracer.RadionuclideHalfLife = FLUORINE_HALF_LIFE_S
    tracer.RadionuclidePositronFraction = 0.967
    tracer.RadionuclideCodeSequence = [_code("77004003", "^18^Fluorine")]
    tracer.RadiopharmaceuticalCodeSequence = [_code("35321007", "Fluorodeoxyglucose F^18^")]
    return tracer


def _code(value: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "SCT", meaning
    return code


def _store_pet(dataset: Dataset, scan: Scan, plane: Volume) -> None:
    """Each slice by a slope of its own, as PET scanners do: the brightest pixel uses all bits."""
    activity = plane * suv_to_bqml()
    slope = max(float(activity.max()), 1.0) / STORED_MAX
    dataset.RescaleIntercept, dataset.RescaleSlope = 0, f"{slope:.9g}"
    _store(dataset, activity / np.float32(dataset.RescaleSlope))


def _store(dataset: Dataset, stored: Volume) -> None:
    levels = np.clip(np.rint(stored), -STORED_MAX - 1, STORED_MAX).astype("<i2")
    dataset.PixelData = levels.tobytes()


_Describe = Callable[[Dataset, Scan, int], None]
_Store = Callable[[Dataset, Scan, Volume], None]
_MODALITIES: dict[str, tuple[_Describe, _Store]] = {
    "CT": (_describe_ct, _store_ct),
    "MR": (_describe_mr, _store_mr),
    "PT": (_describe_pet, _store_pet),
}
