"""Each part by compiled kernels against the plain module whose place it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restoration.blocks import (
    Downsample,
    NAFBlock,
    Pointwise,
    Upsample,
    local_mean,
    set_local_pooling,
)
from restoration.compiled import (
    CompiledBank,
    CompiledDownsample,
    CompiledEmbed,
    CompiledEmit,
    CompiledNAFBlock,
    CompiledPointwise,
    CompiledUpsample,
    _box_means,
    compiled_routing,
)
from restoration.experts import TaskAdaptiveRouting
from restoration.llvm import means
from restoration.llvm.machine import kernel
from restoration.quantizer import CodebookBank

Module = TypeVar("Module", bound=nn.Module)


@pytest.fixture(autouse=True, params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Whole, and in parts: of the kernels' rows PyTorch's number of threads makes the parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch.inference_mode():
        yield request.param
    torch.set_num_threads(before)


def stirred(module: Module) -> Module:
    """The module with no parameter at rest."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def images(*shape: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    return values.contiguous(memory_format=torch.channels_last)


# Channels, pooling cell, image pixels of a pixel, height, width, pooling window in image pixels.
BLOCKS = [
    pytest.param(24, 8, 1, 48, 40, 16, id="windows of two cells"),
    pytest.param(24, 8, 1, 48, 40, None, id="pooling over the image"),
    pytest.param(16, 8, 1, 24, 40, 32, id="a window of the image's height"),
    pytest.param(16, 8, 1, 30, 21, 16, id="sides that are no whole cells"),
    pytest.param(48, 4, 2, 24, 20, 24, id="the second level"),
    pytest.param(96, 2, 4, 10, 18, 24, id="the third level"),
    pytest.param(8, 1, 8, 17, 9, 24, id="cells of one pixel"),
    pytest.param(256, 2, 4, 8, 50, 24, id="the paper's widest level"),
    pytest.param(40, 2, 4, 9, 27, 8, id="five vectors, a chunk and a rest"),
    pytest.param(16, 4, 2, 1, 1, 8, id="one pixel"),
]


@pytest.mark.parametrize(("channels", "cell", "scale", "height", "width", "window"), BLOCKS)
@pytest.mark.parametrize("exact", [False, True])
def test_a_block_gives_what_the_plain_one_does(
    channels: int,
    cell: int,
    scale: int,
    height: int,
    width: int,
    window: int | None,
    exact: bool,
) -> None:
    block = stirred(NAFBlock(channels, cell, scale))
    set_local_pooling(block, window, exact=exact)
    compiled = CompiledNAFBlock(block)
    for x in (images(1, channels, height, width), images(2, channels, height, width)):
        before = x.clone()
        expected = block(x)
        # Roundings are as large as the largest of what is summed up.
        within = 2e-6 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=within)
        assert torch.equal(x, before)


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


@pytest.mark.parametrize("size", [(20, 12), (1, 1), (3, 33)])
def test_an_expert_adds_what_the_plain_one_adds(size: tuple[int, int]) -> None:
    routing = stirred(TaskAdaptiveRouting(24, 3))
    x = images(2, 24, *size)
    expected = [routing(x, expert) for expert in range(3)]
    compiled = compiled_routing(routing)
    for expert in range(3):
        found = compiled(x.clone(memory_format=torch.preserve_format), expert)
        torch.testing.assert_close(found, expected[expert], rtol=1e-5, atol=1e-5)


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


def test_an_upsampling_puts_each_value_where_the_shuffle_puts_it() -> None:
    plain = stirred(Upsample(16, 8))
    x, skip = images(2, 16, 18, 6), images(2, 8, 36, 12)
    ours = CompiledUpsample(plain)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x, skip), plain(x) + skip, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(18, 28), (2, 2)])
def test_a_downsampling_takes_its_four_pixels(size: tuple[int, int]) -> None:
    plain = stirred(Downsample(16, 24))
    x = images(2, 16, *size)
    torch.testing.assert_close(CompiledDownsample(plain)(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("size", [(20, 13), (1, 2)])
def test_a_first_convolution_knows_the_border(channels: int, size: tuple[int, int]) -> None:
    conv = stirred(nn.Conv2d(channels, 16, 3, padding=1))
    x = images(2, channels, *size)
    torch.testing.assert_close(CompiledEmbed(conv)(x), conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(20, 13), (1, 2), (2, 3), (3, 8)])
def test_a_last_convolution_knows_the_border(size: tuple[int, int]) -> None:
    conv = stirred(nn.Conv2d(24, 1, 3, padding=1))
    x = images(2, 24, *size)
    torch.testing.assert_close(CompiledEmit(conv)(x), conv(x), rtol=1e-5, atol=1e-5)


def test_a_convolution_that_stands_alone_is_a_product() -> None:
    conv = stirred(Pointwise(16, 24))
    x = images(2, 16, 5, 6)
    torch.testing.assert_close(CompiledPointwise(conv)(x), conv(x), rtol=1e-5, atol=1e-5)


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
