"""Hours of the week by the clock on the wall, over midnight and over the change of the clocks."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.hours import Hours, days_of, span_of

BERLIN = "Europe/Berlin"
EVERY_DAY = frozenset(range(7))
NIGHT = Hours((span_of("22:00-06:00"),), days_of(["mon-fri"]), BERLIN)


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    ("moment", "opened"),
    [
        ("2026-01-26T21:59:59+01:00", False),  # Monday
        ("2026-01-26T22:00:00+01:00", True),
        ("2026-01-27T05:59:59+01:00", True),  # the night that began on Monday
        ("2026-01-27T06:00:00+01:00", False),
        ("2026-01-31T03:00:00+01:00", True),  # Saturday morning belongs to Friday's night
        ("2026-01-31T23:00:00+01:00", False),
        ("2026-02-02T03:00:00+01:00", False),  # Monday morning belongs to Sunday's
    ],
)
def test_a_night_belongs_to_the_day_on_which_it_begins(moment: str, opened: bool) -> None:
    assert NIGHT.contains(at(moment)) is opened


def test_what_is_closed_opens_at_the_next_start() -> None:
    assert NIGHT.next_start(at("2026-01-31T12:00:00+01:00")) == at("2026-02-02T22:00:00+01:00")
    assert NIGHT.next_start(at("2026-01-27T03:00:00+01:00")) == at("2026-01-27T03:00:00+01:00")


def test_an_hour_keeps_its_place_on_the_wall_when_the_clocks_change() -> None:
    early = Hours((span_of("04:00-05:00"),), EVERY_DAY, BERLIN)
    # 29 March 2026: 02:00 becomes 03:00.
    assert early.next_start(at("2026-03-29T00:30:00+01:00")) == at("2026-03-29T04:00:00+02:00")
    # 25 October 2026: 03:00 becomes 02:00.
    assert early.next_start(at("2026-10-25T00:30:00+02:00")) == at("2026-10-25T04:00:00+01:00")


def test_a_night_over_the_change_of_the_clocks_ends_by_the_wall() -> None:
    night = Hours((span_of("22:00-06:00"),), EVERY_DAY, BERLIN)
    assert night.contains(at("2026-03-29T05:59:00+02:00"))
    assert not night.contains(at("2026-03-29T06:00:00+02:00"))
    assert night.contains(at("2026-10-25T05:59:00+01:00"))
    assert not night.contains(at("2026-10-25T06:00:00+01:00"))


def test_the_last_hour_of_a_day_ends_at_24() -> None:
    evening = Hours((span_of("20:00-24:00"),), EVERY_DAY, "UTC")
    assert evening.contains(at("2026-01-26T23:59:59+00:00"))
    assert not evening.contains(at("2026-01-27T00:00:00+00:00"))


@pytest.mark.parametrize(
    ("names", "days"),
    [
        (["mon"], {0}),
        (["mon-fri"], {0, 1, 2, 3, 4}),
        (["sat-mon"], {5, 6, 0}),
        (["tue", "Thu"], {1, 3}),
        (["mon-sun"], set(range(7))),
    ],
)
def test_days_are_names_and_ranges_of_names(names: list[str], days: set[int]) -> None:
    assert days_of(names) == days


@given(
    start=st.integers(0, 1439),
    length=st.integers(1, 1439),
    days=st.frozensets(st.integers(0, 6), min_size=1),
    now=st.integers(1_700_000_000, 1_800_000_000),
)
def test_the_next_start_is_open_and_nothing_before_it_is(
    start: int, length: int, days: frozenset[int], now: int
) -> None:
    hours = Hours(((start, (start + length) % 1440),), days, BERLIN)
    opens = hours.next_start(float(now))
    assert opens >= now
    assert hours.contains(opens)
    assert opens == now or not hours.contains(float(now))
    assert opens == now or not hours.contains(opens - 1)
