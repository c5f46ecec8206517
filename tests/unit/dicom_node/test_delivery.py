"""When a delivery that failed is tried again."""

from __future__ import annotations

import random

import pytest

from dicom_node.delivery import next_attempt
from dicom_node.settings import DeliverySettings


class NoJitter(random.Random):
    """Takes nothing off the wait."""

    def random(self) -> float:
        return 0.0


BACKOFF = DeliverySettings(first_s=10, factor=2, max_s=60, give_up_after_s=1000)


def wait(attempts: int, *, now: float = 0.0, rng: random.Random | None = None) -> float | None:
    due = next_attempt(attempts, first_attempt=0.0, now=now, backoff=BACKOFF, rng=rng or NoJitter())
    return None if due is None else due - now


@pytest.mark.parametrize(
    ("attempts", "seconds"),
    [
        (1, 10),  # first_s
        (2, 20),  # 10 · 2
        (3, 40),  # 10 · 2²
        (4, 60),  # 10 · 2³ = 80, at most max_s
        (5000, 60),  # far beyond what a float could double
    ],
)
def test_the_wait_doubles_up_to_its_limit(attempts: int, seconds: float) -> None:
    assert wait(attempts) == seconds


def test_jitter_takes_off_at_most_a_fifth() -> None:
    rng = random.Random(1)
    waits = [wait(1, rng=rng) for _ in range(500)]
    assert all(one is not None and 8.0 < one <= 10.0 for one in waits)
    assert len(set(waits)) > 400


def test_the_same_generator_gives_the_same_schedule() -> None:
    assert wait(3, rng=random.Random(7)) == wait(3, rng=random.Random(7))


def test_a_delivery_that_failed_for_too_long_is_given_up() -> None:
    assert wait(9, now=999.0) == 60
    assert wait(9, now=1000.0) is None
