"""The training loop of every stage, and its checkpoints.

    diffcode train restoration --recipe compact --data prepared --out run
    torchrun --nproc-per-node 2 -m training.cli train restoration --recipe paper …

A checkpoint is one safetensors file with weights, averaged weights, Adam's moments and the step.
Batches, noise, restarts and the learning rate are functions of the step alone, so a resumed run
repeats an uninterrupted one to the bit on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from restoration.diffcode import DiffCode
from restoration.quantizer import rows_by_task
from training.checkpoint import (
    CHECKPOINT,
    CHECKPOINT_VERSION,
    TrainingError,
    read_checkpoint,
    refuse_other_recipe,
    under,
    write_checkpoint,
)
from training.codebook import CodebookUpkeep, build_bank, collect_tokens, forget_moments
from training.journal import Journal
from training.patches import Batch
from training.recipe import Optimisation, Recipe
from training.stages import OBJECTIVES, Stage, stage_state, trained_parameters

BANK_BATCHES = 1 << 30  # first batch for the k-means: a step that training never reaches


@dataclass(frozen=True)
class World:
    """This process among those that ``torchrun`` started."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> World:
        """Meet the other processes when the environment names any."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())


@dataclass(frozen=True)
class Limits:
    """When a run pauses, and how often it saves; times in seconds."""

    max_seconds: float | None = None
    max_steps: int | None = None  #: steps of this run, not of the stage
    checkpoint_seconds: float = 300.0


@dataclass(frozen=True)
class Outcome:
    """Where a run stopped; ``model`` carries the averaged weights."""

    step: int
    finished: bool
    model: DiffCode
    figures: Mapping[str, float] = field(default_factory=dict)


def learning_rate(step: int, settings: Optimisation) -> float:
    """Linear warm-up, then a cosine from ``lr`` to ``lr_final`` over all planned steps."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    span = max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - settings.warmup) / span)))
    return settings.lr_final + (settings.lr - settings.lr_final) * cosine


def run_stage(
    stage: Stage,
    recipe: Recipe,
    batch_at: Callable[[int], Batch],
    folder: Path,
    *,
    start: Callable[[DiffCode], None] | None = None,
    validate: Callable[[DiffCode], Mapping[str, float]] | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
    limits: Limits | None = None,
    console: Console | None = None,
    force: bool = False,
) -> Outcome:
    """Train ``stage`` from its start or its last checkpoint until done, stopped or out of time.

    ``start`` loads the stages before into a fresh model; ``validate`` measures the averaged model.
    Raises TrainingError when the checkpoint is of another recipe or the loss is not finite.
    """
    device, world, limits = torch.device(device), world or World(), limits or Limits()
    settings = stage.settings(recipe)
    torch.manual_seed(recipe.seed)
    model = DiffCode(recipe.arch, with_vq_encoder=True)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if start is not None:
        start(model)
    run = _Run(stage, recipe, model, folder, force)
    objective: nn.Module = OBJECTIVES[stage](model, recipe, world.rank)
    if world.size > 1:
        # The expert kept in reserve takes part in no loss.
        objective = DistributedDataParallel(objective, find_unused_parameters=True)
    log = Journal(folder, run.step, settings, console) if world.rank == 0 else None
    begun = saved = time.monotonic()
    first = run.step
    figures: Mapping[str, float] = {}
    with _stop_signal() as stopped, log or contextlib.nullcontext():
        while run.step < settings.steps:
            if stage is Stage.CODEBOOK and run.step == recipe.stage1.ae_warmup:
                run.make_bank(batch_at(BANK_BATCHES + i).to(device) for i in count())
            terms = run.advance(objective, batch_at(run.step).to(device), world)
            now = time.monotonic()
            if log is not None and log.add(run.step, terms):
                log.write(run.step, run.figures())
            if run.step % settings.validate_every == 0 and validate is not None:
                figures = run.measure(validate)
                if log is not None:
                    log.validation(run.step, figures)
            pause = _pause(limits, run.step - first, now - begun, bool(stopped))
            pause = _agree(pause, world, device)
            if pause or (world.rank == 0 and now - saved > limits.checkpoint_seconds):
                run.save(world, terms)
                saved = now
            if pause:
                break
        run.save(world, None)
    run.use_average()
    return Outcome(run.step, run.step >= settings.steps, model, figures)


class _Run:
    """What changes from step to step: weights, their average, Adam's moments, the step."""

    def __init__(
        self, stage: Stage, recipe: Recipe, model: DiffCode, folder: Path, force: bool
    ) -> None:
        self.stage, self.recipe, self.model, self.folder = stage, recipe, model, folder
        self.settings = stage.settings(recipe)
        self.trained = trained_parameters(model, stage)
        self.optimiser = _optimiser(self.trained, self.settings)
        self.average = {n: p.detach().clone() for n, p in self.trained.items()}
        self.upkeep: CodebookUpkeep | None = None
        if stage is Stage.CODEBOOK and model.bank is not None:
            self.upkeep = CodebookUpkeep(model.bank, recipe.stage1, recipe.seed)
            self.upkeep.to(model.bank.weight.device)
        self.step = 0
        self._saved_step = -1
        if (folder / CHECKPOINT).exists():
            self._resume(force)

    def advance(self, objective: nn.Module, batch: Batch, world: World) -> dict[str, Tensor]:
        """One step of Adam; gives the terms of the loss."""
        rate = learning_rate(self.step, self.settings)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        parts = _parts(batch)
        found = []
        for i, part in enumerate(parts):
            with _synchronised(objective, last=i == len(parts) - 1):
                terms = self._backward(objective, part, 1.0 / len(parts))
            found.append(terms)
        terms = _joined(found)
        parameters = list(self.trained.values())
        terms["norm"] = nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        task = torch.cat([part.task for part in parts])
        self._keep_codes(terms, task, world)
        self._update_average()
        self.step += 1
        return terms

    def _backward(self, objective: nn.Module, part: Batch, share: float) -> dict[str, Tensor]:
        bf16 = self.recipe.precision == "bf16" and part.lq.device.type == "cuda"
        with torch.autocast(part.lq.device.type, dtype=torch.bfloat16, enabled=bf16):
            terms: dict[str, Tensor] = objective(part.lq, part.hq, part.mask, part.task, self.step)
        (share * terms["loss"]).backward()  # type: ignore[no-untyped-call]
        return terms

    def make_bank(self, batches: Iterator[Batch]) -> None:
        """Residual k-means over latents of the warmed-up encoder."""
        bank, settings = self.model.bank, self.recipe.stage1
        if bank is None:
            return
        tokens = collect_tokens(self.model, batches, settings.init_tokens)
        build_bank(bank, tokens, settings.kmeans_iterations, self.recipe.seed)
        if dist.is_initialized():
            dist.broadcast(bank.weight.data, 0)
        self.average["bank.weight"].copy_(bank.weight.data)

    def _keep_codes(self, terms: dict[str, Tensor], task: Tensor, world: World) -> None:
        if self.upkeep is None or self.model.bank is None or "codes" not in terms:
            return
        bank = self.model.bank
        self.upkeep.record(terms["codes"], task, self.step)
        if not self.upkeep.is_due(self.step):
            return
        if world.size > 1:
            dist.all_reduce(self.upkeep.last_used, dist.ReduceOp.MAX)
        moved = self.upkeep.restart(bank, terms["latent"], terms["codes"], task, self.step)
        forget_moments(self.optimiser, bank, moved)
        if world.size > 1:
            dist.broadcast(bank.weight.data, 0)
        average = self.average["bank.weight"]
        for n, index in moved:
            average[n, index] = bank.weight.data[n, index]

    def _update_average(self) -> None:
        # A short memory at first, so that the average forgets the random start.
        decay = min(self.settings.ema, (1.0 + self.step) / (10.0 + self.step))
        parameters = [p.detach() for p in self.trained.values()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1.0 - decay)

    def use_average(self) -> None:
        """Exchange the weights and their average; a second call exchanges them back."""
        for name, parameter in self.trained.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def figures(self) -> dict[str, float]:
        """What a line of the log says beside the terms of the loss."""
        usage = {} if self.upkeep is None else self.upkeep.report()
        return {"lr": learning_rate(self.step - 1, self.settings), **usage}

    def measure(self, validate: Callable[[DiffCode], Mapping[str, float]]) -> Mapping[str, float]:
        """Figures of the averaged model, pooled as at inference."""
        self.use_average()
        self.model.use_local_pooling(True)
        with torch.no_grad():
            figures = validate(self.model)
        self.model.use_local_pooling(False)
        self.use_average()
        return figures

    def save(self, world: World, terms: Mapping[str, Tensor] | None) -> None:
        """Write the checkpoint unless this step already has one."""
        if world.rank != 0 or self.step == self._saved_step:
            return
        if terms is not None and not all(map(_finite, (terms["loss"], terms["norm"]))):
            raise TrainingError(f"the loss is not finite at step {self.step}; checkpoint kept")
        write_checkpoint(self.folder, self._tensors(), self._state())
        self._saved_step = self.step

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model/{n}": t for n, t in stage_state(self.model, self.stage).items()}
        tensors |= {f"average/{n}": t for n, t in self.average.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"adam.{key}/{name}"] = value
        if self.upkeep is not None:
            tensors |= {f"upkeep/{n}": t for n, t in self.upkeep.state_dict().items()}
        return tensors

    def _state(self) -> dict[str, Any]:
        return {
            "version": CHECKPOINT_VERSION,
            "stage": self.stage.value,
            "step": self.step,
            "steps": self.settings.steps,
            "recipe": self.recipe.to_dict(),
        }

    def _resume(self, force: bool) -> None:
        tensors, state = read_checkpoint(self.folder)
        refuse_other_recipe(self.folder, state, self.recipe, self.stage.table, force)
        self.step = self._saved_step = int(state["step"])
        own = self.model.state_dict()
        for name, tensor in under(tensors, "model/").items():
            own[name].copy_(tensor)
        for name, tensor in under(tensors, "average/").items():
            self.average[name].copy_(tensor)
        if self.upkeep is not None:
            self.upkeep.load_state_dict(under(tensors, "upkeep/"))
        for key in ("step", "exp_avg", "exp_avg_sq"):
            for name, tensor in under(tensors, f"adam.{key}/").items():
                parameter = self.trained[name]
                # A copy in the layout of the parameter: another layout rounds differently.
                like = tensor.clone() if key == "step" else torch.zeros_like(parameter)
                self.optimiser.state[parameter][key] = like.copy_(tensor)


def _optimiser(trained: Mapping[str, nn.Parameter], settings: Optimisation) -> torch.optim.Adam:
    bank = [p for n, p in trained.items() if n.startswith("bank.")]
    net = [p for n, p in trained.items() if not n.startswith("bank.")]
    groups: list[dict[str, Any]] = [{"params": net, "factor": 1.0}]
    if bank:
        groups.append({"params": bank, "factor": getattr(settings, "codebook_lr_factor", 1.0)})
    return torch.optim.Adam(groups, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _parts(batch: Batch) -> list[Batch]:
    """The batch in the parts that go through the network at once.

    On a CPU one task at a time: no expert has to gather its images, and activations stay in the
    cache. On a GPU all at once: launching the kernels takes longer than they do.
    """
    if batch.lq.device.type == "cuda":
        return [batch]
    return [batch.rows(rows) for _, rows in rows_by_task(batch.task)]


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Scalars averaged over the parts of a batch, everything else in the parts' order."""
    return {
        name: torch.stack([p[name].detach() for p in parts]).mean()
        if parts[0][name].ndim == 0
        else torch.cat([p[name] for p in parts])
        for name in parts[0]
    }


def _synchronised(objective: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """Exchange gradients between processes with the last part only."""
    if isinstance(objective, DistributedDataParallel) and not last:
        return objective.no_sync()
    return contextlib.nullcontext()


def _pause(limits: Limits, steps: int, seconds: float, stopped: bool) -> bool:
    out_of_time = limits.max_seconds is not None and seconds >= limits.max_seconds
    out_of_steps = limits.max_steps is not None and steps >= limits.max_steps
    return stopped or out_of_time or out_of_steps


def _agree(pause: bool, world: World, device: torch.device) -> bool:
    """Whether any rank wants to pause: all must leave the loop at the same step."""
    if world.size == 1:
        return pause
    vote = torch.tensor(float(pause), device=device)
    dist.all_reduce(vote, dist.ReduceOp.MAX)
    return bool(vote.item() > 0)


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """SIGTERM and SIGINT fill the list instead of killing the run in the middle of a step."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _frame: received.append(n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
