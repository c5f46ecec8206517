"""Peers that were turned away, told of once and not once a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dicom_node.listener import Refusal
from dicom_node.observability import get_logger

_log = get_logger(__name__)


@dataclass
class _Window:
    """What has been told of one address since *opened*; the rest was counted."""

    opened: float
    told: set[str] = field(default_factory=set)
    left_out: int = 0


class RefusalLog:
    """Logs a refusal and passes it on, but not its like from the same address within a minute.

    A port scanner, or a sender that tries every second, must fill neither log nor audit trail: of
    one address a few different reasons are told in each window, of all addresses the latest are
    remembered.
    """

    def __init__(
        self,
        tell: Callable[[Refusal, int], None],
        *,
        window_s: float = 60.0,
        reasons: int = 10,
        addresses: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*tell* gets a refusal and how many from its address were left out before it."""
        self._tell = tell
        self._window_s = window_s
        self._reasons = reasons
        self._addresses = addresses
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def __call__(self, refusal: Refusal) -> None:
        """Take a refusal; called by one thread."""
        window, left_out = self._window(refusal.address)
        if refusal.why in window.told or len(window.told) >= self._reasons:
            window.left_out += 1
            return
        window.told.add(refusal.why)
        _write(refusal, left_out)
        self._tell(refusal, left_out)

    def _window(self, address: str) -> tuple[_Window, int]:
        """The address's window, and how many the window before it had left out."""
        now, left_out = self._clock(), 0
        window = self._windows.get(address)
        if window is None or now - window.opened >= self._window_s:
            left_out = window.left_out if window is not None else 0
            self._windows.pop(address, None)
            window = self._windows[address] = _Window(now)
            if len(self._windows) > self._addresses:
                del self._windows[next(iter(self._windows))]
        return window, left_out


def _write(refusal: Refusal, left_out: int) -> None:
    answer = refusal.admission
    _log.warning(
        "connection refused" if answer is None else "association rejected",
        action="connection_refused" if answer is None else "association_rejected",
        why=refusal.why,
        address=refusal.address,
        calling_ae=refusal.calling_ae or None,
        answer=answer.standard_words if answer is not None else None,
        left_out=left_out or None,
    )
