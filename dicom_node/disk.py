"""How much of the disk is free, and whether more may come: two marks with room between them.

Below the lower mark nothing is accepted, above the upper one again. Between them it stays as it
was, so that senders do not meet a node that changes its mind with each instance.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from dicom_node.observability import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True)
class Marks:
    """Bytes that must be free: below *low* the door closes, from *high* on it opens again."""

    low: float
    high: float


def is_open(free: float, marks: Marks, *, was_open: bool) -> bool:
    """Whether more may come when so many bytes are free."""
    return free >= (marks.low if was_open else marks.high)


@dataclass(frozen=True)
class Space:
    """The disk at one moment, in bytes."""

    free: int
    marks: Marks

    @property
    def short(self) -> float:
        """How many bytes are missing to the upper mark; 0 when none."""
        return max(0.0, self.marks.high - self.free)


class Disk:
    """The disk under a folder, and whether its door is open; any number of threads may ask."""

    def __init__(
        self,
        folder: Path,
        *,
        min_free_bytes: int = 0,
        min_free_percent: float = 0.0,
        resume_factor: float = 1.0,
    ) -> None:
        """The lower mark is the larger of the two reserves, the upper *resume_factor* times it."""
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        self._min_free_percent = min_free_percent
        self._resume_factor = resume_factor
        self._open = True
        self._lock = threading.Lock()

    def space(self) -> Space:
        """Look at the disk; OSError when it is gone."""
        found = os.statvfs(self._folder)
        total = found.f_blocks * found.f_frsize
        low = max(self._min_free_bytes, total * self._min_free_percent / 100)
        return Space(found.f_bavail * found.f_frsize, Marks(low, low * self._resume_factor))

    def has_room(self, extra_bytes: int = 0) -> bool:
        """Whether the door is open, and the reserve stays when so many bytes more are written."""
        try:
            space = self.space()
        except OSError:
            return False
        with self._lock:
            before, self._open = self._open, is_open(space.free, space.marks, was_open=self._open)
            door = self._open
        if door is not before:
            # PS3.4 B.2.3: what comes while it is closed is answered 0xA700.
            _log.warning(
                "accepting again" if door else "disk short, accepting nothing",
                action="disk_open" if door else "disk_closed",
                free_bytes=space.free,
            )
        return door and space.free - extra_bytes >= space.marks.low
