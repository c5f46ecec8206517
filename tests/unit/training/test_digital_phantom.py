"""What is measured in the digital phantoms before and after restoration."""

from __future__ import annotations

import math

import pytest

from restoration.restorer import Restorer
from training import digital_phantom


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    return Restorer.open("compact", device="cpu", threads=1)


def test_noise_falls_and_edges_of_bone_stay(restorer: Restorer) -> None:
    found = digital_phantom.ct(restorer, 4, seed=0)
    before, after = found["degraded"], found["restored"]
    assert after["deviation_hu"] < 0.7 * before["deviation_hu"]
    # Rods are drawn sharp: their modulation is above one half as far as pixels can show.
    for rows in (before, after):
        assert math.isnan(rows["mtf50_per_mm"]["+900 HU"])
    assert before["d_prime"] is None  # four slices are too few for the observer


def test_spheres_keep_the_recovery_of_the_input(restorer: Restorer) -> None:
    found = digital_phantom.pet(restorer, 24, seed=0)
    assert set(found) == {"full", "degraded", "restored"}
    for rows in found.values():
        assert rows["13 mm"]["mean"] < rows["22 mm"]["mean"] < rows["37 mm"]["mean"]
        assert rows["37 mm"]["earl_mean"] == [0.76, 0.89]
    for sphere in ("22 mm", "28 mm", "37 mm"):
        restored, given = found["restored"][sphere]["mean"], found["degraded"][sphere]["mean"]
        assert restored == pytest.approx(given, rel=0.1)
