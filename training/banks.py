"""Codebooks made after Stage I: anew for some tasks, or for a task that the run did not have.

The networks stay as they are, so a codebook can be made from data within minutes; the gate of
Stage I then tells whether the encoder's latents serve the task at all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from restoration.diffcode import DiffCode
from restoration.tasks import RestorationTask
from training.checkpoint import CHECKPOINT_VERSION, TrainingError, write_checkpoint
from training.codebook import CodebookReport, build_bank, inspect_bank, refine_bank
from training.recipe import Recipe
from training.run import GATE, gate_figures, pass_gate, tokens_of, trained_model
from training.slices import PreparedSet
from training.stages import GATES, GateCheck, Stage, gate_record

Made = tuple[list[CodebookReport], tuple[GateCheck, ...]]


def rebuild_codebooks(
    source: Path,
    data: Path,
    out: Path,
    *,
    tasks: Sequence[RestorationTask],
    tokens: int,
    passes: int,
) -> Made:
    """Make the codebooks of ``tasks`` anew from data, the networks unchanged, as a new run.

    Residual k-means on the latents of the trained encoder, then ``passes`` of refinement. Raises
    TrainingError when ``out`` holds a codebook stage already.
    """
    folder = _new_folder(out)
    model, recipe = trained_model(source / Stage.CODEBOOK.folder("full"))
    dataset = PreparedSet.open(data)
    assert model.bank is not None
    found = tokens_of(model, recipe, dataset, tokens)
    chosen = {n: sample for n, sample in found.items() if n in {task.index for task in tasks}}
    build_bank(model.bank, chosen, recipe.stage1.kmeans_iterations, recipe.seed)
    refine_bank(model.bank, chosen, passes)
    _write_finished(model, recipe, folder)
    checks = pass_gate(Stage.CODEBOOK, recipe, dataset, model, out)
    return inspect_bank(model.bank, found), checks


def add_codebook(
    source: Path, data: Path, out: Path, *, task: RestorationTask, tokens: int, passes: int
) -> Made:
    """Add the codebook of a task to a trained bank ("codebook concatenation", paper Sec. 1).

    ``data`` need hold images of that task alone. E_vq, G_vq and the other codebooks keep their
    bytes, so their part of the gate is that of ``source``; the new task is put to it. Raises
    TrainingError when the run has the task, is not finished, or ``out`` holds a codebook stage.
    """
    folder = _new_folder(out)
    before = source / Stage.CODEBOOK.folder("full")
    model, recipe = trained_model(before)
    if task.value in recipe.data.tasks:
        raise TrainingError(
            f"{before} has a codebook for {task.value}; 'codebook build' makes it anew"
        )
    if not (before / GATE).exists():
        raise TrainingError(f"{before} is not finished")
    dataset = PreparedSet.open(data)
    alone = _with_tasks(recipe, (task.value,))
    found = tokens_of(model, alone, dataset, tokens)
    assert model.bank is not None
    build_bank(model.bank, found, recipe.stage1.kmeans_iterations, recipe.seed)
    refine_bank(model.bank, found, passes)
    figures = json.loads((before / GATE).read_text(encoding="utf-8"))["figures"]
    figures |= gate_figures(Stage.CODEBOOK, alone, dataset, model, out)
    _write_finished(model, _with_tasks(recipe, (*recipe.data.tasks, task.value)), folder)
    record = gate_record(Stage.CODEBOOK, figures, recipe.stage1.steps)
    (folder / GATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return inspect_bank(model.bank, found), GATES[Stage.CODEBOOK](figures)


def _new_folder(out: Path) -> Path:
    folder = out / Stage.CODEBOOK.folder("full")
    if folder.exists():
        raise TrainingError(f"{folder} exists; choose another --out, nothing is overwritten")
    return folder


def _with_tasks(recipe: Recipe, tasks: tuple[str, ...]) -> Recipe:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tasks=tasks))


def _write_finished(model: DiffCode, recipe: Recipe, folder: Path) -> None:
    weights = {f"model/{n}": t for n, t in model.state_dict().items()}
    weights |= {f"average/{n}": p.data.clone() for n, p in model.named_parameters()}
    steps = recipe.stage1.steps
    state = {"version": CHECKPOINT_VERSION, "stage": Stage.CODEBOOK.value, "step": steps}
    write_checkpoint(folder, weights, {**state, "steps": steps, "recipe": recipe.to_dict()})
