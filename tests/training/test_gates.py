"""Calibrate, judge and harm, from a prepared folder to the tables, by the commands."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from restoration.bundle import read_manifest, write_bundle
from restoration.diffcode import DiffCode, DiffCodeConfig
from restoration.fidelity import Measured
from restoration.restorer import Restorer
from restoration.tasks import RestorationTask, spec
from tests.training.command import call
from training.calibrate import pseudonym
from training.manifest import Item, PreparedManifest
from training.phantoms import body_pet, chest_ct

pytestmark = pytest.mark.slow

TASKS = (RestorationTask.CT_DENOISE, RestorationTask.PET_SYNTHESIS)
SPACING = {TASKS[0]: (3.0, 0.8, 0.8), TASKS[1]: (3.3, 4.0, 4.0)}


def prepared(folder: Path, splits: dict[str, str]) -> Path:
    """One CT and one PET phantom of each subject, white noise as degradation."""
    folder.mkdir()
    items = []
    for number, (subject, split) in enumerate(splits.items()):
        for task in TASKS:
            make, noise = (chest_ct, 40.0) if task is TASKS[0] else (body_pet, 0.3)
            hq = make(slices=5, size=64, seed=number).volume.astype(np.float32)
            lq = hq + np.random.default_rng(number).normal(0, noise, hq.shape).astype(np.float32)
            name = f"{task.value}-{subject}"
            hashes = {}
            for kind, volume in (("hq", hq), ("lq", lq)):
                np.save(folder / f"{name}.{kind}.npy", volume)
                data = (folder / f"{name}.{kind}.npy").read_bytes()
                hashes[kind] = hashlib.sha256(data).hexdigest()
            items.append(
                Item(
                    name, task.value, split, subject, "phantom", "none", spec(task).units,
                    SPACING[task], f"{name}.hq.npy", f"{name}.lq.npy", hq.shape, True, hashes,
                )
            )  # fmt: skip
    PreparedManifest(0, {}, tuple(items)).write(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = DiffCodeConfig(channels=(4, 6, 8, 8), blocks=(1, 1, 1, 1), tlc_train=32, variant="v2")
    model = DiffCode(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("bundle") / "small"
    fields: dict[str, Any] = {
        "name": "small", "version": "1", "licence": "none", "tasks": [t.value for t in TASKS],
    }  # fmt: skip
    write_bundle(folder, model, fields, "# Card\n")
    return folder


@pytest.fixture(scope="module")
def calibrated(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The prepared folder and the bundle that was calibrated on it."""
    root = tmp_path_factory.mktemp("calibrated")
    subjects = {f"train{i}": "train" for i in range(3)} | {f"val{i}": "val" for i in range(4)}
    data = prepared(root / "data", subjects)
    done = call(
        "calibrate", bundle, root / "out", "--data", data, "--plots", root / "plots",
        "--least-subjects", 2,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {path.name for path in (root / "plots").iterdir()} == {
        "ct_denoise.png", "pet_synthesis.png",
    }  # fmt: skip
    return data, root / "out"


def test_levels_are_learnt_from_half_of_the_validation_subjects_and_the_trained_ones(
    bundle: Path, calibrated: tuple[Path, Path]
) -> None:
    _, folder = calibrated
    manifest = read_manifest(folder)
    assert manifest.sha256 == read_manifest(bundle).sha256
    for made in manifest.calibration.values():
        assert made.basis["subjects"] == 5
        assert made.basis["kept_out"] == 2
        held = {pseudonym(f"val{i}") for i in range(4)} & set(made.basis["learnt_from"])
        assert len(held) == 2
        assert {"structure", "gain", "noise_level"} <= set(made.levels)
        assert "idempotence" in set(made.levels) | set(made.basis["program_levels"])
        assert made.inputs is not None
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "## Gates" in card
    assert "val0" not in card + json.dumps(manifest.to_dict())


def test_subjects_of_their_own_split_are_learnt_from_alone(bundle: Path, tmp_path: Path) -> None:
    splits = {f"train{i}": "train" for i in range(3)} | {"e": "val"}
    splits |= dict.fromkeys("bcd", "calibration")
    data = prepared(tmp_path / "data", splits)
    done = call("calibrate", bundle, tmp_path / "out", "--data", data, "--task", "ct_denoise")
    assert done.exit_code == 0, done.output
    (made,) = read_manifest(tmp_path / "out").calibration.values()
    assert set(made.basis["learnt_from"]) == {pseudonym(name) for name in "bcd"}
    # three are too few to learn from, and it is said wherever somebody may look
    assert made.levels == {}
    assert made.basis["program_levels"]["gain"] == 3
    assert "fewer than 19: the levels of the program stay" in done.output
    volume = tmp_path / "data" / "ct_denoise-e.lq.npy"
    judged = call("gates", volume, volume, "--task", "ct_denoise", "--bundle", tmp_path / "out")
    assert "levels not calibrated: defaults" in judged.output


def test_the_bench_uses_subjects_that_were_not_learnt_from(
    calibrated: tuple[Path, Path], tmp_path: Path
) -> None:
    data, folder = calibrated
    done = call(
        "harm", "--bundle", folder, "--data", data, "--json", tmp_path / "harm.json",
        "--series", 1, "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "harm.json").read_text(encoding="utf-8"))
    assert found["false_alarms"]["ct_denoise"]["total"] == 10  # two subjects of five slices
    assert found["warnings"]["ct_denoise"]["hits"] >= found["false_alarms"]["ct_denoise"]["hits"]
    rows = {(row["task"], row["fault"], row["size"]): row for row in found["faults"]}
    offset = rows["ct_denoise", "HU offset", "10 HU"]["at_false_alarms"]
    assert offset["hits"] == offset["total"] == 10
    assert ("pet_synthesis", "slices swapped", "3 apart") in rows
    assert any(fault == "wrong expert" for _, fault, _ in rows)
    assert "| ct_denoise | HU offset | 10 HU | 10 |" in done.output


def test_slices_without_a_fault_are_judged_by_every_gate_of_the_node(
    calibrated: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, probe = list[list[int]](), Restorer.probe

    def counted(self: Restorer, *given: Any) -> dict[str, Measured]:
        asked.append(list(given[3]))
        return probe(self, *given)

    monkeypatch.setattr(Restorer, "probe", counted)
    data, folder = calibrated
    done = call(
        "harm", "--bundle", folder, "--data", data, "--series", 1, "--task", "ct_denoise",
        "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    # Two subjects of a CT and two of a PET, of five slices each; the middle one goes again.
    assert asked == [[2]] * 4


def test_a_bundle_without_levels_has_no_bench(bundle: Path, calibrated: tuple[Path, Path]) -> None:
    done = call("harm", "--bundle", bundle, "--data", calibrated[0])
    assert done.exit_code == 1
    assert "diffcode calibrate" in done.output


def test_a_pair_of_files_is_judged(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    x = np.load(calibrated[0] / "ct_denoise-val0.lq.npy")
    for name, volume in (("x", x), ("same", x), ("moved", x + 20)):
        np.save(tmp_path / f"{name}.npy", volume)
    words = ("--task", "ct_denoise", "--bundle", calibrated[1], "--spacing", 3, 0.8, 0.8)
    bad = call("gates", tmp_path / "x.npy", tmp_path / "moved.npy", *words, "--json")
    assert bad.exit_code == 1
    found = json.loads(bad.output)
    assert found["calibrated"]
    gates = {gate["name"]: gate for gate in found["gates"]}
    assert gates["low_frequency"]["verdict"] == "fail"
    assert gates["routing"]["verdict"] == "not_applicable"
    text = call("gates", tmp_path / "x.npy", tmp_path / "same.npy", *words).output
    assert "levels calibrated for the model" in text
    # People are told slices from 1, as the node tells them, and no unit of what has none.
    (line,) = (line for line in text.splitlines() if line.startswith("continuity "))
    assert line.endswith(f" slice {gates['continuity']['worst_slice'] + 1}")
    assert re.search(r"\.\.\. [\d.e-]+ +slice", line)
