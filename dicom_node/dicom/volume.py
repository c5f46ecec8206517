"""A series as volumes: divide it, and load one into physical units with the way back.

`group_volumes` never mixes two volumes of one series; `check` (from `acceptance`) is the table
of what is restored, held and refused; `load` decodes one volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicom_node.dicom import geometry, pixels
from dicom_node.dicom.acceptance import TASK_MODALITY, Finding, check, gap_note
from dicom_node.dicom.geometry import SliceFrame
from dicom_node.dicom.header import number, read_dataset, text, texts
from dicom_node.dicom.pixels import Rescale
from dicom_node.dicom.suv import suv_factor
from dicom_node.errors import RefusedError
from dicom_node.settings import PolicySettings

__all__ = [
    "TASK_MODALITY",
    "WHOLE",
    "Finding",
    "Scale",
    "SeriesVolume",
    "VolumeGroup",
    "check",
    "group_volumes",
    "load",
]

WHOLE = "whole"
"""The key of the one volume of a series that is not divided."""

# A PET volume without SUV is brought to where the brain and bladder lie in most SUV images.
_SCALED_PEAK = 10.0
_SCALED_QUANTILE = 0.999

_UNITS = {"ct_denoise": "HU", "pet_synthesis": "SUV", "mri_sr": "a.u."}


@dataclass(frozen=True)
class VolumeGroup:
    """Instances that make one volume, in slice order; note says what is missing beside them."""

    key: str
    sop_instance_uids: tuple[str, ...]
    note: str | None = None


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
    """One volume in memory, slices in order of position."""

    headers: tuple[Dataset, ...]  # without pixels
    stored: NDArray[Any]  # (S, R, C) as stored
    array: NDArray[np.float32]  # (S, R, C) HU | SUV | MR arbitrary units
    scale: Scale
    padding: NDArray[np.bool_] | None  # (S, R, C); None: no padding pixel
    spacing: tuple[float, float, float]  # (z, y, x) mm
    runs: tuple[range, ...]  # slices without a gap between them
    affine: NDArray[np.float64]  # 4×4, (slice, row, column) → LPS mm
    warnings: tuple[str, ...]


def group_volumes(headers: Sequence[Dataset], split_by: Sequence[str] = ()) -> list[VolumeGroup]:
    """Divide the instances of one series into volumes, each with slices in order of position.

    split_by names attributes whose values make volumes of their own: echo_time, b_value,
    image_type, temporal_position. Slices of another matrix or kernel and further slices at one
    position are volumes of their own too. A gap does not divide a volume, since restored slices
    stay where they are; the note tells of it. A series that has no order in space (positions
    absent, several orientations) stays whole, for `check` to refuse.
    """
    if not headers:
        return []
    frames = _frames(headers)
    if frames is None:
        uids = sorted(text(header, "SOPInstanceUID") for header in headers)
        return [VolumeGroup(WHOLE, tuple(uids))]
    volumes = [
        volume
        for key, members in _by_attributes(headers, split_by)
        for volume in _by_position(key, members, frames, headers)
    ]
    whole = len(volumes) == 1
    return [
        VolumeGroup(
            WHOLE if whole else ",".join(key),
            tuple(text(headers[i], "SOPInstanceUID") for i in members),
            note or _announced(headers, members),
        )
        for key, members, note in volumes
    ]


Key = tuple[str, ...]
Members = list[int]


def _frames(headers: Sequence[Dataset]) -> list[SliceFrame] | None:
    try:
        frames = [geometry.slice_frame(header) for header in headers]
    except RefusedError:
        return None
    return frames if geometry.one_orientation(frames) else None


def _joined(keyword: str) -> Callable[[Dataset], str]:
    return lambda header: "\\".join(texts(header, keyword))


_ALWAYS: Mapping[str, Callable[[Dataset], str]] = {
    "rows": _joined("Rows"),
    "columns": _joined("Columns"),
    "pixel_spacing": _joined("PixelSpacing"),
    "signed": _joined("PixelRepresentation"),
    "allocated": _joined("BitsAllocated"),
    "kernel": _joined("ConvolutionKernel"),
    "units": _joined("Units"),
}
_ON_REQUEST: Mapping[str, Callable[[Dataset], str]] = {
    "echo_time": _joined("EchoTime"),
    "b_value": _joined("DiffusionBValue"),
    "image_type": _joined("ImageType"),
    "temporal_position": _joined("TemporalPositionIdentifier"),
}


def _by_attributes(
    headers: Sequence[Dataset], split_by: Sequence[str]
) -> list[tuple[Key, Members]]:
    """Indices by the values of those attributes that differ within the series."""
    readers = {**_ALWAYS, **{name: _ON_REQUEST[name] for name in split_by}}
    values = {name: [read(header) for header in headers] for name, read in readers.items()}
    differing = [name for name, found in values.items() if len(set(found)) > 1]
    groups: dict[Key, Members] = {}
    for i in range(len(headers)):
        key = tuple(f"{name}={values[name][i]}" for name in differing)
        groups.setdefault(key, []).append(i)
    return sorted(groups.items())


def _by_position(
    key: Key, members: Members, frames: Sequence[SliceFrame], headers: Sequence[Dataset]
) -> Iterator[tuple[Key, Members, str | None]]:
    """Divide one group where positions repeat."""
    along = geometry.positions(frames)
    copies = _copies(members, along, headers)
    for i, copy in enumerate(copies, start=1):
        note = gap_note([len(run) for run in geometry.contiguous_runs(along[copy])])
        yield ((*key, f"copy={i}") if len(copies) > 1 else key), copy, note


def _copies(
    members: Members, along: NDArray[np.float64], headers: Sequence[Dataset]
) -> list[Members]:
    """Volumes of which each has one slice at a position, the earlier acquired first."""
    piles: list[Members] = []
    for i in sorted(members, key=lambda i: float(along[i])):
        if piles and geometry.has_duplicates(along[[piles[-1][0], i]]):
            piles[-1].append(i)
        else:
            piles.append([i])
    piles = [sorted(pile, key=lambda i: _acquired(headers[i])) for pile in piles]
    return [
        [pile[depth] for pile in piles if depth < len(pile)]
        for depth in range(max(map(len, piles)))
    ]


def _acquired(header: Dataset) -> tuple[float, str, str, float, str]:
    """When a slice was acquired, as far as the header tells; the UID settles the rest."""
    return (
        number(header, "AcquisitionNumber") or 0.0,
        text(header, "AcquisitionDate") + text(header, "AcquisitionTime"),
        text(header, "ContentTime"),
        number(header, "InstanceNumber") or 0.0,
        text(header, "SOPInstanceUID"),
    )


def _announced(headers: Sequence[Dataset], members: Members) -> str | None:
    # PS3.3 C.8.9.1.1.4: Number of Slices is that of one volume of the series.
    announced = max(number(headers[i], "NumberOfSlices") or 0.0 for i in members)
    if len(members) >= announced:
        return None
    return f"{len(members)} of the {announced:.0f} slices that Number of Slices announces"


def load(paths: Sequence[Path], task: str, policy: PolicySettings) -> SeriesVolume:
    """Load the files of one volume into physical units.

    Raises RefusedError where the volume is outside what may be restored, UnreadableInstanceError
    where a file does not parse or its pixels do not decode.
    """
    datasets = [read_dataset(path) for path in paths]
    if not datasets:
        raise RefusedError("no instance to restore")
    findings = check(datasets, task=task, policy=policy)
    against = [finding.reason for finding in findings if finding.level != "warn"]
    if against:
        raise RefusedError("; ".join(against))
    frames = [geometry.slice_frame(dataset) for dataset in datasets]
    uids = [text(dataset, "SOPInstanceUID") for dataset in datasets]
    order = geometry.order(frames, uids)
    warnings = tuple(finding.reason for finding in findings)
    return _assemble([datasets[i] for i in order], [frames[i] for i in order], task, warnings)


def _assemble(
    datasets: Sequence[Dataset],
    frames: Sequence[SliceFrame],
    task: str,
    warnings: tuple[str, ...],
) -> SeriesVolume:
    stored = np.stack([pixels.decode(dataset) for dataset in datasets])
    for dataset in datasets:
        del dataset.PixelData
    rescales = tuple(pixels.rescale(dataset) for dataset in datasets)
    padding = np.stack(
        [
            pixels.padding_mask(slice_, dataset, by)
            for slice_, dataset, by in zip(stored, datasets, rescales, strict=True)
        ]
    )
    native = [pixels.to_physical(s, by) for s, by in zip(stored, rescales, strict=True)]
    per_native, units = _unit_factor(datasets, task, native)
    along = geometry.positions(frames)
    spacing_z = geometry.slice_spacing(along, datasets[0])
    return SeriesVolume(
        headers=tuple(datasets),
        stored=stored,
        array=np.stack([(values * per_native).astype(np.float32) for values in native]),
        scale=Scale(rescales, per_native, units),
        padding=padding if padding.any() else None,
        spacing=(spacing_z, *frames[0].spacing),
        runs=tuple(geometry.contiguous_runs(along)),
        affine=geometry.affine(frames, spacing_z),
        warnings=warnings,
    )


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
