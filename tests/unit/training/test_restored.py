"""Series of a prepared folder as calibration and the harm bench see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from restoration.restorer import Restoration
from restoration.tasks import RestorationTask
from training.manifest import Item
from training.restored import restored_series

Volume = npt.NDArray[np.float32]


class Doubling:
    """A restorer that counts its calls and gives back twice the input."""

    class manifest:
        sha256 = "0" * 64

    def __init__(self) -> None:
        self.calls = 0

    def restore(self, volume: Volume, _: RestorationTask) -> Restoration:
        self.calls += 1
        return Restoration(2 * volume, (), 0.0, {"intensity_scale": 1.0})


class OneSeries:
    """A prepared set of one series."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.lq = np.random.default_rng(0).random(shape, dtype=np.float32)

    def pair(self, _: Item) -> tuple[Volume, Volume]:
        return self.lq, self.lq + 1


def item(task: str, shape: tuple[int, int, int]) -> Item:
    return Item(
        "s", task, "val", "subject", "phantom", "none", "HU", (3.0, 0.8, 0.8), "hq.npy", "lq.npy",
        shape, True, {},
    )  # fmt: skip


def test_the_middle_slices_are_taken_whole() -> None:
    shape = (9, 300, 280)
    restorer: Any = Doubling()
    dataset: Any = OneSeries(shape)
    (series,) = restored_series(restorer, [(dataset, item("ct_denoise", shape))], most=4)
    np.testing.assert_array_equal(series.lq, dataset.lq[2:6])
    np.testing.assert_array_equal(series.made.volume, 2 * series.lq)
    np.testing.assert_array_equal(series.hq, series.lq + 1)


def test_a_series_is_restored_once_and_kept_by_its_pixels(tmp_path: Path) -> None:
    shape = (2, 32, 32)
    restorer: Any = Doubling()
    dataset: Any = OneSeries(shape)
    chosen: Any = [(dataset, item("ct_denoise", shape))]
    (first,) = restored_series(restorer, chosen, most=2, cache=tmp_path)
    (second,) = restored_series(restorer, chosen, most=2, cache=tmp_path)
    assert restorer.calls == 1
    np.testing.assert_array_equal(first.made.volume, second.made.volume)
    dataset.lq = dataset.lq + 1
    list(restored_series(restorer, chosen, most=2, cache=tmp_path))
    assert restorer.calls == 2
