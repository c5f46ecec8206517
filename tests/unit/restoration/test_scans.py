"""What an MR series says about its scan: motion and texture, against made images of both."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from restoration.fidelity import Calibration, Evidence, ScanModel, Verdict, assess, scans
from restoration.kspace import Support, empty_band, truncate
from restoration.tasks import intensity_scale
from training.motion import breathing, moved, restless
from training.scan_models import learn

SIZE = 224


def heads(seed: int, slices: int = 4) -> np.ndarray:
    """Ellipses with 1/f texture and thermal noise, of another shape for each seed."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2) / (SIZE / 2)
    radius = 0.65 + 0.03 * rng.standard_normal((slices, 1, 1))
    head = (x**2 + (1.1 + 0.1 * rng.random()) * y**2 < radius**2).astype(float)
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)) * SIZE
    texture = np.fft.ifft2(np.fft.fft2(rng.standard_normal(head.shape)) / (1 + frequency)).real
    real, imaginary = 0.02 * rng.standard_normal((2, *head.shape))
    full = np.hypot(head * (0.7 + texture / texture.std() * 0.15).clip(0.1) + real, imaginary)
    return low(full)


def low(full: np.ndarray) -> np.ndarray:
    return truncate(torch.from_numpy(full), 4).numpy().astype(np.float32)


@pytest.fixture(scope="module")
def model() -> ScanModel:
    return learn([heads(seed) for seed in range(24)])


def judged(x: np.ndarray, model: ScanModel) -> dict[str, float | str | None]:
    found = assess(x, x, "mri_sr", calibration=Calibration({}, scans=model))
    gates = {name: found.named(name) for name in ("texture", "ghosting")}
    return {name: gate.values[0] if gate.values else gate.reason for name, gate in gates.items()}


def cropped(x: np.ndarray, room: int = 66) -> np.ndarray:
    """The middle of heads, with no air beside them."""
    return np.ascontiguousarray(x[:, room:-room, room:-room])


def lines_of(x: np.ndarray) -> np.ndarray:
    found = scans.lines(scans.spectra(torch.from_numpy(x)), empty_band(torch.from_numpy(x)))
    assert found is not None
    return found


def test_the_middle_half_of_a_series_is_looked_at_and_all_of_a_short_one() -> None:
    assert scans.looked_at(1) == [0]
    assert scans.looked_at(2) == [0, 1]
    assert scans.looked_at(4) == [0, 1, 2, 3]
    assert scans.looked_at(8) == list(range(8))
    assert scans.looked_at(10) == list(range(1, 9))
    assert len(scans.looked_at(200)) == scans.MOST
    assert (scans.looked_at(200)[0], scans.looked_at(200)[-1]) == (50, 149)


def test_an_image_at_its_acquired_matrix_keeps_its_values() -> None:
    wave = 500 + 100 * np.cos(2 * np.pi * 5 * np.arange(64) / 64)
    x = torch.from_numpy(np.broadcast_to(wave, (1, 64, 64)).astype(np.float32))
    planes = scans.at_acquired_matrix(scans.spectra(x), Support(10, 12))
    assert planes.shape == (1, 19, 23)
    at = 64 * np.arange(23) / 23
    expected = 500 + 100 * np.cos(2 * np.pi * 5 * at / 64)
    np.testing.assert_allclose(planes[0, 3].numpy(), expected, rtol=1e-4)


def test_who_moves_is_told_from_who_lies_still(model: ScanModel) -> None:
    rng = np.random.default_rng(3)
    for seed in range(100, 106):
        x = heads(seed)
        still = judged(x, model)["ghosting"]
        assert isinstance(still, float)
        assert still < 2.8
        for axis in (1, 2):
            for move in (restless, breathing):
                ghosts = judged(move(x, rng, axis=axis), model)["ghosting"]
                assert isinstance(ghosts, float)
                assert ghosts > still + 2


def test_motion_is_seen_without_air_beside_the_body(model: ScanModel) -> None:
    rng = np.random.default_rng(4)
    full = 500 + 100 * rng.standard_normal((4, SIZE, SIZE))
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)) * SIZE
    inside = low(np.fft.ifft2(np.fft.fft2(full) / (1 + frequency / 8)).real)
    assert inside.min() > 0.5 * inside.max()
    moved_lines = judged(restless(inside, rng), model)["ghosting"]
    still = judged(inside, model)["ghosting"]
    assert isinstance(moved_lines, float)
    assert isinstance(still, float)
    assert still < 2.8 < moved_lines


def test_levels_that_jump_from_line_to_line_have_the_f_of_their_variance() -> None:
    rng = np.random.default_rng(0)
    size, support = 400, Support(50, 50)
    values = rng.standard_normal((16, size, size)) + 1j * rng.standard_normal((16, size, size))
    jumps = rng.normal(0, 0.2, (16, size, 1))
    planted = torch.from_numpy(1e6 * values * np.exp(jumps / 2))
    none = scans.lines(torch.from_numpy(1e6 * values), support)
    found = scans.lines(planted, support)
    assert none is not None
    assert found is not None
    # The logarithm of an exponential variable has the variance pi^2 / 6; of an axis 2 x 44
    # frequencies lie along each line.
    expected = np.log(1 + 0.2**2 / (np.pi**2 / 6 / 88))
    assert found[0] == pytest.approx([expected] * 5, abs=0.2)
    assert none == pytest.approx(np.zeros((2, 5)), abs=0.2)
    assert found[1] == pytest.approx(none[1], abs=0.25)


def test_lines_do_not_depend_on_level_gain_or_position() -> None:
    x = 1000 * heads(5)
    expected = lines_of(x)
    np.testing.assert_allclose(lines_of(7 * x), expected, atol=1e-3)
    np.testing.assert_allclose(lines_of(np.roll(x, (9, -5), axis=(1, 2))), expected, atol=1e-3)
    np.testing.assert_allclose(lines_of(x + 300), expected, atol=1e-3)
    np.testing.assert_allclose(lines_of(x.transpose(0, 2, 1).copy()), expected[::-1], atol=1e-3)


def test_a_small_matrix_has_too_few_lines(model: ScanModel) -> None:
    x = cropped(heads(0))
    found = judged(x, model)["ghosting"]
    assert found == "too few lines of k-space"


@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_detail_that_was_there_is_told_from_what_is_added(strength: float) -> None:
    rng = np.random.default_rng(8)
    raw, support = 1000 * heads(8), Support(28, 28)
    detail = rng.standard_normal(raw.shape).astype(np.float32) * 20
    other = rng.standard_normal(raw.shape).astype(np.float32) * 20

    def correlation(x: np.ndarray, change: np.ndarray) -> float:
        spectrum = scans.spectra(torch.from_numpy(x))
        found = scans.detail_before(spectrum, torch.from_numpy(strength * change), support)
        assert found is not None
        return found

    assert abs(correlation(raw, detail)) < 0.05
    assert correlation(raw + detail, detail) > 0.9
    # Half of what is added was there: as the cosine of two sums that share one part.
    assert correlation(raw + detail, detail + other) == pytest.approx(0.5**0.5, abs=0.05)
    assert abs(correlation(raw + other, detail)) < 0.05


def test_what_was_restored_before_fails_and_what_was_not_passes() -> None:
    x = 1000 * heads(9)
    rng = np.random.default_rng(9)
    sharp = x + 20 * rng.standard_normal(x.shape).astype(np.float32)
    first = assess(x, sharp, "mri_sr").named("restored_before")
    assert first.verdict is Verdict.PASS
    again = Evidence(support=empty_band(torch.from_numpy(x)))
    second = assess(sharp, sharp + (sharp - x) / 2, "mri_sr", evidence=again)
    assert second.named("restored_before").verdict is Verdict.FAIL
    same = assess(x, x, "mri_sr").named("restored_before")
    assert same.verdict is Verdict.NOT_APPLICABLE
    assert "beyond" in same.reason


def test_what_has_no_texture_is_strange(model: ScanModel) -> None:
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    flat = np.where(np.hypot(y, x) < 88, 700.0, 0.0)
    flat[np.hypot(y - 16, x) < 14] = 100
    flat[np.hypot(y + 32, x) < 9] = 1000
    away = judged(low(np.repeat(flat[None], 4, 0)), model)["texture"]
    usual = [judged(heads(seed), model)["texture"] for seed in range(100, 106)]
    assert all(isinstance(value, float) and value < 2.5 for value in usual)
    assert isinstance(away, float)
    assert away > 4


def test_more_of_k_space_than_was_learnt_is_not_judged_but_fails_elsewhere(
    model: ScanModel,
) -> None:
    rng = np.random.default_rng(0)
    full = 500 + 100 * rng.random((3, SIZE, SIZE)).astype(np.float32)
    found = assess(full, full, "mri_sr", calibration=Calibration({}, scans=model))
    assert found.named("texture").verdict is Verdict.NOT_APPLICABLE
    assert found.named("restored_before").verdict is Verdict.NOT_APPLICABLE
    assert found.named("empty_band").verdict is Verdict.FAIL
    assert "k-space" in scans.why_not(Support(70, 28), (SIZE, SIZE))


def test_a_model_comes_back_from_its_manifest_and_has_to_fit(model: ScanModel) -> None:
    kept = Calibration({}, scans=model)
    assert Calibration.from_dict(kept.to_dict()) == kept
    with pytest.raises(ValueError, match="weights"):
        ScanModel((0.0,), ((1.0,),), (0.0, 1.0), (1.0,))
    with pytest.raises(ValueError, match="precision"):
        ScanModel((0.0, 1.0), ((1.0,),), (0.0,), (1.0,))


def test_too_few_scans_make_no_model() -> None:
    with pytest.raises(ValueError, match="too few"):
        learn([heads(0)])


def test_a_shift_of_all_lines_alike_moves_the_image_and_makes_no_ghost() -> None:
    x = heads(0)
    shifted = moved(x, np.full((len(x), SIZE), 3.0))
    np.testing.assert_allclose(shifted, np.roll(x, -3, axis=1), atol=1e-4)
    still = moved(x, np.zeros((len(x), SIZE)), axis=2)
    np.testing.assert_allclose(still, x, atol=1e-5)


def test_breathing_keeps_the_energy_of_a_scan() -> None:
    x = heads(0)
    disturbed = breathing(x, np.random.default_rng(0))
    assert np.square(disturbed).sum() == pytest.approx(np.square(x).sum(), rel=1e-4)
    assert not np.allclose(disturbed, x, atol=0.01)


def test_ghosting_takes_the_worse_axis() -> None:
    model = ScanModel((0.0,), ((1.0,),), (1.0, 0.0), (1.0, 0.0))
    rows_jump = np.array([[3.0, 0.0], [1.0, 5.0]])
    assert scans.ghosting(rows_jump, model) == scans.ghosting(rows_jump[::-1], model) == 2
    assert math.isclose(scans.strangeness(np.array([2.0]), model), 2.0)


def test_scans_of_an_older_program_leave_their_gates_without_levels(model: ScanModel) -> None:
    values = Calibration({}, scans=model).to_dict()
    del values["scans"]["lines"]
    assert Calibration.from_dict(values).scans is None


def test_the_scale_of_a_series_does_not_matter(model: ScanModel) -> None:
    x = heads(7)
    assert judged(x, model)["texture"] == pytest.approx(judged(50 * x, model)["texture"], rel=1e-3)
    assert empty_band(torch.from_numpy(x)) is not None
    assert intensity_scale(50 * x, "mri_sr") == pytest.approx(intensity_scale(x, "mri_sr") / 50)
