"""Counting what gates catch, and the faults that are planted for it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from scipy.stats import binomtest

from restoration.fidelity import Bounds, Levels
from restoration.fidelity.catalogue import BY_NAME
from restoration.restorer import Restoration, Restorer
from restoration.tasks import RestorationTask
from training.faults import finished_faults
from training.harm import Rate, Slice, exceedance, table, threshold
from training.harm_bench import markdown
from training.network_faults import network_faults
from training.restored import Series, part

CT, MR, PET = (
    RestorationTask.CT_DENOISE,
    RestorationTask.MRI_SR,
    RestorationTask.PET_SYNTHESIS,
)


def series_of(task: RestorationTask, slices: int = 9, size: int = 96) -> Series:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    body = np.hypot(y, x) < 0.45 * size
    low, high = {CT: (-1000.0, 40.0), MR: (0.0, 500.0), PET: (0.0, 1.0)}[task]
    clean = np.repeat(np.where(body, high, low)[None], slices, 0)
    if task is PET:
        clean[2:6, 40:56, 40:56] = 8.0
    clean = clean + np.linspace(0, 0.2 * abs(high), slices)[:, None, None] * body
    clean[:, 30:36, 30:60] += 0.5 * abs(high)
    hq = clean.astype(np.float32)
    lq = (hq + rng.normal(0, 0.1 * abs(high), hq.shape)).astype(np.float32)
    made = Restoration(hq.copy(), (), 0.0, {"intensity_scale": 1.0, "mean_drift": [0.0] * slices})
    return Series("s", task, "subject", True, (4.0, 1.0, 1.0), lq, hq, made)


def test_the_interval_is_that_of_scipy() -> None:
    for hits, total in ((0, 20), (7, 20), (20, 20)):
        expected = binomtest(hits, total).proportion_ci(0.95, "exact")
        assert Rate(hits, total).interval == pytest.approx((expected.low, expected.high))


def test_at_most_one_in_a_hundred_lies_above_the_threshold() -> None:
    scores = np.random.default_rng(0).random(1000).tolist()
    limit = threshold(scores)
    assert sum(score > limit for score in scores) == 10
    assert sum(score > threshold(scores[:50]) for score in scores[:50]) == 0
    assert threshold([]) == math.inf


def test_a_score_is_one_at_the_level_of_failure_and_zero_at_the_median() -> None:
    levels = Levels(fail=Bounds(-2.0, 6.0))
    spec = BY_NAME["gain"]
    assert exceedance(spec, 6.0, levels, 2.0) == 1.0
    assert exceedance(spec, -2.0, levels, 2.0) == 1.0
    assert exceedance(spec, 2.0, levels, 2.0) == 0.0
    assert exceedance(spec, 10.0, levels, 2.0) == 2.0
    assert math.isnan(exceedance(spec, math.nan, levels, 2.0))
    assert exceedance(BY_NAME["weights"], 1.0, Levels(fail=Bounds(high=0.0)), None) > 1


def test_the_table_counts_slices_by_fault_gate_and_subject() -> None:
    clean = [Slice("ct_denoise", "a", {"gain": i / 200, "structure": 0.1}) for i in range(200)]
    hit = [Slice("ct_denoise", "b", {"gain": 3.0, "structure": 0.1})] * 3
    missed = [Slice("ct_denoise", "c", {"gain": 0.2, "structure": math.nan})] * 2
    (row,) = table(clean, {("gain", "3 %"): [*hit, *missed]})
    assert row.shipped == Rate(3, 5)
    assert row.at_false_alarms == Rate(3, 5)
    assert row.gates["gain"] == Rate(3, 5)
    assert row.gates["structure"] == Rate(0, 3)
    assert row.subjects == {"b": Rate(3, 3), "c": Rate(0, 2)}
    assert "weights" not in row.gates


def test_the_printed_table_has_each_fault_with_its_interval() -> None:
    rate = Rate(3, 4).to_dict()
    values = {
        "false_alarms": {"ct_denoise": Rate(1, 200).to_dict()},
        "warnings": {"ct_denoise": Rate(9, 200).to_dict()},
        "clean_subjects": {"ct_denoise": {"1": Rate(0, 150).to_dict(), "2": Rate(1, 50).to_dict()}},
        "faults": [
            {
                "fault": "HU offset", "size": "5 HU", "task": "ct_denoise", "shipped": rate,
                "at_false_alarms": rate, "gates": {"gain": rate}, "subjects": {"1": rate},
            }
        ],
    }  # fmt: skip
    text = "\n".join(markdown(values))
    assert "| ct_denoise | 2 | 200 | 99.5 % | 97.2 ... 100.0 | 95.5 % |" in text
    assert "| ct_denoise | HU offset | 5 HU | 4 | 75.0 % | 75.0 % | 19.4 ... 99.4 |" in text
    assert "| ct_denoise, % | size | `gain` |" in text
    assert "| HU offset | 5 HU | 75 |" in text


@pytest.mark.parametrize("task", list(RestorationTask))
def test_every_fault_harms_the_slices_it_names_and_no_other(task: RestorationTask) -> None:
    series = series_of(task)
    names = set()
    for fault in finished_faults():
        if task not in fault.tasks:
            continue
        planted = fault.plant(series, np.random.default_rng(1))
        if planted is None:
            continue
        names.add(fault.name)
        before = np.stack([series.lq, series.made.volume], 1)
        after = np.stack([planted.series.lq, planted.series.made.volume], 1)
        changed = np.flatnonzero(np.abs(after - before).max(axis=(1, 2, 3)) > 0)
        assert set(changed) <= set(planted.slices), fault
        assert len(changed) >= len(planted.slices) - 2, fault  # a flat place may shift onto itself
    expected = {
        CT: {"lesion added", "lesion removed", "HU offset", "vessel shifted"},
        MR: {"lesion added", "lesion removed", "vessel shifted", "contrast gain"},
        PET: {"lesion added", "lesion removed", "contrast gain", "SUV of a hot spot lowered"},
    }[task]
    assert expected | {"slices swapped"} <= names


def test_a_lesion_has_the_size_and_contrast_of_its_name() -> None:
    series = series_of(CT)
    fault = next(
        f for f in finished_faults() if f.name == "lesion added" and f.size == "8 mm, 30 HU"
    )
    planted = fault.plant(series, np.random.default_rng(0))
    assert planted is not None
    lesion = np.abs(planted.series.made.volume - series.made.volume)[planted.slices[0]]
    assert lesion.max() == pytest.approx(30)
    assert lesion.sum() / 30 == pytest.approx(np.pi * 4**2, rel=0.05)  # mm2 at 1 mm


def test_a_part_of_a_series_keeps_its_diagnostics() -> None:
    series = series_of(CT)
    series.made.diagnostics["mean_drift"] = [float(i) for i in range(9)]
    cut = part(series, slice(2, 5))
    assert cut.made.diagnostics["mean_drift"] == [2.0, 3.0, 4.0]
    assert cut.lq.shape[0] == cut.made.volume.shape[0] == 3


def test_motion_of_mr_is_planted_into_every_slice_of_a_whole_series() -> None:
    class Same:
        manifest = SimpleNamespace(tasks=(), sha256="0")

        def restore(self, lq: np.ndarray, _task: RestorationTask) -> Restoration:
            return Restoration(lq, (), 0.0, {"intensity_scale": 1.0})

    series = series_of(MR)
    faults = [fault for fault in network_faults(cast(Restorer, Same())) if MR in fault.scans]
    moved = {fault.size: fault for fault in faults if fault.size.startswith("motion")}
    assert set(moved) == {"motion, 1 px", "motion, 2 px", "motion, breathing"}
    for fault in moved.values():
        planted = fault.plant(series, np.random.default_rng(0))
        assert planted is not None
        assert planted.slices == tuple(range(9))
        assert (np.abs(planted.series.lq - series.lq).max((1, 2)) > 50).all()
        # What every line keeps is its energy.
        energy = np.square(planted.series.lq).sum((1, 2)) / np.square(series.lq).sum((1, 2))
        np.testing.assert_allclose(energy, 1, rtol=1e-4)
