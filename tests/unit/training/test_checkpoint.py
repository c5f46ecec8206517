from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training.tiny import tiny_recipe
from training.checkpoint import (
    CHECKPOINT,
    STATE,
    TrainingError,
    averaged_weights,
    read_checkpoint,
    refuse_other_recipe,
    write_checkpoint,
)


def write(folder: Path, step: int = 3) -> None:
    tensors = {
        "model/a": torch.ones(2, 3),
        "model/b": torch.zeros(4),
        "average/a": torch.full((2, 3), 7.0),
    }
    write_checkpoint(folder, tensors, {"version": 1, "step": step})


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "run")
    tensors, state = read_checkpoint(tmp_path / "run")
    assert torch.equal(tensors["average/a"], torch.full((2, 3), 7.0))
    assert state == {"version": 1, "step": 3}
    assert json.loads((tmp_path / "run" / STATE).read_text()) == state


def test_what_is_handed_on_is_the_average_where_there_is_one(tmp_path: Path) -> None:
    write(tmp_path)
    weights, _ = averaged_weights(tmp_path)
    assert weights["a"][0, 0] == 7.0
    assert weights["b"][0] == 0.0


def test_only_finished_files_are_left(tmp_path: Path) -> None:
    write(tmp_path, step=1)
    write(tmp_path, step=2)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, STATE}


def test_a_tensor_in_another_memory_layout_is_stored_in_order(tmp_path: Path) -> None:
    image = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    write_checkpoint(tmp_path, {"model/x": image}, {"version": 1})
    assert torch.equal(read_checkpoint(tmp_path)[0]["model/x"], image)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None], ids=str)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is no checkpoint"):
        read_checkpoint(tmp_path)


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model/a": torch.ones(1)}, {"version": 2})
    with pytest.raises(TrainingError, match="version 2"):
        read_checkpoint(tmp_path)


def test_another_schedule_is_refused_with_both_values(tmp_path: Path) -> None:
    state = {"recipe": tiny_recipe().to_dict()}
    other = tiny_recipe(stage3={"steps": 9})
    with pytest.raises(TrainingError, match=r"stage3\.steps was 6, is 9"):
        refuse_other_recipe(tmp_path, state, other, "stage3", force=False)
    refuse_other_recipe(tmp_path, state, other, "stage3", force=True)
    refuse_other_recipe(tmp_path, state, other, "stage1", force=False)


def test_another_network_is_refused_even_by_force(tmp_path: Path) -> None:
    state = {"recipe": tiny_recipe().to_dict()}
    with pytest.raises(TrainingError, match=r"arch\.codes was 16, is 32"):
        refuse_other_recipe(tmp_path, state, tiny_recipe(arch={"codes": 32}), "stage1", force=True)


def test_the_pooling_window_of_inference_may_change(tmp_path: Path) -> None:
    state = {"recipe": tiny_recipe().to_dict()}
    other = tiny_recipe(arch={"tlc_train": 64})
    refuse_other_recipe(tmp_path, state, other, "stage3", force=False)


def test_a_checkpoint_older_than_a_setting_has_its_default(tmp_path: Path) -> None:
    recipe = tiny_recipe(stage1={"gate_tokens": 50_000})
    older = recipe.to_dict()
    del older["stage1"]["gate_tokens"]
    refuse_other_recipe(tmp_path, {"recipe": older}, recipe, "stage1", force=False)
