"""The gates of one restored series: what each measures, against closed forms and planted change."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage

from restoration.domain import TaskDomain
from restoration.fidelity import (
    GATES,
    Bounds,
    Calibration,
    Evidence,
    Fidelity,
    Gate,
    Levels,
    Verdict,
    assess,
    images,
    series,
    uptake,
    worst,
)
from restoration.kspace import truncate
from restoration.tasks import RestorationTask

Volume = npt.NDArray[np.float32]
SPACING = (3.0, 0.7, 0.7)


def ct_pair(slices: int = 6, size: int = 128, seed: int = 0) -> tuple[Volume, Volume]:
    """A body in air with fat, soft tissue and bone: noisy, and without its noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    radius = np.hypot(y, x) / size
    clean = np.full((slices, size, size), -1000.0)
    clean[:, radius < 0.45] = -90
    clean[:, radius < 0.38] = 40
    for index in range(slices):
        clean[index, (np.hypot(y - 12 + 4 * index, x) < 12)] = 400
    noise = ndimage.gaussian_filter(rng.normal(0, 40, clean.shape), (0, 0.6, 0.6))
    noise -= ndimage.gaussian_filter(noise, (0, 4, 4))
    return (clean + noise).astype(np.float32), clean.astype(np.float32)


def pet_pair(slices: int = 12, seed: int = 0) -> tuple[Volume, Volume]:
    """A warm body with a hot ball of 20 mm radius in voxels of 4 mm."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[:slices, :48, :48].astype(float)
    clean = np.where(np.hypot(y - 23.5, x - 23.5) < 20, 1.0, 0.0)
    clean[np.sqrt((z - 6) ** 2 + (y - 20) ** 2 + (x - 20) ** 2) < 5] = 6.0
    clean = ndimage.gaussian_filter(clean, 0.8)
    noise = ndimage.gaussian_filter(rng.normal(0, 0.5, clean.shape), 0.7) * np.sqrt(clean + 0.01)
    return (clean + noise).clip(0).astype(np.float32), clean.astype(np.float32)


def ct(before: Volume, after: Volume) -> Fidelity:
    return assess(before, after, "ct_denoise", evidence=Evidence(spacing_mm=SPACING))


def pet(before: Volume, after: Volume) -> Fidelity:
    return assess(before, after, "pet_synthesis", evidence=Evidence(spacing_mm=(4.0, 4.0, 4.0)))


def largest(found: Fidelity, name: str) -> float:
    return max(abs(value) for value in found.named(name).values if value is not None)


def test_a_value_is_judged_by_both_intervals_and_nan_fails() -> None:
    levels = Levels(Bounds(-1, 1), Bounds(-2, 2))
    judged = [levels.judge(value) for value in (0.0, 1.0, -1.5, 2.5, math.nan, None)]
    assert judged == [
        Verdict.PASS, Verdict.PASS, Verdict.WARN, Verdict.FAIL, Verdict.FAIL,
        Verdict.NOT_APPLICABLE,
    ]  # fmt: skip
    assert worst(judged) is Verdict.FAIL
    assert worst([]) is Verdict.NOT_APPLICABLE


@pytest.mark.parametrize("task", list(RestorationTask))
def test_a_slice_may_lie_backwards_in_memory(task: RestorationTask) -> None:
    x = np.abs(np.random.default_rng(0).normal(5, 1, (1, 32, 32))).astype(np.float32)
    backwards = assess(x[::-1, ::-1], x[::-1, ::-1], task)
    assert backwards == assess(x[::-1, ::-1].copy(), x[::-1, ::-1].copy(), task)


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="no interval"):
        Bounds(2, 1)


def test_the_worst_slice_is_the_one_furthest_out() -> None:
    gate = Gate("gain", "%", (0.1, -3.0, None, 2.0), (4, 5, 6, 7), Levels(fail=Bounds(-2, 2)))
    assert gate.verdict is Verdict.FAIL
    assert gate.worst_slice == 5


def test_a_gate_with_one_value_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="2 values, 1 slices"):
        Gate("gain", "%", (0.0, 1.0), (0,), Levels())
    with pytest.raises(ValueError, match="a series has one value"):
        Gate("gain", "%", (0.0, 1.0), (), Levels())


def test_a_verdict_survives_json_and_is_judged_again() -> None:
    found = ct(*ct_pair())
    stored = json.loads(json.dumps(found.to_dict()))
    assert Fidelity.from_dict(stored) == found
    stored["verdict"] = "pass"
    stored["gates"][0]["values"][0] = 3.0
    assert Fidelity.from_dict(stored).verdict is Verdict.FAIL


def test_a_good_restoration_passes_every_gate_that_can_be_judged() -> None:
    for found in (ct(*ct_pair()), pet(*pet_pair())):
        assert found.verdict in (Verdict.PASS, Verdict.WARN)
        assert not found.calibrated


def test_every_gate_is_there_and_says_why_it_does_not_apply() -> None:
    for task, pair in (("ct_denoise", ct_pair()), ("pet_synthesis", pet_pair())):
        found = assess(*pair, task)
        names = {spec.name for spec in GATES if RestorationTask(task) in spec.tasks}
        assert {gate.name for gate in found.gates} == names
        assert all(gate.reason for gate in found.not_applicable)
        missing = {gate.name for gate in found.not_applicable}
        assert {"routing", "latent", "reference", "idempotence", "weights"} <= missing


def test_an_output_that_is_not_finite_fails_and_raises_nothing() -> None:
    before, after = ct_pair()
    after[2, 5, 5] = np.nan
    after[3, 0, 0] = np.inf
    found = ct(before, after)
    assert found.named("finite").values[:4] == (0, 0, 1, 1)
    assert found.verdict is Verdict.FAIL


def test_input_that_is_not_finite_and_other_shapes_are_refused() -> None:
    before, after = ct_pair()
    with pytest.raises(ValueError, match="one shape"):
        ct(before, after[1:])
    before[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        ct(before, after)


def test_values_beyond_those_of_the_input_are_told_in_their_units() -> None:
    before, after = ct_pair()
    after[1, 64, 64] = before[1].max() + 150
    found = ct(before, after)
    assert found.named("range").values[1] == pytest.approx(150, rel=1e-4)
    assert found.named("range").verdicts[1] is Verdict.FAIL


def test_an_offset_shows_in_low_frequencies_and_in_every_tissue() -> None:
    before, after = ct_pair()
    clean, moved = ct(before, after), ct(before, after + 12)
    assert largest(moved, "low_frequency") == pytest.approx(12, abs=1)
    for tissue in ("fat", "soft"):
        name = f"hu_bias_{tissue}"
        change = np.subtract(moved.named(name).values, clean.named(name).values)
        assert change == pytest.approx([12] * 6, abs=1e-3)
        assert moved.named(name).verdict is Verdict.FAIL


def test_a_gain_is_measured_as_it_is() -> None:
    before, after = ct_pair()
    mean = after.mean(axis=(1, 2), keepdims=True)
    found = ct(before, mean + 1.05 * (after - mean))
    assert found.named("gain").values == pytest.approx([5] * 6, abs=0.3)
    assert found.named("gain").verdict is Verdict.FAIL


def test_a_lesion_is_the_strongest_blob_of_the_change() -> None:
    before, after = ct_pair(size=256)
    clean = largest(ct(before, after), "structure")
    y, x = np.mgrid[:256, :256]
    after[3] += 30 * (np.hypot(y - 90, x - 150) * SPACING[1] < 4)
    found = ct(before, after).named("structure")
    assert found.worst_slice == 3
    assert found.values[3] is not None
    assert found.values[3] > 2 * clean


def test_swapped_slices_are_nearer_to_another_input() -> None:
    before, after = ct_pair(8)
    after[[2, 5]] = after[[5, 2]]
    found = ct(before, after)
    order = found.named("slice_order")
    assert [v is Verdict.FAIL for v in order.verdicts] == [i in (2, 5) for i in range(8)]
    assert found.named("continuity").values[2] > 1.5  # type: ignore[operator]


def test_a_single_slice_has_no_order() -> None:
    before, after = ct_pair(1)
    found = ct(before, after)
    assert found.named("slice_order").verdict is Verdict.NOT_APPLICABLE
    assert "neighbouring" in found.named("slice_order").reason


def test_lost_activity_and_a_colder_hot_spot_are_measured() -> None:
    before, after = pet_pair()
    after *= before.sum() / after.sum()
    assert largest(pet(before, after), "activity") < 1e-3
    cold = after.copy()
    cold[after > 2.5] *= 0.8
    calm, found = pet(before, after), pet(before, cold)
    lost = largest(found, "hot_suv") - largest(calm, "hot_suv")
    assert lost == pytest.approx(20, abs=4)
    assert found.named("hot_suv").verdict is Verdict.FAIL
    assert found.named("hot_suv").values[0] is None  # the ball does not reach this slice


def test_without_the_size_of_a_voxel_uptake_is_not_judged() -> None:
    found = assess(*pet_pair(), "pet_synthesis")
    assert found.named("hot_suv").verdict is Verdict.NOT_APPLICABLE
    assert "voxel" in found.named("hot_suv").reason


def test_a_part_is_smoothed_as_all_of_its_volume_is() -> None:
    volume = np.random.default_rng(0).random((9, 14, 12)).astype(np.float32)
    box = (slice(3, 5), slice(0, 4), slice(7, 12))
    expected = ndimage.gaussian_filter(volume.astype(float), (1.5, 2.0, 0.7), mode="reflect")
    found = uptake._smoothed(volume, (1.5, 2.0, 0.7), box)
    np.testing.assert_allclose(found, expected[box], rtol=1e-5)


@pytest.mark.parametrize("corner", [(0, 0, 0), (3, 20, 9), (5, 28, 24)])
def test_hot_regions_are_those_of_all_of_the_volume_smoothed(corner: tuple[int, ...]) -> None:
    """Wherever in it they lie, though only what surrounds them is looked at."""
    volume = np.random.default_rng(0).random((9, 33, 30)).astype(np.float32)
    volume[tuple(slice(at, at + 5) for at in corner)] += 4
    drawn = ndimage.gaussian_filter(volume.astype(float), 1.0, mode="reflect")
    (region,) = uptake.hot_regions(volume, volume, (4.0, 4.0, 4.0))
    assert region.volume_mm3 == 64 * (drawn > 2.5).sum()
    assert region.slices == tuple(np.flatnonzero((drawn > 2.5).any((1, 2))))
    assert uptake.hot_regions(volume / 2, volume / 2, (4.0, 4.0, 4.0)) == []


def test_a_small_hot_region_is_compared_without_its_noise() -> None:
    before, after = pet_pair()
    voxels = (2.0, 2.0, 2.0)  # mm: the same ball has 4 ml
    region = max(uptake.hot_regions(before, after, voxels), key=lambda each: each.volume_mm3)
    assert 1000 < region.volume_mm3 < 5000
    assert abs(region.wide_change) < 2
    colder = after * np.where(after > 2.5, 0.85, 1.0).astype(np.float32)
    colder_region = max(
        uptake.hot_regions(before, colder, voxels), key=lambda each: each.volume_mm3
    )
    assert colder_region.wide_change == pytest.approx(region.wide_change - 13, abs=2)


@pytest.mark.parametrize("shape", [(2, 17, 130), (3, 192, 96)])
@pytest.mark.parametrize("sigma", [0.7, 2.0, 9.0])
def test_the_gaussian_is_that_of_scipy(shape: tuple[int, ...], sigma: float) -> None:
    stack = np.random.default_rng(0).random(shape)
    expected = ndimage.gaussian_filter(stack, (0, sigma, sigma), mode="reflect")
    if 4 * sigma + 0.5 < min(shape[1:]):  # beyond that scipy reflects more than once
        found = images.gaussian(torch.from_numpy(stack).float(), sigma)
        np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("sigma", [4.0, 9.0])
def test_the_modes_of_a_wide_gaussian_make_the_same_image(sigma: float) -> None:
    stack = 100 + torch.randn(2, 96, 121, generator=torch.Generator().manual_seed(0))
    smooth = images.gaussian(stack, sigma)
    torch.testing.assert_close(images.wide_gaussian(stack, sigma), smooth, rtol=1e-4, atol=1e-3)
    modes = images.smooth_modes(stack, sigma)
    torch.testing.assert_close(images.norm(modes), images.rms(smooth), rtol=1e-6, atol=0)
    mean = stack.mean((-2, -1), dtype=torch.float64)
    torch.testing.assert_close(modes[:, 0, 0], mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [2, 3, 8])
def test_a_shrunk_image_has_the_means_of_its_blocks(step: int) -> None:
    stack = torch.rand(2, 33, 26, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.avg_pool2d(stack[:, None], step)[:, 0]
    torch.testing.assert_close(images.shrunk(stack, step), expected)


def test_a_median_is_the_lower_of_two_middles_inside_the_mask() -> None:
    stack = torch.tensor([[[4.0, 1.0, 9.0], [3.0, 7.0, 2.0]]])
    mask = torch.tensor([[[True, True, False], [True, False, True]]])
    assert images.masked_median(stack, mask).tolist() == [2.0]
    assert math.isnan(images.masked_median(stack, mask, least=5)[0])
    assert math.isnan(images.masked_median(stack, torch.zeros_like(mask))[0])


def test_the_deviation_does_not_lose_a_small_spread_on_a_large_mean() -> None:
    stack = 3000 + 0.1 * torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = stack.double().std(correction=0)
    assert images.deviation(stack).item() == pytest.approx(expected.item(), rel=1e-5)


def test_components_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        mask = rng.random((6, 9, 11)) < 0.4
        labels, _ = ndimage.label(mask)
        expected = sorted(np.bincount(labels.ravel())[1:].tolist())
        assert sorted(len(part) for part in uptake.components(mask)) == expected


def test_mr_is_judged_inside_its_acquired_band(heads: torch.Tensor) -> None:
    truth = heads.numpy().astype(np.float32)
    before = truncate(heads, 4).numpy().astype(np.float32)
    found = assess(before, truth, "mri_sr")
    assert found.named("empty_band").values[0] == pytest.approx(0.25, abs=0.02)
    inside = largest(found, "data_consistency")
    louder = assess(before, (1.1 * truth).astype(np.float32), "mri_sr")
    assert largest(louder, "data_consistency") == pytest.approx(10, abs=inside + 1)
    full = assess(truth, truth, "mri_sr")
    assert full.named("empty_band").values == (1.0,)
    assert full.named("empty_band").verdict is Verdict.FAIL
    assert full.named("data_consistency").verdict is Verdict.NOT_APPLICABLE


def test_the_classifier_has_to_agree_with_the_route() -> None:
    before, after = ct_pair(2)
    logits = {f"class_logit_{task.value}": [0.0, 0.0] for task in RestorationTask}
    # A slice that shows next to nothing is outvoted by the others of its series.
    for votes, margin, verdict in (
        ([3.0, -2.0], 0.5, Verdict.PASS),
        ([1.0, -2.0], -0.5, Verdict.FAIL),
    ):
        logits["class_logit_ct_denoise"] = votes
        found = assess(before, after, "ct_denoise", evidence=Evidence(diagnostics=logits))
        assert found.named("routing").values == (margin,)
        assert found.named("routing").verdict is verdict


def test_an_acquisition_outside_the_domain_fails_with_the_reason() -> None:
    domain = TaskDomain("CT", kernels_refused=("BONE.*",))
    evidence = Evidence(facts={"kernel": "BONEPLUS"}, domain=domain)
    found = assess(*ct_pair(2), "ct_denoise", evidence=evidence).named("domain")
    assert found.verdict is Verdict.FAIL
    assert "BONEPLUS" in found.reason


def test_levels_of_a_calibration_replace_those_of_the_program() -> None:
    tight = Calibration({"noise_level": Levels(fail=Bounds(high=1.0))})
    found = assess(*ct_pair(), "ct_denoise", calibration=tight)
    assert found.calibrated
    assert found.named("noise_level").verdict is Verdict.FAIL


@pytest.mark.parametrize("harm", ["hot spot", "lesion"])
def test_activity_that_moves_shows_where_it_is_in_however_long_a_scan(harm: str) -> None:
    x, _ = pet_pair(120)
    y = x.copy()
    if harm == "hot spot":
        y[2:11, 15:26, 15:26] *= 0.85
    else:
        y[80:84, 28:32, 28:32] += 2.0
    found = pet(x, y)
    total, local = found.named("activity").values[0], found.named("local_activity").values
    assert total is not None
    assert abs(total) < 1.0
    assert int(np.argmax(local)) in (range(2, 11) if harm == "hot spot" else range(80, 84))
    assert largest(found, "local_activity") > 5 * abs(total)
    assert largest(pet(x, x), "local_activity") == 0


def test_the_change_around_a_voxel_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 20, 24, 28)).astype(np.float32)
    moved, known = (ndimage.gaussian_filter(v, 4, mode="reflect") for v in (y - x, x))
    expected = 100 * (np.abs(moved) / np.maximum(known, 0.5)).max(axis=(1, 2))
    np.testing.assert_allclose(uptake.local_change(x, y), expected, rtol=1e-3)


def test_no_more_activity_than_was_injected_can_be_there() -> None:
    x = np.ones((100, 50, 50), np.float32)  # 16 litres of 1 SUV
    for kilograms, verdict in ((40.0, Verdict.PASS), (15.0, Verdict.WARN), (13.0, Verdict.FAIL)):
        evidence = Evidence(spacing_mm=(4, 4, 4), facts={"patient_weight_kg": kilograms})
        found = assess(x, x, "pet_synthesis", evidence=evidence).named("units")
        assert found.values == (pytest.approx(100 * 16 / kilograms),)
        assert found.verdict is verdict
    assert pet(x[:4], x[:4]).named("units").verdict is Verdict.NOT_APPLICABLE


def test_extremes_are_those_of_scipy() -> None:
    stack = torch.randn(2, 20, 17)
    low, high = images.extremes(stack)
    np.testing.assert_array_equal(low, ndimage.minimum_filter(stack, (1, 3, 3), mode="nearest"))
    np.testing.assert_array_equal(high, ndimage.maximum_filter(stack, (1, 3, 3), mode="nearest"))


@pytest.mark.parametrize("step", [1, 2])
def test_white_noise_is_measured_at_its_sd(step: int) -> None:
    stack = 7 * torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 256 // step, 256 // step, dtype=torch.bool)
    assert images.noise(stack, mask, step).numpy() == pytest.approx([7, 7], rel=0.03)


def test_the_spectrum_of_white_noise_is_flat() -> None:
    stack = torch.randn(4, 128, 96, generator=torch.Generator().manual_seed(0))
    power = images.spectrum(images.power(stack), stack.shape[-2:], 6).mean(0)
    assert (power / power.mean()).numpy() == pytest.approx(np.ones(6), abs=0.2)


def test_order_and_continuity_have_their_closed_form() -> None:
    ramp = torch.arange(5.0)[:, None, None].expand(5, 4, 4)
    assert series.slice_order(ramp, ramp + 0.25).numpy() == pytest.approx([1 / 3] * 4 + [0.2])
    assert series.continuity(ramp + ramp**2, 2 * (ramp + ramp**2)).numpy() == pytest.approx([2] * 5)
