"""Which slices go through the network again, with what, and how the two results compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from restoration.fidelity import Measured
from restoration.fidelity.measures import body_noise
from restoration.tasks import RestorationTask

Volume = npt.NDArray[np.float32]

# One slice in so many; PET needs a third pass for each.
_EVERY = {
    RestorationTask.CT_DENOISE: 32,
    RestorationTask.MRI_SR: 32,
    RestorationTask.PET_SYNTHESIS: 48,
}
#: What a slice gave, by the name of the probe.
Probe = dict[str, float | None]
NAMES = ("idempotence", "perturbation")
_NOTHING = "the slices that were looked at hold nothing"
_SHARE = 0.25  # of the noise of a slice, as a disturbance


def probed(slices: int, task: RestorationTask) -> list[int]:
    """The slices to look at again: evenly spread, at least one, never the first alone."""
    every = _EVERY[task]
    return list(range(min(every, slices) // 2, slices, every))


def disturbed(x: Volume, task: RestorationTask, scale: float, seeds: Sequence[int]) -> Volume:
    """The slices with white noise of a quarter of their own SD on top, the same at every call."""
    level = np.nan_to_num(body_noise(torch.from_numpy(x) * scale, task).numpy()) / scale
    drawn = [np.random.default_rng(seed).standard_normal(x.shape[1:]) for seed in seeds]
    noise = _SHARE * level[:, None, None] * np.stack(drawn)
    noisy: Volume = (x + noise).astype(np.float32)
    return noisy


def relative(change: Volume, of: Volume) -> list[float | None]:
    """‖change‖ / ‖of‖ of each slice; nothing where the latter is zero."""
    return [
        float(np.linalg.norm(a) / np.linalg.norm(b)) if b.any() else None
        for a, b in zip(change, of, strict=True)
    ]


def measured(found: Mapping[int, Probe], slices: Sequence[int]) -> dict[str, Measured]:
    """What was found of `slices`, by the name of the probe."""
    return {
        name: Measured(values, tuple(slices), "" if any(values) else _NOTHING)
        for name in NAMES
        for values in (tuple(found[index][name] for index in slices),)
    }
