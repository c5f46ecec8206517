"""Levels from subjects: quantiles, room for another subject, and where they may not go."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import norm

from restoration.fidelity import Bounds
from restoration.fidelity.catalogue import BY_NAME
from restoration.tasks import RestorationTask
from training.levels import (
    CONFIDENCE,
    LEAST_SUBJECTS,
    Level,
    Spread,
    alarms,
    bounds,
    learn,
    tolerance_factor,
)

CT = RestorationTask.CT_DENOISE
Table = dict[str, dict[str, npt.NDArray[np.float64]]]


def subjects_of_one_kind(count: int = 12, slices: int = 200, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(count)]
    return {
        "gain": {name: rng.normal(0, 1.0, slices) for name in names},
        "structure": {name: np.exp(rng.normal(1, 0.2, slices)) for name in names},
    }


def test_bounds_are_the_quantiles_moved_out_from_the_median() -> None:
    values = np.linspace(-10, 10, 2001)
    spread = Spread.of(BY_NAME["gain"], [values], Level.WARN)
    found = bounds(BY_NAME["gain"], spread, CT, Level.WARN, 2.0)
    assert found.low == pytest.approx(-19.6, abs=0.05)
    assert found.high == pytest.approx(19.6, abs=0.05)


def test_a_gate_that_looks_up_has_no_lower_bound_and_its_logarithm_is_moved() -> None:
    values = np.exp(np.linspace(-1, 1, 2001))
    spread = Spread.of(BY_NAME["structure"], [values], Level.WARN)
    found = bounds(BY_NAME["structure"], spread, CT, Level.WARN, 2.0)
    assert found.low is None
    assert found.high == pytest.approx(np.exp(2 * 0.98), rel=0.01)


def test_rounding_alone_never_makes_a_level() -> None:
    values = np.full(100, 1e-9)
    spread = Spread.of(BY_NAME["gain"], [values], Level.FAIL)
    found = bounds(BY_NAME["gain"], spread, CT, Level.FAIL, 1.0)
    # a tenth of the program's 3 %
    assert (found.low, found.high) == pytest.approx((-0.3, 0.3))


@pytest.mark.parametrize(
    ("subjects", "content", "factor"),
    # ISO 16269-6:2014, one-sided, standard deviation unknown, confidence 0.95
    [(5, 0.95, 4.203), (10, 0.95, 2.911), (20, 0.95, 2.396), (10, 0.99, 3.981), (50, 0.99, 2.862)],
)
def test_the_tolerance_factor_is_that_of_the_standard(
    subjects: int, content: float, factor: float
) -> None:
    assert tolerance_factor(subjects, content) == pytest.approx(factor, abs=0.0015)


def test_a_level_holds_the_promised_share_of_other_subjects() -> None:
    rng = np.random.default_rng(3)
    ends = []
    for _ in range(1500):
        rows = list(rng.normal(0, 1, (25, 1)))
        ends.append(Spread.of(BY_NAME["gain"], rows, Level.WARN).limits[1])
    # so often a level lies beyond the quantile of all subjects; three SE of 1,500 draws
    held = np.mean(norm.cdf(ends) >= Level.WARN.content)
    assert held == pytest.approx(CONFIDENCE, abs=0.017)


def test_fewer_subjects_of_one_kind_have_wider_levels() -> None:
    many, few = (learn(subjects_of_one_kind(n, 20), CT).levels["gain"].fail for n in (200, 20))
    assert many.high is not None
    assert few.high is not None
    assert few.high > 1.1 * many.high


def test_subjects_of_one_kind_need_little_margin() -> None:
    learnt = learn(subjects_of_one_kind(24), CT)
    assert max(fail for _, fail in learnt.factors.values()) <= 1.8
    assert learnt.alarms is not None
    assert learnt.alarms[1] <= Level.FAIL.alarms
    level = learnt.levels["gain"]
    assert level.warn.low is not None
    assert level.fail.low is not None
    assert level.warn.low > level.fail.low


def test_subjects_that_differ_have_wider_levels() -> None:
    table = subjects_of_one_kind(20)
    for shift, name in enumerate(table["gain"]):
        table["gain"][name] = table["gain"][name] * 0.1 + shift
    alike, apart = learn(subjects_of_one_kind(20), CT), learn(table, CT)
    wide, narrow = apart.levels["gain"].fail.high, alike.levels["gain"].fail.high
    assert wide is not None
    assert narrow is not None
    assert wide > 3 * narrow
    assert apart.levels["structure"] == alike.levels["structure"]


def test_a_gate_of_too_few_subjects_keeps_the_level_of_the_program() -> None:
    table = subjects_of_one_kind(LEAST_SUBJECTS)
    unknown = np.full(200, np.nan)
    table["structure"] = {**table["structure"], "s0": unknown}
    learnt = learn(table, CT)
    assert set(learnt.levels) == {"gain"}
    assert learnt.kept == {"structure": LEAST_SUBJECTS - 1}
    assert set(learnt.medians) == {"gain", "structure"}
    none = learn(subjects_of_one_kind(8), CT)
    assert (none.levels, none.alarms, set(none.kept)) == ({}, None, {"gain", "structure"})


def test_a_slice_with_nothing_to_measure_raises_no_alarm() -> None:
    table = {"gain": {"a": np.array([np.nan, 5.0, 0.0, np.nan])}}
    assert alarms(table, "a", {"gain": Bounds(-1, 1)}) == 0.25


def test_one_subject_is_not_enough() -> None:
    with pytest.raises(ValueError, match="two subjects"):
        learn({"gain": {"a": np.zeros(5)}}, CT)
