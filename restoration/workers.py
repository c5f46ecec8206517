"""Threads in which PyTorch computes by one thread each: no operator there waits for others."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
Waiting = Callable[[], Result]  #: for a result that is on its way
_CPU = torch.device("cpu")


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


def begun(
    calls: Sequence[Callable[[], Result]], device: torch.device = _CPU
) -> list[Waiting[Result]]:
    """The calls under way, each made by one thread, as many at a time as PyTorch has threads here.

    What comes back waits for its result, once. Calls for an accelerator are made by who waits: it
    does one thing after another anyway.
    """
    count = torch.get_num_threads()
    if count == 1 or device.type != "cpu":
        return list(calls)
    return [workers(count).submit(call).result for call in calls]


def at_once(calls: Sequence[Callable[[], Result]], device: torch.device = _CPU) -> list[Result]:
    """What the calls give: see `begun`.

    Two threads take longer over a small operator than one does, and a sum has other bits by them.
    """
    return [wait() for wait in begun(calls, device)]
