"""Classical restoration to measure a model against: the best of a stated grid, per task.

CT and PET: non-local means, total variation, wavelet shrinkage, a Gaussian filter. MR: the
zero-filled image itself, Lanczos interpolation of the low-resolution image, total variation,
wavelet shrinkage. All of scikit-image (BSD) with PyWavelets (MIT), but for Lanczos. The choice is
made on training slices, never on those that are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from restoration.tasks import RestorationTask, spec
from training.metrics import score

Slice = npt.NDArray[np.float32]
Filter = Callable[[Slice], Slice]

# Multiples of the noise between neighbours, which understates the correlated noise of a
# reconstruction.
NLM_STRENGTHS = (0.8, 1.3, 2.0, 3.0, 5.0, 8.0)
TV_STRENGTHS = (0.5, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 16.0, 25.0, 40.0)
WAVELET_STRENGTHS = (1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 16.0)
GAUSSIAN_SIGMAS = (0.7, 1.0, 1.4, 2.0, 2.8)  # pixels
LANCZOS_LOBES = 3
FOREGROUND = 0.1  # of the 99.5th percentile of the slice


@dataclass(frozen=True)
class Classical:
    """One method with its parameter, applied to slices (rows, columns) in physical units."""

    label: str
    apply: Filter
    tried: Mapping[str, float] = field(default_factory=dict)  #: label → PSNR while tuning


def families(task: RestorationTask, mr_factor: float = 4.0) -> dict[str, tuple[Classical, ...]]:
    """The grid a task's classical method is chosen from: family → from weak to strong."""
    found = {
        "total variation": _grid(
            "total variation {:g} sigma", TV_STRENGTHS, _total_variation, task
        ),
        "wavelets": _grid("wavelet shrinkage {:g} sigma", WAVELET_STRENGTHS, _wavelet, task),
    }
    if task is RestorationTask.MRI_SR:
        lanczos = Classical("Lanczos", lambda image: lanczos_upsampled(image, mr_factor))
        return {
            "zero-filled": (Classical("zero-filled", lambda image: image),),
            "Lanczos": (lanczos,),
            **found,
        }
    return {
        "non-local means": _grid("non-local means {:g} sigma", NLM_STRENGTHS, _nlm, task),
        **found,
        "Gaussian": _grid("Gaussian {:g} px", GAUSSIAN_SIGMAS, _gaussian, task),
    }


def tune(
    task: RestorationTask, pairs: Sequence[tuple[Slice, Slice]], mr_factor: float = 4.0
) -> Classical:
    """The candidate of the highest mean PSNR over training pairs (lq, hq); needs at least one.

    Each family is tried from weak to strong until a step makes it worse.
    """
    if not pairs:
        raise ValueError(f"no training slices to tune a classical method for {task.value}")
    tried: dict[str, float] = {}
    best: tuple[float, Classical] | None = None
    for grid in families(task, mr_factor).values():
        before = -np.inf
        for method in grid:
            quality = tried[method.label] = _quality(method, pairs, task)
            if best is None or quality > best[0]:
                best = (quality, method)
            if quality < before:
                break
            before = quality
    assert best is not None
    return Classical(best[1].label, best[1].apply, tried)


def _quality(
    method: Classical, pairs: Sequence[tuple[Slice, Slice]], task: RestorationTask
) -> float:
    scores = (score(method.apply(lq), hq, task) for lq, hq in pairs)
    return float(np.mean([s.psnr for s in scores if s is not None]))


def _grid(
    label: str,
    strengths: Sequence[float],
    make: Callable[[float, RestorationTask], Filter],
    task: RestorationTask,
) -> tuple[Classical, ...]:
    return tuple(Classical(label.format(s), make(s, task)) for s in strengths)


def noise_level(image: Slice, inside: npt.NDArray[np.bool_] | None = None) -> float:
    """Standard deviation of the noise from the median absolute horizontal difference.

    Between pixels that are both ``inside``, if given; 0 where no neighbours differ.
    """
    difference = np.abs(np.diff(image.astype(np.float64), axis=1))
    counted = difference > 0
    if inside is not None:
        counted &= inside[:, 1:] & inside[:, :-1]
    moving = difference[counted]
    return float(np.median(moving) / 0.6745 / np.sqrt(2)) if moving.size else 0.0


def foreground(image: Slice, task: RestorationTask) -> npt.NDArray[np.bool_] | None:
    """Where MR and PET have a signal: their empty background would pass for little noise."""
    if task is RestorationTask.CT_DENOISE:
        return None
    return image > FOREGROUND * np.percentile(image, 99.5)


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


def _by_noise(task: RestorationTask, denoise: Callable[[Slice, float], Slice]) -> Filter:
    """denoise(image inside the window, its noise level); an image without noise is left alone."""

    def apply(image: Slice) -> Slice:
        sigma = noise_level(image, foreground(image, task))
        return image if sigma == 0 else denoise(np.clip(image, *spec(task).window), sigma)

    return apply


def _nlm(strength: float, task: RestorationTask) -> Filter:
    def denoise(image: Slice, sigma: float) -> Slice:
        from skimage.restoration import denoise_nl_means

        filtered: Slice = denoise_nl_means(
            image, h=strength * sigma, sigma=sigma, patch_size=5, patch_distance=6, fast_mode=True
        )
        return filtered

    return _by_noise(task, denoise)


def _total_variation(strength: float, task: RestorationTask) -> Filter:
    def denoise(image: Slice, sigma: float) -> Slice:
        from skimage.restoration import denoise_tv_chambolle

        filtered: Slice = denoise_tv_chambolle(image, weight=strength * sigma)  # type: ignore[no-untyped-call]
        return filtered

    return _by_noise(task, denoise)


def _wavelet(strength: float, task: RestorationTask) -> Filter:
    """BayesShrink with soft thresholds (Chang, Yu & Vetterli, IEEE TIP 9(9), 2000)."""

    def denoise(image: Slice, sigma: float) -> Slice:
        from skimage.restoration import denoise_wavelet

        filtered: Slice = denoise_wavelet(
            image, sigma=strength * sigma, wavelet="sym4", method="BayesShrink", mode="soft",
            rescale_sigma=False,
        )  # fmt: skip
        return filtered

    return _by_noise(task, denoise)


def _gaussian(sigma: float, _: RestorationTask) -> Filter:
    def apply(image: Slice) -> Slice:
        from skimage.filters import gaussian

        filtered: Slice = gaussian(image, sigma, preserve_range=True)  # type: ignore[no-untyped-call]
        return filtered

    return apply
