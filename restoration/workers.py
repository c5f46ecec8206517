"""Threads in which PyTorch computes by one thread each: no operator there waits for others."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Workers:
    """So many of them."""

    def __init__(self, count: int) -> None:
        ready = threading.Barrier(count + 1)

        def alone() -> None:
            # At a thread's first look PyTorch gives it the number of the process, over its own.
            torch.get_num_threads()
            torch.set_num_threads(1)
            ready.wait()

        self._pool = ThreadPoolExecutor(count, "restore", alone)
        for _ in range(count):
            self._pool.submit(lambda: None)
        ready.wait()
        # The number is a thread's own, but for MKL and for threads to come: these as they were.
        torch.set_num_threads(count)

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Do it in the next thread that is free."""
        return self._pool.submit(torch.inference_mode()(call))


@functools.cache
def workers(count: int) -> Workers:
    """Those of this process."""
    return Workers(count)


def at_once(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """What the calls give, each made by one thread, as many at a time as PyTorch has threads here.

    Two threads take longer over a small operator than one does, and a sum has other bits by them.
    """
    count = torch.get_num_threads()
    if count == 1:
        return [call() for call in calls]
    waiting = [workers(count).submit(call) for call in calls]
    return [each.result() for each in waiting]
