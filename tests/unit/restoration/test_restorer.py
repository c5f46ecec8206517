from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import restoration
from restoration.bundle import BundleError, Manifest, load_bundle
from restoration.diffcode import DiffCode, DiffCodeOutput
from restoration.domain import TaskDomain
from restoration.kspace import GridChange, Support, truncate, zero_fill
from restoration.restorer import (
    Limits,
    RestorationError,
    RestorationMemoryError,
    Restorer,
    default_seed,
)
from restoration.tasks import RestorationTask

Volume = npt.NDArray[np.float32]

TASKS = list(RestorationTask)


def ct(slices: int = 3, rows: int = 40, columns: int = 33, seed: int = 0) -> Volume:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 300, (slices, rows, columns)).astype(np.float32)


def volume_of(task: RestorationTask, shape: tuple[int, int, int] = (3, 40, 33)) -> Volume:
    values = np.random.default_rng(1).random(shape, dtype=np.float32)
    low, high = {"HU": (-1000, 1500), "SUV": (0, 8), "a.u.": (0, 700)}[
        restoration.tasks.spec(task).units
    ]
    return values * np.float32(high - low) + np.float32(low)


@pytest.fixture
def restorer(bundle: Path) -> Restorer:
    return Restorer.open(bundle, device="cpu")


@pytest.fixture
def idle(idle_bundle: Path) -> Restorer:
    return Restorer.open(idle_bundle, device="cpu")


def changed(restorer: Restorer, **changes: Any) -> Restorer:
    """The same model under a manifest with other entries."""
    manifest = replace(restorer.manifest, **changes)
    return Restorer(manifest, restorer.network.model, restorer.device, restorer.network.limits)


class Faulty(DiffCode):
    """A network that has no memory for a slice, or returns a fixed value in its second one."""

    def __init__(self, model: DiffCode, most: int = 1, value: float | None = None) -> None:
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.most, self.value = most, value
        self.calls = 0

    def forward(self, lq: torch.Tensor, task: Any, noise: Any = None) -> DiffCodeOutput:
        self.calls += 1
        if len(lq) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        out = super().forward(lq, task, noise)
        if self.value is None or self.calls < 2:
            return out
        restored = out.restored.clone()
        restored[-1, 0, 5, 5] = self.value
        return out._replace(restored=restored)


def limit_batches(restorer: Restorer, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the device run out of memory above a number of slices; tells the sizes that came."""
    start, batches = restorer.network.start, []

    def cramped(lq: torch.Tensor, task: RestorationTask, seeds: Sequence[int]) -> Any:
        batches.append(len(lq))
        if len(lq) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(lq, task, seeds)

    monkeypatch.setattr(restorer.network, "start", cramped)
    return batches


@pytest.mark.parametrize("task", TASKS)
def test_an_idle_network_returns_every_value_bit_by_bit(
    idle: Restorer, task: RestorationTask
) -> None:
    x = volume_of(task)
    result = idle.restore(x, task)
    assert result.volume.dtype == np.float32
    assert result.volume.tobytes() == x.tobytes()
    assert result.flags == ()
    assert result.seconds > 0


@pytest.mark.parametrize("task", TASKS)
def test_values_outside_the_window_pass_through_bit_by_bit(
    restorer: Restorer, task: RestorationTask
) -> None:
    x = volume_of(task)
    low, high = restoration.tasks.spec(task).window
    odd = {(0, 0, 0): low - 976.5, (1, 20, 17): high * 1.7, (2, 39, 32): high + 0.25 * high}
    for place, value in odd.items():
        x[place] = value
    scale = restoration.tasks.intensity_scale(x, task)
    y = restorer.restore(x, task).volume
    outside = (x * np.float32(scale) < low) | (x * np.float32(scale) > high)
    assert np.array_equal(y[outside], x[outside])
    assert outside[0, 0, 0]
    assert (y != x).mean() > 0.9


def test_values_on_the_rim_of_the_window_are_restored(restorer: Restorer) -> None:
    x = np.full((1, 16, 16), -1024, dtype=np.float32)
    x[:, ::2] = 3071
    assert (restorer.restore(x, "ct_denoise").volume != x).all()


def test_strength_mixes_input_and_output(restorer: Restorer) -> None:
    x = ct()
    full = restorer.restore(x, "ct_denoise").volume
    half = restorer.restore(x, "ct_denoise", strength=0.5).volume
    none = restorer.restore(x, "ct_denoise", strength=0).volume
    assert np.array_equal(none, x)
    np.testing.assert_allclose(half, x + 0.5 * (full - x), rtol=0, atol=1e-3)


def test_the_same_input_and_seeds_give_the_same_bytes(restorer: Restorer, bundle: Path) -> None:
    x = ct()
    first = restorer.restore(x, "ct_denoise", seeds=[5, 6, 7])
    again = Restorer.open(bundle, device="cpu").restore(x, "ct_denoise", seeds=[5, 6, 7])
    assert first.volume.tobytes() == again.volume.tobytes()
    assert first.diagnostics == again.diagnostics


def test_a_restoration_does_not_touch_its_input_or_the_global_random_numbers(
    restorer: Restorer,
) -> None:
    x = ct()
    before, state = x.copy(), torch.random.get_rng_state()
    restorer.restore(x, "ct_denoise")
    assert np.array_equal(x, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_each_slice_has_its_own_seed(
    restorer: Restorer, make_model: Callable[..., DiffCode]
) -> None:
    model = make_model()
    assert model.prior is not None
    with torch.no_grad():  # else what is left of the noise ends at the same codes
        for parameter in model.prior.parameters():
            parameter.mul_(8)
    x = np.repeat(ct(1), 3, axis=0)
    result = Restorer(restorer.manifest, model).restore(x, "ct_denoise", seeds=[5, 6, 5])
    assert np.array_equal(result.volume[0], result.volume[2])
    assert not np.array_equal(result.volume[0], result.volume[1])


def test_default_seeds_follow_from_the_model_and_the_index(restorer: Restorer) -> None:
    sha256 = restorer.manifest.sha256
    x = ct()
    seeds = [default_seed(sha256, index) for index in range(3)]
    assert len({*seeds, default_seed("another", 0)}) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    implicit = restorer.restore(x, "ct_denoise").volume
    assert np.array_equal(implicit, restorer.restore(x, "ct_denoise", seeds=seeds).volume)


def test_the_batch_size_changes_no_bit_on_a_cpu(restorer: Restorer) -> None:
    x = ct(8)
    outputs = []
    for pixels in (1, 8 * 40 * 33):
        restorer.network.limits = Limits(batch_pixels=pixels)
        outputs.append(restorer.restore(x, "ct_denoise").volume)
    assert outputs[0].tobytes() == outputs[1].tobytes()


def test_tiles_give_nearly_what_the_whole_slice_gives(restorer: Restorer) -> None:
    x = truncated_like_ct(200, 168)
    whole = restorer.restore(x, "ct_denoise")
    restorer.network.limits = Limits(whole_slice_pixels=1, tile=128, overlap=64)
    tiled = restorer.restore(x, "ct_denoise")
    change = np.abs(whole.volume - x).mean()
    assert np.abs(tiled.volume - whole.volume).mean() < 0.05 * change
    assert set(tiled.diagnostics) == set(whole.diagnostics)


def truncated_like_ct(rows: int, columns: int) -> Volume:
    smooth = truncate(torch.from_numpy(np.abs(ct(1, rows, columns))), 4)
    return smooth.numpy()


def test_an_idle_network_is_idle_in_tiles_too(idle: Restorer) -> None:
    idle.limits = Limits(whole_slice_pixels=1, tile=64, overlap=16)
    x = ct(1, 100, 90)
    np.testing.assert_allclose(idle.restore(x, "ct_denoise").volume, x, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 9), (1, 8, 300), (3, 64, 64)])
def test_any_size_of_slice_is_restored(restorer: Restorer, shape: tuple[int, int, int]) -> None:
    y = restorer.restore(ct(*shape), "ct_denoise").volume
    assert y.shape == shape
    assert np.isfinite(y).all()


@pytest.mark.parametrize("variant", ["v1", "v2", "v3", "full"])
def test_each_variant_restores_and_says_what_it_knows(
    make_model: Callable[..., DiffCode], restorer: Restorer, variant: str
) -> None:
    other = Restorer(restorer.manifest, make_model(variant=variant))
    diagnostics = other.restore(ct(), "ct_denoise").diagnostics
    assert ("latent_distance" in diagnostics) == (variant in ("v3", "full"))
    assert ("class_logit_ct_denoise" in diagnostics) == (variant != "v1")
    for name, value in diagnostics.items():
        if isinstance(value, list):
            assert len(value) == 3, name
            assert np.isfinite(value).all(), name


def test_mr_is_scaled_to_the_training_range_and_back(restorer: Restorer) -> None:
    x = volume_of(RestorationTask.MRI_SR)
    first = restorer.restore(x, "mri_sr")
    louder = restorer.restore(x * 64, "mri_sr")
    np.testing.assert_allclose(louder.volume, first.volume * 64, rtol=2e-4, atol=0.05)
    assert first.diagnostics["intensity_scale"] == pytest.approx(
        1150 / np.percentile(x, 99.9), rel=1e-5
    )


@pytest.fixture
def mr_series(heads: torch.Tensor) -> Volume:
    return truncate(heads, 4).numpy()


def spectrum(volume: Volume, support: Support) -> npt.NDArray[np.complex128]:
    planes = torch.from_numpy(volume).double()
    return (torch.fft.fft2(planes) * support.mask(planes)).numpy()


def test_the_acquired_frequencies_of_an_mr_series_are_kept_at_full_weight(
    restorer: Restorer, mr_series: Volume
) -> None:
    x = mr_series
    result = changed(restorer, data_consistency={"mri_sr": 1.0}).restore(x, "mri_sr")
    rows, columns = result.diagnostics["support_rows"], result.diagnostics["support_columns"]
    assert isinstance(rows, float)
    assert isinstance(columns, float)
    assert rows in (15, 16, 17)
    support = Support(int(rows), int(columns))
    inside = spectrum(x, support)
    error = np.abs(spectrum(result.volume, support) - inside).max()
    assert error <= 1e-5 * np.abs(inside).max()
    assert np.abs(result.volume - x).max() > 1


def test_half_the_weight_is_half_the_way_to_the_acquired_frequencies(
    restorer: Restorer, mr_series: Volume
) -> None:
    free, half, full = (
        changed(restorer, data_consistency={"mri_sr": weight}).restore(mr_series, "mri_sr").volume
        for weight in (0.0, 0.5, 1.0)
    )
    assert np.allclose(half, (free + full) / 2, rtol=1e-5, atol=1e-5 * np.abs(full).max())
    assert np.abs(free - full).max() > 1e-2 * np.abs(full).max()


def test_data_consistency_can_be_left_out(restorer: Restorer, mr_series: Volume) -> None:
    x = mr_series
    by_argument = restorer.restore(x, "mri_sr", data_consistency=False)
    by_manifest = changed(restorer, data_consistency={}).restore(x, "mri_sr")
    assert "support_rows" not in by_argument.diagnostics
    assert np.array_equal(by_argument.volume, by_manifest.volume)
    assert not np.array_equal(by_argument.volume, restorer.restore(x, "mri_sr").volume)


def test_a_series_with_a_full_band_is_left_to_the_network(restorer: Restorer) -> None:
    x = volume_of(RestorationTask.MRI_SR, (3, 64, 64))
    assert "support_rows" not in restorer.restore(x, "mri_sr").diagnostics


@pytest.mark.parametrize("upsample", [2, 4])
@pytest.mark.parametrize("size", [(64, 64), (65, 48)])
def test_an_idle_network_returns_the_zero_filled_image_of_a_low_matrix(
    idle: Restorer, size: tuple[int, int], upsample: int
) -> None:
    x = volume_of(RestorationTask.MRI_SR, (2, *size))
    result = idle.restore(x, "mri_sr", upsample=upsample)
    assert result.grid == GridChange(upsample)
    expected = zero_fill(torch.from_numpy(x).double(), upsample).float().numpy()
    np.testing.assert_array_equal(result.volume, expected)
    np.testing.assert_allclose(result.volume[:, ::upsample, ::upsample], x, rtol=1e-5, atol=1e-3)


def test_a_low_matrix_keeps_the_frequencies_it_was_acquired_with(restorer: Restorer) -> None:
    x = volume_of(RestorationTask.MRI_SR, (2, 33, 30))
    result = changed(restorer, data_consistency={"mri_sr": 1.0}).restore(x, "mri_sr", upsample=4)
    diagnostics = result.diagnostics
    assert (diagnostics["support_rows"], diagnostics["support_columns"]) == (16, 14)
    filled = zero_fill(torch.from_numpy(x), 4).numpy()
    support = Support(16, 14)
    inside = spectrum(filled, support)
    error = np.abs(spectrum(result.volume, support) - inside).max()
    assert error <= 1e-5 * np.abs(inside).max()
    assert np.abs(result.volume - filled).max() > 1


@pytest.mark.parametrize(
    "size", [(64, 64), (63, 65), (200, 72), pytest.param((1024, 1024), marks=pytest.mark.slow)]
)
def test_mr_on_its_own_grid_comes_back_at_any_matrix(
    restorer: Restorer, size: tuple[int, int]
) -> None:
    x = volume_of(RestorationTask.MRI_SR, (1, *size))
    result = restorer.restore(x, "mri_sr", spacing=(3.0, 0.5, 0.9))
    assert (result.volume.shape, result.grid) == (x.shape, GridChange())
    assert np.isfinite(result.volume).all()


def test_the_domain_is_asked_about_the_grid_of_the_result(restorer: Restorer) -> None:
    domain = {"mri_sr": TaskDomain(modality="MR", pixel_spacing_mm=(0.4, 0.6))}
    narrow = changed(restorer, domain=domain)
    x = volume_of(RestorationTask.MRI_SR, (1, 32, 32))
    spacing = (3.0, 2.0, 2.0)
    assert "outside_domain" in narrow.restore(x, "mri_sr", spacing=spacing).flags
    assert "outside_domain" not in narrow.restore(x, "mri_sr", spacing=spacing, upsample=4).flags


def test_only_mr_has_a_low_matrix_to_fill(restorer: Restorer) -> None:
    with pytest.raises(ValueError, match="ct_denoise keeps its grid"):
        restorer.restore(ct(), "ct_denoise", upsample=2)
    with pytest.raises(ValueError, match="factor"):
        restorer.restore(volume_of(RestorationTask.MRI_SR), "mri_sr", upsample=0)


@pytest.mark.parametrize(("acquired", "wide"), [(4, False), (2, True)])
def test_a_band_wider_than_that_of_the_training_is_flagged_and_kept_as_it_was_measured(
    restorer: Restorer, heads: torch.Tensor, acquired: float, wide: bool
) -> None:
    operator = {"name": "kspace-truncation", "version": 1, "params": {"factor": 4.0}}
    trained = changed(restorer, degradation={"mri_sr": operator}, data_consistency={"mri_sr": 0.5})
    x = truncate(heads, acquired).numpy()
    result = trained.restore(x, "mri_sr")
    assert ("wide_band" in result.flags) == wide
    rows, columns = (result.diagnostics[f"support_{axis}"] for axis in ("rows", "columns"))
    assert isinstance(rows, float)
    assert isinstance(columns, float)
    support = Support(int(rows), int(columns))
    measured = spectrum(x, support)
    moved = np.abs(spectrum(result.volume, support) - measured).max() / np.abs(measured).max()
    assert (moved < 1e-5) == wide
    # Half the matrix of the latter is all measured, of the former its inner half.
    again = trained.restore(x[:, ::2, ::2], "mri_sr", upsample=2)
    assert ("wide_band" in again.flags) == wide


def test_a_model_of_another_degradation_takes_no_low_matrix(restorer: Restorer) -> None:
    other = changed(restorer, degradation={"mri_sr": {"name": "bicubic", "version": 1}})
    with pytest.raises(ValueError, match="trained on bicubic"):
        other.restore(volume_of(RestorationTask.MRI_SR), "mri_sr", upsample=2)


def test_a_drift_of_the_mean_is_flagged(idle: Restorer) -> None:
    with torch.no_grad():
        idle.network.model.backbone.emit.bias.fill_(6 / 4095)
    result = changed(idle).restore(ct(), "ct_denoise")
    assert result.flags == ("mean_drift",)
    assert result.diagnostics["mean_drift"] == pytest.approx([6, 6, 6], rel=1e-2)
    tighter = changed(idle, guards={"ct_denoise": {"mean_drift": 7.0}})
    assert tighter.restore(ct(), "ct_denoise").flags == ()


@pytest.mark.parametrize("task", [RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS])
def test_the_drift_of_mr_and_pet_is_relative(idle: Restorer, task: RestorationTask) -> None:
    x = volume_of(task)
    low, high = restoration.tasks.spec(task).window
    scale = restoration.tasks.intensity_scale(x, task)
    with torch.no_grad():
        idle.network.model.backbone.emit.bias.fill_(0.2 * float(x.mean()) * scale / (high - low))
    drift = changed(idle).restore(x, task).diagnostics["mean_drift"]
    assert drift == pytest.approx([0.2, 0.2, 0.2], rel=0.05)


def test_a_large_change_is_flagged(restorer: Restorer) -> None:
    strict = changed(restorer, guards={"ct_denoise": {"mean_drift": 1e9, "residual_ratio": 0.0}})
    assert strict.restore(ct(), "ct_denoise").flags == ("residual_ratio",)


def test_an_empty_slice_has_finite_diagnostics(restorer: Restorer) -> None:
    for task in TASKS:
        result = restorer.restore(np.zeros((2, 16, 16), np.float32), task)
        assert np.isfinite(result.diagnostics["mean_drift"]).all()
        assert np.isfinite(result.diagnostics["residual_ratio"]).all()


def test_a_spacing_outside_the_domain_is_flagged(idle: Restorer) -> None:
    known = changed(idle, domain={"ct_denoise": TaskDomain("CT", pixel_spacing_mm=(0.5, 1.0))})
    assert known.restore(ct(), "ct_denoise", spacing=(5, 0.7, 0.7)).flags == ()
    assert known.restore(ct(), "ct_denoise", spacing=(1, 0.7, 2)).flags == ("outside_domain",)
    assert idle.restore(ct(), "ct_denoise", spacing=(1, 0.7, 2)).flags == ()


def test_progress_is_told_after_each_batch(restorer: Restorer) -> None:
    restorer.network.limits = Limits(batch_pixels=2 * 40 * 33)
    seen: list[tuple[int, int]] = []
    restorer.restore(ct(5), "ct_denoise", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_batch_that_does_not_fit_is_tried_again_smaller(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = ct(5)
    expected = restorer.restore(x, "ct_denoise").volume
    restorer.network.limits = Limits(batch_pixels=8 * 40 * 33)
    batches = limit_batches(restorer, monkeypatch, most=2)
    made = restorer.restore(x, "ct_denoise")
    assert batches == [5, 4, 2, 2, 1]
    assert made.volume.tobytes() == expected.tobytes()
    assert made.remarks == (
        "no memory on cpu for 8 slices: 4 at once",
        "no memory on cpu for 4 slices: 2 at once",
    )


def test_a_slice_that_does_not_fit_is_a_memory_error(
    restorer: Restorer, make_model: Callable[..., DiffCode]
) -> None:
    full = Restorer(restorer.manifest, Faulty(make_model(), most=0))
    with pytest.raises(RestorationMemoryError, match="cpu: no memory for a slice of 40x33 pixels"):
        full.restore(ct(), "ct_denoise")
    assert issubclass(RestorationMemoryError, RestorationError)


class Cramped(DiffCode):
    """A network that runs out of memory above a number of pixels, unless it is on the CPU."""

    def __init__(self, model: DiffCode, most: int) -> None:
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.most = most
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, lq: torch.Tensor, task: Any, noise: Any = None) -> DiffCodeOutput:
        self.sizes.append(tuple(lq.shape[-2:]))
        if lq.shape[-1] * lq.shape[-2] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(lq, task, noise)

    def cpu(self) -> Cramped:
        self.most = 1 << 40
        return self


@pytest.mark.parametrize(
    ("most", "remarks"),
    [
        (320 * 600, ()),
        (320 * 512, ("no memory on cuda for whole slices: tiles of 512 pixels",)),
        (
            256 * 256,
            (
                "no memory on cuda for whole slices: tiles of 512 pixels",
                "no memory on cuda for whole slices: tiles of 256 pixels",
            ),
        ),
        (
            0,
            (
                "no memory on cuda for whole slices: tiles of 512 pixels",
                "no memory on cuda for whole slices: tiles of 256 pixels",
                "no memory on cuda for a slice: the CPU restores",
            ),
        ),
    ],
)
def test_a_gpu_without_memory_gives_way_step_by_step(
    restorer: Restorer, make_model: Callable[..., DiffCode], most: int, remarks: tuple[str, ...]
) -> None:
    model = Cramped(make_model(), most)
    tight = Restorer(restorer.manifest, model)
    tight.network.device = tight.device = torch.device("cuda")
    x = ct(1, 320, 600)
    made = tight.restore(x, "ct_denoise")
    assert made.remarks == remarks
    expected = restorer.restore(x, "ct_denoise").volume
    assert np.abs(made.volume - expected).mean() < 1e-3 * np.abs(expected - x).mean()
    # The next series starts with whole slices again: what was short may be there.
    model.sizes.clear()
    tight.restore(x, "ct_denoise")
    assert model.sizes[0] == (320, 600)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_never_returned(
    restorer: Restorer, make_model: Callable[..., DiffCode], value: float
) -> None:
    broken = Restorer(
        restorer.manifest,
        Faulty(make_model(), value=value),
        limits=Limits(batch_pixels=2 * 40 * 33),
    )
    with pytest.raises(RestorationError, match="not finite in slice 1"):
        broken.restore(ct(), "ct_denoise")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_finite_names_its_slice(restorer: Restorer, value: float) -> None:
    x = ct()
    x[2, 3, 4] = value
    with pytest.raises(ValueError, match="Slice 2 of 'volume'"):
        restorer.restore(x, "ct_denoise")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.bool_, np.complex64, np.str_, object])
def test_a_type_that_holds_no_physical_units_is_refused(restorer: Restorer, dtype: Any) -> None:
    with pytest.raises(TypeError, match="'volume' must hold floats or integers"):
        restorer.restore(np.zeros((1, 16, 16)).astype(dtype), "ct_denoise")


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float16, np.float64])
def test_wide_numbers_are_taken_as_they_are(idle: Restorer, dtype: Any) -> None:
    x = np.arange(2 * 16 * 16).reshape(2, 16, 16).astype(dtype)
    assert np.array_equal(idle.restore(x, "ct_denoise").volume, x.astype(np.float32))


def test_any_memory_layout_is_taken(restorer: Restorer) -> None:
    x = ct(4, 40, 40)
    flipped = restorer.restore(x[::-1], "ct_denoise", seeds=[3, 2, 1, 0]).volume
    plain = restorer.restore(x, "ct_denoise", seeds=[0, 1, 2, 3]).volume
    np.testing.assert_allclose(flipped[::-1], plain, rtol=0, atol=0.04)


@pytest.mark.parametrize("shape", [(16, 16), (1, 1, 16, 16), (0, 16, 16), (2, 0, 16)])
def test_a_shape_that_is_no_volume_is_refused(restorer: Restorer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="slices, rows, columns"):
        restorer.restore(np.zeros(shape, np.float32), "ct_denoise")


def test_a_list_is_no_volume(restorer: Restorer) -> None:
    with pytest.raises(TypeError, match="NumPy array, not list"):
        restorer.restore([[[1.0]]], "ct_denoise")  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_beyond_one_is_refused(restorer: Restorer, strength: float) -> None:
    with pytest.raises(ValueError, match="strength"):
        restorer.restore(ct(), "ct_denoise", strength=strength)


def test_a_wrong_number_of_seeds_is_refused(restorer: Restorer) -> None:
    with pytest.raises(ValueError, match="2 values for 3 slices"):
        restorer.restore(ct(), "ct_denoise", seeds=[1, 2])


def test_a_task_that_the_model_does_not_know_is_refused(restorer: Restorer) -> None:
    with pytest.raises(ValueError, match="'xray' is not a valid"):
        restorer.restore(ct(), "xray")
    ct_only = changed(restorer, tasks=("ct_denoise",))
    with pytest.raises(ValueError, match="restores ct_denoise, not mri_sr"):
        ct_only.restore(ct(), "mri_sr")


def test_a_bundle_is_opened_by_its_folder_as_text_or_path(bundle: Path) -> None:
    assert Restorer.open(str(bundle)).manifest == Restorer.open(bundle).manifest


def test_a_bare_name_is_a_built_in_bundle_or_a_folder_here(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="built-in"):
        Restorer.open("nonesuch")
    monkeypatch.chdir(bundle.parent)
    assert isinstance(Restorer.open(bundle.name, device="cpu").manifest, Manifest)


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error(bundle: Path, device: str) -> None:
    with pytest.raises(RestorationError, match=device):
        Restorer.open(bundle, device=device)


def test_threads_bound_the_process(bundle: Path) -> None:
    before = torch.get_num_threads()
    try:
        Restorer.open(bundle, device="cpu", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_pooling_is_local_at_inference(bundle: Path) -> None:
    _, model = load_bundle(bundle)
    restorer = Restorer(restoration.read_manifest(bundle), model)
    windows = {m.window for m in restoration.blocks.channel_attentions(restorer.network.model)}
    assert windows == {48, 24, 12, 6}


def test_the_public_names_are_complete() -> None:
    assert sorted(restoration.__all__) == restoration.__all__
    for name in restoration.__all__:
        assert getattr(restoration, name) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_an_accelerator_agrees_with_the_processor_and_with_itself(bundle: Path) -> None:
    x = ct(4, 96, 80)
    cpu = Restorer.open(bundle, device="cpu").restore(x, "ct_denoise").volume
    gpu = Restorer.open(bundle, device="cuda")
    first, again = (gpu.restore(x, "ct_denoise").volume for _ in range(2))
    assert first.tobytes() == again.tobytes()
    # A latent on the border of two codes may fall to either side.
    assert np.median(np.abs(first - cpu)) <= 1e-5 * 4095


def test_a_volume_mapped_from_a_read_only_file_is_restored_and_left_alone(
    restorer: Restorer, tmp_path: Path
) -> None:
    np.save(tmp_path / "ct.npy", ct())
    mapped = np.load(tmp_path / "ct.npy", mmap_mode="r")
    result = restorer.restore(mapped, RestorationTask.CT_DENOISE)
    expected = restorer.restore(ct(), RestorationTask.CT_DENOISE)
    assert np.array_equal(result.volume, expected.volume)
    assert np.array_equal(np.load(tmp_path / "ct.npy"), ct())
