"""Parts that kernels alone replace, and what is the kernels' own; the rest in `test_cpu_parts`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from restoration.blocks import (
    Downsample,
    NAFBlock,
    Pointwise,
    local_mean,
    set_local_pooling,
)
from restoration.compiled import (
    CompiledBank,
    CompiledDownsample,
    CompiledEmit,
    CompiledNAFBlock,
    _box_means,
    compiled_routing,
)
from restoration.experts import TaskAdaptiveRouting
from restoration.llvm import means
from restoration.llvm.machine import kernel
from restoration.quantizer import CodebookBank
from tests.unit.restoration.conftest import images, stirred


@pytest.fixture(autouse=True, params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Whole, and in parts: of the kernels' rows PyTorch's number of threads makes the parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch.inference_mode():
        yield request.param
    torch.set_num_threads(before)


def test_a_block_has_the_same_bits_by_any_number_of_threads(threads: int) -> None:
    block = stirred(NAFBlock(24))
    set_local_pooling(block, 16)
    compiled = CompiledNAFBlock(block)
    x = images(1, 24, 50, 37)
    found = compiled(x)
    torch.set_num_threads(1 if threads > 1 else 2)
    assert torch.equal(found, compiled(x))


def test_a_norm_keeps_its_digits_far_from_zero() -> None:
    """The variance is that of what the mean was taken from: no difference of two large numbers."""
    block = stirred(NAFBlock(24))
    x = 1000 + images(1, 24, 16, 16)
    expected = block.double()(x.double()).float()
    torch.testing.assert_close(CompiledNAFBlock(block.float())(x), expected, rtol=1e-5, atol=5e-3)


def test_a_block_of_equal_values_is_finite() -> None:
    block = stirred(NAFBlock(16))
    x = torch.full((1, 16, 8, 8), 7.0).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(CompiledNAFBlock(block)(x), block(x), rtol=1e-4, atol=1e-4)


def test_the_gelu_is_exact_to_single_precision() -> None:
    """Through an expert that is nothing but its GELU, over all that it may meet."""
    routing = TaskAdaptiveRouting(8, 1).requires_grad_(False)
    expert = routing.experts[0]
    assert isinstance(expert, nn.Sequential)
    first, _, last = expert
    for conv, shape in ((first, (16, 8)), (last, (8, 16))):
        assert isinstance(conv, Pointwise)
        assert conv.bias is not None
        conv.weight.copy_(torch.eye(*shape)[:, :, None, None])
        nn.init.zeros_(conv.bias)
    x = torch.linspace(-9, 9, 8 * 64 * 64).view(1, 64, 64, 8).permute(0, 3, 1, 2)
    expected = x + F.gelu(x.double()).float()
    found = compiled_routing(routing)(x.clone(memory_format=torch.preserve_format), 0)
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("size", [(18, 28), (2, 2)])
def test_a_downsampling_takes_its_four_pixels(size: tuple[int, int]) -> None:
    plain = stirred(Downsample(16, 24))
    x = images(2, 16, *size)
    torch.testing.assert_close(CompiledDownsample(plain)(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(20, 13), (1, 2), (2, 3), (3, 8)])
def test_a_last_convolution_knows_the_border(size: tuple[int, int]) -> None:
    conv = stirred(nn.Conv2d(24, 1, 3, padding=1))
    x = images(2, 24, *size)
    torch.testing.assert_close(CompiledEmit(conv)(x), conv(x), rtol=1e-5, atol=1e-5)


def test_the_nearest_codes_are_those_of_the_plain_search() -> None:
    bank = CodebookBank(3, 64, 16, 4).requires_grad_(False)
    bank.weight.copy_(torch.randn(bank.weight.shape, generator=torch.Generator().manual_seed(1)))
    bank.weight[:, 0] = 0.0
    features = 3 * images(2, 16, 9, 13)
    compiled = CompiledBank(bank)
    for task in range(3):
        expected, found = bank(features, task), compiled(features, task)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.values, expected.values)


def test_of_equal_codes_the_first_is_taken() -> None:
    """In one lane, in lanes of a vector and in several; where no score is a number, code 0."""
    bank = CodebookBank(1, 64, 8, 1).requires_grad_(False)
    bank.weight.copy_(torch.full_like(bank.weight, 100.0))
    for code in (13, 21, 22, 47):
        bank.weight[0, code] = 1.0
    found = CompiledBank(bank)(torch.ones(1, 8, 3, 11), 0).codes
    assert torch.equal(found, torch.full_like(found, 13))
    found = CompiledBank(bank)(torch.full((1, 8, 2, 2), torch.nan), 0).codes
    assert not found.any()


@pytest.mark.parametrize("window", [1, 2, 5, 6, 40])
def test_means_over_boxes_are_those_of_running_sums(window: int) -> None:
    cells = images(1, 24, 9, 14)
    run = kernel(means.box, cells.shape[1])
    found = _box_means(cells[0].permute(1, 2, 0).contiguous(), run, window)
    expected = local_mean(cells, window)[0].permute(1, 2, 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
