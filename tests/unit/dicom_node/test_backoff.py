"""When what failed is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.backoff import JITTER, next_attempt, wait_s
from dicom_node.settings import DeliverySettings

BACKOFF = DeliverySettings(first_s=10, factor=2, max_s=60, give_up_after_s=1000)
DAY = 86_400.0


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [
        (1, 10),  # first_s
        (2, 20),  # 10 · 2
        (3, 40),  # 10 · 2²
        (4, 60),  # 10 · 2³ = 80, at most max_s
        (5000, 60),  # far beyond what a float could double
    ],
)
def test_the_wait_doubles_up_to_its_limit(failures: int, seconds: float) -> None:
    assert wait_s(failures, BACKOFF, 0.0) == seconds


def test_waits_may_grow_to_days() -> None:
    slow = DeliverySettings(first_s=60, factor=4, max_s=3 * DAY, give_up_after_s=30 * DAY)
    waits = [wait_s(number, slow, 0.0) for number in range(1, 9)]
    assert waits == [60, 240, 960, 3840, 15_360, 61_440, 245_760, 3 * DAY]


def test_a_delivery_that_failed_for_too_long_is_given_up() -> None:
    times = {"first_attempt": 0.0, "backoff": BACKOFF, "jitter": 0.0}
    assert next_attempt(9, now=900.0, **times) == 960.0
    assert next_attempt(9, now=999.0, **times) == 1000.0, "the last one is as the patience ends"
    assert next_attempt(9, now=1000.0, **times) is None


settings = st.builds(
    lambda first, more, factor, patience: DeliverySettings(
        first_s=first, max_s=first + more, factor=factor, give_up_after_s=patience
    ),
    st.floats(0.001, DAY),
    st.floats(0, 30 * DAY),
    st.floats(1, 1000),
    st.floats(0.001, 365 * DAY),
)
jitters = st.floats(0, 1, exclude_max=True)


@given(settings, st.integers(0, 10**6), jitters)
def test_a_wait_lies_between_four_fifths_of_the_first_and_the_longest(
    backoff: DeliverySettings, failures: int, jitter: float
) -> None:
    wait = wait_s(failures, backoff, jitter)
    assert (1 - JITTER) * backoff.first_s <= wait <= backoff.max_s


@given(settings, st.integers(1, 10**4), jitters)
def test_a_further_failure_never_shortens_the_wait(
    backoff: DeliverySettings, failures: int, jitter: float
) -> None:
    assert wait_s(failures + 1, backoff, jitter) >= wait_s(failures, backoff, jitter)


@given(settings, jitters, jitters)
def test_jitter_only_shortens(backoff: DeliverySettings, one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert wait_s(3, backoff, more) <= wait_s(3, backoff, less)


@given(settings, jitters)
def test_every_schedule_ends_within_its_patience(backoff: DeliverySettings, jitter: float) -> None:
    now, failures = 0.0, 0
    while failures < 500:
        failures += 1
        due = next_attempt(failures, first_attempt=0.0, now=now, backoff=backoff, jitter=jitter)
        if due is None:
            assert now == backoff.give_up_after_s
            return
        assert now < due <= backoff.give_up_after_s
        now = due
    # Five hundred attempts at four fifths of the first wait or more, and patience is left.
    assert now >= 500 * (1 - JITTER) * backoff.first_s * 0.999
