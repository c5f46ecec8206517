from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from training.statistics import average_difference, difference


def slices(subjects: int, each: int, effect: float, seed: int = 0) -> list[tuple[str, float]]:
    """Differences that vary between subjects with a standard deviation of 0.1."""
    generator = np.random.default_rng(seed)
    return [
        (f"S{n}", effect + offset + generator.normal(0, 0.02))
        for n, offset in enumerate(generator.normal(0, 0.1, subjects))
        for _ in range(each)
    ]


def test_the_interval_is_that_of_scipy_on_the_subjects_means() -> None:
    pairs = slices(subjects=12, each=5, effect=0.2)
    found = difference(pairs)
    assert found.interval is not None
    means = (list(found.subjects.values()),)
    expected = bootstrap(means, np.mean, n_resamples=10_000, method="percentile", rng=1)
    interval = expected.confidence_interval
    assert found.interval == pytest.approx((interval.low, interval.high), abs=0.005)
    assert found.mean == pytest.approx(np.mean(means))


def test_many_slices_of_the_same_subjects_make_no_narrower_interval() -> None:
    few, many = (difference(slices(8, each, 0.1)).interval for each in (2, 200))
    assert few is not None
    assert many is not None
    assert many[1] - many[0] > 0.7 * (few[1] - few[0])


@pytest.mark.parametrize(("effect", "claimed"), [(0.0, False), (0.5, True)])
def test_a_difference_is_significant_when_the_interval_leaves_out_zero(
    effect: float, claimed: bool
) -> None:
    assert difference(slices(10, 3, effect)).significant is claimed


def test_nothing_is_claimed_of_four_subjects() -> None:
    found = difference(slices(4, 50, 10.0))
    assert found.interval is None
    assert not found.significant
    assert set(found.subjects) == {"S0", "S1", "S2", "S3"}


def test_the_mean_is_over_slices_and_each_subject_has_its_own() -> None:
    found = difference([("A", 1.0), ("A", 1.0), ("A", 1.0), ("B", 5.0)])
    assert found.mean == 2.0
    assert found.subjects == {"A": 1.0, "B": 5.0}


def test_the_average_weighs_tasks_alike() -> None:
    found = average_difference([slices(9, 40, 0.0), slices(9, 1, 0.6, seed=3)])
    single = [difference(slices(9, 40, 0.0)).mean, difference(slices(9, 1, 0.6, seed=3)).mean]
    assert found.mean == pytest.approx(np.mean(single))
    assert found.interval is not None
    assert found.interval[0] < found.mean < found.interval[1]


def test_one_task_of_few_subjects_leaves_the_average_without_an_interval() -> None:
    assert average_difference([slices(9, 4, 1.0), slices(1, 4, 1.0)]).interval is None


def test_there_must_be_slices() -> None:
    with pytest.raises(ValueError, match="no slices"):
        difference([])
