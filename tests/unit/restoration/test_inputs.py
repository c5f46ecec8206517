"""What an input says of itself: units, noise, texture and echoes, by closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from restoration.fidelity import Calibration, Evidence, InputModel, Verdict, assess
from restoration.fidelity.images import power
from restoration.fidelity.inputs import (
    COVARIATES,
    RINGS,
    _cepstrum,
    covariates,
    echo,
    intercept_doubt,
    unlikeness,
    uptake_level,
)
from restoration.fidelity.measures import input_features
from restoration.tasks import RestorationTask

CT, PET = RestorationTask.CT_DENOISE, RestorationTask.PET_SYNTHESIS
SPACING = (3.0, 0.7, 0.7)


def slice_of(air: float, lung: float, soft: float, bone: float) -> torch.Tensor:
    """100 x 100 pixels in HU, with these shares of what is left of 1 after contrast at 250 HU."""
    counts = [round(10000 * share) for share in (air, lung, soft, bone)]
    values = np.repeat([-1000.0, -850.0, 50.0, 900.0], counts)
    values = np.concatenate([values, np.full(10000 - len(values), 250.0)])
    return torch.from_numpy(values.reshape(1, 100, 100).astype(np.float32))


@pytest.mark.parametrize(
    "shares",
    [
        (0.4, 0.2, 0.35, 0.05),  # a chest
        (0.45, 0.0, 0.45, 0.1),  # a head: air around it, no lung
        (0.8, 0.0, 0.18, 0.02),  # a small patient
        (0.3, 0.0, 0.5, 0.03),  # much contrast medium
    ],
)
def test_hounsfield_units_are_told_from_values_without_their_intercept(
    shares: tuple[float, float, float, float],
) -> None:
    x = slice_of(*shares)
    assert intercept_doubt(x).item() < -0.02
    assert intercept_doubt(x + 1024).item() > 0
    assert intercept_doubt(x - 1024).item() > 0


def test_a_field_of_view_without_any_air_is_no_more_than_a_warning_but_for_its_units() -> None:
    for shares in ((0.0, 0.0, 0.85, 0.03), (0.0, 0.0, 0.9, 0.1)):
        inside = slice_of(*shares)
        assert intercept_doubt(inside).item() <= 0
        assert intercept_doubt(inside + 1024).item() > 0


def test_a_slice_beside_the_body_tells_nothing_of_its_units() -> None:
    assert math.isnan(intercept_doubt(slice_of(0.97, 0.0, 0.03, 0.0)).item())


def test_a_ct_without_its_intercept_fails_and_needs_no_learnt_level() -> None:
    x = slice_of(0.4, 0.2, 0.36, 0.04).numpy()
    rng = np.random.default_rng(0)
    x = x + rng.normal(0, 20, x.shape).astype(np.float32)
    for shift, verdict in ((0, Verdict.PASS), (1024, Verdict.FAIL), (1000, Verdict.FAIL)):
        found = assess(x + np.float32(shift), x + np.float32(shift), "ct_denoise")
        assert found.named("units").verdict is verdict


def test_the_level_of_uptake_follows_its_scale_exactly() -> None:
    rng = np.random.default_rng(0)
    body = ndimage.gaussian_filter(rng.random((1, 64, 64)), (0, 2, 2)).astype(np.float32)
    body[:, :10] = 0.01
    body[:, 40:44, 40:44] = 9.0
    x = torch.from_numpy(body)
    assert uptake_level(10 * x).item() == pytest.approx(10 * uptake_level(x).item(), rel=1e-5)
    assert uptake_level(x).item() == pytest.approx(0.5, rel=0.2)
    assert math.isnan(uptake_level(0 * x).item())


@pytest.mark.parametrize(("share", "lag"), [(0.5, (3, 4)), (0.5, (-6, 5)), (0.3, (9, 2))])
def test_an_echo_is_as_strong_as_the_second_copy(share: float, lag: tuple[int, int]) -> None:
    # log |1 - s + s exp(iw)|^2 has the Fourier coefficient s / (1 - s) at the lag, for s <= 1 / 2;
    # a window and few frequencies take a little of it.
    x = torch.randn(2, 192, 160, generator=torch.Generator().manual_seed(0))
    moved = (1 - share) * x + share * torch.roll(x, lag, (1, 2))
    assert echo(power(x), x.shape[1:]).max() < 0.1
    assert echo(power(moved), x.shape[1:]).numpy() == pytest.approx(share / (1 - share), abs=0.2)


def test_smaller_noise_and_another_texture_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    white = rng.normal(0, 20, (1, 256, 256)).astype(np.float32)
    blurred = ndimage.gaussian_filter(white, (0, 1, 1))
    plain, half, smooth = (
        input_features(torch.from_numpy(x), CT).numpy()[0] for x in (white, white / 2, blurred)
    )
    noise, fall = RINGS - 1, RINGS
    assert plain[noise] == pytest.approx(math.log(20), abs=0.05)
    assert half[noise] - plain[noise] == pytest.approx(-math.log(2), abs=1e-4)
    assert half[fall] == pytest.approx(plain[fall], abs=1e-4)
    # Means of 2 x 2 pixels of white noise have half its SD.
    assert plain[fall] == pytest.approx(math.log(2), abs=0.05)
    assert smooth[fall] < 0


def model_of(features: int, at: float) -> InputModel:
    spread = tuple(tuple(4.0 * (i == j) for j in range(features)) for i in range(features))
    row = (0.0,) * features
    first = (at, *row[1:])
    directions = {"cleanness": (-2.0, *row[1:])}
    return InputModel((first, row, (1.0, *row[1:]), row), spread, directions)


def test_the_distance_follows_spacing_level_and_direction() -> None:
    # Expected of the first feature: 0.5 + log(row spacing); SD of each: a half.
    model = model_of(3, 0.5)
    spacing = (2.0, math.e, math.e)
    logs = np.array([[1.5, 0, 0, 0.0], [1.0, 0, 0, 0.0], [1.5, 0.5, 0.5, 0.0]])
    found = unlikeness(logs, spacing, model)
    assert found["likeness"] == pytest.approx([0, 1 / math.sqrt(3), math.sqrt(2 / 3)])
    assert found["cleanness"] == pytest.approx([0, 1, 0])
    assert covariates(np.zeros(2), spacing).shape == (2, len(COVARIATES))


def test_an_input_unlike_the_training_is_far_from_its_model() -> None:
    model = model_of(RINGS + 2, 0.0)
    assert Calibration.from_dict(Calibration({}, model).to_dict()).inputs == model
    x = slice_of(0.4, 0.2, 0.36, 0.04).numpy()
    x = x + np.random.default_rng(0).normal(0, 20, x.shape).astype(np.float32)
    evidence = Evidence(spacing_mm=SPACING)
    found = assess(x, x, "ct_denoise", evidence=evidence, calibration=Calibration({}, model))
    assert min(value for value in found.named("likeness").values if value is not None) > 1
    assert found.named("sharpness").verdict is Verdict.NOT_APPLICABLE
    assert "direction" in found.named("sharpness").reason
    unknown = assess(x, x, "ct_denoise", calibration=Calibration({}, model)).named("likeness")
    assert "voxel" in unknown.reason


def test_a_model_of_inputs_that_does_not_fit_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="not of 1 features"):
        InputModel(((0.0, 0.0),), ((1.0,),))
    with pytest.raises(ValueError, match="diffcode calibrate"):
        InputModel.from_dict({"mean": [0.0], "precision": [[1.0]]})


@pytest.mark.parametrize("shape", [(64, 48), (33, 57)])
def test_lags_by_sums_of_cosines_are_those_of_the_fast_transform(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logs = torch.fft.rfft2(torch.rand(2, *shape, generator=generator)).abs().log()
    whole = torch.fft.irfft2(logs, shape)
    reach = 12
    expected = torch.cat([whole[:, :reach, :reach], whole[:, :reach, 1 - reach :]], -1)
    torch.testing.assert_close(_cepstrum(logs, *shape, reach), expected, atol=2e-6, rtol=0)
