"""The images of one job, restored: load, judge, restore, quantise, derive.

No ledger and no spool: the worker and ``dicom-node restore`` come this way alike, with classic
and with multi-frame images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from dicom_node.dicom import derived, division
from dicom_node.dicom.derived import DerivedInstance, RestoredVolume
from dicom_node.dicom.geometry import Resampling
from dicom_node.dicom.header import text
from dicom_node.dicom.reports import GateValue, Restoration, with_reports
from dicom_node.dicom.scratch import Scratch
from dicom_node.gates import Judgement, gate_verdict, judge
from dicom_node.inference import (
    Engine,
    Progress,
)
from dicom_node.readings import GateReading
from dicom_node.reported import judged_values
from dicom_node.restored_volumes import (
    FULL_STRENGTH,
    KeptSlices,
    RestoredVolumes,
    judge_domain,
    restore_volumes,
)
from dicom_node.review import Sheet
from dicom_node.settings import IdentitySettings, NodeSettings


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
    said = Restoration(
        task,
        engine.model,
        parameters_hash(task, engine.parameters(task), strength),
        created,
        strength,
        _warnings(note, done, judgement),
    )
    series_uid = _series_uid(headers, task, engine, settings, frames[0].resampling, strength)
    return RestoredSeries(
        tuple(done.restored),
        series_uid,
        said.warnings,
        {"load": 0.0, "restore": 0.0}
        if ahead is not None
        else {"load": done.load_s, "restore": done.restore_s},
        _quantities(done),
        judgement,
        readings,
        _sheet(said, series_uid, done, judgement),
        _instances(done, said, readings, judgement, settings),
    )


def _warnings(note: str | None, done: RestoredVolumes, judgement: Judgement) -> tuple[str, ...]:
    """What was noticed on the way; what assembler and volume may both have found is told once."""
    noted = note.split("; ") if note else []
    return tuple(dict.fromkeys([*noted, *done.warnings, *judgement.reasons]))


def _sheet(
    said: Restoration, series_uid: str, done: RestoredVolumes, judgement: Judgement
) -> Sheet:
    return Sheet(
        said,
        series_uid,
        tuple(done.pictures),
        done.slices,
        tuple(done.readings),
        judgement,
        done.restored[0].frames[0].header,
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
