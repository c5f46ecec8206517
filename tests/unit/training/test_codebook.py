from __future__ import annotations

import pytest
import torch
from torch import Tensor

from restoration.diffcode import DiffCode
from restoration.quantizer import CodebookBank, residual_codes, sum_codes
from tests.training.tiny import tiny_recipe
from training.codebook import (
    CodebookUpkeep,
    build_bank,
    collect_tokens,
    forget_moments,
    inspect_bank,
    kmeans,
    refine_bank,
    residual_kmeans,
    usage_figures,
)
from training.patches import Batch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int = 400, dim: int = 4) -> Tensor:
    """Tokens around five far-apart centres."""
    centres = 10 * torch.randn(5, dim, generator=generator(3))
    spread = 0.1 * torch.randn(count, dim, generator=generator(4))
    return centres[torch.arange(count) % 5] + spread


def error(tokens: Tensor, codebook: Tensor, depths: int) -> float:
    found = sum_codes(residual_codes(tokens, codebook, depths), codebook)
    return float((tokens - found).square().mean() / tokens.square().mean())


def test_kmeans_finds_clusters_that_stand_apart() -> None:
    tokens = blobs()
    centroids = kmeans(tokens, 5, 8, generator())
    assert error(tokens, centroids, 1) < 1e-3


def test_kmeans_fills_every_cluster_even_with_few_distinct_tokens() -> None:
    tokens = torch.ones(20, 3)
    assert kmeans(tokens, 4, 3, generator()).isfinite().all()


@pytest.mark.parametrize(("codes", "depths"), [(16, 4), (17, 3), (5, 4)])
def test_a_residual_codebook_has_the_zero_code_and_the_size_asked_for(
    codes: int, depths: int
) -> None:
    codebook = residual_kmeans(blobs(), codes, depths, 4, generator())
    assert codebook.shape == (codes, 4)
    assert not codebook[0].any()


def test_a_codebook_from_data_describes_it_better_than_a_random_one() -> None:
    tokens = torch.randn(2000, 8, generator=generator(1))
    made = residual_kmeans(tokens, 64, 4, 6, generator())
    random = torch.randn(64, 8, generator=generator(2))
    random[0] = 0
    assert error(tokens, made, 4) < 0.5 * error(tokens, random, 4)


def test_each_depth_leaves_less_over_than_the_one_before() -> None:
    tokens = torch.randn(500, 8, generator=generator(1))
    bank = CodebookBank(tasks=3, codes=32, dim=8, depths=4)
    build_bank(bank, {1: tokens}, 4, seed=0)
    (report,) = inspect_bank(bank, {1: tokens})
    assert (report.task, report.tokens) == ("ct_denoise", 500)
    assert list(report.relative_error) == sorted(report.relative_error, reverse=True)
    assert 0 < report.usage <= 1
    assert 1 <= report.perplexity <= 32


def test_building_one_codebook_leaves_the_others_alone() -> None:
    bank = CodebookBank(tasks=3, codes=16, dim=4, depths=2)
    before = bank.weight.detach().clone()
    build_bank(bank, {2: blobs()}, 4, seed=0)
    assert torch.equal(bank.weight[:2], before[:2])
    assert not torch.equal(bank.weight[2], before[2])


def test_refinement_lowers_the_error_and_keeps_the_zero_code() -> None:
    tokens = torch.randn(2000, 8, generator=generator(1))
    bank = CodebookBank(tasks=3, codes=32, dim=8, depths=2)
    build_bank(bank, {0: tokens}, 1, seed=0)
    before = inspect_bank(bank, {0: tokens})[0].relative_error[-1]
    refine_bank(bank, {0: tokens}, passes=5)
    assert inspect_bank(bank, {0: tokens})[0].relative_error[-1] < before
    assert not bank.weight[0, 0].any()


def upkeep_of(bank: CodebookBank) -> CodebookUpkeep:
    recipe = tiny_recipe(stage1={"steps": 40, "ae_warmup": 4, "restart_every": 5})
    return CodebookUpkeep(bank, recipe.stage1, seed=0)


def test_restarts_come_once_a_window_and_stop_before_the_end() -> None:
    upkeep = upkeep_of(CodebookBank(tasks=3, codes=8, dim=4, depths=2))
    assert [step for step in range(40) if upkeep.is_due(step)] == [8, 13, 18, 23, 28]


def test_codes_out_of_use_start_again_at_a_residual_and_forget_their_moments() -> None:
    torch.manual_seed(0)
    bank = CodebookBank(tasks=3, codes=16, dim=4, depths=2)
    latent, task = torch.randn(1, 4, 2, 2), torch.tensor([1])
    codes = bank.encode(latent, task)
    upkeep, step = upkeep_of(bank), 13
    upkeep.record(codes, task, step)
    optimiser = torch.optim.Adam([bank.weight])
    bank.weight.square().sum().backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    before = bank.weight.detach().clone()
    moved = upkeep.restart(bank, latent, codes, task, step)
    forget_moments(optimiser, bank, moved)
    used = set(codes.unique().tolist()) | {0}
    ((n, index),) = moved
    assert n == 1
    assert set(index.tolist()) == set(range(16)) - used
    assert torch.equal(bank.weight[0], before[0])
    assert torch.equal(bank.weight[1, sorted(used)], before[1, sorted(used)])
    pool = latent.permute(0, 2, 3, 1).reshape(-1, 4)
    pool = torch.cat([pool, pool - before[1][codes.permute(1, 0, 2, 3).flatten(1)[0]]])
    for code in bank.weight[1, index]:
        assert (pool - code).abs().sum(dim=1).min() < 1e-5
    assert not optimiser.state[bank.weight]["exp_avg"][1, index].any()
    assert optimiser.state[bank.weight]["exp_avg"][0, 1:].any()


def test_a_code_that_was_restarted_has_a_window_to_be_found() -> None:
    bank = CodebookBank(tasks=3, codes=8, dim=4, depths=2)
    latent, task = torch.randn(1, 4, 2, 2, generator=generator()), torch.tensor([0])
    codes, upkeep = bank.encode(latent, task), upkeep_of(bank)
    upkeep.record(codes, task, 8)
    assert upkeep.restart(bank, latent, codes, task, 8)
    assert not upkeep.restart(bank, latent, codes, task, 9)


def test_the_report_counts_since_the_last_report() -> None:
    bank = CodebookBank(tasks=3, codes=8, dim=4, depths=2)
    upkeep = upkeep_of(bank)
    codes = torch.tensor([[[[1, 1]], [[2, 3]]]])  # (B, D, h, w)
    upkeep.record(codes, torch.tensor([2]), step=1)
    figures = upkeep.report()
    assert figures["usage/pet_synthesis"] == 3 / 8
    assert figures["usage/pet_synthesis/depth1"] == 1 / 8
    assert figures["perplexity/pet_synthesis/depth2"] == pytest.approx(2.0)
    assert upkeep.report() == {}


def test_a_task_without_tokens_has_no_figures() -> None:
    assert usage_figures(torch.zeros(3, 2, 4, dtype=torch.long)) == {}


def test_tokens_come_from_real_pixels_of_each_task_alone() -> None:
    recipe = tiny_recipe()
    model = DiffCode(recipe.arch, with_vq_encoder=True)
    mask = torch.zeros(3, 1, 32, 32)
    mask[..., :8, :16] = 1  # one row of two latent positions
    images = torch.rand(3, 1, 32, 32)
    batch = Batch(images, images, mask, torch.tensor([0, 1, 2]))
    tokens = collect_tokens(model, [batch, batch], per_task=3)
    assert {task: sample.shape for task, sample in tokens.items()} == dict.fromkeys(
        range(3), (3, 8)
    )
