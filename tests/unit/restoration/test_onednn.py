"""Each part for a CPU against the plain module whose place it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restoration import onednn
from restoration.blocks import NAFBlock, Pointwise, Upsample, set_local_pooling
from restoration.experts import TaskAdaptiveRouting
from restoration.onednn import (
    BandedNAFBlock,
    ProductEmbed,
    ProductPointwise,
    ProductUpsample,
    banded_routing,
)

Module = TypeVar("Module", bound=nn.Module)

if not onednn.available(torch.device("cpu")):
    pytest.skip("PyTorch was built without oneDNN", allow_module_level=True)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


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
    pytest.param(72, 2, 4, 10, 18, 24, id="the third level"),
    pytest.param(16, 1, 8, 17, 9, 24, id="cells of one pixel"),
    pytest.param(16, 4, 2, 1, 1, 8, id="one pixel"),
]


@pytest.mark.parametrize(("channels", "cell", "scale", "height", "width", "window"), BLOCKS)
@pytest.mark.parametrize("band", [1, onednn.BAND], ids=["bands", "one band"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_block_gives_what_the_plain_one_does(
    channels: int,
    cell: int,
    scale: int,
    height: int,
    width: int,
    window: int | None,
    band: int,
    exact: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "BAND", band)
    block = stirred(NAFBlock(channels, cell, scale))
    set_local_pooling(block, window, exact=exact)
    for x in (images(1, channels, height, width), images(2, channels, height, width)):
        before = x.clone()
        ours = BandedNAFBlock(block, torch.float32)(x)
        torch.testing.assert_close(ours, block(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(x, before)


def test_a_norm_keeps_its_digits_far_from_zero() -> None:
    """The variance is that of what the mean was taken from: no difference of two large numbers."""
    x = 1000 + torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    expected = F.layer_norm(x.double(), (24,), eps=1e-6).float()
    torch.testing.assert_close(onednn._normed(x, 1e-6), expected, rtol=0, atol=5e-4)


def test_a_norm_of_equal_values_is_zero() -> None:
    assert not onednn._normed(torch.full((3, 24), 7.0), 1e-6).any()


@pytest.mark.parametrize("band", [1, onednn.BAND])
def test_an_expert_adds_what_the_plain_one_adds(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "BAND", band)
    routing = stirred(TaskAdaptiveRouting(24, 3))
    x = images(2, 24, 20, 12)
    expected = [routing(x, expert) for expert in range(3)]
    banded = banded_routing(routing, torch.float32)
    for expert in range(3):
        found = banded(x.clone(memory_format=torch.preserve_format), expert)
        torch.testing.assert_close(found, expected[expert], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("band", [1, onednn.BAND])
def test_an_upsampling_puts_each_value_where_the_shuffle_puts_it(
    band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "BAND", band)
    plain = stirred(Upsample(12, 5))
    x, skip = images(2, 12, 18, 6), images(2, 5, 36, 12)
    ours = ProductUpsample(plain, torch.float32)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours(x, skip), plain(x) + skip)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("band", [1, onednn.BAND])
def test_a_first_convolution_knows_the_border(
    channels: int, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "BAND", band)
    conv = stirred(nn.Conv2d(channels, 7, 3, padding=1))
    x = images(2, channels, 20, 13)
    torch.testing.assert_close(ProductEmbed(conv)(x), conv(x), rtol=1e-5, atol=1e-5)


def test_a_convolution_that_stands_alone_is_a_product() -> None:
    conv = stirred(Pointwise(9, 4))
    x = images(2, 9, 5, 6)
    torch.testing.assert_close(ProductPointwise(conv, torch.float32)(x), conv(x))
