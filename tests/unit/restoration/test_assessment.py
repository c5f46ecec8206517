"""A restorer judges what it made: probes of the network, its weights, its diagnostics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from restoration.fidelity import LEAST_SIDE, Bounds, Calibration, Levels, Verdict
from restoration.probes import middle, probed
from restoration.restorer import Restorer


@pytest.fixture
def restorer(bundle: Path) -> Restorer:
    return Restorer.open(bundle, device="cpu")


@pytest.fixture
def idle(idle_bundle: Path) -> Restorer:
    return Restorer.open(idle_bundle, device="cpu")


def ct(slices: int = 4) -> np.ndarray:
    y, x = np.mgrid[:48, :48] - 23.5
    body = np.where(np.hypot(y, x) < 20, 40.0, -1000.0)
    noise = np.random.default_rng(0).normal(0, 30, (slices, 48, 48))
    return (body + noise).astype(np.float32)


def test_every_gate_of_a_full_model_is_judged(restorer: Restorer) -> None:
    x = ct()
    found = restorer.assess(x, restorer.restore(x, "ct_denoise"), "ct_denoise", spacing=(3, 1, 1))
    for name in ("latent", "reference", "routing", "network_drift", "idempotence", "perturbation"):
        assert found.named(name).values, name
    assert found.named("weights").values == (0.0,)
    assert found.named("idempotence").slices == (2,)


def test_the_same_arguments_give_the_same_verdict(restorer: Restorer) -> None:
    x = ct()
    made = restorer.restore(x, "ct_denoise")
    assert restorer.assess(x, made, "ct_denoise") == restorer.assess(x, made, "ct_denoise")


@pytest.mark.parametrize("bit", [0, 13, 23, 30, 31])
def test_one_flipped_bit_of_one_weight_is_found(restorer: Restorer, bit: int) -> None:
    x = ct(2)
    made = restorer.restore(x, "ct_denoise")
    weight = next(each for each in restorer.network.weights() if each.dtype == torch.float32)
    place = (0,) * weight.ndim
    before = weight[place].clone()
    mask = 1 << bit if bit < 31 else -(1 << 31)
    flipped = before.view(torch.int32) ^ torch.tensor(mask, dtype=torch.int32)
    weight[place] = flipped.view(torch.float32)
    assert not restorer.network.intact
    found = restorer.assess(x, made, "ct_denoise")
    assert found.named("weights").verdict is Verdict.FAIL
    weight[place] = before
    assert restorer.network.intact


def test_an_idle_network_gives_back_its_disturbance_and_changes_nothing(idle: Restorer) -> None:
    x = ct()
    found = idle.assess(x, idle.restore(x, "ct_denoise"), "ct_denoise")
    assert found.named("perturbation").values == pytest.approx((1.0,))
    assert found.named("idempotence").verdict is Verdict.NOT_APPLICABLE
    assert found.named("low_frequency").values == pytest.approx([0.0] * 4)


def test_a_weaker_restoration_is_judged_at_full_strength(restorer: Restorer) -> None:
    x = ct()
    full = restorer.assess(x, restorer.restore(x, "ct_denoise"), "ct_denoise")
    half = restorer.assess(
        x, restorer.restore(x, "ct_denoise", strength=0.5), "ct_denoise", strength=0.5
    )
    for name in ("low_frequency", "network_drift", "structure", "residual_energy"):
        assert half.named(name).values == pytest.approx(full.named(name).values, rel=1e-3), name


def test_at_no_strength_nothing_was_changed(restorer: Restorer) -> None:
    x = ct()
    found = restorer.assess(
        x, restorer.restore(x, "ct_denoise", strength=0.0), "ct_denoise", strength=0.0
    )
    assert found.named("perturbation").verdict is Verdict.NOT_APPLICABLE
    assert found.named("low_frequency").values == (0.0,) * 4


def test_a_low_matrix_is_judged_on_its_fine_grid(restorer: Restorer) -> None:
    y, x = np.mgrid[:32, :32] - 15.5
    low = np.repeat(np.where(np.hypot(y, x) < 12, 500.0, 5.0)[None], 2, 0).astype(np.float32)
    made = restorer.restore(low, "mri_sr", upsample=2)
    found = restorer.assess(low, made, "mri_sr", spacing=(3, 2, 2))
    assert found.slices == 2
    assert len(found.named("structure").values) == 2


def test_levels_come_from_the_manifest(restorer: Restorer) -> None:
    tight = Calibration({"network_energy": Levels(fail=Bounds(high=0.0))})
    manifest = replace(restorer.manifest, calibration={"ct_denoise": tight})
    assert type(manifest).from_dict(manifest.to_dict()) == manifest
    strict = Restorer(manifest, restorer.network.model, "cpu")
    x = ct()
    found = strict.assess(x, strict.restore(x, "ct_denoise"), "ct_denoise")
    assert found.calibrated
    assert found.named("network_energy").verdict is Verdict.FAIL


def test_one_slice_in_thirty_two_is_looked_at_again() -> None:
    assert [len(probed(n)) for n in (1, 4, 32, 63, 64, 100)] == [1, 1, 1, 1, 2, 3]
    assert [probed(n) for n in (1, 2, 32, 64)] == [[0], [1], [16], [16, 48]]


def test_the_middle_ninth_of_a_slice_is_looked_at_and_all_of_a_small_one() -> None:
    x = np.arange(2 * 300 * 210, dtype=np.float32).reshape(2, 300, 210)
    np.testing.assert_array_equal(middle(x), x[:, 100:200, 70:140])
    assert middle(x[:, :100, :50]).shape == (2, 64, 50)


def test_a_long_judgement_tells_that_it_goes_on(restorer: Restorer) -> None:
    x = ct(40)
    made = restorer.restore(x, "ct_denoise")
    seen: list[tuple[int, int]] = []
    restorer.assess(x, made, "ct_denoise", progress=lambda *step: seen.append(step))
    steps = [done for done, _ in seen]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 40  # each probe and each few slices
    assert seen[-1][0] == seen[-1][1]


def test_slices_that_say_too_little_are_refused_by_name(restorer: Restorer) -> None:
    x = ct(2)[:, :15]
    with pytest.raises(ValueError, match=f"15x48 pixels are too small .* {LEAST_SIDE}"):
        restorer.assess(x, restorer.restore(x, "ct_denoise"), "ct_denoise")
