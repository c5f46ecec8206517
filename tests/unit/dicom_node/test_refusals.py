"""Refusals are told once, not once a second."""

from __future__ import annotations

import pytest

from dicom_node.listener import Refusal
from dicom_node.refusals import RefusalLog


class Told:
    """A refusal log on a clock of the test, and what it told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[tuple[str, str, int]] = []
        self.log = RefusalLog(
            lambda refusal, left_out: self.said.append((refusal.address, refusal.why, left_out)),
            window_s=60.0,
            reasons=3,
            addresses=2,
            clock=lambda: self.now,
        )


@pytest.fixture
def told() -> Told:
    return Told()


def test_the_same_refusal_is_told_once_in_a_window_and_then_with_the_count(told: Told) -> None:
    for _ in range(5):
        told.log(Refusal("10.0.0.1", "no rule"))
    told.now = 60.0
    told.log(Refusal("10.0.0.1", "no rule"))
    assert told.said == [("10.0.0.1", "no rule", 0), ("10.0.0.1", "no rule", 4)]


def test_different_reasons_and_addresses_are_told_apart(told: Told) -> None:
    for address in ("10.0.0.1", "10.0.0.2"):
        for why in ("no rule", "it spoke HTTP"):
            told.log(Refusal(address, why))
    assert len(told.said) == 4


def test_one_address_cannot_fill_the_log_with_new_reasons(told: Told) -> None:
    for number in range(1000):
        told.log(Refusal("10.0.0.1", f"calling AE title 'X{number}' is in no rule"))
    assert len(told.said) == 3


def test_only_the_latest_addresses_are_remembered(told: Told) -> None:
    for number in range(1000):
        told.log(Refusal(f"10.0.{number // 256}.{number % 256}", "no rule"))
    assert len(told.log._windows) == 2
