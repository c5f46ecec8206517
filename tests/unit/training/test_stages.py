from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from restoration.diffcode import DiffCode
from tests.training.tiny import tiny_recipe
from training.recipe import Recipe
from training.stages import (
    OBJECTIVES,
    Stage,
    codebook_gate,
    diffusion_gate,
    gate_record,
    latent_mask,
    masked_l1,
    masked_mean,
    masked_psnr_loss,
    restoration_gate,
    seeded_noise,
    stage_state,
    start_backbone_from,
    start_condition_from_encoder,
    trained_parameters,
)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    lq, hq = torch.rand(3, 1, 16, 16), torch.rand(3, 1, 16, 16)
    return lq, hq, torch.ones_like(hq), torch.arange(3)


def model_of(recipe: Recipe) -> DiffCode:
    torch.manual_seed(0)
    model = DiffCode(recipe.arch, with_vq_encoder=True)
    for parameter in model.parameters():
        # Away from the zero starts, so that every part takes part.
        torch.nn.init.normal_(parameter, std=0.1)
    if model.bank is not None:
        model.bank.weight.data[:, 0] = 0
    return model


def with_variant(variant: str) -> Recipe:
    return tiny_recipe().with_variant(variant)


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        (Stage.CODEBOOK, {"vq_encoder", "bank", "decoder"}),
        (Stage.DIFFUSION, {"condition", "prior"}),
        (Stage.RESTORATION, {"backbone", "classifier"}),
    ],
    ids=lambda value: getattr(value, "value", ""),
)
def test_a_stage_trains_its_parts_and_freezes_the_rest(stage: Stage, parts: set[str]) -> None:
    model = model_of(tiny_recipe())
    trained = trained_parameters(model, stage)
    assert {name.split(".")[0] for name in trained} == parts
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moving == set(trained)


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.value)
def test_every_trained_weight_but_the_spare_expert_gets_a_gradient(stage: Stage) -> None:
    recipe = tiny_recipe(stage1={"ae_warmup": 1})
    model = model_of(recipe)
    trained = trained_parameters(model, stage)
    terms = OBJECTIVES[stage](model, recipe)(*batch(), step=5)
    terms["loss"].backward()
    idle = {name for name, p in trained.items() if p.grad is None}
    assert all(".experts.3." in name for name in idle)


def test_padding_of_the_target_has_no_part_in_the_loss() -> None:
    recipe = tiny_recipe()
    lq, hq, mask, task = batch()
    mask[..., 8:] = 0
    padded = torch.where(mask > 0, hq, torch.tensor(0.5))
    objective = OBJECTIVES[Stage.RESTORATION](model_of(recipe), recipe)
    losses = [objective(lq, target, mask, task, step=1)["loss"] for target in (hq, padded)]
    assert losses[0] == losses[1]


def test_the_masked_difference_is_the_mean_over_real_pixels() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    difference = torch.zeros(1, 1, 4, 4)
    difference[..., 0] = 3.0
    difference[..., 3] = 100.0
    assert masked_l1(difference, torch.zeros_like(difference), mask) == pytest.approx(1.5)
    assert masked_mean(difference.expand(1, 5, 4, 4), mask) == pytest.approx(1.5)


def test_a_latent_position_with_one_real_pixel_counts() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[0, 0, 8, 7] = 1
    assert latent_mask(mask, 8).tolist() == [[[[0, 0], [1, 0]]]]


def test_a_batch_of_padding_alone_has_no_loss() -> None:
    images = torch.rand(1, 1, 8, 8)
    assert masked_l1(images, 2 * images, torch.zeros_like(images)) == 0


def test_the_psnr_loss_is_minus_the_mean_psnr_of_the_images_in_100_db() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = torch.rand(3, 1, 16, 16, generator=generator)
    restored = truth + 0.1 * torch.randn(truth.shape, generator=generator)
    expected = [
        peak_signal_noise_ratio(t.numpy(), r.numpy(), data_range=1.0)
        for t, r in zip(truth, restored, strict=True)
    ]
    found = masked_psnr_loss(restored, truth, torch.ones_like(truth))
    assert float(found) == pytest.approx(-np.mean(expected) / 100, abs=1e-4)


def test_the_psnr_loss_sees_real_pixels_alone_and_ends_at_the_mean() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    truth = torch.zeros(1, 1, 4, 4)
    truth[..., 0, :2] = 1.0  # one row in four: the median is 0, the mean a quarter
    truth[..., 2:] = 50.0

    def loss(value: float) -> float:
        return float(masked_psnr_loss(torch.full_like(truth, value), truth, mask))

    values = [k / 100 for k in range(101)]
    assert min(values, key=loss) == pytest.approx(0.25)
    assert (
        masked_l1(torch.full_like(truth, 0.0), truth, mask)
        < masked_l1(torch.full_like(truth, 0.25), truth, mask) + 1e-6
    )


def test_noise_depends_on_seed_step_and_rank() -> None:
    def noise(*key: int) -> Tensor:
        return seeded_noise((2, 3), *key)

    assert torch.equal(noise(1, 2, 3), noise(1, 2, 3))
    assert not any(
        torch.equal(noise(1, 2, 3), noise(*k)) for k in ((0, 2, 3), (1, 0, 3), (1, 2, 0))
    )


def test_the_warm_up_is_a_plain_autoencoder() -> None:
    recipe = tiny_recipe(stage1={"ae_warmup": 2})
    objective = OBJECTIVES[Stage.CODEBOOK](model_of(recipe), recipe)
    assert set(objective(*batch(), step=1)) == {"loss", "l1"}
    assert {"codebook", "codes", "latent"} <= set(objective(*batch(), step=2))


def test_the_loss_of_stage_one_is_the_sum_of_equation_three() -> None:
    recipe = tiny_recipe(stage1={"ae_warmup": 1})
    model = model_of(recipe)
    lq, hq, mask, task = batch()
    assert model.vq_encoder is not None
    assert model.decoder is not None
    assert model.bank is not None
    terms = OBJECTIVES[Stage.CODEBOOK](model, recipe)(lq, hq, mask, task, step=1)
    z = model.vq_encoder(hq)
    q = model.bank(z, task).values
    l1, mse = (model.decoder(q) - hq).abs().mean(), (z - q).square().mean()
    assert terms["l1"].item() == pytest.approx(l1.item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx((l1 + 1.25 * mse).item(), rel=1e-4)


def test_per_depth_averages_the_codebook_term_over_prefixes() -> None:
    recipe = tiny_recipe(stage1={"ae_warmup": 1, "codebook_loss": "per_depth"})
    model = model_of(recipe)
    lq, hq, mask, task = batch()
    assert model.vq_encoder is not None
    assert model.bank is not None
    z = model.vq_encoder(hq)
    codes = model.bank.encode(z, task)
    expected = [(z - model.bank.decode(codes[:, :k], task)).square().mean() for k in (1, 2)]
    terms = OBJECTIVES[Stage.CODEBOOK](model, recipe)(lq, hq, mask, task, step=1)
    assert terms["codebook"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_v3_trains_the_condition_itself_as_the_estimate() -> None:
    recipe = with_variant("v3")
    model = model_of(recipe)
    lq, hq, mask, task = batch()
    assert model.vq_encoder is not None
    assert model.condition is not None
    expected = (model.vq_encoder(hq) - model.condition(lq)).abs().mean()
    loss = OBJECTIVES[Stage.DIFFUSION](model, recipe)(lq, hq, mask, task, step=0)["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_v1_has_no_classifier_to_train() -> None:
    recipe = with_variant("v1")
    terms = OBJECTIVES[Stage.RESTORATION](model_of(recipe), recipe)(*batch(), step=0)
    assert set(terms) == {"loss", "l1"}


def test_the_condition_encoder_starts_as_the_image_encoder() -> None:
    model = model_of(tiny_recipe())
    start_condition_from_encoder(model)
    assert model.vq_encoder is not None
    assert model.condition is not None
    lq = batch()[0]
    assert torch.equal(model.condition(lq), model.vq_encoder(lq))


@pytest.mark.parametrize("variant", ["v3", "full"])
def test_a_guided_rung_that_starts_from_v2_restores_as_v2_does(variant: str) -> None:
    v2, guided = model_of(with_variant("v2")), model_of(with_variant(variant))
    start_backbone_from(guided, v2.state_dict())
    lq, _, _, task = batch()
    noise = torch.randn(guided.noise_shape(lq))
    restored = guided(lq, task, noise).restored
    torch.testing.assert_close(restored, v2(lq, task).restored, rtol=1e-5, atol=1e-5)


def test_v2_may_start_from_v1_with_its_own_routing() -> None:
    torch.manual_seed(0)
    v1, v2 = DiffCode(with_variant("v1").arch), DiffCode(with_variant("v2").arch)
    start_backbone_from(v2, v1.state_dict())
    lq, _, _, task = batch()
    torch.testing.assert_close(v2(lq, task).restored, v1(lq, task).restored)


def test_weights_of_another_shape_are_refused_by_name() -> None:
    model = model_of(with_variant("v2"))
    wide = dataclasses.replace(with_variant("v2").arch, channels=(8, 8, 8, 8))
    with pytest.raises(ValueError, match=r"backbone\.embed\.weight"):
        start_backbone_from(model, DiffCode(wide).state_dict())
    with pytest.raises(ValueError, match="have no backbone"):
        start_backbone_from(model, {})


def test_a_checkpoint_holds_what_the_stage_trained_and_stands_on() -> None:
    model = model_of(tiny_recipe())
    parts = {stage: {name.split(".")[0] for name in stage_state(model, stage)} for stage in Stage}
    assert parts[Stage.CODEBOOK] == {"vq_encoder", "bank", "decoder"}
    assert parts[Stage.DIFFUSION] == parts[Stage.CODEBOOK] | {"condition", "prior"}
    assert parts[Stage.RESTORATION] == {
        "condition", "prior", "bank", "decoder", "backbone", "classifier"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "variant", "before", "folder"),
    [
        (Stage.CODEBOOK, "full", None, "codebook"),
        (Stage.DIFFUSION, "full", Stage.CODEBOOK, "diffusion"),
        (Stage.DIFFUSION, "v3", Stage.CODEBOOK, "condition"),
        (Stage.RESTORATION, "full", Stage.DIFFUSION, "restoration-full"),
        (Stage.RESTORATION, "v3", Stage.DIFFUSION, "restoration-v3"),
        (Stage.RESTORATION, "v2", None, "restoration-v2"),
        (Stage.RESTORATION, "v1", None, "restoration-v1"),
    ],
)
def test_the_order_of_the_stages(
    stage: Stage, variant: str, before: Stage | None, folder: str
) -> None:
    assert (stage.before(variant), stage.folder(variant)) == (before, folder)


@pytest.mark.parametrize(
    ("gain", "usage", "passes"),
    [(3.0, 0.6, True), (2.9, 0.6, False), (3.0, 0.59, False), (float("nan"), 0.9, False)],
)
def test_the_gate_of_stage_one(gain: float, usage: float, passes: bool) -> None:
    figures = {
        "ct_denoise": {"input_psnr": 25.0, "reconstruction_psnr": 25.0 + gain, "usage": usage}
    }
    assert all(check.passed for check in codebook_gate(figures)) is passes


@pytest.mark.parametrize(
    ("task", "reference", "latent", "passes"),
    [
        ("ct_denoise", 26.0, 0.1, True),
        ("ct_denoise", 24.0, 0.1, False),
        ("mri_sr", 24.0, 0.1, True),  # the reference need not beat the input on MR
        ("mri_sr", 26.0, 0.3, False),
    ],
)
def test_the_gate_of_stage_two(task: str, reference: float, latent: float, passes: bool) -> None:
    figures = {
        task: {
            "input_psnr": 25.0, "reference_psnr": reference,
            "latent_l1": latent, "plain_latent_l1": 0.2,
        }
    }  # fmt: skip
    assert all(check.passed for check in diffusion_gate(figures)) is passes


def test_the_gate_of_stage_three_compares_with_v2_where_there_is_one() -> None:
    alone = {"mri_sr": {"input_psnr": 27.0, "restored_psnr": 30.0}}
    paired = {"mri_sr": {**alone["mri_sr"], "v2_psnr": 30.1}}
    assert all(check.passed for check in restoration_gate(alone))
    assert [check.passed for check in restoration_gate(paired)] == [True, False]


def test_the_record_of_a_gate_names_what_failed() -> None:
    record = gate_record(
        Stage.RESTORATION, {"mri_sr": {"input_psnr": 27.0, "restored_psnr": 26.0}}, step=9
    )
    assert (record["stage"], record["step"], record["passed"]) == ("restoration", 9, False)
    assert record["checks"][0]["value"] == -1.0


@pytest.mark.parametrize("stage", list(Stage), ids=lambda stage: stage.value)
def test_in_half_precision_the_quantiser_and_the_chain_stay_in_single(stage: Stage) -> None:
    recipe = tiny_recipe()
    model = model_of(recipe)
    trained_parameters(model, stage)
    seen: dict[str, set[torch.dtype]] = {"bank": set(), "chain": set(), "network": set()}
    assert model.bank is not None
    assert model.prior is not None
    encode = model.bank.encode

    def noted(features: Tensor, task: Tensor) -> Tensor:
        seen["bank"].add(features.dtype)
        return encode(features, task)

    model.bank.encode = noted  # type: ignore[method-assign]
    model.prior.denoiser.register_forward_hook(
        lambda _module, _inputs, output: seen["chain"].add(output.dtype)
    )
    for part in (model.backbone.embed, model.condition, model.vq_encoder):
        assert part is not None
        part.register_forward_hook(
            lambda _module, _inputs, output: seen["network"].add(output.dtype)
        )
    objective = OBJECTIVES[stage](model, recipe)
    # One task, past the warm-up of the autoencoder.
    lq, hq, mask, _ = batch()
    arguments = (lq, hq, mask, torch.zeros(3, dtype=torch.long), recipe.stage1.ae_warmup)
    single = objective(*arguments)["loss"]
    for dtypes in seen.values():
        dtypes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective(*arguments)["loss"]
    half.backward()
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(single.item(), rel=0.05)
    assert seen["network"] == {torch.bfloat16}
    assert seen["bank"] <= {torch.float32}
    assert seen["chain"] <= {torch.float32}
    trained = trained_parameters(model, stage)
    assert {p.grad.dtype for p in trained.values() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("stage", list(Stage))
def test_tasks_together_have_the_loss_and_gradient_of_tasks_apart(stage: Stage) -> None:
    recipe = with_variant("full")
    model = model_of(recipe)
    parameters = list(trained_parameters(model, stage).values())
    objective = OBJECTIVES[stage](model, recipe)
    images = list(batch()[:3])
    images[2][0, :, :8] = 0  # one task has fewer real pixels
    task = torch.arange(3)

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in found]

    together = objective(*images, task, step=5)["loss"]
    apart = torch.stack(
        [objective(*(i[k : k + 1] for i in images), task[k : k + 1], step=5)["loss"] for k in task]
    ).mean()
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(together), gradients(apart), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
