from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from restoration.tasks import RestorationTask
from training.classical import (
    Classical,
    families,
    foreground,
    lanczos_upsampled,
    noise_level,
    tune,
)
from training.metrics import score

CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS
Slice = npt.NDArray[np.float32]


def step_image(seed: int = 0, sigma: float = 0.0) -> Slice:
    image = np.zeros((48, 40), np.float32)
    image[12:36, 10:30] = 200.0
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape) if sigma else 0.0
    return (image + noise).astype(np.float32)


def candidates(task: RestorationTask) -> list[Classical]:
    """Every method of the grid."""
    return [method for grid in families(task).values() for method in grid]


def test_the_noise_level_of_white_noise_is_its_standard_deviation() -> None:
    noise = np.random.default_rng(0).normal(0, 7.0, (256, 256)).astype(np.float32)
    assert noise_level(noise) == pytest.approx(7.0, rel=0.03)


def test_an_empty_background_does_not_pass_for_little_noise() -> None:
    generator = np.random.default_rng(0)
    image = generator.normal(0, 1e-3, (96, 96)).astype(np.float32)
    image[32:64, 32:64] += 5 + generator.normal(0, 0.5, (32, 32)).astype(np.float32)
    assert noise_level(image) < 0.01
    assert noise_level(image, foreground(image, PET)) == pytest.approx(0.5, rel=0.1)
    assert foreground(image, CT) is None


def test_edges_do_not_count_as_noise() -> None:
    assert noise_level(step_image(sigma=5.0)) == pytest.approx(5.0, rel=0.2)


def test_an_image_without_noise_is_left_alone() -> None:
    flat = np.full((16, 16), 30.0, np.float32)
    for task in RestorationTask:
        for method in candidates(task):
            np.testing.assert_allclose(method.apply(flat), flat, rtol=1e-5)


@pytest.mark.parametrize("task", [CT, PET], ids=["ct", "pet"])
def test_the_chosen_method_removes_noise(task: RestorationTask) -> None:
    scale = 1.0 if task is CT else 0.02
    clean, noisy = scale * step_image(), scale * step_image(sigma=30.0)
    method = tune(task, [(noisy, clean)])
    before, after = score(noisy, clean, task), score(method.apply(noisy), clean, task)
    assert before is not None
    assert after is not None
    assert after.psnr > before.psnr + 3.0


def test_the_choice_is_the_best_of_the_grid() -> None:
    clean, noisy = step_image(), step_image(sigma=30.0)
    best = tune(CT, [(noisy, clean)])
    found = [score(m.apply(noisy), clean, CT) for m in candidates(CT)]
    chosen = score(best.apply(noisy), clean, CT)
    assert chosen is not None
    assert chosen.psnr == max(s.psnr for s in found if s is not None)


def test_tuning_needs_slices() -> None:
    with pytest.raises(ValueError, match="ct_denoise"):
        tune(CT, [])


@pytest.mark.parametrize("shape", [(48, 40), (45, 51)])
def test_lanczos_keeps_the_mean_and_follows_smooth_images(shape: tuple[int, int]) -> None:
    rows, columns = (np.linspace(0, 2 * np.pi, size, endpoint=False) for size in shape)
    image = (100 + 20 * np.cos(rows)[:, None] * np.sin(columns)[None, :]).astype(np.float32)
    upsampled = lanczos_upsampled(image, 4.0)
    assert upsampled.shape == shape
    assert np.abs(upsampled - image).max() < 1.0
