"""What a reader measures in an image: HU by tissue, SUV in hot regions, total activity.

Regions are drawn on the reference alone, so every method is measured in the same voxels. CT classes
are those of the smoothed reference, eroded by a pixel so that edges do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from restoration.tasks import RestorationTask

Volume = npt.NDArray[np.float32]
Masks = npt.NDArray[np.bool_]

TISSUES = {
    "air": (-np.inf, -950.0),
    "lung": (-950.0, -500.0),
    "fat": (-150.0, -30.0),
    "soft": (0.0, 80.0),
    "bone": (200.0, np.inf),
}  # HU of the smoothed reference
SMOOTHING_PX = 2.0
LEAST_TISSUE_PX = 100  # of a class in a volume; fewer say nothing about it
HOT_SUV = 2.5
HOT_LEAST_MM3 = 1000.0
HOT_CONTOUR = 0.5  # of the region's maximum
BODY = {
    RestorationTask.CT_DENOISE: -500.0,
    RestorationTask.PET_SYNTHESIS: 0.1,
    RestorationTask.MRI_SR: 60.0,
}  # what the smoothed reference exceeds in the body: HU, SUV, a.u.


@dataclass(frozen=True)
class Measure:
    """One value of one volume or region; ``weight`` is its share in the subject's mean."""

    name: str
    value: float
    weight: float


@dataclass(frozen=True)
class Summary:
    """A quantity over subjects: mean, and the subject farthest from zero."""

    mean: float
    worst: float
    subjects: int
    regions: int


UNITS = {
    **{f"hu_bias_{tissue}": "HU" for tissue in TISSUES},
    "suv_mean_bias_hot": "%",
    "activity_vs_reference": "%",
    "activity_vs_input": "%",
}


def measures(
    task: RestorationTask,
    image: Volume,
    truth: Volume,
    lq: Volume,
    spacing_mm: tuple[float, float, float],
) -> list[Measure]:
    """Every quantity of a volume (slices, rows, columns), physical units; MR has none."""
    if task is RestorationTask.CT_DENOISE:
        return list(_hu_biases(image, truth))
    if task is RestorationTask.PET_SYNTHESIS:
        return [*_hot_biases(image, truth, spacing_mm), *_activities(image, truth, lq)]
    return []


def summarise(found: Sequence[tuple[str, Measure]]) -> dict[str, Summary]:
    """Name → summary of (subject, measure): weighted means of subjects, then over subjects."""
    by_name: dict[str, dict[str, list[Measure]]] = {}
    for subject, measure in found:
        by_name.setdefault(measure.name, {}).setdefault(subject, []).append(measure)
    return {name: _summary(subjects) for name, subjects in by_name.items()}


def tissue_masks(truth: Volume) -> dict[str, Masks]:
    """Tissue → its voxels (slices, rows, columns); empty classes are left out."""
    from scipy.ndimage import binary_erosion, gaussian_filter

    smooth = gaussian_filter(truth.astype(np.float32), (0, SMOOTHING_PX, SMOOTHING_PX))
    cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], bool)  # in the plane alone
    masks = {}
    for tissue, (low, high) in TISSUES.items():
        inside = (smooth >= low) & (smooth <= high)
        mask: Masks = binary_erosion(inside, cross, border_value=1)
        if mask.sum() >= LEAST_TISSUE_PX:
            masks[tissue] = mask
    return masks


def hot_regions(truth: Volume, spacing_mm: tuple[float, float, float]) -> list[Masks]:
    """Lesions and organs: 3-D components above 2.5 SUV and 1 mL, within half of their maximum."""
    from scipy.ndimage import label

    labels, count = label(truth > HOT_SUV)
    least = HOT_LEAST_MM3 / float(np.prod(spacing_mm))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    regions = []
    for index in range(1, count + 1):
        if sizes[index] >= least:
            component = labels == index
            regions.append(component & (truth >= HOT_CONTOUR * truth[component].max()))
    return regions


def body_masks(truth: Volume, task: RestorationTask) -> Masks:
    """Pixels of the body in each slice, lungs and other holes filled (slices, rows, columns)."""
    from scipy.ndimage import binary_fill_holes, gaussian_filter

    smooth = gaussian_filter(truth.astype(np.float32), (0, SMOOTHING_PX, SMOOTHING_PX))
    return np.stack([binary_fill_holes(plane > BODY[task]) for plane in smooth])


def _hu_biases(image: Volume, truth: Volume) -> Iterator[Measure]:
    for tissue, mask in tissue_masks(truth).items():
        bias = float(np.mean(image[mask] - truth[mask], dtype=np.float64))
        yield Measure(f"hu_bias_{tissue}", bias, float(mask.sum()))


def _hot_biases(
    image: Volume, truth: Volume, spacing_mm: tuple[float, float, float]
) -> Iterator[Measure]:
    for mask in hot_regions(truth, spacing_mm):
        true, found = (float(volume[mask].mean(dtype=np.float64)) for volume in (truth, image))
        yield Measure("suv_mean_bias_hot", 100 * (found / true - 1), 1.0)


def _activities(image: Volume, truth: Volume, lq: Volume) -> Iterator[Measure]:
    total = float(image.sum(dtype=np.float64))
    for name, volume in (("activity_vs_reference", truth), ("activity_vs_input", lq)):
        expected = float(volume.sum(dtype=np.float64))
        if expected > 0:
            yield Measure(name, 100 * (total / expected - 1), expected)


def _summary(subjects: Mapping[str, Sequence[Measure]]) -> Summary:
    means = [
        sum(m.value * m.weight for m in own) / sum(m.weight for m in own)
        for own in subjects.values()
    ]
    regions = sum(len(own) for own in subjects.values())
    return Summary(float(np.mean(means)), max(means, key=abs), len(means), regions)
