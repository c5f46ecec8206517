from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from restoration.tasks import RestorationTask
from tests.training.command import call
from tests.training.tiny import recipe_file, tiny_recipe, tiny_set
from training import ladder, run
from training.checkpoint import CHECKPOINT
from training.evaluate import evaluate
from training.evaluation import Evaluation, Volume
from training.ladder import leave_subjects_out
from training.ladder_report import ladder_report
from training.manifest import Item
from training.metrics import AMIR
from training.recipe import Recipe
from training.rungs import over_seeds
from training.score_store import cached
from training.slices import PreparedSet
from training.stages import Stage

CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS
CPU = torch.device("cpu")
RUNGS = ("v1", "v2", "v3", "full")
SHORT = {"steps": 2, "log_every": 1}

pytestmark = pytest.mark.timeout(400)  # a ladder of two seeds is fourteen trainings


def short_recipe(**tables: dict[str, Any]) -> Recipe:
    stage1 = SHORT | {"ae_warmup": 1, "init_tokens": 20, "gate_tokens": 20}
    return tiny_recipe(**{"stage1": stage1, "stage2": SHORT, "stage3": SHORT, **tables})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("tiny"), size=32)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe_file(tmp_path_factory.mktemp("recipe"), short_recipe())


@pytest.fixture(scope="module")
def climbed(dataset: PreparedSet, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder of two seeds with every rung."""
    out = tmp_path_factory.mktemp("ladder") / "run"
    done = call(
        "ladder", "--recipe", recipe, "--data", dataset.folder, "--out", out, "--seeds", "0,1",
        "--past-gates", "--threads", 1, "--no-classical",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def summary(climbed: Path, dataset: PreparedSet, recipe: Path) -> dict[str, Any]:
    """What the ladder of two seeds prints as JSON, from the scores that are kept."""
    return ask(climbed, dataset, recipe, "--seeds", "0,1", "--past-gates")


def ask(climbed: Path, dataset: PreparedSet, recipe: Path, *more: Any) -> dict[str, Any]:
    done = call(
        "ladder", "--recipe", recipe, "--data", dataset.folder, "--out", climbed, "--threads", 1,
        "--no-classical", "--json", *more,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.parent): path.read_bytes() for path in folder.rglob(CHECKPOINT)}


def test_every_rung_stands_in_one_table_over_its_seeds(summary: dict[str, Any]) -> None:
    found = summary
    assert found["seeds"] == {rung: [0, 1] for rung in RUNGS}
    assert list(found["evaluation"]["methods"]) == ["input", *RUNGS]
    assert [(step["from"], step["to"]) for step in found["steps"]] == [
        ("input", "v1"), ("v1", "v2"), ("v2", "v3"), ("v3", "full")
    ]  # fmt: skip
    assert found["budget"]["restoration"]["steps"] == 2
    assert found["unfinished"] == {}


def test_a_step_is_the_mean_of_its_seeds(
    summary: dict[str, Any], climbed: Path, dataset: PreparedSet, recipe: Path
) -> None:
    for step in summary["steps"]:
        assert step["average"]["mean"] == pytest.approx(np.mean(list(step["by_seed"].values())))
        assert set(step["by_seed"]) == {"0", "1"}
    single = ask(climbed, dataset, recipe, "--past-gates")
    by_seed = {step["to"]: step["by_seed"]["0"] for step in summary["steps"]}
    assert {step["to"]: step["average"]["mean"] for step in single["steps"]} == pytest.approx(
        by_seed
    )


def test_a_gate_that_was_passed_over_is_reported(summary: dict[str, Any]) -> None:
    gates = summary["passed_gates"]
    assert any(text.startswith("seed 0: codebook failed its gate") for text in gates)
    assert any(text.startswith("seed 1: codebook failed its gate") for text in gates)


def test_finished_rungs_are_used_as_they_are(
    climbed: Path, dataset: PreparedSet, recipe: Path
) -> None:
    before = weights(climbed)
    ask(climbed, dataset, recipe, "--seeds", "0,1", "--max-seconds", "0")
    assert weights(climbed) == before
    assert set(before) == {
        str(climbed / seed / name)
        for seed in ("", "seed-1")
        for name in ("codebook", "condition", "diffusion", *(f"restoration-{r}" for r in RUNGS))
    }


def test_rungs_are_trained_as_the_train_commands_train_them(
    climbed: Path, dataset: PreparedSet, recipe: Path, tmp_path: Path
) -> None:
    done = call(
        "train", "restoration", "--variant", "v2", "--recipe", recipe, "--data", dataset.folder,
        "--out", tmp_path, "--threads", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    ours, theirs = (
        (folder / "restoration-v2" / CHECKPOINT).read_bytes() for folder in (climbed, tmp_path)
    )
    assert ours == theirs


def test_a_rung_behind_a_failed_gate_is_left_out_and_named(
    dataset: PreparedSet, recipe: Path, tmp_path: Path
) -> None:
    done = call(
        "ladder", "--recipe", recipe, "--data", dataset.folder, "--out", tmp_path / "run",
        "--rungs", "v1,v3", "--threads", 1, "--no-classical",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "not in the table: v3, seed 0:" in done.stdout
    assert "failed its gate" in done.stdout
    assert not (tmp_path / "run" / "restoration-v3").exists()


def test_without_time_nothing_is_trained(
    dataset: PreparedSet, recipe: Path, tmp_path: Path
) -> None:
    done = call(
        "ladder", "--recipe", recipe, "--data", dataset.folder, "--out", tmp_path / "run",
        "--max-seconds", 0,
    )  # fmt: skip
    assert done.exit_code == 1
    assert "no rung is finished (v1, seed 0: no time left" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_recipe_is_not_taken_for_this_one(
    climbed: Path, dataset: PreparedSet, tmp_path: Path
) -> None:
    other = recipe_file(tmp_path, short_recipe(stage3=SHORT | {"lr": 1e-4}))
    before = weights(climbed)
    done = call(
        "ladder", "--recipe", other, "--data", dataset.folder, "--out", climbed, "--rungs", "v1",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "holds another run (stage3.lr was 0.002, is 0.0001)" in done.stderr
    assert weights(climbed) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--rungs", "v1,v9"), "--rungs: v9; there are v1, v2, v3, full"),
        (("--seeds", "1,1"), "--seeds must name each seed once"),
        (("--seeds", "one"), "invalid literal"),
        (("--folds", "9"), "9 folds do not fit the subjects of each task: mri_sr 2"),
        (("--recipe", "no-such"), "cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_no_ladder_is_one_line_on_stderr(
    dataset: PreparedSet, recipe: Path, tmp_path: Path, options: tuple[str, str], reason: str
) -> None:
    chosen = {"--recipe": recipe, "--data": dataset.folder, "--out": tmp_path / "run"}
    chosen |= {options[0]: Path(options[1])}
    done = call("ladder", *(part for option in chosen.items() for part in option))
    assert done.exit_code == 1
    assert reason in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_no_prepared_data(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = call(
        "ladder", "--recipe", recipe, "--data", tmp_path / "empty", "--out", tmp_path / "run"
    )
    assert done.exit_code == 1
    assert "no manifest.json" in done.stderr


def test_folds_hold_out_every_subject_once_and_judge_it_there(
    dataset: PreparedSet, recipe: Path, tmp_path: Path
) -> None:
    done = call(
        "ladder", "--recipe", recipe, "--data", dataset.folder, "--out", tmp_path / "run",
        "--folds", 2, "--rungs", "v1,v2", "--threads", 1, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    entry = found["evaluation"]["tasks"]["ct_denoise"]
    assert (entry["subjects"], entry["slices"]) == (2, 4)
    assert {"classical", "v1", "v2"} < set(found["evaluation"]["methods"])
    assert (tmp_path / "run" / "fold-2-of-2" / "restoration-v2" / CHECKPOINT).exists()


def many_subjects(dataset: PreparedSet) -> PreparedSet:
    """Nine CT subjects who also have simulated PET, four with T2 of whom two have T1, three T1."""
    mr, ct, pet = (dataset.items(task, "val")[0] for task in (MR, CT, PET))

    def of(item: Item, subject: str, **more: Any) -> Item:
        return dataclasses.replace(item, name=f"{item.task}-{subject}", subject=subject, **more)

    items = [of(each, f"C{n}") for n in range(9) for each in (ct, pet)]
    items += [of(mr, f"M{n}") for n in range(4)]
    items += [of(mr, f"M{n}", contrast="T1") for n in (0, 1, 4, 5, 6)]
    manifest = dataclasses.replace(dataset.manifest, items=tuple(items))
    return PreparedSet(dataset.folder, manifest)


def test_no_subject_is_in_train_and_val_of_a_fold(dataset: PreparedSet) -> None:
    folds = leave_subjects_out(many_subjects(dataset), 4)
    held = []
    for part in folds:
        train, val = ({item.subject for item in part.items(split=s)} for s in ("train", "val"))
        assert not train & val
        held += sorted(val)
    assert sorted(held) == sorted({item.subject for item in many_subjects(dataset).items()})


def test_every_fold_has_a_t2_and_its_share_of_the_rest(dataset: PreparedSet) -> None:
    for part in leave_subjects_out(many_subjects(dataset), 4):
        assert sum(item.contrast == "T2" for item in part.items(MR, "val")) == 1
        assert len(part.items(CT, "val")) in (2, 3)


def test_folds_follow_the_seed(dataset: PreparedSet) -> None:
    def held(seed: int) -> list[set[str]]:
        parts = leave_subjects_out(many_subjects(dataset), 3, seed)
        return [{item.subject for item in part.items(split="val")} for part in parts]

    assert held(0) == held(0) != held(1)


def _scaled(factor: float, dataset: PreparedSet) -> Evaluation:
    def restore(volume: Volume, item: Item) -> Volume:
        return factor * volume

    return evaluate(dataset, {"v1": restore}, tasks=[PET], baselines=False)


def test_seeds_are_averaged_slice_by_slice(dataset: PreparedSet) -> None:
    parts = [_scaled(factor, dataset) for factor in (0.8, 1.1)]
    mean = over_seeds(parts)
    for row, *own in zip(mean.scores, *(part.scores for part in parts), strict=True):
        expected = np.mean([o.scores[AMIR.id].psnr for o in own])
        assert row.scores[AMIR.id].psnr == pytest.approx(expected)
    activity = [m.measure.value for m in mean.measures if m.measure.name == "activity_vs_input"]
    assert activity == pytest.approx([-5.0], abs=1e-3)


def test_kept_scores_are_read_back_until_their_key_changes(
    dataset: PreparedSet, tmp_path: Path
) -> None:
    calls = []

    def measure() -> Evaluation:
        calls.append(1)
        return _scaled(0.8, dataset)

    path = tmp_path / "rung" / "scores.json"
    first = cached(path, {"weights": "a"}, measure)
    assert cached(path, {"weights": "a"}, measure).scores == first.scores
    assert len(calls) == 1
    cached(path, {"weights": "b"}, measure)
    assert len(calls) == 2


def test_a_ladder_is_reported_to_people(summary: dict[str, Any]) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(ladder_report(summary))
    printed = console.export_text()
    gate = "gate passed over: seed 1: codebook"
    for text in ("Steps of the ladder", "v2 → v3", gate, "2 steps of"):
        assert text in printed


def test_a_unit_knows_what_it_lacks(climbed: Path, dataset: PreparedSet) -> None:
    units = ladder.plan(short_recipe(), dataset, climbed, seeds=[0, 7], folds=None)
    assert [unit.finished("full") for unit in units] == [True, False]
    assert list(ladder.failed_gates(units[1], RUNGS)) == []
    assert run.gate_problem(climbed / "codebook").startswith("failed its gate")


def test_only_a_finished_v2_is_what_the_rungs_above_are_judged_by(
    climbed: Path, dataset: PreparedSet, tmp_path: Path
) -> None:
    recipe = short_recipe()
    model, _ = run.trained_model(climbed / "restoration-full")
    unfinished = tmp_path / "restoration-v2"
    unfinished.mkdir()
    source = climbed / "restoration-v2"
    (unfinished / CHECKPOINT).write_bytes((source / CHECKPOINT).read_bytes())

    def figures() -> set[str]:
        found = run.gate_figures(Stage.RESTORATION, recipe, dataset, model, tmp_path)
        return set(found["ct_denoise"])

    assert "v2_psnr" not in figures()
    (unfinished / run.GATE).write_bytes((source / run.GATE).read_bytes())
    assert "v2_psnr" in figures()
