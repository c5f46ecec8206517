from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from restoration.blocks import channel_attentions
from restoration.diffcode import PRESETS, TASKS, VARIANTS, DiffCode, DiffCodeConfig, as_task_tensor
from restoration.tiling import pad_to_multiple

Make = Callable[..., DiffCode]


def parameters(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def paper(*, with_vq_encoder: bool = False, **changes: Any) -> DiffCode:
    return DiffCode(DiffCodeConfig.preset("paper", **changes), with_vq_encoder=with_vq_encoder)


def run(model: DiffCode, lq: Tensor, task: Tensor | int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(model.noise_shape(lq), generator=generator)
    with torch.inference_mode():
        restored: Tensor = model(lq, task, noise).restored
    return restored


def test_the_paper_model_has_its_published_size() -> None:
    model = paper(with_vq_encoder=True)
    assert parameters(model) == 34_118_661
    sizes = {name: parameters(part) for name, part in model.named_children()}
    assert sizes == {
        "vq_encoder": 4_530_048,
        "condition": 4_530_048,
        "prior": 394_752,
        "bank": 6_291_456,
        "decoder": 4_529_345,
        "classifier": 48_067,
        "backbone": 13_794_945,
    }


@pytest.mark.parametrize(
    ("variant", "count"),
    [("v1", 8_927_809), ("v2", 13_842_436), ("v3", 29_193_861), ("full", 29_588_613)],
)
def test_each_rung_of_the_ladder_has_its_size(variant: str, count: int) -> None:
    assert parameters(paper(variant=variant)) == count


@pytest.mark.parametrize(
    ("preset", "whole", "inference"),
    [("compact", 2_833_061, 2_455_501), ("tiny", 1_973_157, 1_724_309)],
)
def test_the_small_presets_have_their_sizes(preset: str, whole: int, inference: int) -> None:
    config = DiffCodeConfig.preset(preset)
    assert parameters(DiffCode(config, with_vq_encoder=True)) == whole
    assert parameters(DiffCode(config)) == inference


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zeroed_last_convolution_returns_the_input_bit_by_bit(
    make_model: Make, variant: str
) -> None:
    model = make_model(variant=variant)
    with torch.no_grad():
        model.backbone.emit.weight.zero_()
        model.backbone.emit.bias.zero_()
    lq = torch.rand(2, 1, 32, 40)
    assert torch.equal(run(model, lq), lq)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_its_parts_and_no_others(make_model: Make, variant: str) -> None:
    model = make_model(variant=variant)
    guided = variant in ("v3", "full")
    assert (model.classifier is not None) == (variant != "v1")
    assert (model.prior is not None) == (variant == "full")
    assert [p is not None for p in (model.condition, model.bank, model.decoder)] == [guided] * 3
    assert model.vq_encoder is None
    lq = torch.rand(2, 1, 32, 40)
    out = model(lq, 1, torch.randn(model.noise_shape(lq)))
    assert out.restored.shape == lq.shape
    assert (out.class_logits is not None) == (variant != "v1")
    for value in (out.reference, out.latent, out.quantised, out.codes):
        assert (value is not None) == guided
    if guided:
        assert out.reference.shape == lq.shape
        assert out.latent.shape == out.quantised.shape == model.noise_shape(lq)
        assert out.codes.shape == (2, 3, 4, 5)
        assert out.codes.dtype == torch.long


def test_local_pooling_makes_the_batch_size_irrelevant(make_model: Make) -> None:
    model = make_model()
    model.use_local_pooling(True)
    lq = torch.rand(8, 1, 64, 72)
    noise = torch.randn(model.noise_shape(lq))
    with torch.inference_mode():
        together = model(lq, 1, noise).restored
        alone = [model(lq[i : i + 1], 1, noise[i : i + 1]).restored for i in range(8)]
    assert (together - torch.cat(alone)).abs().max() <= 1e-5


def test_a_mixed_batch_equals_its_images_alone(make_model: Make) -> None:
    model = make_model()
    lq, task = torch.rand(3, 1, 32, 32), torch.tensor([2, 0, 1])
    noise = torch.randn(model.noise_shape(lq))
    with torch.inference_mode():
        mixed = model(lq, task, noise).restored
        alone = [model(lq[i : i + 1], int(task[i]), noise[i : i + 1]).restored for i in range(3)]
    assert (mixed - torch.cat(alone)).abs().max() <= 1e-5


def test_the_task_matters(make_model: Make) -> None:
    lq = torch.rand(1, 1, 32, 32)
    outputs = [run(make_model(), lq, task) for task in range(TASKS)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("size", [256, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exact", [True, False])
def test_padding_does_not_reach_the_interior_under_local_pooling(
    make_model: Make, exact: bool, size: int
) -> None:
    model = make_model(variant="v2", tlc_train=16, tlc_exact=exact)
    model.use_local_pooling(True)
    lq = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(9))
    padded, crop = pad_to_multiple(lq, size + 8)
    interior = (..., slice(0, size // 2), slice(0, size // 2))
    plain, around = run(model, lq), run(model, padded)[crop]
    scale = float((plain - lq).abs().mean())
    local = float((plain - around)[interior].abs().max()) / scale
    model.use_local_pooling(False)
    plain, around = run(model, lq), run(model, padded)[crop]
    leaked = float((plain - around)[interior].abs().max()) / scale
    assert local <= 1e-5
    assert leaked > 10 * local


def test_local_pooling_takes_the_window_of_the_configuration(make_model: Make) -> None:
    model = make_model(tlc_train=64, tlc_factor=1.5, tlc_exact=True)
    model.use_local_pooling(True)
    assert {a.window for a in channel_attentions(model)} == {96, 48, 24, 12}
    assert all(a.exact for a in channel_attentions(model))
    model.use_local_pooling(False)
    assert {a.window for a in channel_attentions(model)} == {None}


def test_local_and_global_pooling_agree_on_a_training_patch(make_model: Make) -> None:
    model = make_model()
    lq = torch.rand(2, 1, 32, 32)
    plain = run(model, lq)
    model.use_local_pooling(True)
    assert torch.equal(run(model, lq), plain)


def test_the_reference_is_decoded_from_the_codebook_of_the_task(make_model: Make) -> None:
    model = make_model()
    lq = torch.rand(1, 1, 32, 32)
    out = model(lq, 2, torch.randn(model.noise_shape(lq)))
    task = torch.tensor([2])
    torch.testing.assert_close(model.bank.decode(out.codes, task), out.quantised)
    torch.testing.assert_close(model.decoder(out.quantised), out.reference)
    assert torch.equal(model.bank.encode(out.latent, task), out.codes)


def test_the_third_variant_quantises_the_condition_itself(make_model: Make) -> None:
    model = make_model(variant="v3")
    lq = torch.rand(1, 1, 32, 32)
    assert torch.equal(model(lq, 0).latent, model.condition(lq))


def test_the_full_variant_needs_noise(make_model: Make) -> None:
    with pytest.raises(ValueError, match="noise"):
        make_model()(torch.rand(1, 1, 16, 16), 0)


@pytest.mark.parametrize("task", [-1, TASKS])
def test_a_task_beyond_the_bank_is_refused(task: int) -> None:
    with pytest.raises(ValueError, match="task indices"):
        as_task_tensor(task, torch.zeros(2, 1, 8, 8))


def test_one_task_stands_for_the_whole_batch() -> None:
    assert as_task_tensor(2, torch.zeros(3, 1, 8, 8)).tolist() == [2, 2, 2]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_the_way_through_plain_values(preset: str) -> None:
    config = DiffCodeConfig.preset(preset, variant="v3")
    assert DiffCodeConfig.from_dict(config.to_dict()) == config
    assert config.factor == 8


def test_wrong_configurations_are_named() -> None:
    with pytest.raises(ValueError, match="unknown configuration keys: chanels"):
        DiffCodeConfig.from_dict({"chanels": []})
    with pytest.raises(ValueError, match="variant must be one of v1, v2, v3, full"):
        DiffCodeConfig(variant="v4")
    with pytest.raises(ValueError, match="one entry per level"):
        DiffCodeConfig(blocks=(1, 1))
    with pytest.raises(ValueError, match="preset must be one of paper"):
        DiffCodeConfig.preset("huge")


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_a_network_of_any_number_of_levels_pools_over_one_window_of_the_image(
    levels: int, make_model: Make
) -> None:
    channels = (4, 6, 8, 8, 8)[:levels]
    model = make_model(channels=channels, blocks=(1,) * levels, tlc_train=32)
    assert model.config.factor == 2 ** (levels - 1)
    model.use_local_pooling(True)
    for level, stage in enumerate(model.backbone.encoder):
        windows = {attention.window for attention in channel_attentions(stage)}
        assert windows == {48 >> level}
    # Sides that are multiples of the factor alone, above the window.
    lq = torch.rand(1, 1, 65, 80)
    padded, _ = pad_to_multiple(lq, model.config.factor)
    restored = run(model, padded)
    assert restored.shape == padded.shape
    assert restored.isfinite().all()
    # What lies beyond the window and the convolutions has no say.
    far = padded.clone()
    far[..., -2:, -2:] += 1
    assert (run(model, far) - restored)[..., :2, :2].abs().max() < 1e-6
