"""A series as volumes in physical units, with the way back.

`load_volumes` decodes what one job restores: the volume of a classic series, or one after the
other the volumes of a multi-frame image. How a series is divided is said in `division`, what is
restored, held and refused in `acceptance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicom_node.dicom import geometry, lossy, multiframe, pixels
from dicom_node.dicom.division import Judgement, judge
from dicom_node.dicom.header import number, read_dataset, read_pixels, text
from dicom_node.dicom.pixels import Rescale
from dicom_node.dicom.planes import OnDemand, Planes
from dicom_node.dicom.scratch import Scratch
from dicom_node.dicom.sharing import Shared
from dicom_node.dicom.suv import suv_factor
from dicom_node.errors import RefusedError
from dicom_node.settings import PolicySettings

__all__ = ["Scale", "SeriesVolume", "load", "load_volumes", "read_slice_header"]

# A PET volume without SUV is brought to where the brain and bladder lie in most SUV images.
_SCALED_PEAK = 10.0
_SCALED_QUANTILE = 0.999

# What pixels mean and where they lie hangs on these: one that cannot be read is not one that is
# absent, for which there are defaults.
_DECISIVE = frozenset(
    {
        "NumberOfFrames",
        "PixelRepresentation",
        "PixelPaddingValue",
        "PixelPaddingRangeLimit",
        "RescaleSlope",
        "RescaleIntercept",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
    }
)

# Tasks whose slices are in their units without a look at the others.
_ABSOLUTE = frozenset({"ct_denoise", "mri_sr"})
_UNITS = {"ct_denoise": "HU", "pet_synthesis": "SUV", "mri_sr": "a.u."}


@dataclass(frozen=True)
class Scale:
    """The way from stored values to the volume's units and back.

    array = (stored · slope + intercept) · per_native, slope and intercept by slice; per_native
    is 1 but for PET, where it is SUV per Bq/ml (or a plain number where units is "scaled").
    """

    rescales: tuple[Rescale, ...]
    per_native: float
    units: str


@dataclass(frozen=True)
class SeriesVolume:
    """One volume, slices in order of position; of slices that are read later, planes on demand."""

    headers: tuple[Dataset, ...]  # without pixels; of a frame: `multiframe.frame_headers`
    stored: Planes  # (S, R, C) as stored
    array: Planes  # (S, R, C) float32, HU | SUV | MR arbitrary units
    scale: Scale
    padding: Planes | None  # (S, R, C) bool; None: no padding pixel
    spacing: tuple[float, float, float]  # (z, y, x) mm
    runs: tuple[range, ...]  # slices without a gap between them
    affine: NDArray[np.float64]  # 4×4, (slice, row, column) → LPS mm
    warnings: tuple[str, ...]
    source: Dataset | None = None  # the multi-frame image without pixels; None: classic
    frames: tuple[int, ...] | None = None  # numbers of its frames, from 1; None: classic


def load(paths: Sequence[Path], task: str, policy: PolicySettings) -> SeriesVolume:
    """Load the files of one volume into physical units; errors as for `load_volumes`.

    Raises RefusedError too where the files hold several volumes.
    """
    volumes = load_volumes(paths, task, policy)
    first = next(volumes)
    if next(volumes, None) is not None:
        raise RefusedError("several volumes where one is expected")
    return first


def read_slice_header(path: Path, shared: Shared) -> Dataset:
    """The header of a file as `load_volumes` reads it; errors as there. *shared*: of its series."""
    return read_dataset(path, pixels=False, decisive=_DECISIVE, shared=shared)


def load_volumes(
    paths: Sequence[Path],
    task: str,
    policy: PolicySettings,
    scratch: Scratch | None = None,
    known: Mapping[Path, Dataset] | None = None,
    later: Callable[[Dataset], bool] | None = None,
) -> Iterator[SeriesVolume]:
    """Load what one job restores into physical units, one volume at a time.

    Files of classic images are one volume; the file of a multi-frame image holds one or more.
    Large arrays are those of *scratch*. Headers that are *known*, from `read_slice_header`, are
    not read again. *later* tells by the header of a slice whether its pixels are to be read when
    they are asked for, and not now: errors come then too. Those of PET, whose scale may hang on all
    of them, are read now.

    Raises RefusedError where no volume may be restored, UnreadableInstanceError where a file
    does not parse or its pixels do not decode.
    """
    shared = Shared()
    before = known or {}
    headers = [
        before[path] if path in before else read_slice_header(path, shared) for path in paths
    ]
    shared.clear()  # what few of them have is not to be held twice
    if not headers:
        raise RefusedError("no instance to restore")
    judged = judge(headers, task=task, policy=policy)
    room = scratch or Scratch()
    if any(multiframe.is_multiframe(header) for header in headers):
        (path,) = paths
        dataset = read_dataset(path, decisive=_DECISIVE)
        lossy.record(dataset)
        yield from _load_multiframe(dataset, task, judged, room)
    else:
        yield _load_classic(headers, paths, task, judged, room, later)


def _load_classic(
    headers: Sequence[Dataset],
    paths: Sequence[Path],
    task: str,
    judged: Judgement,
    scratch: Scratch,
    later: Callable[[Dataset], bool] | None,
) -> SeriesVolume:
    frames = [geometry.slice_frame(header) for header in headers]
    uids = [text(header, "SOPInstanceUID") for header in headers]
    order = geometry.order(frames, uids)
    ordered = [headers[i] for i in order]
    if later is not None and task in _ABSOLUTE and any(later(header) for header in ordered):
        files = [paths[i] for i in order]
        return _partly(ordered, files, task, judged.warnings, scratch, later)
    planes = (_decoded(headers[i], paths[i]) for i in order)
    return _assemble(ordered, planes, task, judged.warnings, scratch)


def _partly(
    headers: Sequence[Dataset],
    files: Sequence[Path],
    task: str,
    warnings: tuple[str, ...],
    scratch: Scratch,
    later: Callable[[Dataset], bool],
) -> SeriesVolume:
    """A volume of which some slices, in order, are read now and others when they are asked for."""
    rescales = tuple(pixels.rescale(header) for header in headers)
    kind = pixels.pixel_format(headers[0]).dtype
    shape = (len(headers), *(int(number(headers[0], key) or 0) for key in ("Rows", "Columns")))
    read: dict[int, NDArray[Any]] = {}
    for i, header in enumerate(headers):
        if not later(header):
            read[i] = scratch.keep(_decoded(header, files[i]))
            scratch.release()

    def stored(i: int) -> NDArray[Any]:
        return read[i] if i in read else _decoded(headers[i], files[i])

    def physical(i: int) -> NDArray[Any]:
        return pixels.to_physical(stored(i), rescales[i]).astype(np.float32)

    def padding(i: int) -> NDArray[Any]:
        return pixels.padding_mask(stored(i), headers[i], rescales[i])

    return _placed(
        headers,
        OnDemand(shape, kind, stored),
        OnDemand(shape, np.float32, physical),
        OnDemand(shape, np.bool_, padding),
        Scale(rescales, 1.0, _UNITS[task]),
        warnings,
    )


def _decoded(header: Dataset, path: Path) -> NDArray[Any]:
    """The stored values of a classic image, whose pixel data are held no longer than it takes."""
    element = read_pixels(path)
    header[element.tag] = element
    try:
        lossy.record(header)
        return pixels.decode(header)
    finally:
        del header[element.tag]


def _load_multiframe(
    dataset: Dataset, task: str, judged: Judgement, scratch: Scratch
) -> Iterator[SeriesVolume]:
    source = Dataset()
    source.update(dataset)
    source.file_meta = dataset.file_meta
    del source.PixelData
    warnings = judged.warnings
    for part in judged.parts:
        planes = (pixels.decode(dataset, number) for number in part.frames)
        whole = _assemble(part.headers, planes, task, warnings, scratch)
        yield replace(whole, source=source, frames=part.frames)
        warnings = ()


def _assemble(
    datasets: Sequence[Dataset],
    planes: Iterable[NDArray[Any]],
    task: str,
    warnings: tuple[str, ...],
    scratch: Scratch,
) -> SeriesVolume:
    rescales = tuple(pixels.rescale(dataset) for dataset in datasets)
    stored, padding = _stacked(datasets, planes, rescales, scratch)
    native = (pixels.to_physical(s, by) for s, by in zip(stored, rescales, strict=True))
    per_native, units = _unit_factor(datasets, task, native)
    array = scratch.empty(stored.shape, np.float32)
    for i, by in enumerate(rescales):
        array[i] = pixels.to_physical(stored[i], by) * per_native
        scratch.release()
    scale = Scale(rescales, per_native, units)
    return _placed(datasets, stored, array, padding, scale, warnings)


def _placed(
    headers: Sequence[Dataset],
    stored: Planes,
    array: Planes,
    padding: Planes | None,
    scale: Scale,
    warnings: tuple[str, ...],
) -> SeriesVolume:
    """The planes of a volume with where they lie."""
    frames = [geometry.slice_frame(header) for header in headers]
    along = geometry.positions(frames)
    spacing_z = geometry.slice_spacing(along, headers[0])
    return SeriesVolume(
        headers=tuple(headers),
        stored=stored,
        array=array,
        scale=scale,
        padding=padding,
        spacing=(spacing_z, *frames[0].spacing),
        runs=tuple(geometry.contiguous_runs(along)),
        affine=geometry.affine(frames, spacing_z),
        warnings=warnings,
    )


def _stacked(
    datasets: Sequence[Dataset],
    planes: Iterable[NDArray[Any]],
    rescales: Sequence[Rescale],
    scratch: Scratch,
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Stored values and what of them is padding, slice by slice; None where nothing is."""
    stored: NDArray[Any] | None = None
    padding: NDArray[np.bool_] | None = None
    for i, (plane, dataset, by) in enumerate(zip(planes, datasets, rescales, strict=True)):
        if stored is None:
            stored = scratch.empty((len(datasets), *plane.shape), plane.dtype)
        stored[i] = plane
        mask = pixels.padding_mask(plane, dataset, by)
        if padding is None and mask.any():
            padding = scratch.empty(stored.shape, np.bool_)
            padding[:i] = False
        if padding is not None:
            padding[i] = mask
        scratch.release()
    assert stored is not None
    return stored, padding


def _unit_factor(
    headers: Sequence[Dataset], task: str, native: Iterable[NDArray[np.float64]]
) -> tuple[float, str]:
    if task != "pet_synthesis":
        return 1.0, _UNITS[task]
    factor = suv_factor(headers).value
    if factor is not None:
        return factor, _UNITS[task]
    peak = float(np.quantile(np.stack(list(native)), _SCALED_QUANTILE))
    return (_SCALED_PEAK / peak if peak > 0.0 else 1.0), "scaled"
