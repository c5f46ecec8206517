"""Learn the levels of the gates for a bundle, and write them into its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from restoration.fidelity import (
    LEAST_SIDE,
    Again,
    Calibration,
    Evidence,
    Fidelity,
    InputModel,
    Measured,
    ScanModel,
    judge,
    measure,
)
from restoration.fidelity.inputs import covariates
from restoration.fidelity.measures import input_features
from restoration.guards import support_of
from restoration.restorer import Restorer
from restoration.tasks import RestorationTask, intensity_scale
from training import levels, scan_models
from training.manifest import Item
from training.restored import Series, in_domain, restored_series
from training.slices import PreparedSet
from training.texture import sharpened

SPLIT = "calibration"  # of subjects kept out of the training for this
_LEAST_KEPT_OUT = 4  # held-out subjects of a task that are shared between learning and testing
_FEATURE_SLICES = 400
_SHRINKAGE = 0.1  # of the covariance towards its diagonal
_PROBED = 8  # one slice in so many

Progress = Callable[[int, int, str], None]
Chosen = list[tuple[PreparedSet, Item]]
Row = tuple[float, ...]


@dataclass(frozen=True)
class Subjects:
    """Who the levels of a task are learnt from."""

    learn: tuple[str, ...]
    kept_out: int  #: of `learn`: not trained on


@dataclass(frozen=True)
class Outcome:
    """What calibration found for one task."""

    calibration: Calibration
    values: dict[str, dict[str, npt.NDArray[np.float64]]]  #: gate → subject → values


def pseudonym(subject: str) -> str:
    """What a manifest keeps of a subject's name: enough to leave the subject out of a test."""
    return hashlib.sha256(subject.encode()).hexdigest()[:16]


def subjects_of(restorer: Restorer, sets: Sequence[PreparedSet], task: str) -> Subjects:
    """The subjects of a task to learn from.

    A split of their own, if there is one. Else every other validation subject, and training
    subjects, which widen the levels: see `diffcode calibrate`.
    """
    items = [item for _, item in _items(restorer, sets, task)]
    held = sorted({item.subject for item in items if item.split == "val"})
    own = sorted({item.subject for item in items if item.split == SPLIT})
    if own:
        return Subjects(tuple(own), len(own))
    # By a hash of the name: neighbours in the alphabet come from one site.
    order = sorted(held, key=pseudonym)
    mine = order[::2] if len(held) >= _LEAST_KEPT_OUT else []
    trained = sorted({item.subject for item in items if item.split == "train"})
    return Subjects((*mine, *trained), len(mine))


def calibrate(
    restorer: Restorer,
    sets: Sequence[PreparedSet],
    task: str,
    *,
    most: int = 12,
    items: int = 2,
    probe_every: int = 2,
    least_subjects: int = levels.LEAST_SUBJECTS,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Learn the levels of one task from at most `most` slices of each item.

    Of a subject and a contrast `items` are looked at; one series in `probe_every` goes through the
    network again, none for 0. A gate of which fewer than `least_subjects` have a value keeps the
    level of the program. Raises ValueError when fewer than two subjects of the task lie in the
    model's domain.
    """
    subjects = subjects_of(restorer, sets, task)
    inputs = input_model(restorer, sets, task)
    scan = scan_model(restorer, sets) if RestorationTask(task) is RestorationTask.MRI_SR else None
    chosen = _of_subjects(_items(restorer, sets, task), subjects.learn, items)
    table: dict[str, dict[str, list[npt.NDArray[np.float64]]]] = {}
    slices = 0
    found_series = restored_series(restorer, chosen, most=most, cache=cache)
    for done, series in enumerate(found_series):
        if progress is not None:
            progress(done, len(chosen), series.name)
        probed = _PROBED if probe_every and done % probe_every == 0 else 0
        found = measured(restorer, series, inputs, scan, every=probed)
        slices += len(series.lq)
        for name, column in columns(found, len(series.lq)).items():
            table.setdefault(name, {}).setdefault(series.subject, []).append(column)
    values = {
        name: {subject: np.concatenate(parts) for subject, parts in rows.items()}
        for name, rows in table.items()
    }
    learnt = levels.learn(values, RestorationTask(task), least_subjects)
    basis = {
        "quantiles": {each.name.lower(): each.quantile for each in levels.Level},
        "content": {each.name.lower(): each.content for each in levels.Level},
        "confidence": levels.CONFIDENCE,
        "least_subjects": least_subjects,
        "program_levels": dict(learnt.kept),
        "margins": {name: list(factors) for name, factors in learnt.factors.items()},
        "left_out_alarms": learnt.alarms and {"warn": learnt.alarms[0], "fail": learnt.alarms[1]},
        "slices": slices,
        "medians": learnt.medians,
        **_counts(subjects),
    }
    # Without a level of its own the distance would be a number that nothing judges.
    kept = inputs if "likeness" in learnt.levels else None
    return Outcome(Calibration(learnt.levels, kept, basis, scan), values)


def measured(
    restorer: Restorer,
    series: Series,
    inputs: InputModel | None,
    scan: ScanModel | None = None,
    *,
    every: int = 0,
    intact: bool | None = None,
) -> dict[str, Measured]:
    """The values of every gate for a restored series; probes of one slice in `every`, 0 = none."""
    said = series.made.diagnostics
    probes = {}
    if every:
        chosen = list(range(min(every, len(series.lq)) // 2, len(series.lq), every))
        probes = restorer.probe(series.lq, series.made, series.task, chosen)
    evidence = Evidence(
        spacing_mm=series.spacing_mm,
        domain=restorer.manifest.domain.get(series.task.value),
        diagnostics=said,
        support=support_of(said),
        again=lambda: Again(probes, restorer.network.intact if intact is None else intact),
    )
    return measure(
        series.lq, series.made.volume, series.task, evidence=evidence, inputs=inputs, scan=scan
    )


def judged(found: dict[str, Measured], series: Series, calibration: Calibration | None) -> Fidelity:
    """The verdicts on what was measured."""
    return judge(found, series.task, len(series.lq), calibration)


def input_model(restorer: Restorer, sets: Sequence[PreparedSet], task: str) -> InputModel:
    """What training inputs are like; no network is involved.

    Their features follow spacing and level by a regression, and spread about it. Two directions are
    those in which the inputs move that are made sharper, and that are as clean as their references.
    """
    chosen = [pair for pair in _items(restorer, sets, task) if pair[1].split == "train"]
    chosen = chosen or _items(restorer, sets, task)
    share = max(1, _FEATURE_SLICES // max(1, len(chosen)))
    parts = [_features(dataset, item, share) for dataset, item in chosen]
    # Each subject counts alike, however many slices it has.
    weights = np.concatenate([np.full(len(part.known), 1 / len(part.known)) for part in parts])
    known, plain, sharper, cleaner = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("known", "plain", "sharper", "cleaner")
    )
    good = np.isfinite(np.hstack([known, plain, sharper, cleaner])).all(axis=1)
    known, plain, sharper, cleaner, weights = (
        each[good] for each in (known, plain, sharper, cleaner, weights)
    )
    if len(plain) <= plain.shape[1] + known.shape[1]:
        raise ValueError(f"{task}: {len(plain)} slices are too few to say what inputs are like")
    root = np.sqrt(weights)[:, None]
    coefficients = np.linalg.lstsq(root * known, root * plain, rcond=None)[0]
    covariance = np.cov((plain - known @ coefficients).T, aweights=weights)
    spread = np.diag(np.diag(covariance)) + 1e-6 * np.eye(plain.shape[1])
    precision = np.linalg.inv((1 - _SHRINKAGE) * covariance + _SHRINKAGE * spread)
    moved = {"sharpness": sharper - plain, "cleanness": cleaner - plain}
    directions = {
        name: _direction(np.average(by, axis=0, weights=weights), precision)
        for name, by in moved.items()
    }
    return InputModel(_rows(coefficients), _rows(precision), directions)


def scan_model(restorer: Restorer, sets: Sequence[PreparedSet]) -> ScanModel:
    """What MR series of the training are like, and how motion would show; no network is involved.

    Raises ValueError where too few of them can be looked at.
    """
    items = _items(restorer, sets, RestorationTask.MRI_SR.value)
    chosen = [pair for pair in items if pair[1].split == "train"] or items
    parts = [
        part
        for dataset, item in chosen
        for part in scan_models.parts(np.array(dataset.pair(item)[0], np.float32))
    ]
    return scan_models.learn(parts)


def _direction(
    moved: npt.NDArray[np.floating[Any]], precision: npt.NDArray[np.floating[Any]]
) -> Row:
    """Fisher's discriminant of a shift, in SD; what moves nothing gives nothing."""
    weights = precision @ moved
    length = float(np.sqrt(moved @ weights))
    return tuple((weights / length).tolist()) if length > 0 else tuple(np.zeros(len(moved)))


def _rows(matrix: npt.NDArray[np.floating[Any]]) -> tuple[Row, ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)


@dataclass(frozen=True)
class _Described:
    """Slices of an item: what their features depend on, and these as they are and as changed."""

    known: npt.NDArray[np.float64]
    plain: npt.NDArray[np.float64]
    sharper: npt.NDArray[np.float64]
    cleaner: npt.NDArray[np.float64]


def _features(dataset: PreparedSet, item: Item, share: int) -> _Described:
    lq, hq = dataset.pair(item)
    places = np.unique(np.linspace(0, len(lq) - 1, share).round().astype(int))
    task = RestorationTask(item.task)
    scale = intensity_scale(np.asarray(lq), task)
    x, reference = (np.array(each[places], np.float32) * scale for each in (lq, hq))
    plain, sharper, cleaner = (
        input_features(torch.from_numpy(volume), task).numpy()
        for volume in (x, sharpened(x), reference)
    )
    known = covariates(plain[:, -1], item.spacing_mm)
    # The level that the noise depends on differs a little too: it is part of the change.
    return _Described(known, plain[:, :-1], sharper[:, :-1], cleaner[:, :-1])


def _items(restorer: Restorer, sets: Sequence[PreparedSet], task: str) -> Chosen:
    return [
        (dataset, item)
        for dataset in sets
        for item in dataset.items(task)
        if in_domain(restorer, item) and min(item.shape[1:]) >= LEAST_SIDE
    ]


def _of_subjects(items: Chosen, subjects: Sequence[str], most: int) -> Chosen:
    """The first items of each subject: a long series must not outweigh ten subjects."""
    taken: dict[tuple[str, str], int] = {}
    chosen = []
    for dataset, item in items:
        key = (item.subject, item.contrast or "")
        if item.subject in subjects and taken.get(key, 0) < most:
            taken[key] = taken.get(key, 0) + 1
            chosen.append((dataset, item))
    return chosen


def columns(found: Mapping[str, Measured], slices: int) -> dict[str, npt.NDArray[np.float64]]:
    """Gate → (slices,) with NaN where it has no value; a value of the series stands everywhere."""
    columns = {}
    for name, values in found.items():
        column = np.full(slices, np.nan)
        if values.slices:
            numbers = [np.nan if value is None else value for value in values.values]
            column[list(values.slices)] = numbers
        elif values.values and values.values[0] is not None:
            column[:] = values.values[0]
        columns[name] = column
    return columns


def _counts(subjects: Subjects) -> dict[str, Any]:
    # No names: a manifest travels further than the images.
    return {
        "subjects": len(subjects.learn),
        "learnt_from": [pseudonym(name) for name in subjects.learn],
        "kept_out": subjects.kept_out,
        "trained_on": len(subjects.learn) - subjects.kept_out,
    }
