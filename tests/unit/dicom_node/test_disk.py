from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node import disk
from dicom_node.disk import Disk, Marks, Space, is_open

MARKS = Marks(low=100, high=125)


@pytest.mark.parametrize(
    ("free", "was_open", "opens"),
    [(99, True, False), (100, True, True), (100, False, False), (124, False, False),
     (125, False, True), (0, False, False)],
)  # fmt: skip
def test_between_the_marks_the_door_stays_as_it_was(free: int, was_open: bool, opens: bool) -> None:
    assert is_open(free, MARKS, was_open=was_open) is opens


@given(st.lists(st.integers(0, 200), min_size=1))
def test_a_disk_that_moves_less_than_the_marks_are_apart_changes_the_door_once(
    free: list[int],
) -> None:
    door, changes = True, 0
    for one in [100 + each % 24 for each in free]:
        changes += is_open(one, MARKS, was_open=door) is not door
        door = is_open(one, MARKS, was_open=door)
    assert changes == 0


class Shelf(Disk):
    """A disk of 1000 bytes of which a test says how many are free."""

    free = 1000

    def space(self) -> Space:
        return Space(self.free, MARKS)


def test_a_disk_that_was_short_opens_at_the_upper_mark_only() -> None:
    shelf = Shelf(Path())
    told = []
    for free in (1000, 99, 110, 124, 125, 101):
        shelf.free = free
        told.append(shelf.has_room())
    assert told == [True, False, False, False, True, True]


def test_one_instance_that_is_too_large_closes_nothing() -> None:
    shelf = Shelf(Path())
    shelf.free = 300
    assert not shelf.has_room(201)
    assert shelf.has_room(200)


def test_what_is_missing_is_counted_to_the_upper_mark() -> None:
    assert Space(90, MARKS).short == 35
    assert Space(125, MARKS).short == 0


def test_the_marks_are_those_of_the_larger_reserve(tmp_path: Path) -> None:
    total = (found := disk.os.statvfs(tmp_path)).f_blocks * found.f_frsize
    space = Disk(tmp_path, min_free_bytes=1, min_free_percent=10, resume_factor=2).space()
    assert space.marks == Marks(total / 10, total / 5)
    assert Disk(tmp_path, min_free_bytes=total, min_free_percent=10).space().marks.low == total


def test_a_disk_that_is_gone_has_no_room(tmp_path: Path) -> None:
    assert not Disk(tmp_path / "gone").has_room()
