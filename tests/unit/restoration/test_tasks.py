from __future__ import annotations

import numpy as np
import pytest
import torch

from restoration.tasks import RestorationTask, denormalise, intensity_scale, normalise, spec

TASKS = list(RestorationTask)


def test_the_order_of_the_tasks_is_that_of_the_codebooks() -> None:
    assert [(task.value, task.index) for task in TASKS] == [
        ("mri_sr", 0),
        ("ct_denoise", 1),
        ("pet_synthesis", 2),
    ]


@pytest.mark.parametrize(
    ("task", "units", "window"),
    [
        ("mri_sr", "a.u.", (0, 4095)),
        ("ct_denoise", "HU", (-1024, 3071)),
        ("pet_synthesis", "SUV", (0, 20)),
    ],
)
def test_windows_and_units_are_the_papers(
    task: str, units: str, window: tuple[float, float]
) -> None:
    assert (spec(task).units, spec(task).window) == (units, window)
    assert spec(task) is spec(RestorationTask(task))


@pytest.mark.parametrize("task", TASKS)
def test_the_window_maps_onto_zero_to_one_and_nothing_is_clipped(task: RestorationTask) -> None:
    low, high = spec(task).window
    x = torch.tensor([low, (low + high) / 2, high, high + (high - low)])
    torch.testing.assert_close(normalise(x, task), torch.tensor([0.0, 0.5, 1.0, 2.0]))


@pytest.mark.parametrize("task", TASKS)
def test_arrays_and_tensors_go_there_and_back_alike(task: RestorationTask) -> None:
    x = np.linspace(-3000, 9000, 101, dtype=np.float32)
    there = normalise(x, task)
    assert there.dtype == np.float32
    np.testing.assert_allclose(denormalise(there, task), x, rtol=1e-5, atol=2e-3)
    np.testing.assert_array_equal(normalise(torch.from_numpy(x), task).numpy(), there)


def test_an_mr_series_is_scaled_by_its_bright_end() -> None:
    volume = np.arange(100_001, dtype=np.float32).reshape(1, 1, -1)
    assert intensity_scale(volume, "mri_sr") == pytest.approx(1150 / 99_900)
    assert intensity_scale(volume.astype(np.int32), "mri_sr") == pytest.approx(1150 / 99_900)


def test_absolute_units_are_not_scaled() -> None:
    volume = np.full((1, 2, 2), 7.0, np.float32)
    assert intensity_scale(volume, "ct_denoise") == 1.0
    assert intensity_scale(volume, "pet_synthesis") == 1.0


@pytest.mark.parametrize("value", [0, -5])
def test_an_mr_series_without_signal_is_left_as_it_is(value: float) -> None:
    assert intensity_scale(np.full((2, 4, 4), value, np.float32), "mri_sr") == 1.0


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="'xray'"):
        spec("xray")
