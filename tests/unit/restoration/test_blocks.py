from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from restoration.blocks import (
    ChannelAttention,
    Downsample,
    LayerNorm2d,
    NAFBlock,
    Pointwise,
    Upsample,
    channel_attentions,
    local_mean,
    set_local_pooling,
    simple_gate,
    stack,
)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def active(block: NAFBlock) -> NAFBlock:
    """A block whose branches count."""
    with torch.no_grad():
        block.beta.fill_(0.7)
        block.gamma.fill_(-0.4)
    return block


def box_mean(x: Tensor, window: int) -> Tensor:
    """The definition: a box around each pixel, pushed back inside at the border."""
    out = torch.empty_like(x)
    height, width = x.shape[-2:]
    tall, wide = min(window, height), min(window, width)
    for i in range(height):
        top = min(max(i - (tall - 1) // 2, 0), height - tall)
        for j in range(width):
            left = min(max(j - (wide - 1) // 2, 0), width - wide)
            box = x[..., top : top + tall, left : left + wide]
            out[..., i, j] = box.mean(dim=(-2, -1))
    return out


@pytest.mark.parametrize(("channels", "count"), [(64, 30_784), (128, 118_912), (256, 467_200)])
def test_a_block_has_the_published_number_of_parameters(channels: int, count: int) -> None:
    assert parameters(NAFBlock(channels)) == count == 7 * channels**2 + 33 * channels


def test_a_block_starts_as_the_identity() -> None:
    x = torch.randn(2, 8, 16, 16)
    assert torch.equal(NAFBlock(8)(x), x)


def test_a_block_is_the_formula_of_nafnet() -> None:
    block = active(NAFBlock(4))
    x = torch.randn(2, 4, 12, 10)
    y = F.conv2d(block.norm1(x), block.conv1.weight, block.conv1.bias)
    y = F.conv2d(y, block.conv2.weight, block.conv2.bias, padding=1, groups=8)
    y = y[:, :4] * y[:, 4:]
    pooled = y.mean(dim=(2, 3), keepdim=True)
    y = y * F.conv2d(pooled, block.attention.project.weight, block.attention.project.bias)
    z = x + block.beta * F.conv2d(y, block.conv3.weight, block.conv3.bias)
    y = F.conv2d(block.norm2(z), block.conv4.weight, block.conv4.bias)
    y = y[:, :4] * y[:, 4:]
    z = z + block.gamma * F.conv2d(y, block.conv5.weight, block.conv5.bias)
    torch.testing.assert_close(block(x), z, rtol=1e-5, atol=1e-5)


def test_memory_format_does_not_change_a_block() -> None:
    block = active(NAFBlock(8))
    x = torch.randn(2, 8, 16, 24)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(last), block(x), rtol=1e-5, atol=1e-5)


def test_the_norm_is_over_the_channels_of_each_pixel() -> None:
    x = 100 + 5 * torch.randn(2, 16, 3, 5)
    normed = LayerNorm2d(16)(x)
    expected = (x - x.mean(1, keepdim=True)) / x.var(1, unbiased=False, keepdim=True).sqrt()
    torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-4)


def test_the_norm_takes_its_statistics_in_single_precision() -> None:
    x = 1000 + torch.randn(1, 64, 4, 4)
    half = LayerNorm2d(64)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    expected = LayerNorm2d(64)(x.bfloat16().float())
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution_is_a_convolution(bias: bool) -> None:
    layer = Pointwise(5, 7, bias=bias)
    x = torch.randn(2, 5, 6, 4)
    expected = F.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    scale = torch.randn(1, 7, 1, 1)
    torch.testing.assert_close(layer(x, scale), scale * expected)


def test_the_gate_multiplies_the_halves() -> None:
    a, b = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    assert torch.equal(simple_gate(torch.cat([a, b], dim=1)), a * b)


@pytest.mark.parametrize("window", [1, 2, 3, 6, 7, 8, 9, 20])
def test_a_local_mean_is_the_mean_of_the_box(window: int) -> None:
    x = torch.randn(2, 3, 7, 9)
    torch.testing.assert_close(local_mean(x, window), box_mean(x, window))


def test_a_local_mean_of_a_constant_does_not_drift() -> None:
    x = torch.full((1, 1, 4, 4096), 0.1)
    torch.testing.assert_close(local_mean(x, 4), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("exact", [True, False])
def test_a_window_as_large_as_the_image_pools_globally(exact: bool) -> None:
    attention = ChannelAttention(4, cell=8)
    x = torch.randn(2, 4, 32, 24)
    everywhere = attention(x)
    attention.window, attention.exact = 32, exact
    assert torch.equal(attention(x), everywhere)


@pytest.mark.parametrize("cell", [1, 2, 4, 8])
def test_the_coarse_grid_is_near_the_exact_window(cell: int) -> None:
    torch.manual_seed(0)
    attention = ChannelAttention(4, cell=cell)
    attention.window = 4 * cell
    x = torch.rand(1, 4, 12 * cell, 10 * cell)
    coarse = attention(x)
    attention.exact = True
    exact = attention(x)
    if cell == 1:
        torch.testing.assert_close(coarse, exact)
    assert (coarse - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("exact", [True, False])
def test_a_local_window_does_not_see_the_far_corner(exact: bool) -> None:
    attention = ChannelAttention(4, cell=8)
    x = torch.rand(1, 4, 128, 128)
    other = x.clone()
    other[..., 96:, 96:] = 50
    assert not torch.equal(attention(x)[..., :32, :32], attention(other)[..., :32, :32])
    attention.window, attention.exact = 32, exact
    assert torch.equal(attention(x)[..., :32, :32], attention(other)[..., :32, :32])


def test_the_window_is_halved_at_each_level() -> None:
    levels = torch.nn.ModuleList(stack(4, 2, level) for level in range(4))
    set_local_pooling(levels, 192, exact=True)
    assert [a.window for a in channel_attentions(levels)] == [192, 192, 96, 96, 48, 48, 24, 24]
    assert all(a.exact for a in channel_attentions(levels))
    set_local_pooling(levels, None)
    assert {a.window for a in channel_attentions(levels)} == {None}


def test_resampling_halves_and_doubles() -> None:
    x = torch.randn(2, 6, 16, 24)
    assert Downsample(6, 10)(x).shape == (2, 10, 8, 12)
    finer = Upsample(6, 3)
    assert finer(x).shape == (2, 3, 32, 48)
    skip = torch.randn(2, 3, 32, 48)
    assert torch.equal(finer(x, skip), finer(x) + skip)
    assert parameters(Upsample(6, 3)) == 6 * 12
