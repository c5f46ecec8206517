"""A network in half precision where that is safe, in single precision where it is not.

Convolutions, gates and activations between the first and the last convolution of each sub-network
go to the lower precision. In fp32 stay: the image that comes in and the residual that is added to
it (bf16 has steps of 8 HU in soft tissue), norms' and pools' statistics, the latent, the diffusion
chain, the codebooks and the search in them, and the task classifier.
"""

from __future__ import annotations

import copy
import enum

import torch
from torch import Tensor, nn

from restoration import kernels, llvm, onednn
from restoration.autoencoder import Decoder, Encoder
from restoration.blocks import (
    POOLING_CELL,
    Downsample,
    NAFBlock,
    Pointwise,
    Upsample,
    channel_attentions,
)
from restoration.diffcode import Backbone, DiffCode
from restoration.experts import TaskAdaptiveRouting
from restoration.quantizer import CodebookBank


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


_FIRST = ("condition.embed", "backbone.embed")  # 3×3 convolutions of images, behind `Into`
_LAST = ("decoder.emit", "backbone.emit")  # and to one channel, behind `OutOf`
_LATENT = ("condition.project", "decoder.expand")  # 1×1, in fp32, into and out of the latent


class Form(enum.Enum):
    """By what the blocks and experts of a network compute."""

    PLAIN = "plain"  #: PyTorch's own operators
    KERNELS = "kernels"  #: Triton kernels, on a GPU
    COMPILED = "compiled kernels"  #: by LLVM, on a CPU in fp32
    PRODUCTS = "products"  #: oneDNN's fused products in bands, on a CPU


def lowered(model: DiffCode, dtype: torch.dtype, form: Form = Form.PLAIN) -> DiffCode:
    """A copy of `model` for inference whose inner layers are in `dtype` and of that form.

    A form other than the plain one needs to be among :func:`forms`.
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
    if form is Form.KERNELS:
        _use_kernels(model, copied, dtype)
    elif form is Form.PRODUCTS:
        _use_products(model, copied, dtype)
    elif form is Form.COMPILED:
        _use_compiled(model, copied)
    return copied


def forms(model: DiffCode, device: torch.device, dtype: torch.dtype) -> tuple[Form, ...]:
    """The forms beside the plain one that fit the network, the device and the type, best first."""
    if model.config.gate != "task_map":
        return ()
    if onednn.available(device):
        compiled = dtype == torch.float32 and llvm.available(device) and llvm.fits(model.config)
        return (Form.COMPILED, Form.PRODUCTS) if compiled else (Form.PRODUCTS,)
    fits = model.config.factor == POOLING_CELL and max(model.config.channels) <= 256
    exact = any(attention.exact for attention in channel_attentions(model))
    # Kernels know whole pooling cells, and the widths that their tiles were made for.
    return (Form.KERNELS,) if kernels.available(device) and fits and not exact else ()


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


def _use_kernels(model: DiffCode, copied: DiffCode, dtype: torch.dtype) -> None:
    # Only here, as Triton may be absent.
    from restoration.fused import FusedNAFBlock, fused_routing

    for name, module in model.named_modules():
        if isinstance(module, NAFBlock):
            _replace(copied, name, FusedNAFBlock(module, dtype))
        elif isinstance(module, TaskAdaptiveRouting):
            _replace(copied, name, fused_routing(module, dtype))


def _use_products(model: DiffCode, copied: DiffCode, dtype: torch.dtype) -> None:
    for name, module in model.named_modules():
        if isinstance(module, NAFBlock):
            _replace(copied, name, onednn.BandedNAFBlock(module, dtype))
        elif isinstance(module, TaskAdaptiveRouting):
            _replace(copied, name, onednn.banded_routing(module, dtype))
        elif isinstance(module, Upsample):
            _replace(copied, name, onednn.ProductUpsample(module, dtype))
        elif name in _FIRST:
            copied.get_submodule(name).layer = onednn.ProductEmbed(module)
    # What is left: of the attentions inside the blocks, and between levels.
    for name, module in list(copied.named_modules()):
        if isinstance(module, Pointwise):
            _replace(copied, name, onednn.ProductPointwise(module, dtype))


def _use_compiled(model: DiffCode, copied: DiffCode) -> None:
    # Only here, as LLVM may be absent.
    from restoration import compiled

    for name, module in model.named_modules():
        if isinstance(module, NAFBlock):
            _replace(copied, name, compiled.CompiledNAFBlock(module))
        elif isinstance(module, TaskAdaptiveRouting):
            _replace(copied, name, compiled.compiled_routing(module))
        elif isinstance(module, Upsample):
            _replace(copied, name, compiled.CompiledUpsample(module))
        elif isinstance(module, Downsample):
            _replace(copied, name, compiled.CompiledDownsample(module))
        elif name in _FIRST:
            copied.get_submodule(name).layer = compiled.CompiledEmbed(module)
        elif name in _LAST:
            copied.get_submodule(name).layer = compiled.CompiledEmit(module)
        elif name in _LATENT:
            copied.get_submodule(name).layer = compiled.CompiledPointwise(module)
        elif isinstance(module, CodebookBank):
            _replace(copied, name, compiled.CompiledBank(module))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
