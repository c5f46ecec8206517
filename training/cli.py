"""The ``diffcode`` command: prepare data, train the stages, inspect, evaluate, bundle, restore."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from restoration.diffcode import DiffCode
    from training.recipe import Recipe
    from training.slices import PreparedSet
    from training.stages import Stage

Command = TypeVar("Command", bound=Callable[..., Any])
VARIANTS = ("v1", "v2", "v3", "full")
GATE = "gate.json"
GATE_TOKENS = 50_000


class Refused(click.ClickException):
    """The command was understood and not carried out; exit code 1."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        click.echo(f"diffcode: {self.message}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Train, evaluate and use DiffCode restoration models."""


@main.group()
def train() -> None:
    """Train one stage; the same command again resumes it.

    \b
    diffcode train codebook    --recipe compact --data prepared --out run     Stage I
    diffcode train diffusion   --recipe compact --data prepared --out run     Stage II
    diffcode train restoration --recipe compact --data prepared --out run     Stage III
    diffcode train restoration --recipe compact --variant v2 --data prepared --out run

    The variants v1 and v2 need Stage III alone. SIGTERM, SIGINT and --max-seconds save and exit 0.
    """


def _train_options(command: Command) -> Command:
    folder = click.Path(path_type=Path)
    options = [
        click.option("--recipe", default="compact", show_default=True, help="preset or TOML file"),
        click.option("--data", required=True, type=folder, help="prepared folder"),
        click.option("--out", required=True, type=folder, help="run folder"),
        click.option("--variant", type=click.Choice(VARIANTS), help="rung of the ladder"),
        click.option("--steps", type=click.IntRange(1), help="planned steps of the stage, in all"),
        click.option("--max-seconds", type=click.FloatRange(0), help="save and stop after this"),
        click.option("--seed", type=int, help="instead of the recipe's"),
        click.option("--threads", type=click.IntRange(1), help="CPU threads"),
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda"),
        click.option("--init-from", type=folder, help="run or bundle that Stage III starts from"),
        click.option("--force", is_flag=True, help="go on past a gate or a changed schedule"),
    ]
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def _register(name: str, text: str) -> None:
    @train.command(name, help=text)
    @_train_options
    def command(**options: Any) -> None:
        from training.stages import Stage

        _guarded(_train, Stage(name), **options)


_register("codebook", "Stage I: the VQ autoencoder and the codebook bank, Eq. (3).")
_register("diffusion", "Stage II: the condition encoder and the latent diffusion, Eq. (6).")
_register("restoration", "Stage III: the backbone, its routing and the classifier, Eq. (7).")


def _guarded(command: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Run a command; what the libraries refuse becomes one line on stderr and exit code 1."""
    from restoration.bundle import RestorationError
    from training.checkpoint import TrainingError

    try:
        command(*arguments, **options)
    except (TrainingError, RestorationError, ValueError, TypeError, OSError) as error:
        raise Refused(str(error)) from error


def _train(
    stage: Stage,
    *,
    recipe: str,
    data: Path,
    out: Path,
    variant: str | None,
    steps: int | None,
    max_seconds: float | None,
    seed: int | None,
    threads: int | None,
    device: str,
    init_from: Path | None,
    force: bool,
) -> None:
    import torch
    from rich.console import Console

    from training.loop import Limits, World, run_stage
    from training.slices import PreparedSet

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = _device(device)
    settled = _settle(recipe, stage, variant, steps, seed, init_from)
    console = Console(stderr=True)
    world = World.join(chosen)
    dataset = PreparedSet.open(data)
    start = _start(stage, settled, out, force, console)
    batch_at = _sampler(dataset, stage, settled, world.rank)
    folder = out / stage.folder(settled.arch.variant)
    outcome = run_stage(
        stage,
        settled,
        batch_at,
        folder,
        start=start,
        validate=_validation(stage, dataset, settled),
        device=chosen,
        world=world,
        limits=Limits(max_seconds=max_seconds),
        console=console if world.rank == 0 else None,
        force=force,
    )
    if world.rank != 0:
        return
    done = "finished" if outcome.finished else "paused; the same command goes on"
    console.print(f"{stage.value}: step {outcome.step} of {stage.settings(settled).steps}, {done}")
    if outcome.finished:
        _write_gate(stage, settled, dataset, outcome.model, batch_at, out, console)


def _settle(
    source: str,
    stage: Stage,
    variant: str | None,
    steps: int | None,
    seed: int | None,
    init_from: Path | None,
) -> Recipe:
    """The recipe with the command line's changes, checked again."""
    from training.recipe import Recipe

    values = Recipe.load(source).to_dict()
    table = values[stage.table]
    if variant is not None:
        values["arch"]["variant"] = variant
    if steps is not None:
        table["steps"] = steps
    if seed is not None:
        values["seed"] = seed
    if init_from is not None:
        values["stage3"]["init_from"] = str(init_from)
    return Recipe.from_dict(values, source=source)


def _sampler(dataset: PreparedSet, stage: Stage, recipe: Recipe, rank: int) -> Callable[[int], Any]:
    from training.slices import PatchSampler

    settings, data = stage.settings(recipe), recipe.data
    sampler = PatchSampler(
        dataset,
        split="train",
        patch=settings.patch,
        per_task=settings.per_task,
        seed=recipe.seed,
        tasks=data.tasks,
        flip=data.flip,
        rotate=data.rotate,
        rank=rank,
    )
    return sampler.batch


def _validation(
    stage: Stage, dataset: PreparedSet, recipe: Recipe
) -> Callable[[DiffCode], Mapping[str, float]]:
    from training.evaluate import evaluation_pairs, stage_figures

    pairs = list(evaluation_pairs(dataset, _tasks(recipe), limit=recipe.data.validation_slices))

    def measure(model: DiffCode) -> Mapping[str, float]:
        figures = stage_figures(stage, model, pairs)
        return {f"{t}/{name}": value for t, row in figures.items() for name, value in row.items()}

    return measure


def _tasks(recipe: Recipe) -> list[Any]:
    from restoration.tasks import RestorationTask

    return [RestorationTask(task) for task in recipe.data.tasks]


def _start(
    stage: Stage, recipe: Recipe, out: Path, force: bool, console: Console
) -> Callable[[DiffCode], None]:
    """What loads the stage before, whose gate must have passed, into a fresh model."""
    from training.checkpoint import CHECKPOINT, TrainingError, averaged_weights
    from training.stages import Stage, start_backbone_from, start_condition_from_encoder

    variant = recipe.arch.variant
    before = stage.before(variant)
    if stage is not Stage.RESTORATION and not recipe.arch.has_reference:
        raise TrainingError(f"the variant {variant} has no {stage.value} stage")
    weights: Mapping[str, torch.Tensor] = {}
    if before is not None:
        folder = out / before.folder(variant)
        if not (folder / CHECKPOINT).exists():
            raise TrainingError(f"{folder} has no checkpoint: train {before.value} first")
        _require_gate(folder, force, console)
        weights, _ = averaged_weights(folder)

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


def _backbone_weights(source: Path) -> Mapping[str, torch.Tensor]:
    """Weights of a bundle, or of a run folder's restoration stage."""
    from restoration.bundle import MANIFEST, load_bundle
    from training.checkpoint import CHECKPOINT, averaged_weights

    if (source / MANIFEST).exists() and not (source / CHECKPOINT).exists():
        return load_bundle(source)[1].state_dict()
    for folder in (source, source / "restoration-v2", source / "restoration-v1"):
        if (folder / CHECKPOINT).exists():
            return averaged_weights(folder)[0]
    raise ValueError(f"{source} is neither a bundle nor a run with a restoration stage")


def _require_gate(folder: Path, force: bool, console: Console) -> None:
    from training.checkpoint import TrainingError

    path = folder / GATE
    if not path.exists():
        problem = "is not finished"
    else:
        record = json.loads(path.read_text(encoding="utf-8"))
        failed = [c["name"] for c in record["checks"] if not c["passed"]]
        problem = f"failed its gate: {', '.join(failed)}" if failed else ""
    if not problem:
        return
    if not force:
        raise TrainingError(f"{folder} {problem}; --force goes on all the same")
    console.print(f"{folder} {problem}; going on as --force asks")


def _write_gate(
    stage: Stage,
    recipe: Recipe,
    dataset: PreparedSet,
    model: DiffCode,
    batch_at: Callable[[int], Any],
    out: Path,
    console: Console,
) -> None:
    """Measure the finished stage on all validation slices and keep the verdict beside it."""
    from training.evaluate import evaluation_pairs, stage_figures
    from training.stages import GATES, gate_record

    others = _earlier_rungs(stage, recipe, out, next(model.parameters()).device)
    model.use_local_pooling(True)
    pairs = evaluation_pairs(dataset, _tasks(recipe))
    figures = stage_figures(stage, model, pairs, others)
    model.use_local_pooling(False)
    for task, usage in _usage(stage, model, batch_at).items():
        figures.setdefault(task, {})["usage"] = usage
    record = gate_record(stage, figures, stage.settings(recipe).steps)
    folder = out / stage.folder(recipe.arch.variant)
    (folder / GATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for check in GATES[stage](figures):
        console.print(str(check), markup=False)


def _usage(stage: Stage, model: DiffCode, batch_at: Callable[[int], Any]) -> dict[str, float]:
    """Share of each codebook that the training images use."""
    from training.codebook import collect_tokens, inspect_bank
    from training.stages import Stage

    if stage is not Stage.CODEBOOK or model.bank is None:
        return {}
    device = model.bank.weight.device
    batches = (_moved(batch_at(step), device) for step in range(1 << 20))
    tokens = collect_tokens(model, batches, GATE_TOKENS)
    return {report.task: report.usage for report in inspect_bank(model.bank, tokens)}


def _moved(batch: Any, device: torch.device) -> Any:
    names = [field.name for field in dataclasses.fields(batch)]
    return dataclasses.replace(batch, **{n: getattr(batch, n).to(device) for n in names})


def _earlier_rungs(
    stage: Stage, recipe: Recipe, out: Path, device: torch.device
) -> dict[str, DiffCode]:
    """A V2 of the same run, against which V3 and the full model are judged."""
    from training.checkpoint import CHECKPOINT
    from training.stages import Stage

    folder = out / Stage.RESTORATION.folder("v2")
    guided = recipe.arch.has_reference
    if stage is not Stage.RESTORATION or not guided or not (folder / CHECKPOINT).exists():
        return {}
    model = _trained_model(folder)
    model.use_local_pooling(True)
    return {"v2": model.to(device)}


def _trained_model(folder: Path) -> DiffCode:
    """The model of a finished or paused stage, with its averaged weights."""
    import torch

    from restoration.diffcode import DiffCode
    from training.checkpoint import averaged_weights
    from training.recipe import Recipe

    weights, state = averaged_weights(folder)
    model = DiffCode(Recipe.from_dict(state["recipe"]).arch, with_vq_encoder=True)
    model.load_state_dict(weights, strict=False)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


if __name__ == "__main__":
    main()
