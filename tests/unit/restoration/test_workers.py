from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from restoration.workers import at_once, begun, workers


@pytest.mark.usefixtures("two_threads")
def test_a_worker_computes_by_one_thread_and_its_caller_by_as_many_as_before() -> None:
    assert workers(2).submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_as_many_calls_are_made_at_a_time_as_there_are_threads() -> None:
    meeting = threading.Barrier(2)

    def number(value: int) -> int:
        meeting.wait(20)  # broken, were there one at a time
        return value

    assert at_once([partial(number, value) for value in (3, 1)]) == [3, 1]


@pytest.mark.usefixtures("two_threads")
def test_what_is_begun_is_under_way_before_somebody_waits() -> None:
    meeting = threading.Barrier(2)
    (wait,) = begun([lambda: meeting.wait(20)])
    assert {meeting.wait(20), wait()} == {0, 1}


def test_work_for_an_accelerator_is_done_by_who_waits_for_it() -> None:
    made = list[int]()
    (wait,) = begun([lambda: made.append(threading.get_ident())], torch.device("cuda"))
    assert not made
    wait()
    assert made == [threading.get_ident()]


@pytest.mark.usefixtures("two_threads")
def test_a_call_of_a_worker_may_ask_for_more_calls() -> None:
    def outer() -> list[int]:
        return at_once([lambda: 1, lambda: 2, lambda: 3])

    assert at_once([outer, outer]) == [[1, 2, 3], [1, 2, 3]]


def test_one_thread_makes_the_calls_itself() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert at_once([threading.get_ident]) == [threading.get_ident()]
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_what_goes_wrong_in_a_call_is_raised() -> None:
    def fails() -> None:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        at_once([fails, fails])
