from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from restoration.diffcode import DiffCode
from tests.training.tiny import tiny_recipe, tiny_set
from training.checkpoint import CHECKPOINT, TrainingError, averaged_weights, read_checkpoint
from training.journal import LOG
from training.loop import Limits, learning_rate, run_stage
from training.patches import Batch
from training.run import sampler
from training.slices import PreparedSet
from training.stages import Stage

RECIPE = tiny_recipe()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def batch_at(dataset: PreparedSet) -> Callable[[int], Batch]:
    return sampler(dataset, Stage.CODEBOOK, RECIPE)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.value)
def test_a_run_in_three_parts_leaves_the_bytes_of_a_run_in_one(
    stage: Stage, batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    run_stage(stage, RECIPE, batch_at, tmp_path / "one")
    for steps in (1, 3, 9):  # pauses in the warm-up, in a restart window, and at the end
        run_stage(stage, RECIPE, batch_at, tmp_path / "parts", limits=Limits(max_steps=steps))
    one, parts = ((tmp_path / name / CHECKPOINT).read_bytes() for name in ("one", "parts"))
    assert one == parts


def test_a_pause_at_the_step_that_makes_the_bank_changes_nothing(
    batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    run_stage(Stage.CODEBOOK, RECIPE, batch_at, tmp_path / "one")
    pause = Limits(max_steps=RECIPE.stage1.ae_warmup)
    run_stage(Stage.CODEBOOK, RECIPE, batch_at, tmp_path / "parts", limits=pause)
    run_stage(Stage.CODEBOOK, RECIPE, batch_at, tmp_path / "parts")
    one, parts = ((tmp_path / name / CHECKPOINT).read_bytes() for name in ("one", "parts"))
    assert one == parts


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.value)
def test_frozen_weights_keep_their_bytes(
    stage: Stage, batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    before: dict[str, torch.Tensor] = {}

    def note(model: DiffCode) -> None:
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    outcome = run_stage(stage, RECIPE, batch_at, tmp_path, start=note)
    moved = {
        name.split(".")[0]
        for name, tensor in outcome.model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    expected = {
        Stage.CODEBOOK: {"vq_encoder", "bank", "decoder"},
        Stage.DIFFUSION: {"condition", "prior"},
        Stage.RESTORATION: {"backbone", "classifier"},
    }
    assert moved == expected[stage]


def test_the_zero_code_stays_zero(batch_at: Callable[[int], Batch], tmp_path: Path) -> None:
    outcome = run_stage(Stage.CODEBOOK, RECIPE, batch_at, tmp_path)
    assert outcome.model.bank is not None
    assert not outcome.model.bank.weight[:, 0].any()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_ends_the_run(
    number: signal.Signals, batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    def interrupted(step: int) -> Batch:
        if step == 2:
            os.kill(os.getpid(), number)
        return batch_at(step)

    before = signal.getsignal(number)
    outcome = run_stage(Stage.RESTORATION, RECIPE, interrupted, tmp_path)
    assert (outcome.step, outcome.finished) == (3, False)
    assert read_checkpoint(tmp_path)[1]["step"] == 3
    assert signal.getsignal(number) is before


def test_the_time_limit_saves_and_ends_the_run(
    batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    outcome = run_stage(Stage.RESTORATION, RECIPE, batch_at, tmp_path, limits=Limits(max_seconds=0))
    assert (outcome.step, outcome.finished) == (1, False)


def test_a_finished_stage_is_not_trained_again(
    batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    run_stage(Stage.RESTORATION, RECIPE, batch_at, tmp_path)
    before = (tmp_path / CHECKPOINT).stat().st_mtime_ns

    def none(step: int) -> Batch:
        raise AssertionError(step)

    outcome = run_stage(Stage.RESTORATION, RECIPE, none, tmp_path)
    assert (outcome.step, outcome.finished) == (6, True)
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == before


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    run_stage(Stage.RESTORATION, RECIPE, batch_at, tmp_path, limits=Limits(max_steps=2))
    before = (tmp_path / CHECKPOINT).read_bytes()

    def spoilt(step: int) -> Batch:
        batch = batch_at(step)
        batch.lq[0] = float("nan")
        return batch

    with pytest.raises(TrainingError, match="not finite"):
        run_stage(Stage.RESTORATION, RECIPE, spoilt, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_checkpoint_of_another_recipe_is_left_alone(
    batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    run_stage(Stage.RESTORATION, RECIPE, batch_at, tmp_path, limits=Limits(max_steps=1))
    before = (tmp_path / CHECKPOINT).read_bytes()
    other = tiny_recipe(arch={"codes": 32})
    with pytest.raises(TrainingError, match=r"arch\.codes"):
        run_stage(Stage.RESTORATION, other, batch_at, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_the_log_has_a_line_for_each_interval_and_none_twice(
    batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    run_stage(Stage.CODEBOOK, RECIPE, batch_at, tmp_path, limits=Limits(max_steps=3))
    # A crash after the checkpoint of step 3 would have left later lines.
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 4, "lo')
    run_stage(Stage.CODEBOOK, RECIPE, batch_at, tmp_path)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [2, 4, 6]
    assert {"loss", "l1", "lr", "steps_per_second", "norm"} <= found[0].keys()
    assert 0 < found[-1]["usage/ct_denoise"] <= 1


def test_validation_measures_the_average_and_disturbs_nothing(
    batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []

    def validate(model: DiffCode) -> Mapping[str, float]:
        seen.append(model.backbone.emit.weight.clone())
        return {"psnr": 1.0}

    recipe = tiny_recipe(stage3={"validate_every": 3})
    outcome = run_stage(Stage.RESTORATION, recipe, batch_at, tmp_path / "a", validate=validate)
    assert outcome.figures == {"psnr": 1.0}
    assert torch.equal(seen[-1], averaged_weights(tmp_path / "a")[0]["backbone.emit.weight"])
    run_stage(Stage.RESTORATION, recipe, batch_at, tmp_path / "b")
    one, other = ((tmp_path / name / CHECKPOINT).read_bytes() for name in "ab")
    assert one == other
    assert [x["step"] for x in lines(tmp_path / "a") if "validation/psnr" in x] == [3, 6]


def test_the_average_is_between_the_start_and_the_weights(
    batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    outcome = run_stage(Stage.RESTORATION, RECIPE, batch_at, tmp_path)
    tensors, _ = read_checkpoint(tmp_path)
    name = "backbone.emit.weight"
    assert not torch.equal(tensors[f"average/{name}"], tensors[f"model/{name}"])
    assert torch.equal(outcome.model.state_dict()[name], tensors[f"average/{name}"])


def test_the_rate_rises_then_falls_by_a_cosine_over_the_planned_steps() -> None:
    settings = tiny_recipe(stage3={"steps": 110, "warmup": 10, "lr": 1e-3, "lr_final": 1e-6}).stage3
    rates = [learning_rate(step, settings) for step in range(111)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx((1e-3 + 1e-6) / 2)
    assert rates[110] == pytest.approx(1e-6)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_codebook_learns_at_its_own_rate(
    batch_at: Callable[[int], Batch], tmp_path: Path
) -> None:
    def bank_after(factor: float) -> torch.Tensor:
        changes = {"steps": 3, "codebook_lr_factor": factor, "restart_every": 100}
        folder = tmp_path / str(factor)
        run_stage(Stage.CODEBOOK, tiny_recipe(stage1=changes), batch_at, folder)
        return read_checkpoint(folder)[0]["model/bank.weight"]

    still, slow, fast = (bank_after(factor) for factor in (0.0, 1.0, 10.0))
    # One step of Adam after the bank was made from data: each used code moves by the rate.
    ratio = (fast - still).abs().max() / (slow - still).abs().max()
    assert ratio == pytest.approx(10.0, rel=1e-3)
