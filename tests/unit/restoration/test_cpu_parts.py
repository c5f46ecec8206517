"""Each part for a CPU, in both of its forms, against the plain module whose place it takes.

The forms are kernels that LLVM compiles (`restoration.compiled`) and oneDNN's fused products
(`restoration.onednn`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from restoration import compiled, onednn
from restoration.blocks import NAFBlock, Pointwise, Upsample, set_local_pooling
from restoration.experts import TaskAdaptiveRouting
from tests.unit.restoration.conftest import images, stirred

FP32 = torch.float32
EACH_VALUE = 1e-5


def of_the_largest(expected: Tensor) -> float:
    """Roundings are as large as the largest of what is summed up."""
    return 2e-6 * max(1.0, float(expected.abs().max()))


def of_each_value(expected: Tensor) -> float:
    """What products round does not grow before the values are large."""
    return EACH_VALUE if expected.abs().max() < 15 else of_the_largest(expected)


@dataclass(frozen=True)
class Form:
    """How a form makes the parts of a network, and what it is held to."""

    block: Callable[[NAFBlock], nn.Module]
    routing: Callable[[TaskAdaptiveRouting], nn.Module]
    upsample: Callable[[Upsample], nn.Module]
    embed: Callable[[nn.Conv2d], nn.Module]
    pointwise: Callable[[Pointwise], nn.Module]
    widths: tuple[int, int]  # channels, more and fewer, that it can do and are awkward for it
    within: Callable[[Tensor], float]  # of what a block gives


COMPILED = Form(
    compiled.CompiledNAFBlock,
    compiled.compiled_routing,
    compiled.CompiledUpsample,
    compiled.CompiledEmbed,
    compiled.CompiledPointwise,
    widths=(24, 16),  # whole vectors; a chunk of them and a rest
    within=of_the_largest,
)
PRODUCTS = Form(
    lambda block: onednn.BandedNAFBlock(block, FP32),
    lambda routing: onednn.banded_routing(routing, FP32),
    lambda upsample: onednn.ProductUpsample(upsample, FP32),
    onednn.ProductEmbed,
    lambda conv: onednn.ProductPointwise(conv, FP32),
    widths=(12, 7),
    within=of_each_value,
)


@dataclass(frozen=True)
class Way:
    """A form, and into how many parts it shares out an image."""

    form: Form
    threads: int = 1  # as many parts as threads, of the kernels' rows
    band: int = onednn.BAND  # octets: the products' rows in bands, the smallest of 8


WAYS = [
    pytest.param(Way(COMPILED), id="compiled, one thread"),
    pytest.param(Way(COMPILED, threads=3), id="compiled, three threads"),
    pytest.param(Way(PRODUCTS), id="products, one band"),
    pytest.param(Way(PRODUCTS, band=1), id="products, bands"),
]


@pytest.fixture(params=WAYS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Form]:
    way: Way = request.param
    if way.form is PRODUCTS and not onednn.available(torch.device("cpu")):
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(onednn, "BAND", way.band)
    before = torch.get_num_threads()
    torch.set_num_threads(way.threads)
    with torch.inference_mode():
        yield way.form
    torch.set_num_threads(before)


# Channels, pooling cell, image pixels of a pixel, height, width, pooling window in image pixels.
BLOCKS = [
    pytest.param(24, 8, 1, 48, 40, 16, id="windows of two cells"),
    pytest.param(24, 8, 1, 48, 40, None, id="pooling over the image"),
    pytest.param(16, 8, 1, 24, 40, 32, id="a window of the image's height"),
    pytest.param(16, 8, 1, 30, 21, 16, id="sides that are no whole cells"),
    pytest.param(48, 4, 2, 24, 20, 24, id="the second level"),
    pytest.param(72, 2, 4, 10, 18, 24, id="the third level, no power of two"),
    pytest.param(96, 2, 4, 10, 18, 24, id="the third level"),
    pytest.param(8, 1, 8, 17, 9, 24, id="cells of one pixel, one vector"),
    pytest.param(16, 1, 8, 17, 9, 24, id="cells of one pixel"),
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
    form: Form,
) -> None:
    block = stirred(NAFBlock(channels, cell, scale))
    set_local_pooling(block, window, exact=exact)
    ours = form.block(block)
    for x in (images(1, channels, height, width), images(2, channels, height, width)):
        before = x.clone()
        expected = block(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=form.within(expected))
        assert torch.equal(x, before)


@pytest.mark.parametrize("size", [(20, 12), (1, 1), (3, 33)])
def test_an_expert_adds_what_the_plain_one_adds(size: tuple[int, int], form: Form) -> None:
    plain = stirred(TaskAdaptiveRouting(24, 3))
    x = images(2, 24, *size)
    expected = [plain(x, expert) for expert in range(3)]
    ours = form.routing(plain)
    for expert in range(3):
        found = ours(x.clone(memory_format=torch.preserve_format), expert)
        torch.testing.assert_close(found, expected[expert], rtol=1e-5, atol=EACH_VALUE)


def test_an_upsampling_puts_each_value_where_the_shuffle_puts_it(form: Form) -> None:
    more, fewer = form.widths
    plain = stirred(Upsample(more, fewer))
    x, skip = images(2, more, 18, 6), images(2, fewer, 36, 12)
    ours = form.upsample(plain)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours(x, skip), plain(x) + skip)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("size", [(20, 13), (1, 2)])
def test_a_first_convolution_knows_the_border(
    channels: int, size: tuple[int, int], form: Form
) -> None:
    x = images(2, channels, *size)
    for outputs in form.widths:
        plain = stirred(nn.Conv2d(channels, outputs, 3, padding=1))
        torch.testing.assert_close(form.embed(plain)(x), plain(x), rtol=1e-5, atol=EACH_VALUE)


def test_a_convolution_that_stands_alone_is_a_product(form: Form) -> None:
    for inputs, outputs in (form.widths, form.widths[::-1]):
        plain = stirred(Pointwise(inputs, outputs))
        x = images(2, inputs, 5, 6)
        torch.testing.assert_close(form.pointwise(plain)(x), plain(x))
