"""The network on a device: normalised slices of any size in, restored slices out, on the CPU.

Knows no physical units. Pads, tiles what is too large, draws the noise that starts the diffusion,
gives way where memory is short, and can say whether the weights in memory are still those that were
loaded.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from restoration.diffcode import DiffCode
from restoration.execution import Execution, Pass
from restoration.tasks import RestorationTask
from restoration.tiling import Window, pad_to_multiple, restore_tiled

__all__ = ["Limits", "Network", "Pass"]

_SMALLER_TILES = (512, 256)
_HASHED_AT_ONCE = 1 << 20  # octets of weights


@dataclass(frozen=True)
class Limits:
    """How much goes through the network at once; results differ by rounding only."""

    batch_pixels: int | None = None  #: of the slices of one pass; None: what the memory takes
    whole_slice_pixels: int = 1024 * 1024  #: larger slices are restored in tiles
    tile: int = 512  #: a multiple of 8, as is the overlap
    overlap: int = 64


class Network:
    """A model on a device. Not for use by several threads at once."""

    def __init__(
        self, model: DiffCode, device: torch.device, limits: Limits, precision: str = "auto"
    ) -> None:
        self.device = device
        self.model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.model.use_local_pooling(True)
        self._execution = self._first = Execution(self.model, device, precision)
        self.limits = self._limits = limits
        self._loaded = self._fingerprint()

    def weights(self) -> list[Tensor]:
        """The tensors in memory that a pass reads; to change one is to change the network."""
        return list(self._first.tensors())

    @property
    def intact(self) -> bool:
        """Whether every bit of the weights is as it was when the network was made."""
        return self._fingerprint() == self._loaded

    @property
    def remark(self) -> str | None:
        """Why the network does not run in the precision that was asked for; None where it does."""
        return self._first.remark

    @property
    def basis(self) -> str:
        """What the bits of a pass rest on beside the weights: device, precision, threads."""
        first = self._first
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        return (
            f"torch {torch.__version__}, {self.device.type} {name}, {first.dtype} "
            f"{first.form.value}, {torch.get_num_threads()} threads, {self.limits}"
        )

    def slices(self, height: int, width: int) -> int:
        """How many slices of that size to take at once."""
        if self._limits.batch_pixels is None:
            return self._execution.slices(height, width)
        return max(1, self._limits.batch_pixels // (height * width))

    def run(self, lq: Tensor, task: RestorationTask, seeds: Sequence[int]) -> Pass:
        """Normalised slices (B, 1, H, W) through the network, back on the CPU."""
        return self.start(lq, task, seeds)()

    def start(self, lq: Tensor, task: RestorationTask, seeds: Sequence[int]) -> Callable[[], Pass]:
        """The same, but a GPU works on while the caller goes on; what comes back waits for it."""
        factor = self.model.config.factor
        # The task classifier needs more than one latent position along each axis.
        padded, crop = pad_to_multiple(lq, factor, least=2 * factor)
        noise = None
        if self.model.prior is not None:
            noise = _noise(seeds, self.model.noise_shape(padded)[1:])
        if padded.shape[-2] * padded.shape[-1] > self._limits.whole_slice_pixels:
            done = self._tiles(padded, task, noise)
            return lambda: replace(done, restored=done.restored[crop])
        wait = self._execution.start(padded, noise, task.index)

        def cropped() -> Pass:
            result = wait()
            return replace(result, restored=result.restored[crop])

        return cropped

    def give_way(self) -> str | None:
        """Need less memory for a slice than before: by tiles, then by the CPU.

        In words what is done from now on; None where nothing is left to do.
        """
        if self.device.type == "cpu" or self._execution is not self._first:
            return None
        tiled = self._limits.whole_slice_pixels == 0
        for tile in _SMALLER_TILES:
            if tile < self._limits.tile or (tile == self._limits.tile and not tiled):
                self._limits = replace(self._limits, whole_slice_pixels=0, tile=tile)
                self._execution.forget()
                return f"no memory on {self.device} for whole slices: tiles of {tile} pixels"
        self._limits = self.limits
        self._execution.forget()
        self._execution = Execution(copy.deepcopy(self.model).cpu(), torch.device("cpu"), "fp32")
        return f"no memory on {self.device} for a slice: the CPU restores"

    def recover(self) -> None:
        """Take back what `give_way` did: memory that was short may be there again."""
        self._execution, self._limits = self._first, self.limits

    def forget(self) -> None:
        """Give memory that is kept for the next batch back to the device."""
        self._execution.forget()

    def _tiles(self, x: Tensor, task: RestorationTask, noise: Tensor | None) -> Pass:
        factor = self.model.config.factor
        parts: list[Pass] = []

        def tile(part: Tensor, window: Window) -> Tensor:
            cut = noise
            if cut is not None:
                rows, columns = _latent(window.rows, factor), _latent(window.columns, factor)
                cut = cut[..., rows, columns]
            parts.append(self._execution.start(part, cut, task.index)())
            return parts[-1].restored

        restored = restore_tiled(tile, x, self._limits.tile, self._limits.overlap)
        return Pass(
            restored,
            _mean([part.latent_distance for part in parts]),
            _mean([part.reference_distance for part in parts]),
            _mean([part.class_logits for part in parts]),
        )

    def _fingerprint(self) -> bytes:
        """SHA-256 of the octets of all weights and buffers."""
        digest = hashlib.sha256()
        # Many at once: two threads change places in more time than a small one takes.
        for part in _together([each.detach().contiguous() for each in self.weights()]):
            octets = torch.cat([each.flatten().view(torch.uint8) for each in part])
            digest.update(octets.cpu().numpy().data)
        return digest.digest()


def _together(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors, in order, so many at a time that they have some octets."""
    part, octets = list[Tensor](), 0
    for tensor in tensors:
        part.append(tensor)
        octets += tensor.nbytes
        if octets >= _HASHED_AT_ONCE:
            yield part
            part, octets = [], 0
    if part:
        yield part


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
