from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from restoration.tasks import RestorationTask
from training.quantities import Measure, body_masks, hot_regions, measures, summarise, tissue_masks

CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS
Volume = npt.NDArray[np.float32]
SPACING = (4.0, 4.0, 4.0)


def blocks(**values: float) -> Volume:
    """One slice with a block of 32 x 32 pixels of each value, side by side."""
    return np.concatenate([np.full((1, 32, 32), v, np.float32) for v in values.values()], axis=2)


@pytest.fixture
def tissues() -> Volume:
    return blocks(air=-1000, lung=-800, fat=-100, soft=40, bone=600)


@pytest.fixture
def torso() -> Volume:
    """Background 1 SUV; a hot ball of 10 SUV and 7 voxels across, a hot voxel, a warm ball."""
    grid = np.indices((20, 40, 40))
    volume = np.ones((20, 40, 40), np.float32)
    volume[np.linalg.norm(grid - np.array([10, 12, 12])[:, None, None, None], axis=0) < 3.6] = 10
    volume[np.linalg.norm(grid - np.array([10, 28, 28])[:, None, None, None], axis=0) < 3.6] = 2
    volume[3, 3, 3] = 30
    return volume


def values(found: list[Measure]) -> dict[str, float]:
    return {measure.name: measure.value for measure in found}


def test_each_tissue_is_measured_in_its_own_voxels(tissues: Volume) -> None:
    shifts = {"air": 1.0, "lung": 2.0, "fat": -3.0, "soft": 4.0, "bone": -5.0}
    image = tissues + blocks(**shifts)
    found = values(measures(CT, image, tissues, tissues, SPACING))
    assert found == pytest.approx({f"hu_bias_{name}": shift for name, shift in shifts.items()})


def test_edges_belong_to_no_tissue(tissues: Volume) -> None:
    masks = tissue_masks(tissues)
    middle = 2 * 32 + 16
    assert masks["fat"][0, 16, middle]
    assert not any(mask[0, :, 2 * 32 - 1 : 2 * 32 + 1].any() for mask in masks.values())


def test_noise_without_bias_is_no_bias(tissues: Volume) -> None:
    noise = np.random.default_rng(0).normal(0, 20, tissues.shape).astype(np.float32)
    found = values(measures(CT, tissues + noise, tissues, tissues, SPACING))
    assert all(abs(bias) < 4 * 20 / np.sqrt(500) for bias in found.values())


def test_a_class_of_few_voxels_says_nothing() -> None:
    truth = np.full((1, 32, 32), 40.0, np.float32)
    truth[0, :6, :6] = 900
    assert set(tissue_masks(truth)) == {"soft"}


def test_hot_regions_are_lesions_of_more_than_a_millilitre(torso: Volume) -> None:
    regions = hot_regions(torso, SPACING)
    assert len(regions) == 1
    assert regions[0][10, 12, 12]
    assert regions[0].sum() * np.prod(SPACING) > 1000


def test_the_bias_of_a_hot_region_is_relative(torso: Volume) -> None:
    image = np.where(torso == 10, 9, torso)
    found = values(measures(PET, image, torso, torso, SPACING))
    assert found["suv_mean_bias_hot"] == pytest.approx(-10.0)


def test_activity_is_compared_with_reference_and_input(torso: Volume) -> None:
    found = values(measures(PET, 1.02 * torso, torso, 2 * torso, SPACING))
    assert found["activity_vs_reference"] == pytest.approx(2.0, abs=1e-3)
    assert found["activity_vs_input"] == pytest.approx(-49.0, abs=1e-3)


def test_mr_has_no_quantity(torso: Volume) -> None:
    assert measures(MR, torso, torso, torso, SPACING) == []


def test_a_body_encloses_its_lungs() -> None:
    truth = np.full((1, 64, 64), -1000.0, np.float32)
    truth[0, 12:52, 12:52] = 40
    truth[0, 24:40, 24:40] = -850
    body = body_masks(truth, CT)
    assert body[0, 32, 32]
    assert body[0, 14, 14]
    assert not body[0, 4, 4]
    assert body.sum() == pytest.approx(40 * 40, rel=0.1)


def test_a_subject_counts_once_however_many_regions_it_has() -> None:
    found = [
        ("A", Measure("x", 1.0, 1.0)),
        ("A", Measure("x", 3.0, 3.0)),
        ("B", Measure("x", -6.5, 1)),
    ]
    summary = summarise(found)["x"]
    assert (summary.mean, summary.worst) == (pytest.approx(-2.0), -6.5)
    assert (summary.subjects, summary.regions) == (2, 3)
