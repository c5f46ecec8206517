from __future__ import annotations

import dataclasses
import shutil
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

from restoration.diffcode import PRESETS as NETWORKS
from tests.training.tiny import tiny_recipe
from training import recipe
from training.recipe import PRESETS, Recipe, RecipeError


def problems_of(table: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(table)
    return caught.value.problems


@pytest.mark.parametrize("name", [*NETWORKS, "compact-ladder"])
def test_each_preset_trains_the_network_of_that_name(name: str) -> None:
    assert Recipe.load(name).arch == NETWORKS[name.removesuffix("-ladder")]


def test_the_presets_are_found_beside_an_installed_package_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "share" / "diffcode" / "recipes"
    shutil.copytree(recipe.preset_folder(), installed)
    monkeypatch.setattr(recipe, "_CHECKOUT", tmp_path / "no-checkout")
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    assert recipe.preset_folder() == installed
    assert Recipe.load("tiny").arch == NETWORKS["tiny"]


def test_a_wheel_is_told_to_carry_the_presets() -> None:
    setup = ConfigParser()
    setup.read(Path(recipe.__file__).parent.parent / "setup.cfg")
    assert "config/training/*.toml" in setup["options.data_files"]["share/diffcode/recipes"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_training_patch_is_the_one_that_local_pooling_assumes(name: str) -> None:
    loaded = Recipe.load(name)
    assert loaded.arch.tlc_train == loaded.stage3.patch


def test_the_paper_preset_has_the_published_schedule() -> None:
    recipe = Recipe.load("paper")
    for stage in (recipe.stage1, recipe.stage2, recipe.stage3):
        assert (stage.lr, stage.lr_final, stage.steps, stage.patch) == (2e-4, 1e-6, 200_000, 128)
    assert (recipe.stage1.commitment, recipe.stage1.codebook_loss) == (0.25, "final")
    assert recipe.stage3.class_loss == 0.01


def test_a_recipe_survives_the_way_through_plain_tables() -> None:
    recipe = Recipe.load("compact")
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_toml_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 4\n[arch]\nvariant = 'v2'\n[stage3]\nsteps = 7\n")
    recipe = Recipe.load(path)
    assert (recipe.seed, recipe.arch.variant, recipe.stage3.steps) == (4, "v2", 7)


def test_every_fault_is_named_with_its_key_path() -> None:
    table = {
        "arch": {"codess": 4, "beta": [0.1]},
        "stage1": {"steps": "many", "codebook_loss": "all"},
        "stages": {},
        "stage2": 3,
    }
    assert [problem.split(":")[0] for problem in problems_of(table)] == [
        "stages",
        "arch.codess",
        "arch.beta",
        "stage1.steps",
        "stage1.codebook_loss",
        "stage2",
    ]


def test_a_missing_arch_is_named() -> None:
    assert problems_of({}) == ["arch: missing"]


@pytest.mark.parametrize(
    ("table", "path"),
    [
        ({"stage1": {"patch": 36}}, "stage1.patch"),
        ({"stage2": {"steps": 0}}, "stage2.steps"),
        ({"stage3": {"ema": 1.0}}, "stage3.ema"),
        ({"stage3": {"warmup": 6}}, "stage3.warmup"),
        ({"stage1": {"ae_warmup": 6}}, "stage1.ae_warmup"),
        ({"data": {"flip": ["xray"]}}, "data.flip"),
        ({"data": {"flip": "ct_denoise"}}, "data.flip"),
        ({"data": {"simulated_pet": 1.0}}, "data.simulated_pet"),
        ({"data": {"fresh_noise": -1}}, "data.fresh_noise"),
        ({"arch": {"variant": "v9"}}, "arch"),
        ({"arch": {"codes": 2}}, "arch.codes"),
        ({"arch": {"channels": [4, "8"]}}, "arch.channels[1]"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used_are_refused(table: dict[str, Any], path: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(**table)
    assert path in {problem.split(":")[0] for problem in caught.value.problems}


@pytest.mark.parametrize("preset", ["paper", "compact", "tiny"])
def test_simulated_whole_bodies_are_half_of_the_pet_patches(preset: str) -> None:
    assert Recipe.load(preset).data.simulated_pet >= 0.5


def test_a_whole_number_serves_where_a_real_number_is_meant() -> None:
    assert tiny_recipe(stage1={"lr": 1}).stage1.lr == 1.0


def test_text_that_is_not_toml_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[arch\n")
    with pytest.raises(RecipeError, match=r"broken\.toml.*line 1"):
        Recipe.load(path)


def test_a_file_that_is_not_there_is_named_with_the_presets(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"none\.toml: cannot be read .*paper, compact, compact-polish, tiny"
    ):
        Recipe.load(tmp_path / "none.toml")


def test_optional_values_may_be_left_out_or_given() -> None:
    recipe = tiny_recipe(stage3={"init_from": "run"})
    assert recipe.stage3.init_from == "run"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_recipe().seed = 1  # type: ignore[misc]
