"""When to try again: exponential waits with jitter, up to days, as a pure function."""

from __future__ import annotations

from dicom_node.settings import DeliverySettings

JITTER = 0.2
"""Up to this share is taken off a wait, so that what failed together does not return together."""


def wait_s(failures: int, backoff: DeliverySettings, jitter: float) -> float:
    """How long to wait after *failures* failed attempts in a row, in seconds.

    The wait grows by ``factor`` from ``first_s`` up to ``max_s``; *jitter*, from 0 up to but not
    1, takes off up to a fifth of it.
    """
    # A float overflows after a thousand doublings; the wait has met its limit long before.
    steps = min(max(0, failures - 1), 1024)
    try:
        grown = backoff.first_s * backoff.factor**steps
    except OverflowError:
        grown = backoff.max_s
    return min(backoff.max_s, grown) * (1.0 - JITTER * jitter)


def next_attempt(
    failures: int, *, first_attempt: float, now: float, backoff: DeliverySettings, jitter: float
) -> float | None:
    """When to try again; None once it has failed for ``give_up_after_s``.

    The last attempt is made as the patience ends, however long the wait before it would have been.
    """
    end = first_attempt + backoff.give_up_after_s
    if now >= end:
        return None
    return min(now + wait_s(failures, backoff, jitter), end)
