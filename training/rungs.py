"""The judgement of a ladder: each rung's scores kept beside its weights, then one table of all.

A rung is restored once; ``scores.json`` in its stage folder is used again as long as weights,
slices and protocols are the same. Figures of a rung are means over its seeds, slice by slice; folds
are put together, since each subject is held out in one of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from restoration.restorer import Restorer
from restoration.tasks import RestorationTask
from training.checkpoint import CHECKPOINT
from training.contenders import RUNG_LABELS, Contender, rung_restorer
from training.evaluate import evaluate, tuned_methods
from training.evaluation import (
    CLASSICAL,
    INPUT,
    Evaluation,
    SliceScore,
)
from training.ladder import Progress, Unit, budget
from training.metrics import PROTOCOLS, Score
from training.score_store import cached
from training.slices import PreparedSet
from training.stages import Stage

SCORES = "scores.json"
BASELINES = "baselines.json"
CACHE_VERSION = 1  # of what is measured; a new one measures again
Say = Callable[[str], None]


@dataclass(frozen=True)
class Ladder:
    """Every rung's evaluation by unit, and what its training came to."""

    units: tuple[Unit, ...]
    baselines: Mapping[int | None, Evaluation]  #: by fold
    found: Mapping[tuple[str, int, int | None], Evaluation]  #: by rung, seed and fold
    progress: Progress
    recipe: str
    folds: int | None

    def seeds(self, *rungs: str) -> list[int]:
        """Seeds for which each of ``rungs`` is finished on every split."""
        splits = list(self.baselines)
        return [
            seed
            for seed in dict.fromkeys(unit.seed for unit in self.units)
            if all((rung, seed, fold) in self.found for rung in rungs for fold in splits)
        ]

    @property
    def rungs(self) -> list[str]:
        """Rungs with at least one seed on every split, from below."""
        return [rung for rung in RUNG_LABELS if self.seeds(rung)]

    def merged(self, rungs: Sequence[str], seeds: Sequence[int]) -> Evaluation:
        """Input, classical method and ``rungs`` in one evaluation, means over ``seeds``."""
        parts = list(self.baselines.values())
        for rung in rungs:
            parts += [
                over_seeds([self.found[rung, seed, fold] for seed in seeds])
                for fold in self.baselines
            ]
        first = parts[0]
        labels = {name: text for part in parts for name, text in part.labels.items()}
        return replace(
            first,
            scores=tuple(score for part in parts for score in part.scores),
            measures=tuple(measure for part in parts for measure in part.measures),
            labels={name: labels[name] for name in [*first.labels, *rungs]},
            models=tuple(rungs),
            samples=(),
        )

    def table(self) -> Evaluation:
        """Every rung over the seeds it has."""
        evaluations = [self.merged([rung], self.seeds(rung)) for rung in self.rungs]
        if not evaluations:
            return self.merged([], [])
        own = [
            replace(
                e,
                scores=tuple(s for s in e.scores if s.method in e.models),
                measures=tuple(m for m in e.measures if m.method in e.models),
            )
            for e in evaluations
        ]
        base = self.merged([], [])
        return replace(
            base,
            scores=base.scores + tuple(s for e in own for s in e.scores),
            measures=base.measures + tuple(m for e in own for m in e.measures),
            labels={**base.labels, **{rung: RUNG_LABELS[rung] for rung in self.rungs}},
            models=tuple(self.rungs),
        )

    def to_dict(self) -> dict[str, Any]:
        """What ``diffcode ladder --json`` prints."""
        recipe = self.units[0].recipe
        return {
            "recipe": self.recipe,
            "budget": budget(recipe),
            "folds": self.folds,
            "seeds": {rung: self.seeds(rung) for rung in self.rungs},
            "passed_gates": list(self.progress.passed_over),
            "unfinished": dict(self.progress.unfinished),
            "evaluation": self.table().to_dict(),
            "steps": self.steps(),
        }

    def steps(self) -> list[dict[str, Any]]:
        """Each rung against the one below it, on the seeds that both have."""
        base = self.merged([], [])
        below = [name for name in (INPUT, CLASSICAL) if name in base.labels]
        rows = [_step(base, *below)] if len(below) == 2 else []
        order = [below[-1], *self.rungs]
        for lower, upper in itertools.pairwise(order):
            rungs = [name for name in (lower, upper) if name in RUNG_LABELS]
            seeds = self.seeds(*rungs)
            if seeds:
                row = _step(self.merged(rungs, seeds), lower, upper)
                row["by_seed"] = {
                    str(seed): found.mean
                    for seed in seeds
                    if (found := self.merged(rungs, [seed]).compare_average(upper, lower))
                }
                rows.append(row)
        return rows


def judge(
    units: Sequence[Unit],
    rungs: Sequence[str],
    progress: Progress,
    *,
    recipe: str,
    folds: int | None,
    central: int | None = None,
    classical: bool = True,
    device: str = "cpu",
    threads: int | None = None,
    say: Say = lambda _: None,
) -> Ladder:
    """Evaluate every finished rung on the subjects that it has not seen.

    Raises ValueError when no rung is finished, with what each lacks.
    """
    baselines: dict[int | None, Evaluation] = {}
    found: dict[tuple[str, int, int | None], Evaluation] = {}
    for unit in units:
        for rung in rungs:
            if f"{rung}, {unit.name}" not in progress.unfinished and unit.finished(rung):
                say(f"judging {rung}, {unit.name}")
                found[rung, unit.seed, unit.fold] = _rung(
                    unit, rung, central=central, device=device, threads=threads
                )
    if not found:
        lacking = "; ".join(f"{name}: {why}" for name, why in progress.unfinished.items())
        raise ValueError(f"no rung is finished ({lacking})")
    for fold, unit in {unit.fold: unit for unit in reversed(units)}.items():
        say(f"judging input and classical method, {unit.name}")
        baselines[fold] = _baselines(unit, central=central, classical=classical)
    ordered = {fold: baselines[fold] for fold in dict.fromkeys(unit.fold for unit in units)}
    return Ladder(tuple(units), ordered, found, progress, recipe, folds)


def over_seeds(parts: Sequence[Evaluation]) -> Evaluation:
    """The mean of each slice's scores and each region's quantities over trainings of one rung."""
    first = parts[0]
    if len(parts) == 1:
        return first
    scores = [replace(rows[0], scores=_mean_scores(rows)) for rows in _aligned(parts, "scores")]
    measures = []
    for rows in _aligned(parts, "measures"):
        mean = float(np.mean([row.measure.value for row in rows]))
        measures.append(replace(rows[0], measure=replace(rows[0].measure, value=mean)))
    return replace(first, scores=tuple(scores), measures=tuple(measures))


def _aligned(parts: Sequence[Evaluation], name: str) -> Iterable[tuple[Any, ...]]:
    # Slices and regions are those of the reference, so trainings have the same, in the same order.
    return zip(*(getattr(part, name) for part in parts), strict=True)


def _mean_scores(rows: Sequence[SliceScore]) -> dict[str, Score]:
    return {
        protocol: Score(
            *(
                float(np.mean([getattr(row.scores[protocol], figure) for row in rows]))
                for figure in ("psnr", "ssim", "rmse")
            )
        )
        for protocol in rows[0].scores
    }


def _step(evaluation: Evaluation, lower: str, upper: str) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task in evaluation.tasks:
        kinds = {s.simulated for s in evaluation.select(task, INPUT)}
        chosen = {"": None} if len(kinds) == 1 else {"real": False, "simulated": True}
        for kind, simulated in chosen.items():
            found = evaluation.compare(task, upper, lower, "psnr", simulated)
            if found is not None:
                tasks[task.value + (f", {kind}" if kind else "")] = found.to_dict()
    average = evaluation.compare_average(upper, lower)
    mean = average.to_dict() if average else None
    return {"from": lower, "to": upper, "tasks": tasks, "average": mean}


def _rung(
    unit: Unit, rung: str, *, central: int | None, device: str, threads: int | None
) -> Evaluation:
    folder = unit.folder / Stage.RESTORATION.folder(rung)
    digest = hashlib.sha256((folder / CHECKPOINT).read_bytes()).hexdigest()

    def measure() -> Evaluation:
        restorer = rung_restorer(
            folder, unit.dataset.folder, device=device, threads=threads, bare=True
        )
        return _measured(unit.dataset, rung, restorer, central)

    return cached(folder / SCORES, _key(unit.dataset, central, checkpoint=digest), measure)


def _measured(
    dataset: PreparedSet, rung: str, restorer: Restorer, central: int | None
) -> Evaluation:
    contender = Contender(rung, RUNG_LABELS[rung], restorer)
    return evaluate(
        dataset, {rung: contender}, labels={rung: contender.label}, tasks=_tasks(dataset),
        central=central, baselines=False,
    )  # fmt: skip


def _baselines(unit: Unit, *, central: int | None, classical: bool) -> Evaluation:
    dataset = unit.dataset
    key = _key(dataset, central, classical=classical)

    def measure() -> Evaluation:
        tasks = _tasks(dataset)
        methods = tuned_methods(dataset, tasks) if classical else {}
        return evaluate(dataset, {}, tasks=tasks, methods=methods, central=central)

    return cached(unit.folder / BASELINES, key, measure)


def _tasks(dataset: PreparedSet) -> list[RestorationTask]:
    return [task for task in RestorationTask if dataset.items(task, "val")]


def _key(dataset: PreparedSet, central: int | None, **more: Any) -> dict[str, Any]:
    """What a stored evaluation depends on."""
    items = [[i.name, i.split, sorted(i.sha256.items())] for i in dataset.items()]
    digest = hashlib.sha256(json.dumps(items).encode()).hexdigest()
    protocols = [protocol.description for protocol in PROTOCOLS]
    return {
        "version": CACHE_VERSION, "data": digest, "central": central, "protocols": protocols, **more
    }  # fmt: skip
