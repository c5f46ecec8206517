from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from restoration.tasks import RestorationTask
from training.metrics import (
    HIGHEST_PSNR,
    PROTOCOLS,
    SSIM_SIZE,
    Protocol,
    Score,
    mean_score,
    psnr,
    rmse,
    score,
    ssim,
)

CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS
Image = npt.NDArray[np.float64]


@pytest.fixture
def images() -> tuple[Image, Image]:
    generator = np.random.default_rng(0)
    reference = np.add.outer(np.arange(37.0), np.arange(50.0)) + generator.normal(0, 4, (37, 50))
    return reference + generator.normal(0, 5, (37, 50)), reference


def test_psnr_is_that_of_scikit_image(images: tuple[Image, Image]) -> None:
    image, reference = images
    expected = peak_signal_noise_ratio(reference, image, data_range=90.0)
    assert psnr(image, reference, 90.0) == pytest.approx(expected, rel=1e-12)


def test_ssim_is_that_of_scikit_image_on_images_surrounded_by_zeros(
    images: tuple[Image, Image],
) -> None:
    image, reference = images
    padded = [np.pad(each, SSIM_SIZE) for each in (reference, image)]
    _, every = structural_similarity(
        *padded, data_range=90.0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    inner = every[SSIM_SIZE:-SSIM_SIZE, SSIM_SIZE:-SSIM_SIZE]
    assert ssim(image, reference, 90.0) == pytest.approx(inner.mean(), rel=1e-9)


def test_two_ct_slices_give_the_figures_worked_out_by_hand() -> None:
    # Reference spans the whole window, R = 400. First slice: 10 HU off everywhere, so RMSE 10 and
    # PSNR 20 log10(400 / 10) = 32.0412. Second: 40 HU off in a quarter of the pixels, so RMSE 20,
    # PSNR 26.0206.
    reference = np.tile(np.linspace(-160, 240, 16), (16, 1))
    first = reference.clip(-150, 230) + np.where(reference < 40, 10.0, -10.0)
    first = np.where(np.abs(first - reference) > 10, reference + 10, first)
    second = reference.copy()
    second[:4] -= np.where(reference[:4] > 0, 40.0, -40.0)
    scores = [score(image, reference, CT) for image in (first, second)]
    assert scores[0] is not None
    assert scores[1] is not None
    assert scores[1].rmse == pytest.approx(20.0)
    assert scores[1].psnr == pytest.approx(26.0206, abs=1e-4)
    mean = mean_score([s for s in scores if s is not None])
    assert mean.rmse == pytest.approx((scores[0].rmse + 20.0) / 2)


def test_a_constant_error_of_ten_hu_is_32_db() -> None:
    reference = np.tile(np.linspace(-160, 230, 14), (14, 1))
    reference[0, 0] = 240.0
    image = reference + 10.0
    image[0, 0] = 230.0
    found = score(image, reference, CT)
    assert found is not None
    assert found.rmse == pytest.approx(10.0)
    assert found.psnr == pytest.approx(32.0412, abs=1e-4)


def test_ct_figures_give_back_the_range_of_400_hu() -> None:
    generator = np.random.default_rng(1)
    reference = generator.uniform(-1000, 1000, (32, 32))  # reaches both ends of the window
    image = reference + generator.normal(0, 20, reference.shape)
    found = score(image, reference, CT)
    assert found is not None
    assert found.rmse * 10 ** (found.psnr / 20) == pytest.approx(400.0)


def test_values_outside_the_window_do_not_count() -> None:
    reference = np.tile(np.linspace(-500, 500, 32), (32, 1))
    beyond = np.where(np.abs(reference) > 300, 4 * reference, reference)
    assert score(beyond, reference, CT) == Score(HIGHEST_PSNR, pytest.approx(1.0), 0.0)


@pytest.mark.parametrize(("task", "highest"), [(MR, 5000.0), (PET, 30.0)], ids=["mr", "pet"])
def test_the_range_is_that_of_the_clipped_reference(task: RestorationTask, highest: float) -> None:
    reference = np.tile(np.linspace(0, highest, 32), (32, 1))
    image = 0.9 * reference
    found = score(image, reference, task)
    limit = {MR: 4095.0, PET: 20.0}[task]
    expected = psnr(image.clip(0, limit), reference.clip(0, limit), limit)
    assert found is not None
    assert found.psnr == pytest.approx(expected)


def test_a_reference_that_is_constant_in_the_window_has_no_score() -> None:
    air = np.full((16, 16), -1000.0)
    assert score(air + 3, air, CT) is None


def test_the_mean_of_no_slices_is_an_error() -> None:
    with pytest.raises(ValueError, match="no slice"):
        mean_score([])


def test_rmse_keeps_the_units() -> None:
    assert rmse(np.full((2, 2), 3.0), np.zeros((2, 2))) == 3.0


def protocol(name: str) -> Protocol:
    return next(p for p in PROTOCOLS if p.id == name)


@pytest.fixture
def chest() -> Image:
    """A body of 0 to 60 HU with a lung, in air."""
    reference = np.full((48, 48), -1000.0)
    reference[8:40, 8:40] = np.linspace(0, 60, 32)
    reference[16:30, 16:30] = -850.0
    return reference


def test_a_fixed_range_is_the_same_for_every_slice() -> None:
    reference = np.tile(np.linspace(0, 100, 32), (32, 1))
    found = score(reference + 4.0, reference, CT, protocol("fixed-range/1"))
    expected = peak_signal_noise_ratio(reference, reference + 4.0, data_range=400.0)
    assert found is not None
    assert found.psnr == pytest.approx(expected)


def test_the_body_mask_leaves_out_the_air(chest: Image) -> None:
    body = np.zeros(chest.shape, bool)
    body[8:40, 8:40] = True
    worse = chest + np.where(body, 0.0, 950.0)
    masked = score(worse, chest, CT, protocol("body-mask/1"), body)
    assert masked is not None
    assert (masked.psnr, masked.rmse) == (HIGHEST_PSNR, 0.0)
    whole = score(chest + 6.0, chest, CT, protocol("body-mask/1"), body)
    assert whole is not None
    inside = np.clip(chest, -160, 240)[body]
    error = np.clip(chest + 6.0, -160, 240)[body] - inside
    assert whole.rmse == pytest.approx(np.sqrt(np.mean(error**2)))
    assert whole.psnr == pytest.approx(
        peak_signal_noise_ratio(inside, inside + error, data_range=float(np.ptp(inside)))
    )


def test_without_a_body_there_is_no_figure(chest: Image) -> None:
    assert score(chest, chest, CT, protocol("body-mask/1")) is None
    assert score(chest, chest, CT, protocol("body-mask/1"), np.zeros(chest.shape, bool)) is None


def test_the_lung_window_sees_what_the_abdomen_window_hides(chest: Image) -> None:
    blurred = chest.copy()
    blurred[18:28, 18:28] += 60.0
    abdomen, lung = score(blurred, chest, CT), score(blurred, chest, CT, protocol("lung-window/1"))
    assert abdomen is not None
    assert lung is not None
    assert abdomen.rmse == 0.0
    assert lung.rmse == pytest.approx(60 * 10 / 48)


def test_the_lung_window_is_for_ct_alone(chest: Image) -> None:
    assert score(chest, chest, MR, protocol("lung-window/1")) is None


def test_protocol_ids_are_unique() -> None:
    assert len({p.id for p in PROTOCOLS}) == len(PROTOCOLS) == 4
