"""Harm before and inside the network: another task, another scale, other weights, other inputs.

Each of these runs the network again, so they are planted into some series and slices alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import EllipsisType
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restoration.restorer import Restoration, RestorationError, Restorer
from restoration.tasks import RestorationTask, normalise, spec
from restoration.tiling import pad_to_multiple
from training.degrade import truncate_kspace
from training.faults import CT, MR, PET, Fault, Planted
from training.metrics import score
from training.motion import breathing, restless
from training.phantoms import body_pet, brain_t2, chest_ct
from training.restored import Series, part, restored
from training.shepp_logan import shepp_logan
from training.texture import edged, sharpened

Volume = npt.NDArray[np.float32]
_PSNR_LOSS = 1.0  # dB, from which flipped bits count as harm
# Words of a weight by its bytes, and the place of its sign bit.
_WORDS = {4: (torch.int32, 31), 2: (torch.int16, 15)}
_FLIPS = 24  # tries for a series
_REACHED = 192  # pixels around a patch in which adversarial noise lies


@dataclass(frozen=True)
class Bench:
    """The model that the faults run, and whether its node would look at series of this shape."""

    restorer: Restorer
    cache: Path | None = None

    def again(
        self, series: Series, lq: Volume, task: RestorationTask | None = None, *, own: bool = True
    ) -> Series | None:
        """The series with another input or task, restored anew; None where that is refused.

        `own` says that the network is as it was loaded: what it makes may be kept.
        """
        task = task or series.task
        try:
            made = restored(self.restorer, lq, task, self.cache if own else None)
        except RestorationError:
            return None  # not finite: never sent
        return replace(series, lq=lq, task=task, made=made)


def network_faults(restorer: Restorer, cache: Path | None = None) -> Iterator[Fault]:
    """Every fault that runs the network; `cache` keeps what an unharmed network makes."""
    bench = Bench(restorer, cache)
    for wrong in (RestorationTask(name) for name in restorer.manifest.tasks):
        others = tuple(task for task in (CT, MR, PET) if task is not wrong)
        yield Fault("wrong task", f"as {wrong.value}", others, _route(bench, wrong))
        yield Fault("wrong expert", f"of {wrong.value}", others, _expert(bench, wrong))
    yield Fault(
        "wrong normalisation", "intercept left out", (CT,), _input(bench, lambda x: x + 1024)
    )
    yield Fault("wrong normalisation", "intercept twice", (CT,), _input(bench, lambda x: x - 1024))
    for factor in (0.25, 4.0):
        yield Fault("wrong normalisation", f"scale x {factor:g}", (MR,), _scaled(bench, factor))
    for factor in (0.1, 10.0, 5000.0):
        yield Fault(
            "wrong normalisation", f"SUV x {factor:g}", (PET,), _input(bench, _times(factor))
        )
    yield Fault("weights flipped", "exponent bit", (CT, MR, PET), _flipped(bench))
    yield Fault("other domain", "sharp kernel", (CT,), _input(bench, sharpened))
    yield Fault("other domain", "edge-enhancing kernel", (CT,), _input(bench, edged))
    yield Fault("other domain", "already restored", (CT, MR, PET), _restored_twice(bench), (MR,))
    yield Fault("other domain", "full quality", (CT, MR, PET), _full_quality(bench), (MR,))
    yield Fault("other domain", "noise-free phantom", (CT, MR, PET), _phantom(bench))
    yield Fault("other domain", "head phantom with noise", (MR,), _phantom(bench, noisy=True))
    yield Fault("other domain", "motion", (CT,), _double(bench))
    for pixels in (1.0, 2.0):
        moved = partial(restless, pixels=pixels)
        yield Fault("other domain", f"motion, {pixels:g} px", (MR,), _moved(bench, moved), (MR,))
    yield Fault("other domain", "motion, breathing", (MR,), _moved(bench, breathing), (MR,))
    for size in (2.0, 5.0):
        yield Fault("adversarial noise", f"{size:g} HU", (CT,), _adversarial(bench, size))


def _all(series: Series | None, intact: bool = True) -> Planted | None:
    return None if series is None else Planted(series, tuple(range(len(series.lq))), intact)


def _input(bench: Bench, change: Callable[[Volume], Volume]) -> Callable[..., Planted | None]:
    def plant(series: Series, _: np.random.Generator) -> Planted | None:
        return _all(bench.again(series, change(series.lq).astype(np.float32)))

    return plant


def _times(factor: float) -> Callable[[Volume], Volume]:
    return lambda x: x * np.float32(factor)


def _route(bench: Bench, wrong: RestorationTask) -> Callable[..., Planted | None]:
    """The series handled as another modality: its window, its expert and its gates."""

    def plant(series: Series, _: np.random.Generator) -> Planted | None:
        return _all(bench.again(series, series.lq, wrong))

    return plant


def _expert(bench: Bench, wrong: RestorationTask) -> Callable[..., Planted | None]:
    """The right window, but the expert (and codebook) of another task inside the network."""

    def plant(series: Series, _: np.random.Generator) -> Planted | None:
        network = bench.restorer.network
        start = network.start
        with mock.patch.object(network, "start", lambda lq, _task, seeds: start(lq, wrong, seeds)):
            return _all(bench.again(series, series.lq, own=False))

    return plant


def _scaled(bench: Bench, factor: float) -> Callable[..., Planted | None]:
    """MR brought into the window by a scale that is not that of its series."""

    def plant(series: Series, _: np.random.Generator) -> Planted | None:
        right = series.made.diagnostics["intensity_scale"]
        assert isinstance(right, float)
        made = bench.restorer.restore(series.lq, series.task, scale=right * factor)
        return _all(replace(series, made=made))

    return plant


def _flipped(bench: Bench) -> Callable[..., Planted | None]:
    """One exponent bit of one weight at a time, until a slice loses more than 1 dB."""

    def plant(series: Series, rng: np.random.Generator) -> Planted | None:
        middle = len(series.lq) // 2
        series = part(series, slice(middle, middle + 1))
        for _ in range(_FLIPS):
            with _one_bit(bench.restorer, rng):
                broken = bench.again(series, series.lq, own=False)
                harmed = () if broken is None else _worse(series, broken.made)
                if broken is not None and harmed:
                    return Planted(broken, harmed, bench.restorer.network.intact)
        return None

    return plant


@contextlib.contextmanager
def _one_bit(restorer: Restorer, rng: np.random.Generator) -> Iterator[None]:
    """Flip one of the upper exponent bits of a weight in memory, and back."""
    tensors = [each for each in restorer.network.weights() if each.is_floating_point()]
    sizes = np.array([tensor.numel() for tensor in tensors], float)
    weights = tensors[int(rng.choice(len(tensors), p=sizes / sizes.sum()))]
    place = np.unravel_index(int(rng.integers(weights.numel())), weights.shape)
    word, top = _WORDS[weights.dtype.itemsize]
    # The exponent's five bits next to the sign.
    bit = 1 << int(rng.integers(top - 5, top))
    before = weights[place].clone()
    weights[place] = (before.view(word) ^ bit).view(weights.dtype)
    try:
        yield
    finally:
        weights[place] = before


def _worse(series: Series, made: Restoration) -> tuple[int, ...]:
    harmed = []
    for index, truth in enumerate(series.hq):
        before = score(series.made.volume[index], truth, series.task)
        after = score(made.volume[index], truth, series.task)
        if before is not None and after is not None and before.psnr - after.psnr > _PSNR_LOSS:
            harmed.append(index)
    return tuple(harmed)


def _restored_twice(bench: Bench) -> Callable[..., Planted | None]:
    def plant(series: Series, _: np.random.Generator) -> Planted | None:
        return _all(bench.again(series, series.made.volume))

    return plant


def _full_quality(bench: Bench) -> Callable[..., Planted | None]:
    """Full dose, full counts or full k-space: nothing to restore."""

    def plant(series: Series, _: np.random.Generator) -> Planted | None:
        return _all(bench.again(series, series.hq))

    return plant


def _phantom(bench: Bench, noisy: bool = False) -> Callable[..., Planted | None]:
    def plant(series: Series, rng: np.random.Generator) -> Planted | None:
        seed, slices = int(rng.integers(1 << 31)), min(4, len(series.lq))
        if series.task is MR and not noisy:
            volume = shepp_logan(slices, seed=seed)
        else:
            make = {CT: chest_ct, MR: brain_t2, PET: body_pet}[series.task]
            volume = make(slices=slices, seed=seed).volume.astype(np.float32)
        if series.task is MR:
            volume = truncate_kspace(volume)
        made = bench.again(series, volume)
        return None if made is None else _all(replace(made, hq=volume))

    return plant


def _double(bench: Bench) -> Callable[..., Planted | None]:
    """CT: two positions in one image."""

    def plant(series: Series, _: np.random.Generator) -> Planted | None:
        moved = np.roll(series.lq, (3, 4), axis=(1, 2))
        return _all(bench.again(series, ((series.lq + moved) / 2).astype(np.float32)))

    return plant


def _moved(bench: Bench, motion: Callable[..., Volume]) -> Callable[..., Planted | None]:
    """MR: each line of k-space saw another position, in every slice; the axis is drawn."""

    def plant(series: Series, rng: np.random.Generator) -> Planted | None:
        axis = int(rng.integers(1, 3))
        return _all(bench.again(series, motion(series.lq, rng, axis=axis)))

    return plant


def _adversarial(bench: Bench, size: float, steps: int = 4) -> Callable[..., Planted | None]:
    """Signed-gradient noise that makes the network change a patch most, at most `size` HU.

    It lies in a part of the slice around the patch: what is further away hardly reaches it.
    """

    def plant(series: Series, rng: np.random.Generator) -> Planted | None:
        middle = len(series.lq) // 2
        series = part(series, slice(middle, middle + 1))
        low, high = spec(series.task).window
        around = _centre(series.lq.shape, _REACHED)
        clean = torch.from_numpy(series.lq[around])[:, None].clamp(low, high)
        model, device = bench.restorer.network.model, bench.restorer.device
        noise = torch.from_numpy(rng.uniform(-size, size, clean.shape)).float()
        patch = _centre(clean.shape, 16)
        for _ in range(steps):
            noise.requires_grad_(True)
            lq = normalise(clean + noise, series.task).to(device)
            out = model(_padded(lq, model.config.factor), series.task.index, None).restored
            change = (out[..., : clean.shape[2], : clean.shape[3]] - lq)[patch]
            (gradient,) = torch.autograd.grad(change.mean(), noise)
            noise = (noise.detach() + size / 2 * gradient.sign()).clamp(-size, size)
        x = series.lq.copy()
        x[around] += noise.detach()[:, 0].numpy()
        return _all(bench.again(series, x))

    return plant


def _centre(shape: Sequence[int], size: int) -> tuple[slice | EllipsisType, ...]:
    """The middle of the last two axes, at most `size` on each."""
    places = [((edge - min(size, edge)) // 2, min(size, edge)) for edge in shape[-2:]]
    return (..., *(slice(first, first + many) for first, many in places))


def _padded(x: Tensor, factor: int) -> Tensor:
    return pad_to_multiple(x, factor, least=2 * factor)[0]
