"""Training made twice: equal bytes of every checkpoint on the CPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from tests.training.tiny import tiny_recipe, tiny_set
from training import run
from training.checkpoint import CHECKPOINT
from training.loop import Limits
from training.recipe import Recipe
from training.slices import PreparedSet
from training.stages import Stage

SHORT = tiny_recipe(
    stage1={"steps": 8, "ae_warmup": 3, "restart_every": 2}, stage2={"steps": 3},
    stage3={"steps": 3},
)  # fmt: skip
# Two hundred steps: the warm-up, the k-means, restarts, the chain and the routing.
WHOLE = tiny_recipe(
    stage1={"steps": 100, "ae_warmup": 30, "restart_every": 10, "init_tokens": 400},
    stage2={"steps": 40, "log_every": 20},
    stage3={"steps": 60, "log_every": 20},
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("tiny"), size=48)


def digests(recipe: Recipe, dataset: PreparedSet, out: Path) -> dict[str, str]:
    """SHA-256 of the checkpoint of each stage of the full network."""
    for stage in Stage:
        run.train(
            stage, recipe, dataset.folder, out,
            device=torch.device("cpu"), limits=Limits(), past_gates=True,
        )  # fmt: skip
    return {
        stage.value: hashlib.sha256(
            (out / stage.folder("full") / CHECKPOINT).read_bytes()
        ).hexdigest()
        for stage in Stage
    }


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(SHORT, id="14-steps-in-all"),
        pytest.param(
            WHOLE, id="200-steps-in-all", marks=[pytest.mark.slow, pytest.mark.timeout(900)]
        ),
    ],
)
def test_all_three_stages_made_twice_are_equal_to_the_byte(
    recipe: Recipe, dataset: PreparedSet, tmp_path: Path
) -> None:
    first, second = (digests(recipe, dataset, tmp_path / name) for name in ("one", "two"))
    assert first == second
    assert len(set(first.values())) == len(Stage)


@pytest.mark.slow
def test_another_seed_gives_other_bytes(dataset: PreparedSet, tmp_path: Path) -> None:
    values = SHORT.to_dict()
    other = Recipe.from_dict({**values, "seed": 1})
    first, second = (
        digests(recipe, dataset, tmp_path / str(recipe.seed)) for recipe in (SHORT, other)
    )
    assert all(first[stage] != second[stage] for stage in first)
