from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from restoration.diffcode import DiffCode
from restoration.tasks import RestorationTask
from tests.training.tiny import tiny_recipe, tiny_set
from training import report
from training.evaluate import (
    Evaluation,
    Volume,
    evaluate,
    evaluation_pairs,
    prepared,
    stage_figures,
    tuned_methods,
)
from training.manifest import Item
from training.metrics import HIGHEST_PSNR, PROTOCOL
from training.slices import PreparedSet
from training.stages import Stage

CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("tiny"), size=48)


def unchanged(volume: Volume, item: Item) -> Volume:
    return volume


@pytest.fixture(scope="module")
def evaluation(dataset: PreparedSet) -> Evaluation:
    return evaluate(dataset, unchanged, methods=tuned_methods(dataset))


def test_a_model_that_does_nothing_scores_as_its_input(evaluation: Evaluation) -> None:
    for task, entry in evaluation.to_dict()["tasks"].items():
        assert entry["restored"] == entry["input"], task
        assert (entry["slices"], entry["subjects"]) == (2, 1)


def test_a_model_that_knows_the_truth_reaches_the_highest_score(dataset: PreparedSet) -> None:
    def oracle(volume: Volume, item: Item) -> Volume:
        return np.asarray(dataset.pair(item)[1], np.float32)

    tasks = evaluate(dataset, oracle).to_dict()["tasks"]
    assert set(tasks) == {"mri_sr", "ct_denoise", "pet_synthesis"}
    for entry in tasks.values():
        assert entry["restored"] == {"psnr": HIGHEST_PSNR, "ssim": pytest.approx(1.0), "rmse": 0.0}
        assert "classical" not in entry


def test_the_protocol_and_the_classical_method_are_named(evaluation: Evaluation) -> None:
    summary = json.loads(json.dumps(evaluation.to_dict()))
    assert (summary["protocol"], summary["split"]) == (PROTOCOL, "val")
    entry = summary["tasks"]["ct_denoise"]["classical"]
    assert entry["method"]
    assert entry["psnr"] > summary["tasks"]["ct_denoise"]["input"]["psnr"]


def test_the_mean_is_over_slices(evaluation: Evaluation) -> None:
    scores = [row.score.rmse for row in evaluation.select(PET, "input")]
    entry = evaluation.to_dict()["tasks"]["pet_synthesis"]
    assert entry["input"]["rmse"] == pytest.approx(sum(scores) / 2)


def test_real_and_simulated_references_are_reported_apart(
    dataset: PreparedSet, tmp_path: Path
) -> None:
    manifest = json.loads((dataset.folder / "manifest.json").read_text())
    for item in manifest["items"]:
        for kind in ("hq", "lq"):
            (tmp_path / item[kind]).symlink_to(dataset.folder / item[kind])
    real = [
        item | {"name": "real", "subject": "real", "simulated": False}
        for item in manifest["items"]
        if (item["task"], item["split"]) == ("pet_synthesis", "val")
    ]
    manifest["items"] += real
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    entry = evaluate(PreparedSet.open(tmp_path), unchanged, tasks=[PET]).to_dict()["tasks"]
    groups = entry["pet_synthesis"]["groups"]
    assert {name: group["slices"] for name, group in groups.items()} == {"real": 2, "simulated": 2}
    assert entry["pet_synthesis"]["subjects"] == 2


def test_mr_is_judged_on_t2_unless_asked(dataset: PreparedSet, tmp_path: Path) -> None:
    manifest = json.loads((dataset.folder / "manifest.json").read_text())
    for item in manifest["items"]:
        for kind in ("hq", "lq"):
            (tmp_path / item[kind]).symlink_to(dataset.folder / item[kind])
    other = [i | {"name": "t1", "contrast": "T1"} for i in manifest["items"] if i["contrast"]]
    manifest["items"] += other
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    both = PreparedSet.open(tmp_path)

    def slices(**options: Any) -> int:
        found = evaluate(both, unchanged, tasks=[MR], **options).to_dict()
        return int(found["tasks"]["mri_sr"]["slices"])

    assert (slices(), slices(contrasts=())) == (2, 4)


def test_a_split_without_items_is_refused(dataset: PreparedSet) -> None:
    with pytest.raises(ValueError, match="no test items of mri_sr"):
        evaluate(dataset, unchanged, split="test")


def test_progress_counts_items(dataset: PreparedSet) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(
        dataset, unchanged, tasks=[CT], progress=lambda done, total, _: seen.append((done, total))
    )
    assert seen == [(1, 1)]


def test_the_evaluation_slices_are_evenly_spread(dataset: PreparedSet) -> None:
    pairs = list(evaluation_pairs(dataset, [CT, MR], limit=1))
    assert [(pair.task, pair.index) for pair in pairs] == [(CT, 0), (MR, 0)]
    assert len(list(evaluation_pairs(dataset, [CT]))) == 2


def test_packs_are_prepared_for_as_long_as_they_are_needed(packs: Path) -> None:
    with prepared(packs, "val") as dataset:
        folder = dataset.folder
        assert {item.split for item in dataset.items()} == {"val"}
        assert {item.task for item in dataset.items()} == {task.value for task in RestorationTask}
    assert not folder.exists()


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.value)
def test_the_figures_of_a_stage_are_those_its_gate_reads(
    stage: Stage, dataset: PreparedSet
) -> None:
    torch.manual_seed(0)
    model = DiffCode(tiny_recipe().arch, with_vq_encoder=True)
    pairs = list(evaluation_pairs(dataset, list(RestorationTask)))
    figures = stage_figures(stage, model, pairs)
    wanted = {
        Stage.CODEBOOK: {"input_psnr", "reconstruction_psnr"},
        Stage.DIFFUSION: {"input_psnr", "reference_psnr", "latent_l1", "plain_latent_l1"},
        Stage.RESTORATION: {"input_psnr", "restored_psnr"},
    }
    assert {task: set(row) for task, row in figures.items()} == dict.fromkeys(
        [task.value for task in RestorationTask], wanted[stage]
    )
    assert all(np.isfinite(value) for row in figures.values() for value in row.values())
    assert stage_figures(stage, model, pairs) == figures


def test_rungs_are_compared_on_the_same_slices(dataset: PreparedSet) -> None:
    model = DiffCode(tiny_recipe().with_variant("v2").arch)
    pairs = evaluation_pairs(dataset, [CT])
    row = stage_figures(Stage.RESTORATION, model, pairs, {"v2": model})["ct_denoise"]
    assert row["v2_psnr"] == row["restored_psnr"]


def test_the_table_has_a_row_for_each_method(evaluation: Evaluation) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.evaluation_table(evaluation.to_dict()))
    text = console.export_text()
    for word in ("input", "restored", "classical", "average", "amir/1", "CT denoising, HU"):
        assert word in text


def test_the_csv_has_a_line_for_each_slice_and_method(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    path = tmp_path / "slices.csv"
    report.write_csv(evaluation, path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(evaluation.scores) == 3 * 2 * 3
    assert tuple(rows[0]) == report.COLUMNS
    with pytest.raises(FileExistsError):
        report.write_csv(evaluation, path)


def test_a_picture_is_drawn_for_each_task(dataset: PreparedSet, tmp_path: Path) -> None:
    written = report.write_figures(
        dataset, unchanged, tuned_methods(dataset, [CT]), [CT, PET], "val", tmp_path / "figures"
    )
    assert [path.name for path in written] == ["ct_denoise.png", "pet_synthesis.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
