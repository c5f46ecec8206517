"""What receiving is to reach, and what one run has measured of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks import receivers
from benchmarks.receivers import Receiver


class Rated(Protocol):
    """One receiver in one repetition."""

    rate: float
    cpu_ms: float


@dataclass(frozen=True)
class Line:
    """One line of the table of targets."""

    what: str
    target: str
    measured: str
    met: bool
    only: str  # what --only repeats it
    limit: str = "–"  # what nobody exceeds here who flushes as the node does

    @property
    def row(self) -> str:
        """The line in Markdown."""
        command = f"`python -m benchmarks.bench_receive --only '{self.only}'`"
        met = "yes" if self.met else "no"
        return (
            f"| {self.what} | {self.target} | {self.measured} | {self.limit} | {met} | {command} |"
        )


@dataclass(frozen=True)
class _Rate:
    """The node's rate is to be so many times that of another receiver."""

    scenario: str
    against: Receiver
    at_least: float


PLAIN = "storescu as it comes, 1 association"
ONE = "storescu, TCP_NODELAY=1, 1 association"
FOUR = "storescu, TCP_NODELAY=1, 4 associations at once"
_RATES = (
    _Rate(PLAIN, receivers.STORESCP, 10),
    _Rate(PLAIN, receivers.ORTHANC_PLAIN, 10),
    _Rate(ONE, receivers.STORESCP_ND, 0.7),
    _Rate(ONE, receivers.ORTHANC_ND, 2.5),
    _Rate(FOUR, receivers.STORESCP_FORK, 1.0),
    _Rate(FOUR, receivers.ORTHANC_ND, 2.5),
)
_CPU_AT_MOST = 0.5
_PEAK_AT_MOST, _GROWTH_AT_MOST = 150e6, 20e6
_ECHO_WITHIN_S = 0.2


def rates(title: str, samples: Mapping[str, Sequence[Rated]]) -> list[Line]:
    """The lines that one scenario has something to say of."""
    node, limit = samples[receivers.NODE.name], samples.get(receivers.DURABLE.name, ())
    lines = []
    for wanted in _RATES:
        if wanted.scenario == title:
            theirs = samples[wanted.against.name]
            ratio, possible = _ratio(node, theirs), _ratio(limit, theirs)
            what = f"{title}, against {wanted.against.name}"
            target = f"≥ {wanted.at_least:g}×"
            met = ratio >= wanted.at_least
            lines.append(Line(what, target, f"{ratio:.2f}×", met, title, f"{possible:.2f}×"))
    if title == ONE:
        pairs = zip(node, samples[receivers.PYNETDICOM.name], strict=True)
        ratio = statistics.median(ours.cpu_ms / theirs.cpu_ms for ours, theirs in pairs)
        what = f"CPU per instance, against {receivers.PYNETDICOM.name}"
        target = f"≤ {_CPU_AT_MOST}×"
        lines.append(Line(what, target, f"{ratio:.2f}×", ratio <= _CPU_AT_MOST, title))
    return lines


def _ratio(ours: Sequence[Rated], theirs: Sequence[Rated]) -> float:
    """The median of the ratios within a repetition."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(one.rate / other.rate for one, other in pairs)


def memory(name: str, idle: int, peak: int) -> Line:
    """The line of a row of the table of memory."""
    growth = peak - idle
    return Line(
        f"memory of the receive process, {name}",
        f"≤ {_PEAK_AT_MOST / 1e6:.0f} MB, growth ≤ {_GROWTH_AT_MOST / 1e6:.0f} MB",
        f"{peak / 1e6:.0f} MB, growth {growth / 1e6:.0f} MB",
        peak <= _PEAK_AT_MOST and growth <= _GROWTH_AT_MOST,
        "memory",
    )


def echo(silent: int, seconds: Sequence[float]) -> Line:
    """The line of the C-ECHO; the longest counts."""
    return Line(
        f"C-ECHO beside {silent} silent peers on each port",
        f"< {_ECHO_WITHIN_S} s",
        f"{max(seconds):.3f} s at most",
        max(seconds) < _ECHO_WITHIN_S,
        "echo",
    )


def table(lines: Sequence[Line]) -> str:
    """All lines in Markdown."""
    return "\n".join(
        [
            "### Targets",
            "",
            "| what | target | measured | limit here | met | by |",
            "|---|---|---|---|---|---|",
            *(line.row for line in lines),
            "",
            "The limit here: what our storage loop reaches against the same peer with the same",
            "flushes, and with nothing checked, hashed or recorded.",
            "",
        ]
    )
