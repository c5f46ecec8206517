from __future__ import annotations

import numpy as np
import pytest
import torch

from restoration.diffcode import DiffCode
from restoration.tasks import RestorationTask
from tests.training.tiny import tiny_recipe, tiny_set
from training.slices import PreparedSet
from training.stages import Stage
from training.validation import evaluation_pairs, stage_figures

CT, MR = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return tiny_set(tmp_path_factory.mktemp("tiny"), size=48)


def test_the_evaluation_slices_are_evenly_spread(dataset: PreparedSet) -> None:
    pairs = list(evaluation_pairs(dataset, [CT, MR], limit=1))
    assert [(pair.task, pair.index) for pair in pairs] == [(CT, 0), (MR, 0)]
    assert len(list(evaluation_pairs(dataset, [CT]))) == 2


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
