"""Find the series among packs, NIfTI files and DICOM folders, and read them in physical units."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from restoration.tasks import RestorationTask, why_no_magnitude
from training import medz

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Volume = npt.NDArray[np.float32]

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_OTHER_FILES = {".json", ".txt", ".md", ".csv", ".tsv", ".pdf", ".xml", ".py", ".html", ".bval",
                ".bvec", ".zip", ".xlsx", ".xls", ".tcia"}  # fmt: skip
_OTHER_NAMES = {"dicomdir", "license", "readme"}
# What lies beside the images of a study: segmentations, reports, plans, presentation states.
_COMPANIONS = {"SEG", "SR", "RTSTRUCT", "RTDOSE", "RTPLAN", "PR", "KO", "REG", "RWV", "DOC"}
_RAW_DATA = "1.2.840.10008.5.1.4.1.1.66"
_PROJECTIONS = re.compile(r"\bprojections?\b", re.IGNORECASE)
_TASKS = {
    "CT": RestorationTask.CT_DENOISE,
    "MR": RestorationTask.MRI_SR,
    "PT": RestorationTask.PET_SYNTHESIS,
}
_NIFTI_NAMES = (
    (r"t2w?", "MR", "T2"),
    (r"t1w?", "MR", "T1"),
    (r"flair", "MR", "FLAIR"),
    (r"pdw?", "MR", "PD"),
    (r"mri?", "MR", None),
    (r"ct|ldct", "CT", None),
    (r"pet|pt|suv|fdg", "PT", None),
)


class SourceError(ValueError):
    """A source cannot be used; the message says what and where."""


@dataclass(frozen=True)
class Series:
    """One series that can be read: its facts, and a function that reads it."""

    name: str
    task: RestorationTask
    subject: str
    source: str
    licence: str
    spacing_mm: tuple[float, float, float]
    where: str
    """File or folder, for messages."""
    read: Callable[[], Volume]
    """Pixels in physical units, float32 [slice, row, column]; raises SourceError."""
    validation: bool = False
    """The source itself marks the series as held out."""
    contrast: str | None = None
    noise_hu: float | None = None
    low_dose: bool = False
    """The low-dose half of a real pair, as in the LDCT-and-Projection-data collection."""
    positions: tuple[float, ...] = ()
    """Slice positions in mm, where the source tells them."""
    slices: int | None = None
    """How many there are, where the source tells it."""

    def volume(self) -> Volume:
        """Read and check. Raises SourceError naming the slice that is not finite."""
        volume = self.read()
        bad = ~np.isfinite(volume).all(axis=(1, 2))
        if bad.any():
            raise SourceError(f"{self.where}: slice {int(bad.argmax())} holds NaN or infinity.")
        if min(volume.shape[1:]) < 8:
            raise SourceError(f"{self.where}: slices of {volume.shape[1:]} are below 8 x 8.")
        if volume.min() == volume.max():
            raise SourceError(f"{self.where}: the image is empty, every value is {volume.min()}.")
        if self.task is RestorationTask.CT_DENOISE and volume.min() > -200:
            raise SourceError(f"{self.where}: not CT in HU, the lowest value is {volume.min()}.")
        reason = why_no_magnitude(volume) if self.task is RestorationTask.MRI_SR else None
        if reason:
            raise SourceError(f"{self.where}: {reason}")
        return volume


def discover(sources: Sequence[Path], tasks: Sequence[RestorationTask]) -> list[Series]:
    """All series of the given tasks, without reading pixels.

    Raises SourceError for a missing or empty source, a picture, an unreadable file, a modality
    that is not CT, MR or PET, and when nothing serves the tasks.
    """
    series: list[Series] = []
    for source in sources:
        if not source.exists():
            raise SourceError(f"{source} does not exist.")
        found = list(_discover_one(source, tasks))
        if not found:
            raise SourceError(f"{source} holds no image series.")
        series += found
    wanted = [each for each in series if each.task in tasks]
    if not wanted:
        names = ", ".join(task.value for task in tasks)
        raise SourceError(f"No series among the sources serves the tasks asked for: {names}.")
    return wanted


def _discover_one(source: Path, tasks: Sequence[RestorationTask]) -> Iterator[Series]:
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    dicom = []
    for path in files:
        name = path.name.lower()
        if name.startswith(".") or name in _OTHER_NAMES:
            continue
        if path.suffix.lower() in PICTURES:
            raise SourceError(f"{path} is an 8-bit picture, not an image in physical units.")
        if name.endswith(".medz"):
            yield from _pack_series(path)
        elif name.endswith((".nii", ".nii.gz")):
            yield _nifti_series(path, tasks)
        elif path.suffix.lower() not in _OTHER_FILES:
            dicom.append(path)
    yield from _dicom_series(dicom)


def _pack_series(path: Path) -> Iterator[Series]:
    try:
        items = medz.read_items(path)
    except medz.MedzError as error:
        raise SourceError(str(error)) from error
    for item in items:
        meta = item.meta
        where = f"{path}: item {item.name!r}"
        yield Series(
            name=f"{path.stem.removeprefix('val_')}-{_slug(item.name)}",
            task=_task_of(str(meta.get("modality")), where),
            subject=str(meta.get("patient") or item.name),
            source=str(meta.get("source", "unknown")),
            licence=str(meta.get("licence", "unknown")),
            spacing_mm=_spacing(meta.get("spacing_mm"), where),
            where=where,
            read=partial(_read_pack, item),
            validation=path.name.startswith("val_"),
            contrast=_contrast(meta.get("contrast")),
            noise_hu=meta.get("noise_hu"),
            slices=item.shape[0],
        )


def _read_pack(item: medz.PackItem) -> Volume:
    try:
        stored = medz.read_volume(item)
    except medz.MedzError as error:
        raise SourceError(str(error)) from error
    slope = np.asarray(item.meta.get("slope", 1.0), np.float64).reshape(-1, 1, 1)
    intercept = np.asarray(item.meta.get("intercept", 0.0), np.float64).reshape(-1, 1, 1)
    physical = (stored * slope + intercept) * float(item.meta.get("suv_factor", 1.0))
    return np.asarray(physical, np.float32)


def _nifti_series(path: Path, tasks: Sequence[RestorationTask]) -> Series:
    import nibabel

    try:
        header: Any = nibabel.load(path).header
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError) as error:
        raise SourceError(f"{path} is not a readable NIfTI file: {error}") from error
    if header.get_data_dtype().itemsize == 1:
        raise SourceError(f"{path} is an 8-bit picture, not an image in physical units.")
    stem = path.name.lower().removesuffix(".gz").removesuffix(".nii")
    modality, contrast = _nifti_kind(path, stem, tasks)
    zooms = [float(zoom) for zoom in header.get_zooms()[:3]]
    return Series(
        name=_slug(stem),
        task=_TASKS[modality],
        subject=_nifti_subject(stem),
        source=path.name,
        licence="unknown",
        spacing_mm=(zooms[2], zooms[1], zooms[0]),
        where=str(path),
        read=partial(_read_nifti, path),
        validation=path.name.startswith("val_"),
        contrast=contrast,
    )


def _nifti_kind(path: Path, stem: str, tasks: Sequence[RestorationTask]) -> tuple[str, str | None]:
    words = re.split(r"[^a-z0-9]+", stem)
    for pattern, modality, contrast in _NIFTI_NAMES:
        if any(re.fullmatch(pattern, word) for word in words):
            return modality, contrast
    if len(tasks) == 1:
        return next(name for name, task in _TASKS.items() if task is tasks[0]), None
    raise SourceError(
        f"{path}: NIfTI does not say its modality; name one task, or put T1, T2, CT or PET "
        "into the file name."
    )


def _nifti_subject(stem: str) -> str:
    """BIDS ``sub-XX``, else the first word: IXI's ``IXI002-Guys-0828-T2`` is IXI002."""
    stem = stem.removeprefix("val_")
    bids = re.match(r"sub-[a-z0-9]+", stem)
    return bids.group() if bids else re.split(r"[-_.]", stem)[0]


def _read_nifti(path: Path) -> Volume:
    import nibabel

    try:
        image: Any = nibabel.as_closest_canonical(nibabel.load(path))  # type: ignore[no-untyped-call]
        data = np.asarray(image.dataobj, np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise SourceError(f"{path} is not a readable NIfTI file: {error}") from error
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise SourceError(f"{path} has {data.ndim} dimensions, not 3.")
    # NIfTI is right-anterior-superior; DICOM rows and columns run to the left and posterior.
    return np.ascontiguousarray(data[::-1, ::-1].transpose(2, 1, 0))


def _dicom_series(paths: Sequence[Path]) -> Iterator[Series]:
    if not paths:
        return
    groups: dict[str, list[tuple[Path, Dataset]]] = defaultdict(list)
    for path in paths:
        header = _dicom_header(path)
        if header is not None:
            groups[str(header.SeriesInstanceUID)].append((path, header))
    for members in groups.values():
        yield _one_dicom_series(sorted(members, key=lambda member: _position(member[1])))


def _dicom_header(path: Path) -> Dataset | None:
    """The header of a slice; None for what a study holds beside its slices."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except (InvalidDicomError, OSError, EOFError) as error:
        raise SourceError(f"{path} is not a DICOM file: {error}") from error
    if _is_beside_the_slices(header):
        return None
    _task_of(str(header.get("Modality")), str(path))
    if header.get("BitsStored", 16) <= 8 or header.get("SamplesPerPixel", 1) != 1:
        raise SourceError(f"{path} is an 8-bit picture, not an image in physical units.")
    if int(header.get("NumberOfFrames", 1) or 1) > 1:
        raise SourceError(f"{path} is a multi-frame image, which cannot be prepared.")
    for keyword in ("SeriesInstanceUID", "PixelSpacing", "Rows", "Columns"):
        if keyword not in header:
            raise SourceError(f"{path} has no {keyword}.")
    return header


def _is_beside_the_slices(header: Dataset) -> bool:
    """Segmentations, reports, localizers, and raw data: TCIA keeps CT projections as CT series."""
    return (
        header.get("Modality") in _COMPANIONS
        or header.get("SOPClassUID") == _RAW_DATA
        or bool(_PROJECTIONS.search(str(header.get("SeriesDescription", ""))))
        or "LOCALIZER" in [str(part) for part in header.get("ImageType", None) or []]
    )


def _one_dicom_series(members: Sequence[tuple[Path, Dataset]]) -> Series:
    (first, header), headers = members[0], [each for _, each in members]
    where = str(first.parent)
    if len({(each.Rows, each.Columns) for each in headers}) > 1:
        raise SourceError(f"{where}: the slices of a series have different sizes.")
    # Identifiers stay out of the manifest: a hash still keeps a patient's series together.
    patient = str(header.get("PatientID") or header.get("StudyInstanceUID") or where)
    subject = "dicom-" + hashlib.sha256(patient.encode()).hexdigest()[:12]
    uid = hashlib.sha256(str(header.SeriesInstanceUID).encode()).hexdigest()[:8]
    description = str(header.get("SeriesDescription", ""))
    rows, columns = (float(value) for value in header.PixelSpacing)
    return Series(
        name=f"{subject}-{uid}",
        task=_task_of(str(header.Modality), where),
        subject=subject,
        source="DICOM",
        licence="unknown",
        spacing_mm=(_slice_distance(headers), rows, columns),
        where=where,
        read=partial(_read_dicom, [path for path, _ in members]),
        contrast=_contrast(description) if header.Modality == "MR" else None,
        positions=tuple(round(_position(each)[0], 2) for each in headers),
        slices=len(members),
        low_dose=bool(re.search(r"\blow[ _-]?dose\b", description, re.IGNORECASE)),
    )


def _position(header: Dataset) -> tuple[float, float]:
    number = float(header.get("InstanceNumber") or 0)
    position, orientation = (
        header.get("ImagePositionPatient"),
        header.get("ImageOrientationPatient"),
    )
    if not position or not orientation:
        return 0.0, number
    normal = np.cross(np.asarray(orientation[:3], float), np.asarray(orientation[3:], float))
    return float(normal @ np.asarray(position, float)), number


def _slice_distance(headers: Sequence[Dataset]) -> float:
    gaps = np.diff([_position(header)[0] for header in headers])
    gaps = gaps[gaps > 1e-3]
    return float(np.median(gaps)) if len(gaps) else float(headers[0].get("SliceThickness") or 1)


def _read_dicom(paths: Sequence[Path]) -> Volume:
    import pydicom

    planes = []
    for path in paths:
        dataset = pydicom.dcmread(path)
        try:
            stored = dataset.pixel_array.astype(np.float64)
        except (AttributeError, RuntimeError, ValueError, NotImplementedError) as error:
            raise SourceError(f"{path}: the pixel data do not decode: {error}") from error
        slope = float(dataset.get("RescaleSlope") or 1)
        physical = stored * slope + float(dataset.get("RescaleIntercept") or 0)
        if dataset.Modality == "CT":
            physical = np.maximum(physical, -1024)  # padding outside the field of view
        elif dataset.Modality == "PT":
            physical *= _suv_factor(dataset, path)
        planes.append(physical.astype(np.float32))
    return np.stack(planes)


def _suv_factor(dataset: Dataset, path: Path) -> float:
    """Factor to SUV by body weight (QIBA FDG-PET/CT profile). Raises SourceError."""
    units = str(dataset.get("Units", ""))
    if units == "GML":
        return 1.0
    try:
        if units != "BQML":
            raise KeyError(f"Units {units!r}")
        tracer = dataset.RadiopharmaceuticalInformationSequence[0]
        grams = float(dataset.PatientWeight) * 1000
        decay = 1.0
        if str(dataset.DecayCorrection) != "ADMIN":
            elapsed = _seconds(dataset.SeriesTime) - _seconds(tracer.RadiopharmaceuticalStartTime)
            decay = 2.0 ** (-(elapsed % 86400) / float(tracer.RadionuclideHalfLife))
        return grams / (float(tracer.RadionuclideTotalDose) * decay)
    except (
        AttributeError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        raise SourceError(f"{path}: PET values do not convert to SUV: {error}") from error


def _seconds(time: object) -> float:
    text = str(time or "").split(".")[0]
    if not text:
        raise ValueError("a time is missing")
    # PS3.5 6.2: a TM value may end after its hours or minutes.
    clock = datetime.strptime(text.ljust(6, "0"), "%H%M%S")  # noqa: DTZ007
    return clock.hour * 3600 + clock.minute * 60 + clock.second


def _task_of(modality: str, where: str) -> RestorationTask:
    if modality not in _TASKS:
        raise SourceError(f"{where}: modality {modality} is not CT, MR or PT.")
    return _TASKS[modality]


def _contrast(text: object) -> str | None:
    for name in ("FLAIR", "T2", "T1", "PD"):
        if name.lower() in str(text or "").lower():
            return name
    return None


def _spacing(values: object, where: str) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3 or min(values) <= 0:
        raise SourceError(f"{where}: spacing_mm is {values}, not three positive numbers.")
    return float(values[0]), float(values[1]), float(values[2])


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")
