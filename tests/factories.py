"""DICOM series made by code: clean ones, and the odd ones that scanners and archives send.

`make_series("CT", slices=8)` gives datasets that validators find no error in; every argument
spoils or varies one thing. The same arguments make the same series.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)
from pydicom.valuerep import format_number_as_ds

__all__ = ["NAMES", "PLANES", "encode", "make_series", "phantom", "uid", "write_series"]

Modality = Literal["CT", "MR", "PT"]

SOP_CLASSES: dict[str, UID] = {
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "PT": PositronEmissionTomographyImageStorage,
}

PLANES: dict[str, tuple[float, ...]] = {
    "axial": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "oblique": (0.6, 0.8, 0.0, -0.48, 0.36, 0.8),
}

NAMES: dict[str, tuple[str | list[str], str]] = {
    "latin": ("ISO_IR 100", "Müller^Änne"),
    "greek": ("ISO_IR 126", "Διονυσιος"),
    "cyrillic": ("ISO_IR 144", "Люкceмбypг"),
    "japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    "chinese": ("GB18030", "Wang^XiaoDong=王^小东"),
    "unicode": ("ISO_IR 192", "Wang^XiaoDong=王^小东"),
}
"""Specific Character Set and Patient's Name by script (PS3.5 H to K)."""

_NAMESPACE = uuid.UUID("c0ffee00-0000-5000-8000-00000000d1c0")


def uid(*parts: object) -> str:
    """A UID that is the same for the same parts."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '|'.join(map(str, parts))).int}"


def phantom(modality: str, shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float64]:
    """A noisy body with an organ in it: HU, MR arbitrary units or Bq/ml; shape (S, R, C)."""
    slices, rows, columns = shape
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(
        np.linspace(-0.5, 0.5, slices),
        np.linspace(-1, 1, rows),
        np.linspace(-1, 1, columns),
        indexing="ij",
    )
    body = (x / 0.85) ** 2 + (y / 0.7) ** 2 + z**2 < 1
    organ = ((x - 0.3) / 0.3) ** 2 + (y / 0.25) ** 2 + (z / 0.8) ** 2 < 1
    outside, tissue, bright, noise = {
        "CT": (-1000.0, 40.0, 120.0, 25.0),
        "MR": (0.0, 400.0, 1100.0, 20.0),
        "PT": (0.0, 4000.0, 30000.0, 600.0),
    }[modality]
    image = np.where(organ, bright, np.where(body, tissue, outside))
    noisy = image + rng.normal(0.0, noise, shape) * (body if modality != "CT" else 1.0)
    return noisy if modality == "CT" else np.clip(noisy, 0.0, None)


def make_series(
    modality: Modality,
    *,
    slices: int = 6,
    rows: int = 32,
    columns: int | None = None,
    spacing: tuple[float, float] = (1.5, 1.5),
    slice_spacing: float = 3.0,
    plane: str | Sequence[float] = "axial",
    tilt: float = 0.0,
    missing: Sequence[int] = (),
    duplicated: Sequence[int] = (),
    physical: NDArray[Any] | None = None,
    slope: float | None = None,
    intercept: float | None = None,
    slope_per_slice: bool | None = None,
    bits_stored: int = 16,
    signed: bool | None = None,
    padding: int | None = None,
    padding_limit: int | None = None,
    localizer: bool = False,
    script: str | None = None,
    transfer_syntax: str = ExplicitVRLittleEndian,
    seed: int = 0,
    study: str = "study",
    series: str = "series",
    **attributes: Any,
) -> list[Dataset]:
    """Make one series, sliced from foot to head, in an order that is not that of space.

    physical: (S, R, C) in HU, MR arbitrary units or Bq/ml; a phantom by default. slices counts
    before missing are taken out and duplicated are put in again under new UIDs. tilt: degrees of
    gantry tilt. padding fills the corners outside the inscribed circle. attributes set any
    element by keyword, or remove it where None.
    """
    shape = (slices, rows, columns or rows)
    values = phantom(modality, shape, seed) if physical is None else np.asarray(physical)
    signed = (modality != "MR") if signed is None else signed
    per_slice = (modality == "PT") if slope_per_slice is None else slope_per_slice
    cosines = np.asarray(PLANES[plane] if isinstance(plane, str) else plane, dtype=float)
    kept = [i for i in range(len(values)) if i not in set(missing)]
    made = []
    for copy, i in [*((0, i) for i in kept), *((1, i) for i in duplicated)]:
        dataset = _base(modality, (study, series, seed), i, copy)
        _place(dataset, i, cosines, spacing, slice_spacing, tilt)
        by = _rescale(modality, values[i], slope, intercept, per_slice, bits_stored, signed)
        _fill(dataset, modality, values[i], by, bits_stored, signed, (padding, padding_limit))
        if modality == "PT":
            dataset.NumberOfSlices = len(values)
        if localizer:
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        if script is not None:
            dataset.SpecificCharacterSet, dataset.PatientName = NAMES[script]
        for keyword, value in attributes.items():
            _override(dataset, keyword, value)
        made.append(encode(dataset, transfer_syntax))
    # Arrival order is not slice order: even slices first, as interleaved scanners send them.
    return made[::2] + made[1::2]


def write_series(datasets: Sequence[Dataset], folder: Path) -> list[Path]:
    """Write each dataset as a PS3.10 file into folder, named by its place in the sequence."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04d}.dcm" for i in range(1, len(datasets) + 1)]
    for dataset, path in zip(datasets, paths, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def _override(dataset: Dataset, keyword: str, value: Any) -> None:
    if value is not None:
        setattr(dataset, keyword, value)
    elif keyword in dataset:
        delattr(dataset, keyword)


def _base(modality: str, names: tuple[str, str, int], i: int, copy: int) -> Dataset:
    study, series, seed = names
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.SOPClassUID = SOP_CLASSES[modality]
    dataset.SOPInstanceUID = uid(study, series, modality, seed, i, copy)
    dataset.StudyInstanceUID = uid(study)
    dataset.SeriesInstanceUID = uid(study, series, modality, seed)
    dataset.FrameOfReferenceUID = uid(study, "frame")
    dataset.Modality = modality
    dataset.PatientName = "Phantom^Test"
    dataset.PatientID = "PHANTOM-1"
    dataset.PatientBirthDate = "19700101"
    dataset.PatientSex = "O"
    dataset.PatientWeight = "70"
    dataset.PatientPosition = "HFS"
    dataset.BodyPartExamined = "CHEST" if modality == "CT" else "HEAD"
    dataset.PositionReferenceIndicator = ""
    dataset.StudyID = "1"
    dataset.AccessionNumber = "A1"
    dataset.ReferringPhysicianName = ""
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = "20260102"
    dataset.ContentDate = "20260102"
    dataset.StudyTime, dataset.SeriesTime = "090000", "100000"
    dataset.AcquisitionTime, dataset.ContentTime = "100005", "100500"
    dataset.SeriesNumber = "3"
    dataset.SeriesDescription = "Phantom"
    dataset.AcquisitionNumber = "1"
    # Counts down while position counts up: whoever orders by it is found out.
    dataset.InstanceNumber = str(900 - i)
    dataset.Manufacturer = "Phantoms"
    dataset.ManufacturerModelName = "By code"
    dataset.SoftwareVersions = "1"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"]
    {"CT": _ct, "MR": _mr, "PT": _pet}[modality](dataset, i)
    return dataset


def _ct(dataset: Dataset, _: int) -> None:
    dataset.KVP = "120"
    dataset.ConvolutionKernel = "B31f"
    dataset.RescaleType = "HU"
    dataset.WindowCenter, dataset.WindowWidth = "40", "400"


def _mr(dataset: Dataset, _: int) -> None:
    dataset.ScanningSequence = "SE"
    dataset.SequenceVariant = "SK"
    dataset.ScanOptions = ""
    dataset.MRAcquisitionType = "2D"
    dataset.RepetitionTime, dataset.EchoTime = "4000", "90"
    dataset.EchoTrainLength = "8"
    dataset.MagneticFieldStrength = "1.5"


def _pet(dataset: Dataset, i: int) -> None:
    # PS3.3 C.7.3.1: the orientation is told by codes instead.
    del dataset.PatientPosition
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Units = "BQML"
    dataset.SeriesType = ["WHOLE BODY", "IMAGE"]
    dataset.CountsSource = "EMISSION"
    dataset.CorrectedImage = ["DECY", "ATTN", "SCAT", "NORM"]
    dataset.DecayCorrection = "START"
    dataset.CollimatorType = "NONE"
    dataset.ActualFrameDuration = "120000"
    dataset.FrameReferenceTime = "60000"
    dataset.DecayFactor = "1.01"
    dataset.ImageIndex = i + 1
    item = Dataset()
    item.Radiopharmaceutical = "FDG"
    item.RadiopharmaceuticalStartTime = "090000"
    item.RadionuclideTotalDose = "350000000"
    item.RadionuclideHalfLife = "6586.2"
    item.RadionuclidePositronFraction = "0.967"
    item.RadionuclideCodeSequence = [_code("77004003", "SCT", "^18^Fluorine")]
    dataset.RadiopharmaceuticalInformationSequence = [item]
    dataset.PatientOrientationCodeSequence = [
        _oriented("102538003", "recumbent", "40199007", "supine")
    ]
    dataset.PatientGantryRelationshipCodeSequence = [_code("102540008", "SCT", "headfirst")]
    dataset.EnergyWindowRangeSequence = [_energy_window()]


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _oriented(value: str, meaning: str, modifier: str, modifier_meaning: str) -> Dataset:
    item = _code(value, "SCT", meaning)
    item.PatientOrientationModifierCodeSequence = [_code(modifier, "SCT", modifier_meaning)]
    return item


def _energy_window() -> Dataset:
    item = Dataset()
    item.EnergyWindowLowerLimit, item.EnergyWindowUpperLimit = "425", "650"
    return item


def _place(
    dataset: Dataset,
    i: int,
    cosines: NDArray[np.float64],
    spacing: tuple[float, float],
    slice_spacing: float,
    tilt: float,
) -> None:
    row, column = cosines[:3], cosines[3:]
    normal = np.cross(row, column)
    angle = np.deg2rad(tilt)
    # A tilted gantry turns the slices about their rows and still steps along the old normal.
    turned = column * np.cos(angle) - normal * np.sin(angle)
    place = np.array([-20.0, -30.0, -40.0]) + normal * slice_spacing * i
    dataset.ImagePositionPatient = [format_number_as_ds(float(v)) for v in place]
    dataset.ImageOrientationPatient = [format_number_as_ds(float(v)) for v in (*row, *turned)]
    dataset.PixelSpacing = [format_number_as_ds(float(v)) for v in spacing]
    dataset.SliceThickness = format_number_as_ds(float(slice_spacing))
    if tilt:
        dataset.GantryDetectorTilt = format_number_as_ds(float(tilt))


def _rescale(
    modality: str,
    values: NDArray[Any],
    slope: float | None,
    intercept: float | None,
    per_slice: bool,
    bits: int,
    signed: bool,
) -> tuple[float, float] | None:
    if modality == "MR" and slope is None:
        return None
    base = -1024.0 if modality == "CT" else 0.0
    if not per_slice:
        return slope or 1.0, base if intercept is None else intercept
    peak = max(float(np.abs(values).max()), 1e-6)
    return float(f"{peak / (2 ** (bits - signed) - 1):.6g}") * 1.00001, 0.0


def _fill(
    dataset: Dataset,
    modality: str,
    values: NDArray[Any],
    by: tuple[float, float] | None,
    bits: int,
    signed: bool,
    padding: tuple[int | None, int | None],
) -> None:
    scale, offset = by or (1.0, 0.0)
    if by is not None:
        dataset.RescaleSlope = format_number_as_ds(float(f"{scale:.9g}"))
        dataset.RescaleIntercept = format_number_as_ds(float(offset))
        scale = float(dataset.RescaleSlope)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    stored = np.clip(np.rint((values - offset) / scale), low, high)
    allocated = 8 if bits <= 8 else 16
    stored = stored.astype(f"<{'i' if signed else 'u'}{allocated // 8}")
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, bits, bits - 1
    dataset.PixelRepresentation = int(signed)
    if padding[0] is not None:
        dataset.PixelPaddingValue = padding[0]
        if padding[1] is not None:
            dataset.PixelPaddingRangeLimit = padding[1]
        stored[_corners(stored.shape)] = padding[0]
    data = stored.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW" if allocated == 16 else "OB"


def _corners(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return np.asarray(x**2 + y**2 > 1)


def encode(dataset: Dataset, transfer_syntax: str) -> Dataset:
    """Give a data set in explicit little endian its file meta information and a transfer syntax."""
    syntax = UID(transfer_syntax)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if syntax.is_compressed and not syntax.is_deflated:
        dataset.compress(syntax, generate_instance_uid=False)
        return dataset
    if syntax == ExplicitVRBigEndian:
        width = f"u{dataset.BitsAllocated // 8}"
        dataset.PixelData = (
            np.frombuffer(dataset.PixelData, f"<{width}").astype(f">{width}").tobytes()
        )
        dataset["PixelData"].VR = "OW" if dataset.BitsAllocated == 16 else "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset
