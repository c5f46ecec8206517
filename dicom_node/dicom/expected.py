"""What says whether a series is whole: counts that headers announce, and gaps in position.

Each signal is an `Evidence`: what it found beside what it expected, and what that means. A header
that announces nothing makes none; one that contradicts itself is said to prove nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from dicom_node.dicom import geometry
from dicom_node.dicom.acceptance import gap_note
from dicom_node.dicom.header import number, text

__all__ = ["COUNTS", "Evidence", "announced_by", "counts", "ranges", "slice_count", "slice_gaps"]

Verdict = Literal["whole", "short", "unproven"]

#: Signals by which a series that proves whole needs no quiet time.
COUNTS = frozenset(
    {"number_of_slices", "image_index", "images_in_acquisition", "concatenation", "c_find"}
)


@dataclass(frozen=True)
class Evidence:
    """One signal for or against a series being whole."""

    signal: str
    verdict: Verdict
    words: str  #: For a person; no patient data.
    expected: int | None = None
    found: int | None = None
    volume: str | None = None  #: The key of the volume it speaks of; None: the series.

    def as_row(self) -> dict[str, Any]:
        """The evidence as the ledger keeps it: what is unset left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def slice_gaps(along: NDArray[np.float64]) -> Evidence | None:
    """Whether slices at these positions (mm, in order) have one spacing; None: too few to tell."""
    if len(along) < 3:
        return None
    note = gap_note([len(run) for run in geometry.contiguous_runs(along)])
    if note is not None:
        return Evidence("slice_position", "short", note)
    step = float(np.median(np.diff(along)))
    return Evidence("slice_position", "unproven", f"{len(along)} slices, {step:.4g} mm apart")


def slice_count(headers: Sequence[Dataset]) -> Evidence | None:
    """Number of Slices (PS3.3 C.8.9.1.1.4), which is that of one volume of the series."""
    announced = int(max(number(header, "NumberOfSlices") or 0.0 for header in headers))
    if announced < 1:
        return None
    return _compared(
        "number_of_slices",
        announced,
        len(headers),
        f"{len(headers)} of the {announced} slices that Number of Slices announces",
    )


def counts(
    headers: Sequence[Dataset], *, trust_images_in_acquisition: bool = False
) -> list[Evidence]:
    """What the headers of one series announce of it as a whole."""
    looks: tuple[Callable[[Sequence[Dataset]], Iterator[Evidence]], ...] = (
        _time_slices,
        _image_index,
        _temporal_positions,
        _concatenation,
    )
    found = [evidence for look in looks for evidence in look(headers)]
    return [*found, *_images_in_acquisition(headers, trust_images_in_acquisition)]


def announced_by(header: Dataset) -> int | None:
    """How many instances a series must have at the least, by one of its headers; None: unknown.

    To be asked before every header of a series is read: `counts` then tells.
    """
    total = _pet_total(header)
    if total is not None:
        return total
    found = number(header, "ImagesInAcquisition") or number(header, "InConcatenationTotalNumber")
    return int(found) if found else None


def _compared(signal: str, expected: int, found: int, words: str) -> Evidence:
    verdict: Verdict = "whole" if found >= expected else "short"
    return Evidence(signal, verdict, words, expected, found)


def _pet_total(header: Dataset) -> int | None:
    """The instances of a whole PET series: the largest Image Index (PS3.3 C.8.9.4.1.9)."""
    slices = _count(header, "NumberOfSlices")
    if text(header, "Modality") != "PT" or slices is None:
        return None
    kind = text(header, "SeriesType").upper()
    if kind == "DYNAMIC":
        return _product(slices, _count(header, "NumberOfTimeSlices"))
    if kind == "GATED":
        intervals = _count(header, "NumberOfRRIntervals")
        return _product(slices, _count(header, "NumberOfTimeSlots"), intervals)
    return slices


def _count(header: Dataset, keyword: str) -> int | None:
    value = number(header, keyword)
    return int(value) if value is not None and value >= 1 and value.is_integer() else None


def _product(*factors: int | None) -> int | None:
    total = 1
    for factor in factors:
        if factor is None:
            return None
        total *= factor
    return total


def _time_slices(headers: Sequence[Dataset]) -> Iterator[Evidence]:
    """A dynamic or gated PET series lacks whole time slices, which no volume of it would tell."""
    totals = {_pet_total(header) for header in headers}
    kinds = {text(header, "SeriesType").upper() for header in headers}
    if len(totals) != 1 or not kinds <= {"DYNAMIC", "GATED"} or (total := totals.pop()) is None:
        return
    words = f"{len(headers)} of {total} images: {kinds.pop().lower()} PET of that many in all"
    yield _compared("time_slices", total, len(headers), words)


def _image_index(headers: Sequence[Dataset]) -> Iterator[Evidence]:
    """Image Index runs from 1 through a PET series (PS3.3 C.8.9.4.1.9)."""
    found = [_count(header, "ImageIndex") for header in headers]
    indices = [index for index in found if index is not None]
    if not indices or any(text(header, "Modality") != "PT" for header in headers):
        return
    total = max((_pet_total(header) or 0 for header in headers), default=0)
    expected = max(total, *indices)
    if len(indices) < len(headers) or len(set(indices)) < len(indices):
        yield Evidence("image_index", "unproven", "Image Index is absent or repeats itself")
        return
    absent = sorted(set(range(1, expected + 1)) - set(indices))
    if absent:
        words = f"{len(absent)} of {expected} images missing by Image Index: {ranges(absent)}"
    else:
        words = f"Image Index 1-{expected} without a gap"
    evidence = _compared("image_index", expected, len(indices), words)
    # Without a total the highest index may itself be missing.
    yield evidence if total or absent else Evidence("image_index", "unproven", words)


def _temporal_positions(headers: Sequence[Dataset]) -> Iterator[Evidence]:
    """Number of Temporal Positions against the identifiers that came (PS3.3 C.8.3.1)."""
    announced = max(_count(header, "NumberOfTemporalPositions") or 0 for header in headers)
    positions = Counter(_count(header, "TemporalPositionIdentifier") for header in headers)
    if announced < 2 or None in positions:
        return
    absent = sorted(set(range(1, announced + 1)) - set(positions))
    most = max(positions.values())
    partial = sorted(at or 0 for at, slices in positions.items() if slices < most)
    if absent:
        words = f"temporal positions {ranges(absent)} of {announced} are missing"
    elif partial:
        words = f"temporal positions {ranges(partial)} have fewer than {most} slices"
    else:
        words = f"{announced} temporal positions of {most} slices"
    verdict: Verdict = "short" if absent or partial else "unproven"
    yield Evidence("temporal_positions", verdict, words, announced * most, len(headers))


def _concatenation(headers: Sequence[Dataset]) -> Iterator[Evidence]:
    """An image in several instances says how many they are (PS3.3 C.7.6.16.2.2.4)."""
    parts: dict[str, list[Dataset]] = {}
    for header in headers:
        if uid := text(header, "ConcatenationUID"):
            parts.setdefault(uid, []).append(header)
    for members in parts.values():
        total = max(_count(header, "InConcatenationTotalNumber") or 0 for header in members)
        if total:
            words = f"{len(members)} of {total} parts of a concatenation"
            yield _compared("concatenation", total, len(members), words)


def _images_in_acquisition(headers: Sequence[Dataset], trusted: bool) -> Iterator[Evidence]:
    """Images in Acquisition (PS3.3 C.7.6.1): of all series that the acquisition was made into.

    As many as it says are all of them; fewer may lie in another series, and prove something only
    where a site says so.
    """
    acquisitions: dict[str, list[Dataset]] = {}
    for header in headers:
        acquisitions.setdefault(text(header, "AcquisitionNumber"), []).append(header)
    expected = [
        max(_count(header, "ImagesInAcquisition") or 0 for header in members)
        for members in acquisitions.values()
    ]
    if not all(expected):
        return
    here = [len(members) for members in acquisitions.values()]
    total = sum(expected)
    words = f"{len(headers)} of the {total} images that Images in Acquisition announces"
    if all(found >= wanted for found, wanted in zip(here, expected, strict=True)):
        yield Evidence("images_in_acquisition", "whole", words, total, len(headers))
    else:
        verdict: Verdict = "short" if trusted else "unproven"
        yield Evidence("images_in_acquisition", verdict, words, total, len(headers))


def ranges(values: Sequence[int]) -> str:
    """1, 2, 3, 7 as '1-3, 7'; a dozen ranges and a mark for more."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(words[:12]) + (" …" if len(words) > 12 else "")
