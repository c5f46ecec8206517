"""The same head scanned again, and the phantom of Shepp and Logan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from restoration.kspace import empty_band
from restoration.restorer import Restoration
from restoration.tasks import RestorationTask
from training.rescans import rescanned
from training.restored import Series
from training.shepp_logan import shepp_logan


def test_another_scan_has_another_place_and_noise_and_the_same_empty_band() -> None:
    hq = shepp_logan(3, 128)
    made = Restoration(hq, (), 0.0, {"intensity_scale": 1.0})
    series = Series("s", RestorationTask.MRI_SR, "who", True, (3.0, 1.0, 1.0), hq, hq, made)

    def restore(lq: np.ndarray) -> Restoration:
        return Restoration(2 * lq, (), 0.0, {"intensity_scale": 1.0})

    first, same, other = (
        rescanned(series, restore, np.random.default_rng(seed), "s, scan 2") for seed in (1, 1, 2)
    )
    assert (first.name, first.subject, first.lq.shape) == ("s, scan 2", "who", (3, 152, 152))
    np.testing.assert_array_equal(first.lq, same.lq)
    assert not np.allclose(first.lq, other.lq, atol=5)
    np.testing.assert_array_equal(first.made.volume, 2 * first.lq)
    assert np.percentile(first.lq, 99.9) == pytest.approx(1150, rel=1e-3)
    support = empty_band(torch.from_numpy(first.lq))
    assert support is not None
    assert max(support.rows, support.columns) == pytest.approx(152 / 8, abs=1)


def test_the_phantom_has_the_values_of_its_table() -> None:
    (head,) = shepp_logan(1, 512, seed=0)
    assert head.max() == pytest.approx(1000)
    assert head[0, 0] == 0
    values = np.unique(head.round(3))
    assert {0.0, 200.0, 300.0, 1000.0} <= set(values.tolist())
    area = (head > 0).mean()
    assert area == pytest.approx(np.pi * 0.69 * 0.92 / 4 - np.pi * 0.16 * 0.41 / 4, abs=0.03)
