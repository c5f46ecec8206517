from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from restoration import diffcode
from restoration.bundle import read_manifest
from restoration.tasks import RestorationTask
from tests.training.command import call
from tests.training.tiny import recipe_file, tiny_recipe, tiny_set
from training import run
from training.card import nameless
from training.checkpoint import CHECKPOINT
from training.cli import common
from training.slices import PreparedSet


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("tiny"), size=48)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe_file(tmp_path_factory.mktemp("recipe"), tiny_recipe())


@pytest.fixture(scope="module")
def trained(dataset: PreparedSet, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a V2 of a few steps, and Stage I."""
    out = tmp_path_factory.mktemp("trained") / "run"
    common = ("--recipe", recipe, "--data", dataset.folder, "--out", out, "--threads", 1)
    for command in (("restoration", "--variant", "v2"), ("codebook",)):
        assert call("train", *command, *common).exit_code == 0
    return out


@pytest.fixture(scope="module")
def bundled(trained: Path, dataset: PreparedSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    done = call("bundle", trained, out, "--data", dataset.folder, "--name", "tiny")
    assert done.exit_code == 0, done.stderr
    return out


def test_names_that_help_shows_are_those_of_the_network() -> None:
    assert common.VARIANTS == diffcode.VARIANTS
    assert set(common.TASKS) == {task.value for task in RestorationTask}


def test_help_is_quick_because_it_does_not_import_torch() -> None:
    probe = "import sys, training.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        ["prepare"], ["train", "codebook"], ["train", "diffusion"], ["train", "restoration"],
        ["codebook", "add"], ["codebook", "build"], ["codebook", "inspect"],
        ["ladder"], ["evaluate"], ["bundle"], ["card"], ["restore"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_explains_itself(command: list[str]) -> None:
    done = call(*command, "--help")
    assert done.exit_code == 0
    assert "Options:" in done.stdout


def test_a_missing_option_is_a_usage_error() -> None:
    assert call("train", "codebook").exit_code == 2


def test_training_says_where_it_stands_and_leaves_a_gate(trained: Path) -> None:
    record = json.loads((trained / "restoration-v2" / run.GATE).read_text())
    assert (record["stage"], record["step"]) == ("restoration", 6)
    assert (trained / "restoration-v2" / CHECKPOINT).exists()


def test_a_run_pauses_and_goes_on(dataset: PreparedSet, recipe: Path, tmp_path: Path) -> None:
    command = (
        "train", "restoration", "--variant", "v1", "--recipe", recipe,
        "--data", dataset.folder, "--out", tmp_path / "run",
    )  # fmt: skip
    paused = call(*command, "--max-seconds", 0)
    assert paused.exit_code == 0
    assert "step 1 of 6, paused" in paused.stderr
    assert "step 6 of 6, finished" in call(*command).stderr


def test_a_stage_refuses_to_build_upon_a_failed_gate(
    trained: Path, dataset: PreparedSet, recipe: Path
) -> None:
    command = ("train", "diffusion", "--recipe", recipe, "--data", dataset.folder, "--out", trained)
    refused = call(*command)
    assert refused.exit_code == 1
    assert "failed its gate" in refused.stderr
    assert not (trained / "diffusion").exists()
    assert call(*command, "--force").exit_code == 0


def test_a_stage_refuses_to_start_before_the_one_it_needs(
    dataset: PreparedSet, recipe: Path, tmp_path: Path
) -> None:
    done = call(
        "train", "restoration", "--recipe", recipe, "--data", dataset.folder, "--out", tmp_path
    )
    assert done.exit_code == 1
    assert "train diffusion first" in done.stderr


def test_v2_has_no_codebook_to_train(dataset: PreparedSet, recipe: Path, tmp_path: Path) -> None:
    done = call(
        "train", "codebook", "--variant", "v2", "--recipe", recipe,
        "--data", dataset.folder, "--out", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 1
    assert "v2 has no codebook stage" in done.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("--data", "nowhere"), "no manifest.json"),
        (("--recipe", "nothing.toml"), "cannot be read"),
        (("--steps", "1"), "stage1.ae_warmup"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_trained_is_one_line_on_stderr(
    dataset: PreparedSet, recipe: Path, tmp_path: Path, change: tuple[str, str], reason: str
) -> None:
    options = {"--data": dataset.folder, "--recipe": recipe, "--out": tmp_path / "run"}
    options |= {change[0]: Path(change[1])}
    flat = [part for option in options.items() for part in option]
    done = call("train", "codebook", *flat)
    assert done.exit_code == 1
    assert reason in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_prepare_makes_a_folder_once(packs: Path, tmp_path: Path) -> None:
    command = ("prepare", packs, "--out", tmp_path / "set", "--task", "mri_sr")
    done = call(*command)
    assert done.exit_code == 0, done.stderr
    assert {item.task for item in PreparedSet.open(tmp_path / "set").items()} == {"mri_sr"}
    again = call(*command)
    assert again.exit_code == 1
    assert "nothing is overwritten" in again.stderr


def test_codebooks_are_inspected(trained: Path, dataset: PreparedSet) -> None:
    command = ("codebook", "inspect", trained, "--data", dataset.folder, "--tokens", 100)
    assert "perplexity" in call(*command).stdout
    found = json.loads(call(*command, "--json").stdout)
    assert set(found) == {"mri_sr", "ct_denoise", "pet_synthesis"}
    assert found["mri_sr"]["tokens"] == 100
    assert len(found["mri_sr"]["relative_error"]) == 2


def test_a_codebook_is_built_anew_in_a_new_run(
    trained: Path, dataset: PreparedSet, tmp_path: Path
) -> None:
    command = (
        "codebook", "build", trained, "--data", dataset.folder, "--out", tmp_path / "new",
        "--task", "ct_denoise", "--tokens", 100,
    )  # fmt: skip
    done = call(*command)
    assert done.exit_code == 0, done.stderr
    before, _ = run.trained_model(trained / "codebook")
    after, _ = run.trained_model(tmp_path / "new" / "codebook")
    changed = {
        name: (before.state_dict()[name] - tensor).abs().sum().item() > 0
        for name, tensor in after.state_dict().items()
        if name.startswith(("bank.", "decoder.", "vq_encoder."))
    }
    assert {name for name, moved in changed.items() if moved} == {"bank.weight"}
    assert before.bank is not None
    assert after.bank is not None
    assert (before.bank.weight[0] == after.bank.weight[0]).all()
    assert (tmp_path / "new" / "codebook" / run.GATE).exists()
    assert "nothing is overwritten" in call(*command).stderr


def test_a_task_is_added_to_a_trained_bank(dataset: PreparedSet, tmp_path: Path) -> None:
    two = tiny_recipe(data={"tasks": ["mri_sr", "ct_denoise"]}, stage1={"steps": 3})
    common = ("--recipe", recipe_file(tmp_path, two), "--data", dataset.folder)
    assert call("train", "codebook", *common, "--out", tmp_path / "two").exit_code == 0
    command = (
        "codebook", "add", tmp_path / "two", "--data", dataset.folder, "--out", tmp_path / "three",
        "--task", "pet_synthesis", "--tokens", 100,
    )  # fmt: skip
    done = call(*command)
    assert done.exit_code == 0, done.stderr
    before, _ = run.trained_model(tmp_path / "two" / "codebook")
    after, extended = run.trained_model(tmp_path / "three" / "codebook")
    assert extended.data.tasks == ("mri_sr", "ct_denoise", "pet_synthesis")
    for name, tensor in before.state_dict().items():
        kept = after.state_dict()[name]
        if name == "bank.weight":
            assert torch.equal(kept[:2], tensor[:2])
            assert not torch.equal(kept[2], tensor[2])
        elif name.startswith(("vq_encoder.", "decoder.")):
            assert torch.equal(kept, tensor)
    old, new = (
        json.loads((tmp_path / name / "codebook" / run.GATE).read_text())["figures"]
        for name in ("two", "three")
    )
    assert {task: new[task] for task in old} == old
    assert {"usage", "perplexity", "reconstruction_psnr"} <= set(new["pet_synthesis"])
    # The next stage starts from the bank of three tasks.
    whole = recipe_file(tmp_path, tiny_recipe(stage1={"steps": 3}, stage2={"steps": 1}))
    going_on = ("--recipe", whole, "--data", dataset.folder, "--out", tmp_path / "three")
    assert call("train", "diffusion", *going_on, "--force").exit_code == 0
    again = call(*command[:-2], "--out", tmp_path / "four", "--task", "mri_sr")
    assert "has a codebook for mri_sr" in again.stderr
    assert "nothing is overwritten" in call(*command).stderr


def test_a_bundle_says_what_it_was_trained_on(bundled: Path) -> None:
    manifest = read_manifest(bundled)
    assert (manifest.name, manifest.variant, manifest.licence) == ("tiny", "v2", "Apache-2.0")
    assert manifest.training_data == ({"name": "phantom", "licence": "Apache-2.0"},)
    assert manifest.degradation["mri_sr"]["name"] == "kspace-truncation"
    assert manifest.domain["ct_denoise"].modality == "CT"
    assert manifest.domain["ct_denoise"].pixel_spacing_mm == (1.0, 1.0)


def test_a_bundle_carries_its_evaluation_and_its_card(
    trained: Path, dataset: PreparedSet, bundled: Path, tmp_path: Path
) -> None:
    shown = call("evaluate", "--data", dataset.folder, "--bundle", bundled, "--json")
    assert shown.exit_code == 0, shown.stderr
    (tmp_path / "evaluation.json").write_text(shown.stdout)
    (tmp_path / "card.md").write_text("# Tiny\n")
    done = call(
        "bundle", trained, tmp_path / "out", "--data", dataset.folder,
        "--metrics", tmp_path / "evaluation.json", "--card", tmp_path / "card.md",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert read_manifest(tmp_path / "out").metrics == nameless(json.loads(shown.stdout))
    assert (tmp_path / "out" / "MODEL_CARD.md").read_text() == "# Tiny\n"
    # The figures are those of these weights.
    assert read_manifest(tmp_path / "out").sha256 == read_manifest(bundled).sha256


def test_the_domain_may_be_narrowed_by_hand(
    trained: Path, dataset: PreparedSet, tmp_path: Path
) -> None:
    (tmp_path / "domain.toml").write_text("[ct_denoise]\nslice_thickness_mm = [0.5, 5.0]\n")
    done = call(
        "bundle", trained, tmp_path / "out", "--data", dataset.folder,
        "--domain", tmp_path / "domain.toml",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    domain = read_manifest(tmp_path / "out").domain["ct_denoise"]
    assert (domain.slice_thickness_mm, domain.modality) == ((0.5, 5.0), "CT")


def test_a_run_without_a_restoration_stage_makes_no_bundle(
    dataset: PreparedSet, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    done = call("bundle", tmp_path / "run", tmp_path / "out", "--data", dataset.folder)
    assert done.exit_code == 1
    assert "holds no restoration stage" in done.stderr
    assert not (tmp_path / "out").exists()


def test_evaluate_prints_a_table_and_writes_its_files(
    dataset: PreparedSet, bundled: Path, tmp_path: Path
) -> None:
    done = call(
        "evaluate", "--data", dataset.folder, "--bundle", bundled, "--task", "ct_denoise",
        "--csv", tmp_path / "slices.csv", "--figures", tmp_path / "figures",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "restored" in done.stdout
    assert (tmp_path / "slices.csv").exists()
    assert (tmp_path / "figures" / "ct_denoise.png").exists()


def test_evaluate_takes_a_folder_of_packs(packs: Path, bundled: Path) -> None:
    done = call(
        "evaluate", "--data", packs, "--bundle", bundled, "--task", "mri_sr", "--json",
        "--no-classical",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert set(summary["tasks"]) == {"mri_sr"}
    assert {"slices", "subjects", "input", "restored"} <= set(summary["tasks"]["mri_sr"])
    assert "classical" not in summary["tasks"]["mri_sr"]


def test_an_array_is_restored(bundled: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.npy", tmp_path / "out.npy"
    np.save(source, np.full((2, 20, 24), 40.0, np.float32))
    command = ("restore", source, out, "--task", "ct_denoise", "--bundle", bundled)
    done = call(*command)
    assert done.exit_code == 0, done.stderr
    restored = np.load(out)
    assert (restored.shape, restored.dtype) == ((2, 20, 24), np.float32)
    again = call(*command)
    assert again.exit_code == 1
    assert "nothing is overwritten" in again.stderr


def test_a_nifti_image_is_restored_in_place(bundled: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.nii.gz", tmp_path / "out.nii.gz"
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.ones((24, 20, 2), np.float32), affine), source)
    done = call("restore", source, out, "--task", "pet_synthesis", "--bundle", bundled)
    assert done.exit_code == 0, done.stderr
    image = nibabel.load(out)
    assert image.shape == (24, 20, 2)
    np.testing.assert_allclose(image.affine, affine)


def test_an_image_with_a_nan_is_refused(bundled: Path, tmp_path: Path) -> None:
    volume = np.zeros((3, 16, 16), np.float32)
    volume[1, 2, 3] = np.nan
    np.save(tmp_path / "in.npy", volume)
    done = call(
        "restore", tmp_path / "in.npy", tmp_path / "out.npy", "--task", "mri_sr",
        "--bundle", bundled,
    )  # fmt: skip
    assert done.exit_code == 1
    assert "Slice 1" in done.stderr
    assert not (tmp_path / "out.npy").exists()


def test_evaluate_puts_the_rungs_of_a_run_beside_a_bundle(
    dataset: PreparedSet, trained: Path, bundled: Path
) -> None:
    done = call(
        "evaluate", "--data", dataset.folder, "--bundle", bundled, "--run", trained,
        "--task", "ct_denoise", "--no-classical", "--baseline", "v2", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert list(summary["methods"]) == ["input", "tiny", "v2"]
    entry = summary["tasks"]["ct_denoise"]
    # The bundle was made of this very rung.
    assert entry["methods"]["tiny"] == entry["methods"]["v2"] == entry["restored"]
    assert entry["differences"]["tiny"]["psnr"]["mean"] == 0


def _not_yet(*_: object) -> None:
    raise AssertionError("methods are tuned although the evaluation cannot be")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--data", "empty"), "empty holds no image series"),
        (("--bundle", "no-such-bundle"), "No built-in bundle is called"),
        (("--bundle", "altered"), "the manifest says"),
        (("--run", "empty"), "holds no restoration stage"),
        (("--baseline", "v9"), "--baseline v9: no such method; there are input"),
        (("--csv", "there.csv"), "there.csv exists; nothing is overwritten"),
        (("--figures", "figures"), "ct_denoise.png exists; nothing is overwritten"),
    ],
    ids=[
        "empty-folder",
        "unknown-bundle",
        "altered-weights",
        "empty-run",
        "baseline",
        "csv",
        "png",
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_work(
    dataset: PreparedSet,
    bundled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, str],
    reason: str,
) -> None:
    monkeypatch.setattr("training.evaluate.tuned_methods", _not_yet)
    (tmp_path / "empty").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "ct_denoise.png").write_bytes(b"kept")
    (tmp_path / "there.csv").write_bytes(b"kept")
    shutil.copytree(bundled, tmp_path / "altered")
    with (tmp_path / "altered" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    name, value = options
    paths = ("--data", "--run", "--csv", "--figures")
    inside = name in paths or value == "altered"
    chosen = {"--data": dataset.folder, "--task": "ct_denoise", "--bundle": bundled}
    chosen |= {name: tmp_path / value if inside else value}
    done = call("evaluate", *(part for option in chosen.items() for part in option))
    assert done.exit_code == 1
    assert reason in done.stderr
    assert done.stdout == ""
    assert (tmp_path / "there.csv").read_bytes() == b"kept"
    assert (tmp_path / "figures" / "ct_denoise.png").read_bytes() == b"kept"


def test_an_image_with_a_nan_is_not_evaluated(
    dataset: PreparedSet, bundled: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "prepared"
    shutil.copytree(dataset.folder, broken)
    volume = np.load(broken / "val-ct_denoise.lq.npy")
    volume[1, 2, 3] = np.nan
    np.save(broken / "val-ct_denoise.lq.npy", volume)
    done = call("evaluate", "--data", broken, "--bundle", bundled, "--no-classical")
    assert done.exit_code == 1
    assert "val-ct_denoise.lq.npy: slice 1 holds a value that is not finite" in done.stderr
    assert done.stdout == ""
