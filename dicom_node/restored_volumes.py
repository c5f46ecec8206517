"""The volumes of one job, restored and measured one after the other: nothing is decided on them.

What becomes of them hangs on their slices, the model and the policy: not on where they go to.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydicom.dataset import Dataset

from dicom_node.dicom import derived, volume
from dicom_node.dicom.derived import RestoredVolume
from dicom_node.dicom.header import number, numbers, text, texts
from dicom_node.dicom.reports import GateValue
from dicom_node.dicom.scratch import Scratch
from dicom_node.errors import RefusedError
from dicom_node.inference import (
    DomainVerdict,
    Engine,
    ModelIdentity,
    Progress,
    RestorationRequest,
    RestorationResult,
)
from dicom_node.readings import GateReading
from dicom_node.reported import delivered_drift, gate_values
from dicom_node.review import Picture, pictures
from dicom_node.settings import NodeSettings

FULL_STRENGTH = 1.0


class KeptSlices(Protocol):
    """What was made of the slices of a job before."""

    def has(self, sop_instance_uid: str, seed: int) -> bool:
        """Whether something was, as far as can be told without reading it."""

    def facts(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of the engine's `MadeSlice`; None: nothing. So the others."""

    def plane(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of the same."""

    def image(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of the `derived.PreparedImage`."""

    def stored(self, sop_instance_uid: str, seed: int) -> bytes | None:
        """Of the same."""


class _KeptOfVolume:
    """What was made of the slices of one classic volume before, by their places in it."""

    def __init__(self, kept: KeptSlices, headers: Sequence[Dataset], given: Sequence[int]) -> None:
        self._kept = kept
        self._of = [
            (text(header, "SOPInstanceUID"), seed)
            for header, seed in zip(headers, given, strict=True)
        ]

    def facts(self, index: int) -> bytes | None:
        """See `KeptSlices`; so the others."""
        return self._kept.facts(*self._of[index])

    def plane(self, index: int) -> bytes | None:
        """As there."""
        return self._kept.plane(*self._of[index])

    def image(self, index: int) -> bytes | None:
        """As there."""
        return self._kept.image(*self._of[index])

    def stored(self, index: int) -> bytes | None:
        """As there."""
        return self._kept.stored(*self._of[index])


@dataclass
class RestoredVolumes:
    """The images of a job restored and measured, volume by volume; nothing is decided on them."""

    restored: list[RestoredVolume] = field(default_factory=list)
    upsample: int | None = None
    warnings: list[str] = field(default_factory=list)
    values: list[GateValue] = field(default_factory=list)
    readings: list[GateReading] = field(default_factory=list)
    calibrated: bool = True
    pictures: list[Picture] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    load_s: float = 0.0
    restore_s: float = 0.0
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def slices(self) -> int:
        """Of all volumes so far."""
        return sum(len(each.frames) for each in self.restored)


@dataclass(frozen=True)
class _Asked:
    """What is asked for, of all volumes of a job alike."""

    task: str
    engine: Engine
    settings: NodeSettings
    scale: float | None
    strength: float
    kept: KeptSlices | None


def restore_volumes(
    paths: Sequence[Path],
    task: str,
    engine: Engine,
    settings: NodeSettings,
    *,
    scale: float | None = None,
    strength: float = FULL_STRENGTH,
    kept: KeptSlices | None = None,
    known: Mapping[Path, Dataset] | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> RestoredVolumes:
    """Load, restore, measure and quantise volume by volume; see `restoring.restore_series`.

    One volume is held in physical units.
    """
    if task not in engine.tasks:
        raise RefusedError(f"the model {engine.model.name} cannot do {task}")
    asked = _Asked(task, engine, settings, scale, strength, kept)
    gathered = RestoredVolumes(scratch=Scratch(work))
    started = time.perf_counter()
    later = None if kept is None else partial(_is_kept, kept, engine.model)
    for series in volume.load_volumes(paths, task, settings.policy, gathered.scratch, known, later):
        upsample = _accept(series, asked, gathered)
        loaded = time.perf_counter()
        _restore(series, upsample, asked, gathered, progress)
        ended = time.perf_counter()
        gathered.load_s += loaded - started
        gathered.restore_s += ended - loaded
        started = ended
    return gathered


def _accept(series: volume.SeriesVolume, asked: _Asked, gathered: RestoredVolumes) -> int:
    """How many times finer its grid has to be; RefusedError where it may not be restored."""
    verdict = judge_domain(series.headers[0], asked.task, asked.engine, asked.settings)
    if gathered.upsample not in (None, verdict.upsample):
        raise RefusedError("volumes of one image that need grids of their own")
    gathered.upsample = verdict.upsample
    gathered.warnings += [*series.warnings, *_remarks(verdict)]
    return verdict.upsample


def _restore(
    series: volume.SeriesVolume,
    upsample: int,
    asked: _Asked,
    gathered: RestoredVolumes,
    progress: Progress | None,
) -> None:
    """Restore one volume, measure it, and bring it back to stored values."""
    scratch, first = gathered.scratch, gathered.slices
    given = seeds(series.headers, asked.engine.model, series.frames)
    before = None
    if asked.kept is not None and series.frames is None:
        before = _KeptOfVolume(asked.kept, series.headers, given)
    request = RestorationRequest(
        array=series.array,
        task=asked.task,
        spacing=series.spacing,
        seeds=given,
        strength=asked.strength,
        scale=asked.scale,
        upsample=upsample,
        facts=facts(series.headers[0]),
        kept=before,
        out=scratch.empty(series.array.shape, np.float32) if upsample == 1 else None,
    )
    result = asked.engine.restore(request, _onwards(progress, first, scratch))
    _gather(series, result, asked, gathered)
    quantised = derived.quantise(series, result.array, result.resampling, scratch, before)
    gathered.restored.append(quantised)
    gathered.values += delivered_drift(series, quantised, first=first, release=scratch.release)


def _gather(
    series: volume.SeriesVolume,
    result: RestorationResult,
    asked: _Asked,
    gathered: RestoredVolumes,
) -> None:
    """What the engine says of the next volume, by the places of its slices among those of all."""
    first = gathered.slices
    # The domain was judged before, with all that the header says.
    guards = [flag for flag in result.flags if flag != "outside_domain"]
    gathered.warnings += [f"guard {guard} did not hold" for guard in guards]
    gathered.warnings += result.remarks
    gathered.values += gate_values(
        result, len(series.array), first, hounsfield=asked.task == "ct_denoise"
    )
    gathered.readings += [each.shifted(first) for each in result.readings]
    gathered.calibrated &= result.calibrated
    gathered.pictures += pictures(
        series.array,
        result.array,
        result.readings,
        first=first,
        further=asked.settings.review.slices,
    )
    if "intensity_scale" in result.diagnostics and asked.task == "mri_sr":
        gathered.scales.append(float(result.diagnostics["intensity_scale"]))


def _is_kept(kept: KeptSlices, model: ModelIdentity, header: Dataset) -> bool:
    """Whether the pixels of a slice need not be read before somebody asks for them."""
    (seed,) = seeds([header], model)
    return kept.has(text(header, "SOPInstanceUID"), seed)


def _onwards(progress: Progress | None, before: int, scratch: Scratch) -> Progress:
    """Progress of one volume, counted on from the slices of those before it."""

    def onwards(done: int, total: int) -> None:
        scratch.release()
        if progress is not None:
            progress(before + done, before + total)

    return onwards


def seeds(
    headers: Sequence[Dataset], model: ModelIdentity, frames: Sequence[int] | None = None
) -> tuple[int, ...]:
    """One seed for each slice from its SOP Instance UID: alike on every try, in any company.

    The frames of a multi-frame image, which share one, are told apart by their numbers.
    """
    names = [str(header.SOPInstanceUID) for header in headers]
    if frames is not None:
        names = [f"{name}#{number}" for name, number in zip(names, frames, strict=True)]
    digests = (hashlib.sha256(f"{name}\n{model.sha256}".encode()).digest() for name in names)
    return tuple(int.from_bytes(digest[:8], "big") >> 1 for digest in digests)


def judge_domain(
    header: Dataset, task: str, engine: Engine, settings: NodeSettings
) -> DomainVerdict:
    """How a volume, by a header of it, stands to the bundle's training domain.

    Raises RefusedError where policy says so.
    """
    policy = settings.policy
    verdict = engine.judge(task, facts(header))
    if verdict.upsample > 1 and policy.low_matrix == "refuse":
        raise RefusedError("an MR series at its acquired matrix, outside the training domain")
    if verdict.outside and policy.domain == "refuse":
        outside = "; ".join(verdict.outside)
        raise RefusedError(f"outside the model's training domain: {outside}")
    if verdict.missing and policy.missing_metadata == "refuse":
        raise RefusedError(f"the header does not state {', '.join(verdict.missing)}")
    return verdict


def _remarks(verdict: DomainVerdict) -> list[str]:
    outside, missing = "; ".join(verdict.outside), ", ".join(verdict.missing)
    finer = f"{verdict.upsample} x {verdict.upsample} finer grid by zero filling of k-space"
    return [
        *([f"outside the model's training domain: {outside}"] if outside else []),
        *([f"the header does not state {missing}"] if missing else []),
        *([finer] if verdict.upsample > 1 else []),
    ]


def facts(header: Dataset) -> dict[str, Any]:
    """What a header says of the acquisition, by the names of the bundle's domain."""
    return {
        "modality": next(iter(texts(header, "Modality")), None),
        "pixel_spacing_mm": numbers(header, "PixelSpacing"),
        "slice_thickness_mm": number(header, "SliceThickness"),
        "field_strength_t": number(header, "MagneticFieldStrength"),
        "kernel": texts(header, "ConvolutionKernel") or None,
        "patient_weight_kg": number(header, "PatientWeight"),
    }
