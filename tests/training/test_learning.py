"""Each stage learns on tiny phantoms, alone and as two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.tiny import recipe_file, tiny_recipe, tiny_set
from training import run
from training.journal import LOG
from training.loop import Limits
from training.slices import PreparedSet
from training.stages import Stage
from training.validation import evaluation_pairs, stage_figures

CPU = torch.device("cpu")
LONG = {"steps": 80, "lr": 5e-3, "log_every": 20}
RECIPE = tiny_recipe(
    arch={"channels": [8, 8, 16, 16], "latent_dim": 16, "codes": 32},
    stage1=LONG | {"ae_warmup": 40, "init_tokens": 400, "restart_every": 20},
    stage2=LONG | {"steps": 60},
    stage3=LONG | {"steps": 160, "lr_final": 1e-4, "clip": 0.1},
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("phantoms"), size=48)


@pytest.fixture(scope="module")
def trained(dataset: PreparedSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its three stages done, one after the other."""
    out = tmp_path_factory.mktemp("run")
    for stage in Stage:
        run.train(stage, RECIPE, dataset.folder, out, device=CPU, limits=Limits(), force=True)
    return out


def test_the_autoencoder_learns_and_its_codes_are_used(trained: Path) -> None:
    lines = [line for line in log(trained / "codebook") if "l1" in line]
    warm_up, quantised = lines[:2], lines[2:]
    assert warm_up[-1]["l1"] < 0.8 * warm_up[0]["l1"]
    assert quantised[-1]["l1"] < 1.1 * warm_up[-1]["l1"]
    for task in ("mri_sr", "ct_denoise", "pet_synthesis"):
        assert quantised[-1][f"usage/{task}"] >= 0.6


def test_the_diffusion_learns_the_latents(trained: Path) -> None:
    lines = [line for line in log(trained / "diffusion") if "latent_l1" in line]
    assert lines[-1]["latent_l1"] < 0.7 * lines[0]["latent_l1"]


def test_the_restoration_learns_and_the_classifier_knows_the_tasks(trained: Path) -> None:
    lines = [line for line in log(trained / "restoration-full") if "l1" in line]
    assert lines[-1]["l1"] < lines[0]["l1"]
    assert lines[-1]["class"] < lines[0]["class"]


def test_the_trained_model_improves_images_it_has_not_seen(
    trained: Path, dataset: PreparedSet
) -> None:
    model, recipe = run.trained_model(trained / "restoration-full")
    pairs = evaluation_pairs(dataset, run.tasks_of(recipe), "val")
    figures = stage_figures(Stage.RESTORATION, model, pairs)
    gains = [row["restored_psnr"] - row["input_psnr"] for row in figures.values()]
    assert sum(gains) / len(gains) > 0.3


def test_each_finished_stage_has_its_gate_on_record(trained: Path) -> None:
    for folder, stage in (("codebook", "codebook"), ("diffusion", "diffusion")):
        record = json.loads((trained / folder / run.GATE).read_text())
        assert record["stage"] == stage
        assert record["passed"] == all(check["passed"] for check in record["checks"])


def test_two_processes_train_one_model(dataset: PreparedSet, tmp_path: Path) -> None:
    recipe = tiny_recipe(stage1={"steps": 5})
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "training.cli", "train", "codebook", "--recipe", recipe_file(tmp_path, recipe),
        "--data", dataset.folder, "--out", tmp_path / "run", "--threads", "1", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=110,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 5 of 5" in done.stderr
    alone = tmp_path / "alone"
    run.train(Stage.CODEBOOK, recipe, dataset.folder, alone, device=CPU, limits=Limits(max_steps=5))
    together = log(tmp_path / "run" / "codebook")[0]
    # The second process brings other patches, so the two runs must differ.
    assert together["l1"] != log(alone / "codebook")[0]["l1"]
