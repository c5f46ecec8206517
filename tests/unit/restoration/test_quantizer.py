from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from restoration.quantizer import (
    ZERO_CODE,
    CodebookBank,
    code_usage,
    nearest_codes,
    perplexity,
    residual_codes,
    rows_by_task,
    straight_through,
    sum_codes,
)


@pytest.fixture
def codebook() -> Tensor:
    values = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    values[ZERO_CODE] = 0
    return values


@pytest.fixture
def tokens() -> Tensor:
    return 2 * torch.randn(301, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def bank() -> CodebookBank:
    bank = CodebookBank(tasks=3, codes=20, dim=6, depths=4)
    with torch.no_grad():
        bank.weight.copy_(torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(3)))
        bank.weight[:, ZERO_CODE] = 0
    return bank


@pytest.mark.parametrize("rows", [1, 7, 100, 301, 1000])
def test_the_chunked_search_finds_what_the_dense_one_does(
    tokens: Tensor, codebook: Tensor, rows: int
) -> None:
    dense = (tokens[:, None] - codebook[None]).square().sum(-1).argmin(1)
    assert torch.equal(nearest_codes(tokens, codebook, rows), dense)


def test_a_tie_goes_to_the_lowest_index() -> None:
    codebook = torch.tensor([[9.0], [1.0], [-1.0], [1.0]])
    assert nearest_codes(torch.tensor([[0.0], [1.0], [-7.0]]), codebook).tolist() == [1, 1, 2]


def test_no_tokens_have_no_codes(codebook: Tensor) -> None:
    assert nearest_codes(torch.empty(0, 8), codebook).shape == (0,)


def test_each_depth_takes_the_code_nearest_to_what_is_left(
    tokens: Tensor, codebook: Tensor
) -> None:
    ids = residual_codes(tokens, codebook, 3)
    residual = tokens.clone()
    for depth in range(3):
        nearest = torch.cdist(residual, codebook).argmin(1)
        assert torch.equal(ids[:, depth], nearest)
        residual = residual - codebook[nearest]


def test_the_zero_code_keeps_residuals_from_growing(tokens: Tensor, codebook: Tensor) -> None:
    small = torch.cat([tokens, 0.01 * tokens, torch.zeros(1, 8)])
    ids = residual_codes(small, codebook, 8)
    norms = [
        (small - sum_codes(ids[:, :depth], codebook)).norm(dim=1) if depth else small.norm(dim=1)
        for depth in range(9)
    ]
    for before, after in itertools.pairwise(norms):
        assert bool((after <= before + 1e-5).all())


def test_without_a_zero_code_residuals_can_grow(tokens: Tensor, codebook: Tensor) -> None:
    far = codebook + 10
    ids = residual_codes(tokens, far, 1)
    assert bool(((tokens - sum_codes(ids, far)).norm(dim=1) > tokens.norm(dim=1)).any())


def test_half_precision_features_are_searched_in_single(tokens: Tensor, codebook: Tensor) -> None:
    half = tokens.bfloat16()
    assert torch.equal(residual_codes(half, codebook, 4), residual_codes(half.float(), codebook, 4))


def test_the_gradient_of_a_code_counts_its_uses() -> None:
    codebook = torch.randn(5, 2, requires_grad=True)
    ids = torch.tensor([[1, 1], [1, 3], [ZERO_CODE, ZERO_CODE]])
    sum_codes(ids, codebook).sum().backward()
    assert codebook.grad is not None
    assert codebook.grad[:, 0].tolist() == [0, 3, 0, 1, 0]


def test_the_straight_through_value_is_the_quantised_and_its_gradient_the_features() -> None:
    features = torch.randn(4, 3, requires_grad=True)
    quantised = torch.randn(4, 3, requires_grad=True)
    out = straight_through(features, quantised)
    torch.testing.assert_close(out, quantised)
    (out * torch.arange(3.0)).sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad, torch.arange(3.0).expand(4, 3))
    assert quantised.grad is None


def test_training_and_evaluation_quantise_alike(bank: CodebookBank) -> None:
    features, task = torch.randn(3, 6, 4, 5), torch.tensor([2, 0, 1])
    bank.train()
    trained = bank(features, task)
    bank.eval()
    with torch.inference_mode():
        evaluated = bank(features, task)
    assert torch.equal(trained.codes, evaluated.codes)
    assert torch.equal(trained.values, evaluated.values)


def test_each_image_uses_the_codebook_of_its_task(bank: CodebookBank) -> None:
    features = torch.randn(1, 6, 4, 5)
    mixed = bank(features.expand(4, -1, -1, -1), torch.tensor([1, 2, 0, 1]))
    for row, task in enumerate([1, 2, 0, 1]):
        alone = bank(features, torch.tensor([task]))
        assert torch.equal(mixed.codes[row], alone.codes[0])
        assert torch.equal(mixed.values[row], alone.values[0])
        tokens = features[0].flatten(1).T
        expected = residual_codes(tokens, bank.weight[task], 4)
        assert torch.equal(mixed.codes[row].flatten(1).T, expected)


def test_more_depths_never_make_the_error_larger(bank: CodebookBank) -> None:
    features, task = torch.randn(2, 6, 8, 8), torch.tensor([0, 2])
    codes = bank.encode(features, task)
    with torch.no_grad():
        errors = [
            float((bank.decode(codes[:, :depth], task) - features).square().mean())
            for depth in range(1, 5)
        ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < float(features.square().mean())


def test_a_gradient_reaches_only_the_codebook_that_was_used(bank: CodebookBank) -> None:
    bank(torch.randn(2, 6, 4, 4), torch.tensor([1, 1])).values.square().sum().backward()
    assert bank.weight.grad is not None
    assert [bool(g.any()) for g in bank.weight.grad] == [False, True, False]
    assert not bool(bank.weight.grad[:, ZERO_CODE].any())


def test_a_codebook_of_the_paper_has_two_million_parameters() -> None:
    with torch.device("meta"):
        bank = CodebookBank(tasks=3, codes=8192, dim=256, depths=8)
    assert bank.codes == 8192
    assert bank.weight.numel() == 3 * 2_097_152


def test_every_codebook_starts_with_its_zero_code() -> None:
    assert not bool(CodebookBank(3, 9, 4, 2).weight[:, ZERO_CODE].any())


def test_usage_and_perplexity_of_known_counts() -> None:
    assert code_usage(torch.tensor([5, 0, 1, 0])) == 0.5
    assert perplexity(torch.full((16,), 3)) == pytest.approx(16)
    assert perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)
    # p = (½, ¼, ¼): 2^(½·1 + ½·2) = 2^1.5
    assert perplexity(torch.tensor([2, 1, 1])) == pytest.approx(2**1.5)
    assert perplexity(torch.zeros(4)) == 0


def test_images_are_grouped_by_task() -> None:
    groups = rows_by_task(torch.tensor([2, 0, 2, 1]))
    assert [(n, rows.tolist()) for n, rows in groups] == [(0, [1]), (1, [3]), (2, [0, 2])]
