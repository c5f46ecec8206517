"""The ladder: V1, V2, V3 and DiffCode trained alike, for several seeds and splits of the subjects.

    RUN/                  the recipe's own seed on the data's own split, as ``training.run`` lays it
    RUN/seed-N/           another seed
    RUN/fold-K-of-N/      subjects of fold K held out of train and val together (and RUN/…/seed-N)

A finished stage that is found is used as it is; an unfinished one goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from restoration.diffcode import VARIANTS
from restoration.tasks import RestorationTask
from training import run
from training.checkpoint import CHECKPOINT, TrainingError, read_state, refuse_other_recipe
from training.loop import Limits
from training.manifest import Item
from training.recipe import Recipe
from training.slices import PreparedSet
from training.stages import Stage
from training.validation import MR_CONTRASTS

Say = Callable[[str], None]


@dataclass(frozen=True)
class Unit:
    """One seed on one split: a run folder that holds every rung."""

    seed: int
    fold: int | None  #: from 1; None is the data's own split
    folder: Path
    recipe: Recipe
    dataset: PreparedSet

    @property
    def name(self) -> str:
        """For messages and tables."""
        return f"seed {self.seed}" + (f", fold {self.fold}" if self.fold else "")

    def finished(self, rung: str) -> bool:
        """Whether the rung's last stage is done."""
        return _is_finished(Stage.RESTORATION, self.recipe.with_variant(rung), self.folder)


@dataclass(frozen=True)
class Progress:
    """What the training of a ladder came to."""

    passed_over: tuple[str, ...]  #: gates that failed and were passed over, in words
    unfinished: Mapping[str, str] = field(default_factory=dict)  #: rung of a unit → why


def plan(
    recipe: Recipe, dataset: PreparedSet, out: Path, *, seeds: Sequence[int], folds: int | None
) -> list[Unit]:
    """Every run of a ladder, seeds within folds; ValueError when the folds do not fit the data."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must name each seed once, not {list(seeds)}")
    splits: list[tuple[int | None, Path, PreparedSet]] = [(None, out, dataset)]
    if folds is not None:
        sets = leave_subjects_out(dataset, folds, recipe.seed)
        splits = [(k, out / f"fold-{k}-of-{folds}", part) for k, part in enumerate(sets, start=1)]
    return [
        Unit(
            seed,
            fold,
            folder if seed == recipe.seed else folder / f"seed-{seed}",
            dataclasses.replace(recipe, seed=seed),
            part,
        )
        for fold, folder, part in splits
        for seed in seeds
    ]


def leave_subjects_out(dataset: PreparedSet, folds: int, seed: int = 0) -> list[PreparedSet]:
    """The set ``folds`` times, each with other subjects of train and val held out.

    A subject is held out with all its tasks. Subjects are dealt by what they are judged on (T2, CT,
    real or simulated PET), so that every fold has some of each as far as there are enough.
    Raises ValueError for fewer than two folds, or more than a task has subjects.
    """
    kinds = _kinds(dataset)
    counts = {
        task: sum(bool(_judged(task) & set(kind)) for kind in kinds.values())
        for task in RestorationTask
        if dataset.items(task)
    }
    if folds < 2 or any(folds > count for count in counts.values()):
        have = ", ".join(f"{task.value} {count}" for task, count in counts.items())
        raise ValueError(f"{folds} folds do not fit the subjects of each task: {have}")
    held: dict[str, int] = {}
    generator = np.random.default_rng(seed)
    dealt = 0
    for kind in sorted(set(kinds.values())):
        names = sorted(name for name, own in kinds.items() if own == kind)
        for name in generator.permutation(names):
            held[str(name)] = dealt % folds
            dealt += 1
    return [_held_out(dataset, {n for n, k in held.items() if k == fold}) for fold in range(folds)]


def train(
    units: Sequence[Unit],
    rungs: Sequence[str],
    *,
    device: torch.device,
    past_gates: bool = False,
    max_seconds: float | None = None,
    say: Say = lambda _: None,
) -> Progress:
    """Train what is not finished, rung by rung; a rung behind a failed gate is left out.

    ``past_gates`` builds upon a stage that failed its gate, and reports that it did.
    """
    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    unfinished: dict[str, str] = {}
    passed: list[str] = []
    for unit in units:
        for rung in rungs:
            name = f"{rung}, {unit.name}"
            try:
                reason = _train_rung(unit, rung, device, past_gates, deadline, say)
            except TrainingError as error:
                reason = str(error)
            if reason:
                unfinished[name] = reason
                say(f"{name}: {reason}")
        passed += [text for text in failed_gates(unit, rungs) if past_gates]
    return Progress(tuple(dict.fromkeys(passed)), unfinished)


def failed_gates(unit: Unit, rungs: Sequence[str]) -> Iterator[str]:
    """Gates of Stages I and II that a rung of the unit stands upon and that failed, in words."""
    for rung in rungs:
        for stage in _stages(rung)[:-1]:
            folder = unit.folder / stage.folder(rung)
            problem = run.gate_problem(folder) if (folder / run.GATE).exists() else ""
            if problem:
                yield f"{unit.name}: {folder.name} {problem}"


def checked_rungs(names: Sequence[str]) -> list[str]:
    """The rungs named, in the order of the ladder; ValueError for an unknown one."""
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown or not names:
        raise ValueError(
            f"--rungs: {', '.join(unknown) or 'none'}; there are {', '.join(VARIANTS)}"
        )
    return [rung for rung in VARIANTS if rung in names]


def _train_rung(
    unit: Unit,
    rung: str,
    device: torch.device,
    past_gates: bool,
    deadline: float | None,
    say: Say,
) -> str:
    """Why the rung is not finished; empty when it is."""
    for stage in _stages(rung):
        # Stage I is one for V3 and DiffCode; its checkpoint is that of the whole network.
        recipe = unit.recipe.with_variant("full" if stage is Stage.CODEBOOK else rung)
        if _is_finished(stage, recipe, unit.folder):
            continue
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return f"no time left for {stage.folder(rung)}; the same command goes on"
        say(f"{unit.name}: {stage.folder(rung)}")
        outcome, checks = run.train(
            stage, recipe, unit.dataset, unit.folder,
            device=device, limits=Limits(max_seconds=left), past_gates=past_gates,
        )  # fmt: skip
        if not outcome.finished:
            return f"{stage.folder(rung)} at step {outcome.step}; the same command goes on"
        for check in checks:
            say(f"  {check}")
    return ""


def _stages(rung: str) -> list[Stage]:
    return list(Stage) if rung in ("v3", "full") else [Stage.RESTORATION]


def _is_finished(stage: Stage, recipe: Recipe, out: Path) -> bool:
    """Whether the stage is done by this recipe; TrainingError when by another."""
    folder = out / stage.folder(recipe.arch.variant)
    if not (folder / CHECKPOINT).exists():
        return False
    state = read_state(folder)
    refuse_other_recipe(folder, state, recipe, stage.table, force=False)
    done = int(state["step"]) >= stage.settings(recipe).steps
    return done and (folder / run.GATE).exists()


def _kinds(dataset: PreparedSet) -> dict[str, tuple[str, ...]]:
    """Subject → the kinds of its images."""
    kinds: dict[str, set[str]] = {}
    for item in dataset.items():
        kinds.setdefault(item.subject, set()).add(_kind(item))
    return {subject: tuple(sorted(own)) for subject, own in kinds.items()}


def _judged(task: RestorationTask) -> set[str]:
    return {task.value, f"{task.value}, simulated"}


def _kind(item: Item) -> str:
    if item.task == RestorationTask.MRI_SR.value and item.contrast not in MR_CONTRASTS:
        return f"{item.task}, not judged"
    return f"{item.task}, simulated" if item.simulated else item.task


def _held_out(dataset: PreparedSet, subjects: set[str]) -> PreparedSet:
    items = tuple(
        dataclasses.replace(item, split="val" if item.subject in subjects else "train")
        for item in dataset.manifest.items
    )
    return PreparedSet(dataset.folder, dataclasses.replace(dataset.manifest, items=items))


def budget(recipe: Recipe) -> dict[str, object]:
    """What every rung was given: steps, patches and learning rates, as numbers."""
    settings = {stage.value: stage.settings(recipe) for stage in Stage}
    return {
        name: {
            "steps": each.steps,
            "patches_per_step": each.per_task * len(recipe.data.tasks),
            "patch": each.patch,
            "lr": each.lr,
            "lr_final": each.lr_final,
        }
        for name, each in settings.items()
    }
