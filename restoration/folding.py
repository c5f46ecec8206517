"""The linear parts of a network as forms for inference take them: (C', C) weights and biases.

In a NAF block the scale and shift of a norm go into the 1×1 convolution behind it, β and γ into the
one before them: what the block computes is the same, in fewer passes over its activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from restoration.blocks import LayerNorm2d, NAFBlock, Pointwise, Upsample
from restoration.experts import TaskAdaptiveRouting


class Linear(NamedTuple):
    """A 1×1 convolution: weight (C', C), bias (C',), fp32."""

    weight: Tensor
    bias: Tensor


class FoldedBlock(NamedTuple):
    """The linear parts of a NAF block of C channels, in the order of their use."""

    into: Linear  #: norm1 and conv1: (2C, C)
    project: Linear  #: conv3 and β: (C, C)
    feed: Linear  #: norm2 and conv4: (2C, C)
    last: Linear  #: conv5 and γ: (C, C)


def folded(block: NAFBlock) -> FoldedBlock:
    """Fold the norms and the residual scales of a block."""
    return FoldedBlock(
        _behind_norm(block.norm1, block.conv1),
        _before_scale(block.conv3, block.beta),
        _behind_norm(block.norm2, block.conv4),
        _before_scale(block.conv5, block.gamma),
    )


def plain(conv: nn.Conv2d) -> Linear:
    """A 1×1 convolution as it is; without a bias, zeros stand for it."""
    return Linear(conv.weight.detach().float()[:, :, 0, 0], _bias(conv))


def upsample_rows(upsample: Upsample) -> tuple[Linear, Linear]:
    """An upsampling as products (2C', C): of the upper and of the lower row of each 2×2 pixels.

    A product's first half are the channels of the left pixel, its second those of the right one.
    """
    conv, _ = upsample
    assert isinstance(conv, Pointwise)
    weight, bias = plain(conv)  # (4C', C): the shuffle reads C' as (C', row, column)
    finer = len(bias) // 4
    weights = weight.view(finer, 2, 2, -1).permute(1, 2, 0, 3).flatten(1, 2)
    biases = bias.view(finer, 2, 2).permute(1, 2, 0).flatten(1)
    return Linear(weights[0], biases[0]), Linear(weights[1], biases[1])


def expert_layers(expert: nn.Module) -> tuple[Linear, Linear]:
    """The two 1×1 convolutions of an expert; between them stands a GELU."""
    assert isinstance(expert, nn.Sequential)
    first, _, last = expert
    assert isinstance(first, Pointwise)
    assert isinstance(last, Pointwise)
    return plain(first), plain(last)


class KnownRouting(nn.Module):
    """A TARM whose images all have one expert, which is known before the pass.

    ``form`` makes of an expert a module that gives features with what the expert adds.
    """

    def __init__(
        self, routing: TaskAdaptiveRouting, form: Callable[[nn.Module], nn.Module]
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(form(expert) for expert in routing.experts)

    def forward(self, features: Tensor, expert: int) -> Tensor:
        """(B, C, H, W) → the same, with what the expert adds."""
        out: Tensor = self.experts[expert](features)
        return out


def parameter(values: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Values that no training moves."""
    return nn.Parameter(values.detach().to(dtype).contiguous(), requires_grad=False)


def _behind_norm(norm: LayerNorm2d, conv: nn.Conv2d) -> Linear:
    weight, bias = plain(conv)
    return Linear(weight * norm.weight.detach().float(), bias + weight @ norm.bias.detach().float())


def _before_scale(conv: nn.Conv2d, scale: Tensor) -> Linear:
    factor = scale.detach().float().view(-1)
    weight, bias = plain(conv)
    return Linear(weight * factor[:, None], bias * factor)


def _bias(conv: nn.Conv2d) -> Tensor:
    if conv.bias is None:
        return conv.weight.new_zeros(conv.out_channels, dtype=torch.float32)
    return conv.bias.detach().float()
