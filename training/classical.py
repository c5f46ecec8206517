"""Classical restoration to measure a model against: the best of a stated grid, per task.

CT: non-local means and total variation; PET: these and a Gaussian filter. MR: the zero-filled
image itself, Lanczos interpolation of the low-resolution image, total variation. scikit-image is
needed for all but Lanczos. The choice is made on training slices, never on those that are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from restoration.tasks import RestorationTask, spec
from training.metrics import score

Slice = npt.NDArray[np.float32]
Filter = Callable[[Slice], Slice]

# Of the noise between neighbours, which understates the correlated noise of a reconstruction.
NLM_STRENGTHS = (0.8, 1.3, 2.0, 3.0, 5.0)
TV_STRENGTHS = (0.5, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 16.0, 25.0)
GAUSSIAN_SIGMAS = (0.7, 1.0, 1.4, 2.0)  # pixels
LANCZOS_LOBES = 3


@dataclass(frozen=True)
class Classical:
    """One method with its parameter, applied to slices (rows, columns) in physical units."""

    label: str
    apply: Filter


def candidates(task: RestorationTask, mr_factor: float = 4.0) -> tuple[Classical, ...]:
    """The grid a task's classical method is chosen from."""
    tv = [
        Classical(f"total variation {s:g} sigma", _total_variation(s, task)) for s in TV_STRENGTHS
    ]
    if task is RestorationTask.MRI_SR:
        lanczos = Classical("Lanczos", lambda image: lanczos_upsampled(image, mr_factor))
        return (Classical("zero-filled", lambda image: image), lanczos, *tv)
    nlm = [Classical(f"non-local means {s:g} sigma", _nlm(s, task)) for s in NLM_STRENGTHS]
    if task is RestorationTask.CT_DENOISE:
        return (*nlm, *tv)
    gaussian = [Classical(f"Gaussian {s:g} px", _gaussian(s)) for s in GAUSSIAN_SIGMAS]
    return (*nlm, *tv, *gaussian)


def tune(
    task: RestorationTask, pairs: Sequence[tuple[Slice, Slice]], mr_factor: float = 4.0
) -> Classical:
    """The candidate of the highest mean PSNR over training pairs (lq, hq); needs at least one."""
    if not pairs:
        raise ValueError(f"no training slices to tune a classical method for {task.value}")

    def quality(method: Classical) -> float:
        scores = (score(method.apply(lq), hq, task) for lq, hq in pairs)
        return float(np.mean([s.psnr for s in scores if s is not None]))

    return max(candidates(task, mr_factor), key=quality)


def noise_level(image: Slice) -> float:
    """Standard deviation of the noise from the median absolute horizontal difference."""
    difference = np.abs(np.diff(image.astype(np.float64), axis=1))
    moving = difference[difference > 0]
    return float(np.median(moving) / 0.6745 / np.sqrt(2)) if moving.size else 0.0


def lanczos_upsampled(image: Slice, factor: float) -> Slice:
    """The central 1/factor of k-space as a small image, interpolated back to the grid."""
    small = _k_space_centre(image.astype(np.float64), factor)
    rows = _lanczos_weights(image.shape[0], small.shape[0])
    columns = _lanczos_weights(image.shape[1], small.shape[1])
    upsampled: Slice = (rows @ small @ columns.T).astype(np.float32)
    return upsampled


def _k_space_centre(image: npt.NDArray[np.float64], factor: float) -> npt.NDArray[np.float64]:
    spectrum = np.fft.fftshift(np.fft.fft2(image))
    window = []
    for size in image.shape:
        kept = max(1, round(size / factor))
        start = size // 2 - kept // 2  # zero frequency stays in the middle
        window.append(slice(start, start + kept))
    part = np.fft.ifftshift(spectrum[tuple(window)])
    small: npt.NDArray[np.float64] = np.abs(np.fft.ifft2(part)) * (part.size / image.size)
    return small


def _lanczos_weights(size: int, samples: int) -> npt.NDArray[np.float64]:
    """Weights (size, samples) of periodic Lanczos interpolation; each row sums to one."""
    place = np.arange(size)[:, None] * samples / size - np.arange(samples)[None, :]
    place = (place + samples / 2) % samples - samples / 2
    inside = np.abs(place) < LANCZOS_LOBES
    weights = np.where(inside, np.sinc(place) * np.sinc(place / LANCZOS_LOBES), 0.0)
    normed: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normed


def _nlm(strength: float, task: RestorationTask) -> Filter:
    def apply(image: Slice) -> Slice:
        from skimage.restoration import denoise_nl_means

        sigma = noise_level(image)
        if sigma == 0:
            return image
        filtered: Slice = denoise_nl_means(
            np.clip(image, *spec(task).window), h=strength * sigma, sigma=sigma,
            patch_size=5, patch_distance=6, fast_mode=True,
        )  # fmt: skip
        return filtered

    return apply


def _total_variation(strength: float, task: RestorationTask) -> Filter:
    def apply(image: Slice) -> Slice:
        from skimage.restoration import denoise_tv_chambolle

        sigma = noise_level(image)
        if sigma == 0:
            return image
        clipped = np.clip(image, *spec(task).window)
        filtered: Slice = denoise_tv_chambolle(clipped, weight=strength * sigma)  # type: ignore[no-untyped-call]
        return filtered

    return apply


def _gaussian(sigma: float) -> Filter:
    def apply(image: Slice) -> Slice:
        from skimage.filters import gaussian

        filtered: Slice = gaussian(image, sigma, preserve_range=True)  # type: ignore[no-untyped-call]
        return filtered

    return apply
