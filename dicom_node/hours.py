"""Hours of the week in which a route is open, by the clock on the wall of a place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

__all__ = ["DAYS", "Hours", "days_of", "span_of"]

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SPAN = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-(?:([01]\d|2[0-3]):([0-5]\d)|24:00)")
_MINUTES = 24 * 60


@dataclass(frozen=True)
class Hours:
    """Spans of the day in minutes after midnight on some days of the week.

    A span that ends before it begins goes on to the next day, and belongs to the day on which it
    begins. zone is a name of the IANA database; None is the zone of the machine.
    """

    spans: tuple[tuple[int, int], ...]
    days: frozenset[int]  # 0 is Monday
    zone: str | None = None

    def contains(self, now: float) -> bool:
        """Whether *now* (seconds since 1970 UTC) lies in a span."""
        return any(start <= now < end for start, end in self._around(now))

    def next_start(self, now: float) -> float:
        """*now* itself where it lies in a span, else when the next begins."""
        if self.contains(now):
            return now
        return min(start for start, _ in self._around(now) if start > now)

    def _around(self, now: float) -> Iterator[tuple[float, float]]:
        """Spans from yesterday's to those of the same day next week, as moments."""
        today = datetime.fromtimestamp(now, self._tz()).replace(
            hour=0, minute=0, second=0, microsecond=0, fold=0
        )
        for offset in range(-1, 9):
            day = today + timedelta(days=offset)
            if day.weekday() in self.days:
                for start, end in self.spans:
                    later = end + (_MINUTES if end <= start else 0)
                    yield _moment(day, start), _moment(day, later)

    def _tz(self) -> tzinfo | None:
        return None if self.zone is None else ZoneInfo(self.zone)

    def __str__(self) -> str:
        """Reads ``22:00-06:00 on mon, tue (Europe/Berlin)``."""
        spans = ", ".join(f"{_clock(start)}-{_clock(end)}" for start, end in self.spans)
        days = "" if len(self.days) == 7 else " on " + ", ".join(DAYS[d] for d in sorted(self.days))
        return f"{spans}{days}" + (f" ({self.zone})" if self.zone else "")


def _moment(day: datetime, minutes: int) -> float:
    """The moment at which the clock shows so many minutes after the midnight of *day*.

    Arithmetic on the clock, not on elapsed time: 22:00 is 22:00 on the night the clocks change too.
    """
    return (day + timedelta(minutes=minutes)).timestamp()


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def span_of(text: str) -> tuple[int, int]:
    """Read '22:00-06:00' as minutes after midnight; ValueError in words for a person."""
    found = _SPAN.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no span of the day, as 22:00-06:00")
    start = int(found[1]) * 60 + int(found[2])
    end = _MINUTES if found[3] is None else int(found[3]) * 60 + int(found[4])
    if start == end:
        raise ValueError(f"{text!r} begins when it ends")
    return start, end


def days_of(names: Sequence[str]) -> frozenset[int]:
    """Read ['mon-fri', 'sun'] as days of the week; ValueError in words for a person."""
    found: set[int] = set()
    for name in names:
        first, _, last = name.strip().lower().partition("-")
        if first not in DAYS or (last and last not in DAYS):
            raise ValueError(f"{name!r} is no day of the week ({', '.join(DAYS)})")
        start = DAYS.index(first)
        found.update((start + i) % 7 for i in range((DAYS.index(last or first) - start) % 7 + 1))
    return frozenset(found)
