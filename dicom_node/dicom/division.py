"""How the instances of a series, or the frames of one image, are divided into volumes.

`group_volumes` never mixes two volumes of one series. `judge` says which of the volumes of one
job may be restored, by the table of `acceptance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicom_node.dicom import geometry, multiframe
from dicom_node.dicom.acceptance import check
from dicom_node.dicom.expected import Evidence, ranges, slice_count, slice_gaps
from dicom_node.dicom.geometry import SliceFrame
from dicom_node.dicom.header import number, text, texts
from dicom_node.errors import RefusedError
from dicom_node.settings import PolicySettings

__all__ = ["WHOLE", "Judgement", "Part", "VolumeGroup", "group_volumes", "judge", "representative"]

WHOLE = "whole"
"""The key of the one volume of a series that is not divided."""


@dataclass(frozen=True)
class VolumeGroup:
    """Instances that make one volume, in slice order, and what says whether it is whole."""

    key: str
    sop_instance_uids: tuple[str, ...]
    evidence: tuple[Evidence, ...] = ()

    @property
    def note(self) -> str | None:
        """What is missing beside them, in words."""
        return "; ".join(each.words for each in self.evidence if each.verdict == "short") or None


@dataclass(frozen=True)
class Part:
    """One volume within a multi-frame image: frame numbers from 1 in slice order."""

    key: str
    frames: tuple[int, ...]
    headers: tuple[Dataset, ...]  # flat, one for each frame
    gaps: Evidence | None


@dataclass(frozen=True)
class Judgement:
    """What may be restored of one job; parts is empty for classic images, which are one volume."""

    parts: tuple[Part, ...]
    warnings: tuple[str, ...]


def judge(headers: Sequence[Dataset], *, task: str, policy: PolicySettings) -> Judgement:
    """Which volumes of the images of one job may be restored, and with what warnings.

    Volumes of a multi-frame image that may not be restored are left out, as a classic series
    leaves out the instances of such a volume, and the warnings say so.
    Raises RefusedError with every reason where nothing is left.
    """
    if not any(multiframe.is_multiframe(header) for header in headers):
        return Judgement((), _warnings_of(headers, task, policy))
    if len(headers) > 1:
        raise RefusedError("several multi-frame images in one volume")
    parts: list[Part] = []
    warnings: dict[str, None] = {}
    refused: dict[str, list[int]] = {}
    for part in _parts(multiframe.frame_headers(headers[0]), policy.split_by):
        try:
            warnings.update(dict.fromkeys(_warnings_of(part.headers, task, policy)))
            parts.append(part)
        except RefusedError as error:
            refused.setdefault(error.message, []).extend(part.frames)
    if not parts:
        raise RefusedError("; ".join(refused))
    for reason, frames in refused.items():
        warnings[f"frames {ranges(frames)} left out: {reason}"] = None
    return Judgement(tuple(parts), tuple(warnings))


def _warnings_of(headers: Sequence[Dataset], task: str, policy: PolicySettings) -> tuple[str, ...]:
    findings = check(headers, task=task, policy=policy)
    against = [finding.reason for finding in findings if finding.level != "warn"]
    if against:
        raise RefusedError("; ".join(against))
    return tuple(finding.reason for finding in findings)


def representative(headers: Sequence[Dataset]) -> Dataset:
    """The header that rules are tested on: of the middle slice, or the middle frame.

    Tube current is modulated along the patient, and the ends are odd.
    """
    middle = headers[len(headers) // 2]
    if not multiframe.is_multiframe(middle):
        return middle
    try:
        frames = multiframe.frame_headers(middle)
    except RefusedError:
        return middle
    return frames[len(frames) // 2]


def group_volumes(headers: Sequence[Dataset], split_by: Sequence[str] = ()) -> list[VolumeGroup]:
    """Divide the instances of one series into volumes, each with slices in order of position.

    split_by names attributes whose values make volumes of their own: echo_time, b_value,
    image_type, temporal_position. Slices of another matrix or kernel and further slices at one
    position are volumes of their own too. A gap does not divide a volume, since restored slices
    stay where they are; the note tells of it. A series that has no order in space (positions
    absent, several orientations) stays whole, for `judge` to refuse. A multi-frame image is a
    group of its own, whatever volumes it holds.
    """
    classic = [header for header in headers if not multiframe.is_multiframe(header)]
    groups = _classic_groups(classic, split_by)
    objects = [_object_group(h, split_by) for h in headers if multiframe.is_multiframe(h)]
    if len(objects) == 1 and not groups:
        return [replace(objects[0], key=WHOLE)]
    return [*groups, *sorted(objects, key=lambda group: group.key)]


def _object_group(header: Dataset, split_by: Sequence[str]) -> VolumeGroup:
    """A multi-frame image: its volumes are restored one by one and written back into one."""
    uid = text(header, "SOPInstanceUID")
    try:
        parts = _parts(multiframe.frame_headers(header), split_by)
    except RefusedError:
        parts = []
    gaps = dict.fromkeys(part.gaps for part in parts if part.gaps)
    return VolumeGroup(f"object={uid}", (uid,), tuple(gaps))


def _classic_groups(headers: Sequence[Dataset], split_by: Sequence[str]) -> list[VolumeGroup]:
    if not headers:
        return []
    frames = _frames(headers)
    if frames is None:
        uids = sorted(text(header, "SOPInstanceUID") for header in headers)
        return [VolumeGroup(WHOLE, tuple(uids))]
    volumes = [
        volume
        for key, members in _by_attributes(headers, _readers(split_by))
        for volume in _by_position(key, members, frames, headers)
    ]
    whole = len(volumes) == 1
    return [
        VolumeGroup(
            WHOLE if whole else ",".join(key),
            tuple(text(headers[i], "SOPInstanceUID") for i in members),
            _evidence(gaps, [headers[i] for i in members]),
        )
        for key, members, gaps in volumes
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
_OF_FRAMES: Mapping[str, Callable[[Dataset], str]] = {
    "orientation": _joined("ImageOrientationPatient"),
    **{keyword: _joined(keyword) for keyword in multiframe.VOLUME_ATTRIBUTES},
}
_APART_BY: Mapping[str, str] = {
    "acquisition": "AcquisitionNumber",
    "phase": "TriggerTime",
    "cardiac_phase": "NominalPercentageOfCardiacPhase",
    "frame_reference_time": "FrameReferenceTime",
    "acquired": "AcquisitionTime",
    "content": "ContentTime",
}
_LEAST_SLICES = 2

_ON_REQUEST: Mapping[str, Callable[[Dataset], str]] = {
    "echo_time": _joined("EchoTime"),
    "b_value": _joined("DiffusionBValue"),
    "image_type": _joined("ImageType"),
    "temporal_position": _joined("TemporalPositionIdentifier"),
}


def _readers(split_by: Sequence[str]) -> Mapping[str, Callable[[Dataset], str]]:
    return {**_ALWAYS, **{name: _ON_REQUEST[name] for name in split_by}}


def _parts(headers: Sequence[Dataset], split_by: Sequence[str]) -> list[Part]:
    """The volumes within the frames of one multi-frame image; headers in the order of frames."""
    parts = []
    for key, members in _by_attributes(headers, {**_OF_FRAMES, **_readers(split_by)}):
        own = [headers[i] for i in members]
        frames = _frames(own)
        if frames is None:  # for `judge` to refuse
            parts.append(Part(",".join(key), tuple(i + 1 for i in members), tuple(own), None))
            continue
        for names, places, gaps in _by_position(key, list(range(len(own))), frames, own):
            chosen = tuple(members[place] + 1 for place in places)
            parts.append(Part(",".join(names), chosen, tuple(own[place] for place in places), gaps))
    return parts


def _by_attributes(
    headers: Sequence[Dataset], readers: Mapping[str, Callable[[Dataset], str]]
) -> list[tuple[Key, Members]]:
    """Indices by the values of those attributes that differ within the series."""
    values = {name: [read(header) for header in headers] for name, read in readers.items()}
    differing = [name for name, found in values.items() if len(set(found)) > 1]
    groups: dict[Key, Members] = {}
    for i in range(len(headers)):
        key = tuple(f"{name}={values[name][i]}" for name in differing)
        groups.setdefault(key, []).append(i)
    return sorted(groups.items())


def _by_position(
    key: Key, members: Members, frames: Sequence[SliceFrame], headers: Sequence[Dataset]
) -> Iterator[tuple[Key, Members, Evidence | None]]:
    """Divide one group where positions repeat."""
    along = geometry.positions(frames)
    for name, copy in _apart(members, along, headers):
        yield ((*key, name) if name else key), copy, slice_gaps(along[copy])


def _apart(
    members: Members, along: NDArray[np.float64], headers: Sequence[Dataset]
) -> list[tuple[str, Members]]:
    """Volumes of which each has one slice at a position, by name.

    Phases, time frames and beds are told apart by the first attribute that does so; slices that
    none tells apart, in the order of acquisition.
    """
    ordered = sorted(members, key=lambda i: float(along[i]))
    if not geometry.has_duplicates(along[ordered]):
        return [("", ordered)]
    for name, keyword in _APART_BY.items():
        piles = _piles(ordered, keyword, headers)
        # An attribute that every slice has for itself tells slices apart, not volumes.
        if len(piles) < 2 or len(members) < _LEAST_SLICES * len(piles):
            continue
        if not any(geometry.has_duplicates(along[pile]) for pile in piles.values()):
            return [(f"{name}={value}", pile) for value, pile in piles.items()]
    copies = _copies(members, along, headers)
    return [(f"copy={i}", copy) for i, copy in enumerate(copies, start=1)]


def _piles(ordered: Members, keyword: str, headers: Sequence[Dataset]) -> dict[str, Members]:
    """Indices by the value of an attribute, the lowest value first, each pile in their order."""
    read = _joined(keyword)
    firsts = {read(headers[i]): number(headers[i], keyword) or 0.0 for i in ordered}
    values = sorted(firsts, key=lambda value: (firsts[value], value))
    return {value: [i for i in ordered if read(headers[i]) == value] for value in values}


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


def _evidence(gaps: Evidence | None, headers: Sequence[Dataset]) -> tuple[Evidence, ...]:
    return tuple(each for each in (gaps, slice_count(headers)) if each is not None)
