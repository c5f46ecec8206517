from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from restoration.tasks import RestorationTask
from tests.training.tiny import tiny_set
from training import pictures, report
from training.evaluate import checked_pair, evaluate, prepared, tuned_methods
from training.evaluation import Evaluation, Volume
from training.manifest import Item, PreparedManifest
from training.metrics import HIGHEST_PSNR, PROTOCOL, PROTOCOLS
from training.slices import PreparedSet

CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("tiny"), size=48)


def unchanged(volume: Volume, item: Item) -> Volume:
    return volume


MODELS = {"restored": unchanged}


@pytest.fixture(scope="module")
def evaluation(dataset: PreparedSet) -> Evaluation:
    return evaluate(dataset, MODELS, methods=tuned_methods(dataset))


def test_a_model_that_does_nothing_scores_as_its_input(evaluation: Evaluation) -> None:
    for task, entry in evaluation.to_dict()["tasks"].items():
        assert entry["restored"] == entry["input"], task
        assert (entry["slices"], entry["subjects"]) == (2, 1)


def test_a_model_that_knows_the_truth_reaches_the_highest_score(dataset: PreparedSet) -> None:
    def oracle(volume: Volume, item: Item) -> Volume:
        return np.asarray(dataset.pair(item)[1], np.float32)

    tasks = evaluate(dataset, {"restored": oracle}).to_dict()["tasks"]
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
    scores = [row.scores["amir/1"].rmse for row in evaluation.select(PET, "input")]
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
    entry = evaluate(PreparedSet.open(tmp_path), MODELS, tasks=[PET]).to_dict()["tasks"]
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
        found = evaluate(both, MODELS, tasks=[MR], **options).to_dict()
        return int(found["tasks"]["mri_sr"]["slices"])

    assert (slices(), slices(contrasts=())) == (2, 4)


def test_a_split_without_items_is_refused(dataset: PreparedSet) -> None:
    with pytest.raises(ValueError, match="no test items of mri_sr"):
        evaluate(dataset, MODELS, split="test")


def test_progress_counts_items(dataset: PreparedSet) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(
        dataset, MODELS, tasks=[CT], progress=lambda done, total, _: seen.append((done, total))
    )
    assert seen == [(1, 1)]


def test_packs_are_prepared_for_as_long_as_they_are_needed(packs: Path) -> None:
    with prepared(packs, "val") as dataset:
        folder = dataset.folder
        assert {item.split for item in dataset.items()} == {"val"}
        assert {item.task for item in dataset.items()} == {task.value for task in RestorationTask}
    assert not folder.exists()


def printed(evaluation: Evaluation, baseline: str | None = None) -> str:
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(report.evaluation_report(evaluation.to_dict(baseline)))
    return console.export_text()


def test_each_row_of_the_table_names_its_protocol_and_its_method(evaluation: Evaluation) -> None:
    lines = printed(evaluation).splitlines()
    for protocol in PROTOCOLS:
        for method in ("input", "classical", "restored"):
            assert any(protocol.id in line and method in line for line in lines), protocol.id
    assert {"CT denoising, HU", "average"} <= {
        cell.strip() for line in lines for cell in line.split("┃")
    }


def test_two_models_stand_in_one_table_and_the_first_is_the_restored(dataset: PreparedSet) -> None:
    def halved(volume: Volume, item: Item) -> Volume:
        return 0.5 * volume

    models = {"v1": unchanged, "v2": halved}
    found = evaluate(dataset, models, labels={"v1": "V1, backbone"}, tasks=[PET])
    entry = found.to_dict("v1")["tasks"]["pet_synthesis"]
    assert entry["restored"] == entry["methods"]["v1"] == entry["input"]
    assert entry["methods"]["v2"]["psnr"] != entry["methods"]["v1"]["psnr"]
    quantities = entry["quantities"]["v2"]
    assert quantities["activity_vs_input"]["mean"] == pytest.approx(-50.0)
    assert "V1, backbone" in printed(found, "v1")


def test_a_difference_of_few_subjects_lists_them_and_claims_nothing(
    evaluation: Evaluation,
) -> None:
    entry = evaluation.to_dict("classical")["tasks"]["ct_denoise"]["differences"]["restored"]
    assert set(entry) == {"psnr", "ssim", "rmse"}
    assert "interval_95" not in entry["psnr"]
    assert not entry["psnr"]["significant"]
    assert entry["psnr"]["subjects"] == {"val-ct_denoise": pytest.approx(entry["psnr"]["mean"])}
    text = printed(evaluation, "classical")
    assert "no interval (val-ct_denoise" in text
    assert "no significance is claimed" in text


def test_a_difference_is_that_of_the_tables_figures(evaluation: Evaluation) -> None:
    for entry in evaluation.to_dict("classical")["tasks"].values():
        for figure, found in entry["differences"]["restored"].items():
            apart = entry["restored"][figure] - entry["classical"][figure]
            assert found["mean"] == pytest.approx(apart)


def test_an_average_needs_every_task(evaluation: Evaluation) -> None:
    summary = evaluation.to_dict()
    expected = np.mean([entry["input"]["psnr"] for entry in summary["tasks"].values()])
    assert summary["average"]["input"]["psnr"] == pytest.approx(expected)


def test_the_classical_method_is_tuned_on_training_slices_alone(dataset: PreparedSet) -> None:
    held_out = [item for item in dataset.manifest.items if item.split == "val"]
    manifest = dataclasses.replace(dataset.manifest, items=tuple(held_out))
    assert tuned_methods(PreparedSet(dataset.folder, manifest)) == {}
    tuned = tuned_methods(dataset, [CT])
    assert list(tuned) == [(CT, True)]  # the phantoms count as simulated
    method = tuned[CT, True]
    assert method.tried[method.label] == max(method.tried.values())


def test_only_the_central_slices_may_be_judged(dataset: PreparedSet) -> None:
    summary = evaluate(dataset, MODELS, central=1).to_dict()
    assert {entry["slices"] for entry in summary["tasks"].values()} == {1}
    assert summary["slices_per_volume"] == 1


def test_the_csv_has_a_line_for_each_slice_method_and_protocol(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    path = tmp_path / "slices.csv"
    report.write_csv(evaluation, path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS
    amir = [row for row in rows if row["protocol"] == "amir/1"]
    assert len(amir) == 3 * 2 * 3
    mean = np.mean(
        [float(r["psnr"]) for r in amir if (r["task"], r["method"]) == ("mri_sr", "input")]
    )
    expected = evaluation.to_dict()["tasks"]["mri_sr"]["input"]["psnr"]
    assert mean == pytest.approx(expected, abs=1e-4)
    with pytest.raises(FileExistsError):
        report.write_csv(evaluation, path)


def test_a_picture_is_drawn_for_each_task_with_every_method(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    written = pictures.write_pictures(evaluation, tmp_path / "figures")
    assert [path.name for path in written] == [
        "mri_sr.png", "ct_denoise.png", "pet_synthesis.png"
    ]  # fmt: skip
    assert all(
        path in pictures.picture_paths(list(RestorationTask), path.parent) for path in written
    )
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert all(set(s.images) == {"input", "classical", "restored"} for s in evaluation.samples)


def _with(dataset: PreparedSet, folder: Path, **change: Any) -> PreparedSet:
    """A copy of the CT validation item in a folder of its own, with changed fields."""
    item = dataset.items(CT, "val")[0]
    for name in (item.lq, item.hq):
        (folder / name).write_bytes((dataset.folder / name).read_bytes())
    manifest = PreparedManifest(0, {}, (dataclasses.replace(item, **change),))
    return PreparedSet(folder, manifest)


def _nan(path: Path) -> None:
    volume = np.load(path)
    volume[1, 2, 3] = np.nan
    np.save(path, volume)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def _picture(path: Path) -> None:
    np.save(path, np.load(path).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("damage", "change", "reason"),
    [
        (_nan, {}, "slice 1 holds a value that is not finite"),
        (_cut, {}, "val-ct_denoise cannot be read"),
        (_picture, {}, "uint8 is a picture, not HU"),
        (lambda _: None, {"task": "mri_sr"}, "cannot be a.u. of MR super-resolution"),
        (lambda _: None, {"sha256": {"lq": "0" * 64}}, "the manifest says 0000"),
    ],
    ids=["nan", "cut", "8-bit", "ct-called-mr", "changed"],
)
def test_an_item_that_is_no_such_image_is_refused_by_name(
    dataset: PreparedSet,
    tmp_path: Path,
    damage: Callable[[Path], None],
    change: dict[str, Any],
    reason: str,
) -> None:
    broken = _with(dataset, tmp_path, **change)
    item = broken.items()[0]
    damage(tmp_path / item.lq)
    with pytest.raises(ValueError, match="val-ct_denoise") as caught:
        checked_pair(broken, item)
    assert reason in str(caught.value)
