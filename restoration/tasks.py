"""The three restoration tasks: what they are called, their units and their intensity windows.

Windows and scales are those of AMIR's published loaders (Yang et al., MICCAI 2024), which DiffCode
(Chen et al., MICCAI 2025, Sec. 3.1) reuses: CT in HU, PET in SUV, MR in scanner units brought to a
common scale per series.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

Array = TypeVar("Array", npt.NDArray[np.float32], torch.Tensor)

MR_REFERENCE_PERCENTILE = 99.9
MR_REFERENCE_INTENSITY = 1150.0


class RestorationTask(enum.Enum):
    """One restoration problem; the value is the name used by command lines, files and ledgers."""

    MRI_SR = "mri_sr"  #: low-resolution MR to full resolution, on the same grid
    CT_DENOISE = "ct_denoise"  #: low-dose CT to full dose
    PET_SYNTHESIS = "pet_synthesis"  #: low-count PET to full count

    @property
    def index(self) -> int:
        """Position in the codebook bank, the expert list and the classifier's logits."""
        return _ORDER[self]


_ORDER = {task: index for index, task in enumerate(RestorationTask)}


@dataclass(frozen=True)
class TaskSpec:
    """Units and normalisation window of a task; the window maps onto [0, 1]."""

    task: RestorationTask
    units: str
    window: tuple[float, float]
    label: str


_SPECS = {
    RestorationTask.MRI_SR: TaskSpec(
        RestorationTask.MRI_SR, "a.u.", (0.0, 4095.0), "MR super-resolution"
    ),
    RestorationTask.CT_DENOISE: TaskSpec(
        RestorationTask.CT_DENOISE, "HU", (-1024.0, 3071.0), "CT denoising"
    ),
    RestorationTask.PET_SYNTHESIS: TaskSpec(
        RestorationTask.PET_SYNTHESIS, "SUV", (0.0, 20.0), "PET synthesis"
    ),
}


def spec(task: RestorationTask | str) -> TaskSpec:
    """Return the specification of ``task``; ``ValueError`` names an unknown task."""
    return _SPECS[RestorationTask(task)]


def intensity_scale(volume: npt.NDArray[np.generic], task: RestorationTask | str) -> float:
    """Factor that brings a series to the intensities the model was trained on.

    MR intensities are arbitrary, so the 99.9th percentile of the series (zeros included, as AMIR
    does) is moved to 1150; CT (HU) and PET (SUV) are absolute and keep a factor of 1.
    """
    if RestorationTask(task) is not RestorationTask.MRI_SR:
        return 1.0
    reference = float(np.percentile(volume.astype(np.float32), MR_REFERENCE_PERCENTILE))
    return MR_REFERENCE_INTENSITY / reference if reference > 0 else 1.0


def why_no_magnitude(volume: npt.NDArray[np.generic]) -> str | None:
    """Why values cannot be those of an MR magnitude image; None where they may be.

    A magnitude is never negative, while a CT in HU has air at −1000. Interpolation may undershoot:
    up to a thousandth of the values may be negative.
    """
    share = float(np.mean(np.less(volume, 0)))
    if share <= 1e-3:
        return None
    return (
        f"not an MR magnitude image: {share:.1%} of the values are negative, the lowest is "
        f"{volume.min():g}. Is it a CT?"
    )


def normalise(x: Array, task: RestorationTask | str) -> Array:
    """Map physical units onto the network's range, the window onto [0, 1]; nothing is clipped."""
    low, high = spec(task).window
    return (x - low) / (high - low)


def denormalise(x: Array, task: RestorationTask | str) -> Array:
    """Invert :func:`normalise`."""
    low, high = spec(task).window
    return x * (high - low) + low
