"""The exact binomial test behind the circuit breakers, held to SciPy's."""

from __future__ import annotations

import pytest
from scipy.stats import binom, binomtest

from dicom_node.breaker import Rule, at_least, at_most, leaves_band

RULE = Rule(window=50, lowest=0.0, highest=0.05, significance=0.001)


@pytest.mark.parametrize("trials", [1, 7, 50, 1000])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5, 0.99, 1.0])
def test_the_tails_are_those_of_the_binomial_distribution(trials: int, rate: float) -> None:
    for successes in {0, 1, trials // 2, trials}:
        assert at_least(successes, trials, rate) == pytest.approx(
            binom.sf(successes - 1, trials, rate), abs=1e-12
        )
        assert at_most(successes, trials, rate) == pytest.approx(
            binom.cdf(successes, trials, rate), abs=1e-12
        )


def test_the_breaker_opens_at_the_first_count_that_the_exact_test_rejects() -> None:
    opening = next(k for k in range(51) if leaves_band(k, 50, RULE))
    p = [binomtest(k, 50, RULE.highest, alternative="greater").pvalue for k in range(51)]
    assert p[opening] < RULE.significance <= p[opening - 1]
    assert opening == 9


def test_few_jobs_open_it_only_when_nearly_all_fail() -> None:
    assert leaves_band(1, 1, RULE) is None
    assert leaves_band(2, 2, RULE) is None
    assert leaves_band(3, 3, RULE) is not None


def test_too_few_failures_leave_a_band_that_has_a_lower_edge() -> None:
    rule = Rule(window=500, lowest=0.03, highest=0.2, significance=0.001)
    assert "at least 3.0% expected" in (leaves_band(0, 500, rule) or "")
    assert leaves_band(0, 50, rule) is None
    assert leaves_band(15, 500, rule) is None


def test_the_words_name_counts_band_and_probability() -> None:
    assert leaves_band(10, 50, RULE) == (
        "10 of the last 50 jobs failed a gate, at most 5.0% expected (exact binomial p = 0.0002)"
    )


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="3 of 2"):
        leaves_band(3, 2, RULE)
