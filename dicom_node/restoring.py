"""The images of one job, restored: load, judge, restore, quantise, derive.

No ledger and no spool: the worker and ``dicom-node restore`` come this way alike, with classic
and with multi-frame images.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydicom.dataset import Dataset

from dicom_node.dicom import derived, division, volume
from dicom_node.dicom.derived import DerivedInstance, RestoredVolume
from dicom_node.dicom.geometry import Resampling
from dicom_node.dicom.header import number, numbers, text, texts
from dicom_node.dicom.reports import GateValue, Restoration, with_reports
from dicom_node.dicom.scratch import Scratch
from dicom_node.errors import RefusedError
from dicom_node.gates import Judgement, gate_verdict, judge
from dicom_node.inference import (
    DomainVerdict,
    Engine,
    ModelIdentity,
    Progress,
    RestorationRequest,
)
from dicom_node.readings import GateReading
from dicom_node.reported import delivered_drift, gate_values, judged_values
from dicom_node.review import Picture, Sheet, pictures
from dicom_node.settings import IdentitySettings, NodeSettings

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


@dataclass(frozen=True)
class RestoredSeries:
    """A restored job on its way to files; *instances* are made as they are asked for."""

    volumes: tuple[RestoredVolume, ...]  # one, or those of a multi-frame image
    series_instance_uid: str
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    #: clamped: pixels; intensity_scale: of MR, and where a multi-frame image holds several volumes
    #: intensity_scales, in the order of `volumes`
    quantities: dict[str, Any]
    judgement: Judgement
    readings: tuple[GateReading, ...]  # slices in the order of the result
    sheet: Sheet  # what a reviewer is shown
    instances: Iterator[DerivedInstance]


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


def restore_series(
    paths: Sequence[Path],
    task: str,
    engine: Engine,
    settings: NodeSettings,
    *,
    created: datetime,
    destinations: Sequence[str] = (),
    note: str | None = None,
    scale: float | None = None,
    strength: float = FULL_STRENGTH,
    kept: KeptSlices | None = None,
    known: Mapping[Path, Dataset] | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
    ahead: RestoredVolumes | None = None,
) -> RestoredSeries:
    """Restore and judge the images of one job; for the worker and for ``dicom-node restore``.

    *created* is the time that the result will bear; the same arguments make the same bytes. What
    the gates say for each of the *destinations* is the caller's to obey.
    *scale* is the MR intensity scale of the volume that late slices belong to, *strength* how much
    of the change is applied: source + strength · (restored - source), 0 < strength ≤ 1. What the
    engine has *kept* of slices is taken as it is. Headers that are *known*, from
    `volume.read_slice_header`, are not read again. In the folder *work* a large volume lies in
    files without a name; None: in memory. What `restore_volumes` gave *ahead*, of the same files,
    task, scale and strength, is taken as it is.

    Raises:
        RefusedError: outside what may be restored, by policy or by the bundle's domain.
        UnreadableInstanceError: pixel data that do not decode.
        PermanentError, TransientError: as the engine says.
    """
    done = ahead or restore_volumes(
        paths,
        task,
        engine,
        settings,
        scale=scale,
        strength=strength,
        kept=kept,
        known=known,
        work=work,
        progress=progress,
    )
    readings = tuple(each.placed(_place(done)) for each in done.readings)
    frames = [frame for each in done.restored for frame in each.frames]
    headers = [frame.header for frame in frames]
    judgement = judge(
        readings,
        calibrated=done.calibrated,
        modality=text(headers[0], "Modality"),
        destinations=destinations,
        settings=settings,
    )
    # The assembler and the volume may have found the same gap: it is told once.
    noted = note.split("; ") if note else []
    warnings = tuple(dict.fromkeys([*noted, *done.warnings, *judgement.reasons]))
    steered = parameters_hash(task, engine.parameters(task), strength)
    said = Restoration(task, engine.model, steered, created, strength, warnings)
    series_uid = _series_uid(headers, task, engine, settings, frames[0].resampling, strength)
    return RestoredSeries(
        tuple(done.restored),
        series_uid,
        warnings,
        {"load": 0.0, "restore": 0.0}
        if ahead is not None
        else {"load": done.load_s, "restore": done.restore_s},
        _quantities(done),
        judgement,
        readings,
        Sheet(
            said,
            series_uid,
            tuple(done.pictures),
            len(frames),
            tuple(done.readings),
            judgement,
            headers[0],
        ),
        _instances(done, said, readings, judgement, settings),
    )


def _instances(
    done: RestoredVolumes,
    said: Restoration,
    readings: Sequence[GateReading],
    judgement: Judgement,
    settings: NodeSettings,
) -> Iterator[DerivedInstance]:
    """The images of a result and its reports, made one after the other."""
    images = derived.build(
        done.restored,
        task=said.task,
        model=said.model,
        identity=_labelled(settings, said.task, judgement),
        warnings=said.warnings,
        strength=said.strength,
        created=said.created,
        parameters_hash=said.parameters_hash,
    )
    # Hundreds for each slice, for the structured report alone.
    values = _reported(done, readings, judgement, settings) if settings.report.sr else []
    made = with_reports(images, values, said, settings.identity, settings.report)
    return _released(made, done.scratch)


def _released(instances: Iterator[DerivedInstance], scratch: Scratch) -> Iterator[DerivedInstance]:
    """The same, with what each has read of mapped files let go."""
    for each in instances:
        yield each
        scratch.release()


def _labelled(settings: NodeSettings, task: str, judgement: Judgement) -> IdentitySettings:
    """How the result is labelled: the task's suffix, and that of a warning where one is due."""
    identity = settings.identity
    if not judgement.suffix_due:
        return identity
    suffixes = {str(name): words for name, words in identity.description_suffixes.items()}
    suffixes[task] = suffixes.get(task, "") + settings.gates.warning_suffix
    return identity.model_copy(update={"description_suffixes": suffixes})


def _quantities(done: RestoredVolumes) -> dict[str, Any]:
    quantities: dict[str, Any] = {"clamped": sum(each.clamped for each in done.restored)}
    if len(done.scales) == 1:
        quantities["intensity_scale"] = done.scales[0]
    elif done.scales:
        quantities["intensity_scales"] = list(done.scales)
    return quantities


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
    """Load, restore, measure and quantise one volume after the other; see `restore_series`.

    One volume is held in physical units.
    """
    if task not in engine.tasks:
        raise RefusedError(f"the model {engine.model.name} cannot do {task}")
    scratch = Scratch(work)
    gathered, slices = RestoredVolumes(scratch=scratch), 0
    started = time.perf_counter()
    later = None if kept is None else partial(_is_kept, kept, engine.model)
    for series in volume.load_volumes(paths, task, settings.policy, scratch, known, later):
        verdict = judge_domain(series.headers[0], task, engine, settings)
        if gathered.upsample not in (None, verdict.upsample):
            raise RefusedError("volumes of one image that need grids of their own")
        gathered.upsample = verdict.upsample
        gathered.warnings += [*series.warnings, *_remarks(verdict)]
        loaded = time.perf_counter()
        given = seeds(series.headers, engine.model, series.frames)
        before = None
        if kept is not None and series.frames is None:
            before = _KeptOfVolume(kept, series.headers, given)
        request = RestorationRequest(
            array=series.array,
            task=task,
            spacing=series.spacing,
            seeds=given,
            strength=strength,
            scale=scale,
            upsample=verdict.upsample,
            facts=facts(series.headers[0]),
            kept=before,
            out=scratch.empty(series.array.shape, np.float32) if verdict.upsample == 1 else None,
        )
        result = engine.restore(request, _onwards(progress, slices, scratch))
        # The domain was judged above, with all that the header says.
        guards = [flag for flag in result.flags if flag != "outside_domain"]
        gathered.warnings += [f"guard {guard} did not hold" for guard in guards]
        gathered.warnings += result.remarks
        gathered.values += gate_values(
            result, len(series.array), slices, hounsfield=task == "ct_denoise"
        )
        gathered.readings += [each.shifted(slices) for each in result.readings]
        gathered.calibrated &= result.calibrated
        gathered.pictures += pictures(
            series.array,
            result.array,
            result.readings,
            first=slices,
            further=settings.review.slices,
        )
        if "intensity_scale" in result.diagnostics and task == "mri_sr":
            gathered.scales.append(float(result.diagnostics["intensity_scale"]))
        gathered.restored.append(
            derived.quantise(
                series,
                result.array,
                result.resampling,
                scratch,
                before,
            )
        )
        gathered.values += delivered_drift(
            series, gathered.restored[-1], first=slices, release=scratch.release
        )
        slices += len(series.array)
        ended = time.perf_counter()
        gathered.load_s += loaded - started
        gathered.restore_s += ended - loaded
        started = ended
    return gathered


def _is_kept(kept: KeptSlices, model: ModelIdentity, header: Dataset) -> bool:
    """Whether the pixels of a slice need not be read before somebody asks for them."""
    (seed,) = seeds([header], model)
    return kept.has(text(header, "SOPInstanceUID"), seed)


def _place(done: RestoredVolumes) -> list[int]:
    """The place in the result of each slice.

    A multi-frame result has its frames in the order of the source's, not in that of space.
    """
    numbers = [frame.number for each in done.restored for frame in each.frames]
    if done.restored[0].source is None:
        return list(range(len(numbers)))
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    place = {index: after for after, index in enumerate(order)}
    return [place[index] for index in range(len(numbers))]


def _onwards(progress: Progress | None, before: int, scratch: Scratch) -> Progress:
    """Progress of one volume, counted on from the slices of those before it."""

    def onwards(done: int, total: int) -> None:
        scratch.release()
        if progress is not None:
            progress(before + done, before + total)

    return onwards


def _reported(
    done: RestoredVolumes,
    readings: Sequence[GateReading],
    judgement: Judgement,
    settings: NodeSettings,
) -> list[GateValue]:
    """All that was measured, by the place of its slice in the result, with the gates' verdicts."""
    place, modality = _place(done), text(done.restored[0].frames[0].header, "Modality")
    plain = [
        each if each.slice is None else replace(each, slice=place[each.slice])
        for each in done.values
    ]
    judged = [
        value
        for each in readings
        for value in judged_values(each, gate_verdict(each, modality, judgement, settings))
    ]
    return [*plain, *judged]


def result_series_uid(
    header: Dataset,
    task: str,
    engine: Engine,
    settings: NodeSettings,
    strength: float = FULL_STRENGTH,
) -> str:
    """The series that the result of a CT or MR volume goes to, from the header of any slice."""
    place = division.representative([header])
    factor = judge_domain(place, task, engine, settings).upsample
    return _series_uid([place], task, engine, settings, Resampling(factor), strength)


def _series_uid(
    headers: Sequence[Dataset],
    task: str,
    engine: Engine,
    settings: NodeSettings,
    resampling: Resampling,
    strength: float,
) -> str:
    return derived.derived_series_uid(
        headers[0],
        task=task,
        model=engine.model,
        identity=settings.identity,
        strength=float(strength),
        parameters_hash=parameters_hash(task, engine.parameters(task), strength),
        source_set=derived.source_set_hash(headers),
        resampling=resampling,
    )


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


def parameters_hash(
    task: str, model_parameters: Mapping[str, Any], strength: float = FULL_STRENGTH
) -> str:
    """SHA-256 of what steers a restoration beside the weights and the source."""
    parameters = {
        "task": task,
        "strength": float(strength),  # 1 and 1.0 are one strength, whoever says it
        "seeds": "source SOP Instance UID, 1",
        "model": dict(model_parameters),
    }
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()


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
