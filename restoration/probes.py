"""Which parts of which slices go through the network again, and how the results compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from restoration.fidelity import Measured
from restoration.fidelity.measures import body_noise
from restoration.tasks import RestorationTask

Volume = npt.NDArray[np.float32]

_EVERY = 32  # one slice in so many
_PART = 64  # rows and columns that are looked at, at least: else a third of them
#: What a slice gave, by the name of the probe.
Probe = dict[str, float | None]
NAMES = ("idempotence", "perturbation")
_NOTHING = "the slices that were looked at hold nothing"
_SHARE = 0.25  # of the noise of a slice, as a disturbance


def probed(slices: int) -> list[int]:
    """The slices to look at again: evenly spread, one in 32 and at least one."""
    many = max(1, slices // _EVERY)
    return [(2 * index + 1) * slices // (2 * many) for index in range(many)]


def middle(slices: Volume) -> Volume:
    """A third of the rows and columns of (slices, rows, columns), or as many as tell enough.

    Three passes of a ninth of a slice cost a third of one of all of it, and the network does
    nothing in another part that it does not do here.
    """
    rows, columns = (min(size, max(_PART, size // 3)) for size in slices.shape[1:])
    first, left = (slices.shape[1] - rows) // 2, (slices.shape[2] - columns) // 2
    return np.ascontiguousarray(slices[:, first : first + rows, left : left + columns])


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
    values = {name: tuple(found[index][name] for index in slices) for name in NAMES}
    return {
        name: Measured(each, tuple(slices), "" if any(each) else _NOTHING)
        for name, each in values.items()
    }
