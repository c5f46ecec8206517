"""The network on a device: normalised slices of any size in, restored slices out, on the CPU.

Knows no physical units. Pads, tiles what is too large, draws the noise that starts the diffusion,
and can say whether the weights in memory are still those that were loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from restoration.diffcode import DiffCode, DiffCodeOutput
from restoration.tasks import RestorationTask
from restoration.tiling import Window, pad_to_multiple, restore_tiled


@dataclass(frozen=True)
class Limits:
    """How much goes through the network at once; results differ by rounding only."""

    batch_pixels: int = 512 * 512
    whole_slice_pixels: int = 1024 * 1024  #: larger slices are restored in tiles
    tile: int = 512  #: a multiple of 8, as is the overlap
    overlap: int = 64


@dataclass(frozen=True)
class Pass:
    """One pass of the network: restored (B, 1, H, W) and per-slice values, None without a part."""

    restored: Tensor
    latent_distance: Tensor | None  #: (B,) ‖ẑ − ẑ_q‖ / ‖ẑ‖
    reference_distance: Tensor | None  #: (B,) ‖HP(y − I_ref)‖ / ‖HP(y)‖, HP = what 4 x 4 means lack
    class_logits: Tensor | None  #: (B, tasks)


class Network:
    """A model on a device. Not for use by several threads at once."""

    def __init__(self, model: DiffCode, device: torch.device, limits: Limits) -> None:
        self.device = device
        self.limits = limits
        self.model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.model.use_local_pooling(True)
        self._loaded = self._fingerprint()

    @property
    def intact(self) -> bool:
        """Whether every bit of the weights is as it was when the network was made."""
        return self._fingerprint() == self._loaded

    def run(self, lq: Tensor, task: RestorationTask, seeds: Sequence[int]) -> Pass:
        """Normalised slices (B, 1, H, W) through the network, back on the CPU."""
        factor = self.model.config.factor
        # The task classifier needs more than one latent position along each axis.
        padded, crop = pad_to_multiple(lq, factor, least=2 * factor)
        noise = _noise(seeds, self.model.noise_shape(padded)[1:])
        padded, noise = padded.to(self.device), noise.to(self.device)
        if padded.shape[-2] * padded.shape[-1] > self.limits.whole_slice_pixels:
            done = self._tiles(padded, task, noise)
        else:
            done = self._forward(padded, task, noise)
        return Pass(
            done.restored.cpu()[crop],
            done.latent_distance,
            done.reference_distance,
            done.class_logits,
        )

    def _tiles(self, x: Tensor, task: RestorationTask, noise: Tensor) -> Pass:
        factor = self.model.config.factor
        parts: list[Pass] = []

        def tile(part: Tensor, window: Window) -> Tensor:
            rows, columns = _latent(window.rows, factor), _latent(window.columns, factor)
            parts.append(self._forward(part, task, noise[..., rows, columns]))
            return parts[-1].restored

        restored = restore_tiled(tile, x, self.limits.tile, self.limits.overlap)
        return Pass(
            restored,
            _mean([part.latent_distance for part in parts]),
            _mean([part.reference_distance for part in parts]),
            _mean([part.class_logits for part in parts]),
        )

    def _forward(self, x: Tensor, task: RestorationTask, noise: Tensor) -> Pass:
        out = self.model(x.contiguous(memory_format=torch.channels_last), task.index, noise)
        logits = None if out.class_logits is None else out.class_logits.cpu()
        return Pass(out.restored, _latent_distance(out), _reference_distance(out), logits)

    def _fingerprint(self) -> tuple[int, ...]:
        """Two sums over the words of all weights and buffers: one flipped bit changes the first."""
        sums = torch.zeros(2, dtype=torch.int64, device=self.device)
        for tensor in self.model.state_dict().values():
            words = tensor.detach().flatten().contiguous().view(torch.uint8)
            whole = words[: len(words) // 4 * 4].view(torch.int32).long()
            rest = words[len(whole) * 4 :].long()
            for part in (whole, rest):
                place = torch.arange(1, len(part) + 1, device=self.device)
                # Sums wrap around 2^64; a difference of one bit does not wrap to nothing.
                sums += torch.stack([part.sum(), (part * place).sum()])
        return tuple(sums.tolist())


def _latent_distance(out: DiffCodeOutput) -> Tensor | None:
    if out.latent is None or out.quantised is None:
        return None
    apart = (out.latent - out.quantised).flatten(1).norm(dim=1)
    distance: Tensor = (apart / out.latent.flatten(1).norm(dim=1).clamp(min=1e-12)).cpu()
    return distance


def _reference_distance(out: DiffCodeOutput) -> Tensor | None:
    if out.reference is None:
        return None
    apart = _high_pass(out.restored - out.reference).flatten(1).norm(dim=1)
    detail = _high_pass(out.restored).flatten(1).norm(dim=1)
    distance: Tensor = (apart / detail.clamp(min=1e-12)).cpu()
    return distance


def _high_pass(image: Tensor) -> Tensor:
    means = F.avg_pool2d(image, 4)
    return image - F.interpolate(means, size=image.shape[-2:], mode="nearest")


def _noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Gaussian noise (B, *shape), each slice from its own seed, drawn on the CPU on any device."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def _latent(pixels: slice, factor: int) -> slice:
    return slice(pixels.start // factor, pixels.stop // factor)


def _mean(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present).mean(dim=0) if present else None
