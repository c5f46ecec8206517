"""DiffCode (Chen et al., MICCAI 2025): the restoration backbone and the whole composition.

    LQ ─ E_lq ─ diffusion ─ ẑ ─ residual quantiser (task's codebook) ─ G_vq ─ reference ─┐
    LQ ──────────────────────────────────────────────────────────────────────────────────┴ backbone

The ladder of the paper's Table 2 is one network with parts left out: ``v1`` the plain backbone,
``v2`` with task-adaptive routing, ``v3`` with the codebook reference but no diffusion, ``full``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from restoration.autoencoder import Decoder, Encoder
from restoration.blocks import Downsample, Upsample, set_local_pooling, stack
from restoration.diffusion import LatentDiffusion
from restoration.experts import GlobalRouter, TaskAdaptiveRouting
from restoration.quantizer import CodebookBank
from restoration.tasks import RestorationTask

VARIANTS = ("v1", "v2", "v3", "full")
TASKS = len(RestorationTask)


@dataclass(frozen=True)
class DiffCodeConfig:
    """Everything that shapes the network; defaults are the paper's (34.119 M parameters)."""

    channels: tuple[int, ...] = (64, 128, 256, 256)
    blocks: tuple[int, ...] = (2, 2, 4, 4)
    latent_dim: int = 256
    codes: int = 8192  #: codes per codebook, K
    depths: int = 8  #: residual quantisation iterations, D
    diffusion_steps: int = 8  #: T
    beta: tuple[float, float] = (0.1, 0.99)
    spacing: str = "linear"
    parameterisation: str = "x0"
    experts: int = 4
    gate: str = "task_map"
    gate_k: int = 1
    variant: str = "full"
    tlc_train: int = 128  #: training patch, pixels
    tlc_factor: float = 1.5  #: pooling window at inference over the training patch
    tlc_exact: bool = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {self.variant!r}")
        if len(self.channels) != len(self.blocks):
            raise ValueError("channels and blocks must have one entry per level")

    @property
    def factor(self) -> int:
        """Image pixels per latent position along each axis."""
        return 1 << (len(self.channels) - 1)

    @property
    def bits_per_pixel(self) -> float:
        """What the codes of an image may tell: D·log₂K bits for each latent position."""
        return self.depths * math.log2(self.codes) / self.factor**2

    @property
    def has_reference(self) -> bool:
        """Whether the backbone is guided by a reference decoded from the codebook."""
        return self.variant in ("v3", "full")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DiffCodeConfig:
        """``paper``, ``compact`` or ``tiny``, with single values changed by keyword."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
        return replace(PRESETS[name], **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and TOML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffCodeConfig:
        """Inverse of :meth:`to_dict`; unknown keys are a ``ValueError``."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown configuration keys: {', '.join(unknown)}")
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**known)


PRESETS = {
    "paper": DiffCodeConfig(),
    "compact": DiffCodeConfig(
        channels=(24, 48, 96, 96), blocks=(1, 2, 2, 2), latent_dim=64, codes=1024, depths=4,
        tlc_train=64,
    ),
    "tiny": DiffCodeConfig(
        channels=(16, 32, 64, 96), blocks=(1, 1, 2, 2), latent_dim=64, codes=1024, depths=4,
        tlc_train=64,
    ),
}  # fmt: skip


class Backbone(nn.Module):
    """U-Net of NAF blocks with additive skips, a TARM before each level and a global residual."""

    def __init__(self, config: DiffCodeConfig) -> None:
        super().__init__()
        channels, blocks = config.channels, config.blocks
        top = len(channels) - 1
        experts = 0 if config.variant == "v1" else config.experts
        self.embed = nn.Conv2d(1 + config.has_reference, channels[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            stack(c, n, level) for level, (c, n) in enumerate(zip(channels, blocks, strict=True))
        )
        self.downs = nn.ModuleList(Downsample(a, b) for a, b in itertools.pairwise(channels))
        self.decoder = nn.ModuleList(
            stack(channels[level], blocks[level], level) for level in range(top, -1, -1)
        )
        self.ups = nn.ModuleList(
            Upsample(channels[level], channels[level - 1]) for level in range(top, 0, -1)
        )
        self.encoder_routing = _routings(channels, experts)
        self.decoder_routing = _routings(channels[::-1], experts)
        self.emit = nn.Conv2d(channels[0], 1, 3, padding=1)

    def forward(self, lq: Tensor, reference: Tensor | None, weights: Tensor | int | None) -> Tensor:
        """LQ and reference (B, 1, H, W), expert weights (B, E) → restored (B, 1, H, W).

        A number in the place of the weights is the one expert of all images.
        """
        inputs = lq if reference is None else torch.cat([lq, reference.to(lq.dtype)], dim=1)
        x, skips = self._encode(self.embed(inputs), weights)
        for i, level in enumerate(self.decoder):
            if i > 0:
                x = self.ups[i - 1](x, skips.pop())
            x = level(_route(self.decoder_routing, i, x, weights))
        out: Tensor = lq + self.emit(x)
        return out

    def _encode(self, x: Tensor, weights: Tensor | int | None) -> tuple[Tensor, list[Tensor]]:
        skips: list[Tensor] = []
        for i, level in enumerate(self.encoder):
            if i > 0:
                skips.append(x)
                x = self.downs[i - 1](x)
            x = level(_route(self.encoder_routing, i, x, weights))
        return x, skips


def _routings(channels: tuple[int, ...], experts: int) -> nn.ModuleList:
    return nn.ModuleList(TaskAdaptiveRouting(c, experts) for c in channels if experts)


def _route(routings: nn.ModuleList, level: int, x: Tensor, weights: Tensor | int | None) -> Tensor:
    if weights is None or not len(routings):
        return x
    out: Tensor = routings[level](x, weights)
    return out


class DiffCodeOutput(NamedTuple):
    """What a forward pass gives; ``None`` where the variant has no such part."""

    restored: Tensor  #: (B, 1, H, W)
    reference: Tensor | None  #: (B, 1, H, W), decoded from the codes
    latent: Tensor | None  #: (B, d, h, w), ẑ before quantisation
    quantised: Tensor | None  #: (B, d, h, w)
    codes: Tensor | None  #: (B, D, h, w)
    class_logits: Tensor | None  #: (B, n_tasks)


class DiffCode(nn.Module):
    """One model for the three tasks; ``vq_encoder`` exists only for training (Stages I and II)."""

    def __init__(self, config: DiffCodeConfig, *, with_vq_encoder: bool = False) -> None:
        super().__init__()
        self.config = config
        shape = (config.channels, config.blocks, config.latent_dim)
        guided = config.has_reference
        self.vq_encoder = Encoder(*shape) if with_vq_encoder and guided else None
        self.condition = Encoder(*shape) if guided else None
        self.prior = _prior(config) if config.variant == "full" else None
        self.bank = (
            CodebookBank(TASKS, config.codes, config.latent_dim, config.depths) if guided else None
        )
        self.decoder = Decoder(*shape) if guided else None
        self.classifier = (
            GlobalRouter(TASKS, config.experts, config.gate, config.gate_k)
            if config.variant != "v1"
            else None
        )
        self.backbone = Backbone(config)

    def forward(
        self, lq: Tensor, task: Tensor | int, noise: Tensor | None = None
    ) -> DiffCodeOutput:
        """Restore ``lq`` (B, 1, H, W), normalised, H and W multiples of :attr:`factor`.

        ``task`` is one index or (B,); ``noise`` (B, d, h, w) starts the diffusion chain and is
        needed by the ``full`` variant only.
        """
        tasks = _checked_task(task) if isinstance(task, int) else as_task_tensor(task, lq)
        latent = self.estimate(lq, noise)
        reference, quantised, codes = self.lookup(latent, tasks)
        weights, logits = (None, None)
        if self.classifier is not None:
            weights, logits = self.classifier(lq, tasks)
        restored = self.backbone(lq, reference, weights)
        return DiffCodeOutput(restored, reference, latent, quantised, codes, logits)

    def estimate(self, lq: Tensor, noise: Tensor | None) -> Tensor | None:
        """ẑ of the degraded image: (B, 1, H, W) → (B, d, h, w); V3 takes the condition itself."""
        if self.condition is None:
            return None
        condition: Tensor = self.condition(lq)
        if self.prior is None:
            return condition
        if noise is None:
            raise ValueError("the full variant needs the noise that starts its diffusion chain")
        return self.prior.sample(condition, noise)

    def lookup(
        self, latent: Tensor | None, task: Tensor | int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Reference image, quantised features and codes of ẑ from the codebook of the task."""
        if latent is None or self.bank is None or self.decoder is None:
            return None, None, None
        with torch.autocast(latent.device.type, enabled=False):
            quantised, codes = self.bank(latent.float(), task)
        return self.decoder(quantised), quantised, codes

    def noise_shape(self, lq: Tensor) -> tuple[int, int, int, int]:
        """Shape of the noise that :meth:`forward` takes for ``lq``."""
        b, _, h, w = lq.shape
        return b, self.config.latent_dim, h // self.config.factor, w // self.config.factor

    def use_local_pooling(self, enabled: bool) -> None:
        """Pool channel statistics over the training window (inference) or globally (training)."""
        window = int(self.config.tlc_train * self.config.tlc_factor) if enabled else None
        set_local_pooling(self, window, exact=self.config.tlc_exact)


def _prior(config: DiffCodeConfig) -> LatentDiffusion:
    return LatentDiffusion(
        config.latent_dim,
        config.diffusion_steps,
        config.beta,
        config.spacing,
        config.parameterisation,
    )


def _checked_task(task: int) -> int:
    if not 0 <= task < TASKS:
        raise ValueError(f"task indices must lie in 0..{TASKS - 1}")
    return task


def as_task_tensor(task: Tensor | int, batch: Tensor) -> Tensor:
    """Task indices (B,) on the device of ``batch``; an index outside the bank is an error."""
    if isinstance(task, int):
        task = torch.full((len(batch),), _checked_task(task), dtype=torch.long)
    if task.numel() and not 0 <= int(task.min()) <= int(task.max()) < TASKS:
        raise ValueError(f"task indices must lie in 0..{TASKS - 1}")
    return task.to(batch.device)
