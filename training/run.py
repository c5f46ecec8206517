"""A run folder: its stages in their order, the gates between them, the models they leave.

    RUN/codebook  RUN/diffusion  RUN/condition (V3)  RUN/restoration-{v1,v2,v3,full}

Each holds a checkpoint, a log and, once finished, ``gate.json``. A stage starts only from a stage
before it that passed its gate, unless forced.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from restoration.bundle import MANIFEST, load_bundle
from restoration.diffcode import DiffCode
from restoration.tasks import RestorationTask
from training.checkpoint import (
    CHECKPOINT,
    TrainingError,
    averaged_weights,
)
from training.codebook import (
    CodebookReport,
    collect_tokens,
    inspect_bank,
)
from training.loop import Limits, Outcome, World, run_stage
from training.patches import Batch
from training.recipe import Recipe
from training.resident import ResidentSet
from training.slices import Pairs, PatchSampler, PreparedSet
from training.stages import (
    GATES,
    GateCheck,
    Stage,
    gate_record,
    start_backbone_from,
    start_condition_from_encoder,
)
from training.validation import Figures, evaluation_pairs, stage_figures

GATE = "gate.json"


def train(
    stage: Stage,
    recipe: Recipe,
    data: Path | PreparedSet,
    out: Path,
    *,
    device: torch.device,
    limits: Limits,
    force: bool = False,
    past_gates: bool = False,
    console: Console | None = None,
) -> tuple[Outcome, tuple[GateCheck, ...]]:
    """Start or resume a stage of the run ``out``; a stage that finishes is put to its gate.

    Raises TrainingError when the stage before is missing, unfinished or failed its gate;
    ``past_gates`` goes on after a failed gate, ``force`` also with a changed schedule.
    """
    world = World.join(device)
    dataset = data if isinstance(data, PreparedSet) else PreparedSet.open(data)
    start = starting_weights(stage, recipe, out, force or past_gates)
    batch_at = sampler(_where_cut(dataset, recipe, device), stage, recipe, rank=world.rank)
    outcome = run_stage(
        stage,
        recipe,
        batch_at,
        out / stage.folder(recipe.arch.variant),
        start=start,
        validate=_validation(stage, dataset, recipe),
        device=device,
        world=world,
        limits=limits,
        console=console if world.rank == 0 else None,
        force=force,
    )
    if world.rank != 0 or not outcome.finished:
        return outcome, ()
    return outcome, pass_gate(stage, recipe, dataset, outcome.model, out)


def _where_cut(dataset: PreparedSet, recipe: Recipe, device: torch.device) -> Pairs:
    """On a GPU the whole training set lies beside the network; fresh noise needs it in memory."""
    fresh = recipe.data.fresh_noise
    if device.type == "cpu" and not fresh:
        return dataset
    return ResidentSet(
        dataset, device, tasks=recipe.data.tasks, fresh_every=fresh, seed=recipe.seed
    )


def sampler(
    dataset: Pairs, stage: Stage, recipe: Recipe, *, rank: int = 0
) -> Callable[[int], Batch]:
    """Training patches of a stage as a function of the step."""
    settings, data = stage.settings(recipe), recipe.data
    return PatchSampler(
        dataset,
        split="train",
        patch=settings.patch,
        per_task=settings.per_task,
        seed=recipe.seed,
        tasks=data.tasks,
        flip=data.flip,
        rotate=data.rotate,
        simulated_pet=data.simulated_pet,
        rank=rank,
    ).batch


def starting_weights(
    stage: Stage, recipe: Recipe, out: Path, force: bool = False
) -> Callable[[DiffCode], None]:
    """What loads the stage before into a fresh model."""
    variant = recipe.arch.variant
    if stage is not Stage.RESTORATION and not recipe.arch.has_reference:
        raise TrainingError(f"the variant {variant} has no {stage.value} stage")
    before = stage.before(variant)
    weights = {} if before is None else _finished_weights(before, variant, out, force)

    def start(model: DiffCode) -> None:
        own = model.state_dict()
        for name, tensor in weights.items():
            if name not in own or own[name].shape != tensor.shape:
                raise TrainingError(f"{name} of the stage before does not fit this recipe")
            own[name].copy_(tensor)
        if stage is Stage.DIFFUSION:
            start_condition_from_encoder(model)
        if stage is Stage.RESTORATION and recipe.stage3.init_from is not None:
            start_backbone_from(model, _backbone_weights(Path(recipe.stage3.init_from)))

    return start


def _finished_weights(stage: Stage, variant: str, out: Path, force: bool) -> Mapping[str, Tensor]:
    folder = out / stage.folder(variant)
    if not (folder / CHECKPOINT).exists():
        raise TrainingError(f"{folder} has no checkpoint: train {stage.value} first")
    problem = gate_problem(folder)
    if problem and not force:
        raise TrainingError(
            f"{folder} {problem}; --force (of a ladder: --past-gates) goes on all the same"
        )
    return averaged_weights(folder)[0]


def gate_problem(folder: Path) -> str:
    """Why the stage of ``folder`` may not be built upon; empty when it may."""
    path = folder / GATE
    if not path.exists():
        return "is not finished"
    record = json.loads(path.read_text(encoding="utf-8"))
    failed = [check["name"] for check in record["checks"] if not check["passed"]]
    return f"failed its gate: {', '.join(failed)}" if failed else ""


def _backbone_weights(source: Path) -> Mapping[str, Tensor]:
    """Weights of a bundle, a stage folder, or a run's restoration stage."""
    if (source / MANIFEST).exists() and not (source / CHECKPOINT).exists():
        return load_bundle(source)[1].state_dict()
    for folder in (source, source / "restoration-v2", source / "restoration-v1"):
        if (folder / CHECKPOINT).exists():
            return averaged_weights(folder)[0]
    raise TrainingError(f"{source} is neither a bundle nor a run with a restoration stage")


def _validation(
    stage: Stage, dataset: PreparedSet, recipe: Recipe
) -> Callable[[DiffCode], Mapping[str, float]]:
    pairs = list(evaluation_pairs(dataset, tasks_of(recipe), limit=recipe.data.validation_slices))
    for task in tasks_of(recipe):
        if all(pair.task is not task for pair in pairs):
            raise TrainingError(
                f"{dataset.folder} has no validation slices for {task.value}: the gate of the "
                "stage could not be measured"
            )

    def measure(model: DiffCode) -> Mapping[str, float]:
        figures = stage_figures(stage, model, pairs)
        return {f"{t}/{name}": value for t, row in figures.items() for name, value in row.items()}

    return measure


def tasks_of(recipe: Recipe) -> list[RestorationTask]:
    """The tasks a recipe trains."""
    return [RestorationTask(task) for task in recipe.data.tasks]


def pass_gate(
    stage: Stage, recipe: Recipe, dataset: PreparedSet, model: DiffCode, out: Path
) -> tuple[GateCheck, ...]:
    """Measure a finished stage on all validation slices and keep the verdict beside it."""
    figures = gate_figures(stage, recipe, dataset, model, out)
    record = gate_record(stage, figures, stage.settings(recipe).steps)
    folder = out / stage.folder(recipe.arch.variant)
    (folder / GATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return GATES[stage](figures)


def gate_figures(
    stage: Stage, recipe: Recipe, dataset: PreparedSet, model: DiffCode, out: Path
) -> Figures:
    """The figures that decide a stage's gate."""
    others = _earlier_rungs(stage, recipe, out, next(model.parameters()).device)
    model.use_local_pooling(True)
    limit = recipe.data.gate_slices or None
    pairs = evaluation_pairs(dataset, tasks_of(recipe), limit=limit)
    figures = stage_figures(stage, model, pairs, others)
    model.use_local_pooling(False)
    if stage is Stage.CODEBOOK:
        for report in inspect_codebooks(model, recipe, dataset, recipe.stage1.gate_tokens):
            found = figures.setdefault(report.task, {})
            found |= {"usage": report.usage, "perplexity": report.perplexity}
            found["bits_per_pixel"] = recipe.arch.bits_per_pixel
    return figures


def inspect_codebooks(
    model: DiffCode, recipe: Recipe, dataset: PreparedSet, tokens: int
) -> list[CodebookReport]:
    """How much of each codebook the training images use, and what each depth leaves over."""
    if model.bank is None or model.vq_encoder is None:
        raise TrainingError(f"the variant {recipe.arch.variant} has no codebook")
    return inspect_bank(model.bank, tokens_of(model, recipe, dataset, tokens))


def tokens_of(
    model: DiffCode, recipe: Recipe, dataset: PreparedSet, count: int
) -> dict[int, Tensor]:
    """At most ``count`` latents of training patches for each task of the recipe."""
    batch_at = sampler(dataset, Stage.CODEBOOK, recipe)
    device = next(model.parameters()).device
    return collect_tokens(model, _batches(batch_at, device), count)


def _batches(batch_at: Callable[[int], Batch], device: torch.device) -> Iterator[Batch]:
    return (batch_at(step).to(device) for step in itertools.count())


def _earlier_rungs(
    stage: Stage, recipe: Recipe, out: Path, device: torch.device
) -> dict[str, DiffCode]:
    """A finished V2 of the same run, against which V3 and the full model are judged."""
    folder = out / Stage.RESTORATION.folder("v2")
    guided = recipe.arch.has_reference
    if stage is not Stage.RESTORATION or not guided or not (folder / GATE).exists():
        return {}
    model, _ = trained_model(folder)
    model.use_local_pooling(True)
    return {"v2": model.to(device)}


def trained_model(folder: Path) -> tuple[DiffCode, Recipe]:
    """The model of a stage folder with its averaged weights, and the recipe it was trained by.

    Raises TrainingError when the folder has no checkpoint that can be read.
    """
    weights, state = averaged_weights(folder)
    recipe = Recipe.from_dict(state["recipe"], source=str(folder / CHECKPOINT))
    model = DiffCode(recipe.arch, with_vq_encoder=True)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise TrainingError(f"{folder / CHECKPOINT} has the unknown weight {unknown[0]}")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False), recipe


def restoration_folder(run: Path, variant: str | None) -> Path:
    """The restoration stage of a run, or of the variant named; TrainingError when not unique."""
    if (run / CHECKPOINT).exists():
        return run
    names = [variant] if variant else ["full", "v3", "v2", "v1"]
    folders = [run / Stage.RESTORATION.folder(name) for name in names]
    found = [folder for folder in folders if (folder / CHECKPOINT).exists()]
    if not found:
        raise TrainingError(f"{run} holds no restoration stage ({', '.join(names)})")
    if len(found) > 1:
        rungs = ", ".join(folder.name for folder in found)
        raise TrainingError(f"{run} holds {rungs}: choose with --variant")
    return found[0]
