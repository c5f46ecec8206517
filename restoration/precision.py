"""A network in half precision where that is safe, in single precision where it is not.

Convolutions, gates and activations between the first and the last convolution of each sub-network
go to the lower precision. In fp32 stay: the image that comes in and the residual that is added to
it (bf16 has steps of 8 HU in soft tissue), norms' and pools' statistics, the latent, the diffusion
chain, the codebooks and the search in them, and the task classifier.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from restoration import kernels
from restoration.autoencoder import Decoder, Encoder
from restoration.blocks import POOLING_CELL, NAFBlock, channel_attentions
from restoration.diffcode import Backbone, DiffCode
from restoration.experts import TaskAdaptiveRouting


class Into(nn.Module):
    """A layer in fp32 whose result goes on in a lower precision."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.float()).to(self.dtype)
        return out


class OutOf(nn.Module):
    """A layer that takes a lower precision, and gives fp32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).float()
        return out


class Project(nn.Module):
    """The last layer of an encoder: fp32 of a lower precision, since codes hang on its result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.float())
        return out


def lowered(model: DiffCode, dtype: torch.dtype, *, fused: bool = False) -> DiffCode:
    """A copy of `model` for inference whose inner layers are in `dtype`.

    `fused` puts the Triton kernels in the place of the NAF blocks and experts; it needs
    :func:`fusable`.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for part in (copied.condition, copied.decoder, copied.backbone):
        if part is not None:
            part.to(dtype)
    if isinstance(copied.condition, Encoder):
        _lower_encoder(copied.condition, dtype)
    if isinstance(copied.decoder, Decoder):
        copied.decoder.expand = Into(copied.decoder.expand.float(), dtype)  # type: ignore[assignment]
        copied.decoder.emit = OutOf(copied.decoder.emit)  # type: ignore[assignment]
    backbone: Backbone = copied.backbone
    backbone.embed = Into(backbone.embed.float(), dtype)  # type: ignore[assignment]
    backbone.emit = OutOf(backbone.emit)  # type: ignore[assignment]
    _restore_first_layers(model, copied)
    if fused:
        _fuse(model, copied, dtype)
    return copied


def fusable(model: DiffCode, device: torch.device) -> bool:
    """Whether the kernels can take the place of the blocks: whole pooling cells, one expert."""
    config = model.config
    return (
        kernels.available(device)
        and config.factor == POOLING_CELL
        and max(config.channels) <= 256
        and config.gate == "task_map"
        and not any(attention.exact for attention in channel_attentions(model))
    )


def _lower_encoder(encoder: Encoder, dtype: torch.dtype) -> None:
    encoder.embed = Into(encoder.embed.float(), dtype)  # type: ignore[assignment]
    encoder.project = Project(encoder.project.float())  # type: ignore[assignment]


def _restore_first_layers(model: DiffCode, copied: DiffCode) -> None:
    """Give the layers that stay in fp32 the weights that no rounding has touched."""
    pairs = [(model.backbone.embed, copied.backbone.embed)]
    if model.condition is not None and copied.condition is not None:
        pairs.append((model.condition.embed, copied.condition.embed))
        pairs.append((model.condition.project, copied.condition.project))
    if model.decoder is not None and copied.decoder is not None:
        pairs.append((model.decoder.expand, copied.decoder.expand))
    for whole, wrapped in pairs:
        layer = wrapped.layer
        assert isinstance(layer, nn.Module)
        layer.load_state_dict(whole.state_dict())


def _fuse(model: DiffCode, copied: DiffCode, dtype: torch.dtype) -> None:
    from restoration.fused import FusedNAFBlock, FusedRouting

    for name, module in list(model.named_modules()):
        if isinstance(module, NAFBlock):
            _replace(copied, name, FusedNAFBlock(module, dtype))
        elif isinstance(module, TaskAdaptiveRouting):
            _replace(copied, name, FusedRouting(module, dtype))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
