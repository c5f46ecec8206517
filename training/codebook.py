"""Making and keeping the codebook bank: residual k-means, windowed restarts, usage statistics.

Random codes are never found by the latents of an autoencoder, so the bank is made from data once
the plain autoencoder has warmed up; codes that fall out of use later start again at a latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restoration.diffcode import DiffCode
from restoration.quantizer import (
    ZERO_CODE,
    CodebookBank,
    code_usage,
    nearest_codes,
    perplexity,
    rows_by_task,
)
from restoration.tasks import RestorationTask
from training.patches import Batch
from training.recipe import CodebookStage

SEEDING_TOKENS = 20_000
TASK_NAMES = tuple(task.value for task in RestorationTask)


def kmeans(tokens: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Centroids (K, d) of tokens (N, d): k-means++ seeds on a subsample, then Lloyd's iterations.

    A cluster that loses all its tokens starts again at a random one.
    """
    centroids = _plus_plus(_sample(tokens, SEEDING_TOKENS, generator), clusters, generator)
    for _ in range(iterations):
        index = nearest_codes(tokens, centroids)
        counts = torch.bincount(index, minlength=clusters).to(tokens.dtype)
        sums = torch.zeros_like(centroids).index_add_(0, index, tokens)
        centroids = sums / counts.clamp(min=1.0).unsqueeze(1)
        empty = torch.nonzero(counts == 0).squeeze(1)
        centroids[empty] = _draw(tokens, len(empty), generator)
    return centroids


def residual_kmeans(
    tokens: Tensor, codes: int, depths: int, iterations: int, generator: torch.Generator
) -> Tensor:
    """One codebook (codes, d) from tokens (N, d): a share of the codes for each depth's residuals.

    Code 0 is the fixed zero code. Needs more codes than depths, and at least one token.
    """
    residual = tokens.float()
    parts = [residual.new_zeros(1, residual.shape[1])]
    free = codes - 1
    for depth in range(depths):
        share = free * (depth + 1) // depths - free * depth // depths
        centroids = kmeans(residual, share, iterations, generator)
        residual = residual - centroids[nearest_codes(residual, centroids)]
        parts.append(centroids)
    return torch.cat(parts)


def collect_tokens(model: DiffCode, batches: Iterable[Batch], per_task: int) -> dict[int, Tensor]:
    """Latent tokens (≤ per_task, d) of each task, from clean images; padding is left out."""
    found: dict[int, list[Tensor]] = {}
    counts: dict[int, int] = {}
    with torch.no_grad():
        for batch in batches:
            for task, tokens in _tokens_by_task(model, batch):
                found.setdefault(task, []).append(tokens)
                counts[task] = counts.get(task, 0) + len(tokens)
            if min(counts.values()) >= per_task:
                break
    return {task: torch.cat(parts)[:per_task] for task, parts in sorted(found.items())}


def build_bank(bank: CodebookBank, tokens: dict[int, Tensor], iterations: int, seed: int) -> None:
    """Fill the codebook of every task that has tokens, in place, by residual k-means."""
    for task, sample in tokens.items():
        generator = torch.Generator(sample.device).manual_seed(seed + task)
        made = residual_kmeans(sample, bank.codes, bank.depths, iterations, generator)
        bank.weight.data[task].copy_(made)


def refine_bank(bank: CodebookBank, tokens: dict[int, Tensor], passes: int) -> None:
    """Move each code to the mean of the residuals it stands for, over all depths at once.

    The bank is fixed while a pass gathers its statistics: a codebook that is shared by the depths
    and updated between them fits no depth.
    """
    for task, sample in tokens.items():
        codebook = bank.weight.data[task]
        for _ in range(passes):
            codebook.copy_(_refined(codebook, sample.float(), bank.depths))


def _refined(codebook: Tensor, residual: Tensor, depths: int) -> Tensor:
    counts = codebook.new_zeros(len(codebook))
    sums = torch.zeros_like(codebook)
    for _ in range(depths):
        index = nearest_codes(residual, codebook)
        counts += torch.bincount(index, minlength=len(codebook))
        sums.index_add_(0, index, residual)
        residual = residual - codebook[index]
    means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1.0)[:, None], codebook)
    means[ZERO_CODE] = 0.0
    return means


class CodebookUpkeep(nn.Module):
    """Which codes were used when, and the restart of those out of use; its buffers are its state.

    ``last_used`` holds the step of each code's last use; ``counts`` the uses since the last report.
    """

    def __init__(self, bank: CodebookBank, settings: CodebookStage, seed: int) -> None:
        super().__init__()
        tasks, codes, _ = bank.weight.shape
        self.settings, self.seed, self.depths = settings, seed, bank.depths
        self.last_used: Tensor
        self.counts: Tensor
        self.register_buffer("last_used", torch.zeros(tasks, codes, dtype=torch.long))
        self.register_buffer("counts", torch.zeros(tasks, bank.depths, codes, dtype=torch.long))

    def record(self, codes: Tensor, task: Tensor, step: int) -> None:
        """Note the codes (B, D, h, w) of a step."""
        for n, rows in rows_by_task(task):
            used = codes[rows].transpose(0, 1).flatten(1)  # (D, tokens)
            self.last_used[n, used.flatten()] = step
            for depth, row in enumerate(used):
                self.counts[n, depth] += torch.bincount(row, minlength=self.counts.shape[2])

    def is_due(self, step: int) -> bool:
        """Whether codes out of use are restarted after ``step``."""
        s = self.settings
        quantised = step - s.ae_warmup + 1
        return (
            quantised > 0 and quantised % s.restart_every == 0 and step < s.restart_until * s.steps
        )

    def restart(
        self, bank: CodebookBank, latent: Tensor, codes: Tensor, task: Tensor, step: int
    ) -> list[tuple[int, Tensor]]:
        """Move codes unused for a window onto random residuals of this step's latents.

        Latents are (B, d, h, w), codes (B, D, h, w). Returns the moved codes of each task, whose
        optimiser moments are void.
        """
        generator = torch.Generator(latent.device).manual_seed(self.seed * 1_000_003 + step)
        moved = []
        for n, rows in rows_by_task(task):
            stale = self.last_used[n] <= step - self.settings.restart_every
            stale[ZERO_CODE] = False
            index = torch.nonzero(stale).squeeze(1)
            if len(index):
                pool = _residuals(latent[rows], codes[rows], bank.weight[n])
                bank.weight.data[n, index] = _draw(pool, len(index), generator)
                self.last_used[n, index] = step
                moved.append((n, index))
        return moved

    def report(self) -> dict[str, float]:
        """Usage and perplexity of each task's codebook, and per depth, since the last report."""
        figures = usage_figures(self.counts)
        self.counts.zero_()
        return figures


def usage_figures(counts: Tensor) -> dict[str, float]:
    """Flat figures from counts (tasks, D, K); tasks without a count are left out."""
    figures = {}
    for name, per_depth in zip(TASK_NAMES, counts, strict=True):
        if int(per_depth.sum()) == 0:
            continue
        figures[f"usage/{name}"] = code_usage(per_depth.sum(dim=0))
        figures[f"perplexity/{name}"] = perplexity(per_depth.sum(dim=0))
        for depth, row in enumerate(per_depth, start=1):
            figures[f"usage/{name}/depth{depth}"] = code_usage(row)
            figures[f"perplexity/{name}/depth{depth}"] = perplexity(row)
    return figures


@dataclass(frozen=True)
class CodebookReport:
    """How well one task's codebook describes the latents of a data set."""

    task: str
    tokens: int
    usage: float  #: share of the codes used at least once
    perplexity: float
    depth_usage: tuple[float, ...]
    relative_error: tuple[float, ...]  #: mean square residual over mean square latent, per depth


def inspect_bank(bank: CodebookBank, tokens: dict[int, Tensor]) -> list[CodebookReport]:
    """Usage, perplexity and the error that each further depth leaves, per task."""
    return [_inspect(bank, task, sample) for task, sample in tokens.items()]


def _inspect(bank: CodebookBank, task: int, tokens: Tensor) -> CodebookReport:
    codebook, residual = bank.weight.detach()[task].float(), tokens.float()
    energy = residual.square().mean().clamp(min=1e-20)
    counts, errors = [], []
    for _ in range(bank.depths):
        index = nearest_codes(residual, codebook)
        residual = residual - codebook[index]
        counts.append(torch.bincount(index, minlength=bank.codes))
        errors.append(float(residual.square().mean() / energy))
    total = torch.stack(counts).sum(dim=0)
    return CodebookReport(
        task=TASK_NAMES[task],
        tokens=len(tokens),
        usage=code_usage(total),
        perplexity=perplexity(total),
        depth_usage=tuple(code_usage(c) for c in counts),
        relative_error=tuple(errors),
    )


def forget_moments(
    optimiser: torch.optim.Optimizer, bank: CodebookBank, moved: list[tuple[int, Tensor]]
) -> None:
    """Zero Adam's moments of restarted codes: they belong to the codes that were there before."""
    state = optimiser.state.get(bank.weight, {})
    for key in ("exp_avg", "exp_avg_sq"):
        for task, index in moved:
            if key in state:
                state[key][task, index] = 0.0


def _tokens_by_task(model: DiffCode, batch: Batch) -> Iterator[tuple[int, Tensor]]:
    assert model.vq_encoder is not None
    latent = model.vq_encoder(batch.hq).float()
    real = nn.functional.max_pool2d(batch.mask, model.config.factor)[:, 0] > 0  # (B, h, w)
    tokens = latent.permute(0, 2, 3, 1)
    for n, rows in rows_by_task(batch.task):
        yield n, tokens[rows][real[rows]]


def _residuals(latent: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """What is left of the latents before each depth: (B, d, h, w) → (B·h·w·D, d)."""
    residual = latent.permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
    pools = []
    for ids in codes.permute(1, 0, 2, 3).flatten(1):
        pools.append(residual)
        residual = residual - codebook.detach()[ids]
    return torch.cat(pools)


def _draw(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    index = torch.randint(len(tokens), (count,), generator=generator, device=tokens.device)
    return tokens[index]


def _sample(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(tokens) <= count:
        return tokens
    order = torch.randperm(len(tokens), generator=generator, device=tokens.device)
    return tokens[order[:count]]


def _plus_plus(tokens: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each seed is drawn with probability ∝ squared distance to the seeds before."""
    seeds = [_draw(tokens, 1, generator)]
    nearest = (tokens - seeds[0]).square().sum(dim=1)
    for _ in range(clusters - 1):
        weights = nearest if float(nearest.sum()) > 0 else torch.ones_like(nearest)
        index = torch.multinomial(weights, 1, generator=generator)
        seeds.append(tokens[index])
        nearest = torch.minimum(nearest, (tokens - seeds[-1]).square().sum(dim=1))
    return torch.cat(seeds)
