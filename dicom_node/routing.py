"""Which task a series gets and where its result goes: an ordered table of rules, as data.

``routes.toml`` holds ``[[route]]`` tables.  The first enabled route whose every condition holds
decides; a series that no route matches is ignored with a reason.  Nothing here reads a socket, a
database or a clock: :func:`decide` is a pure function of titles, header, table and time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pydicom.dataset import Dataset

from dicom_node.conditions import Condition, Titles, Value, header_values
from dicom_node.dicom.header import text
from dicom_node.route_table import IGNORE, Routes, Rule, load_routes, parse_routes

__all__ = [
    "IGNORE",
    "Condition",
    "ConditionTrace",
    "Decision",
    "Routes",
    "Rule",
    "RuleTrace",
    "Titles",
    "decide",
    "header_values",
    "load_routes",
    "opted_out",
    "parse_routes",
]

OPT_OUT = "opt_out"


@dataclass(frozen=True)
class ConditionTrace:
    """What one condition saw in one header."""

    condition: Condition
    values: tuple[Value, ...]
    holds: bool

    def __str__(self) -> str:
        """Reads ``KVP in range 80..120 kV: 140 kV → no``."""
        shown = self.condition.shown(self.values)
        return f"{self.condition}: {shown} → {'yes' if self.holds else 'no'}"


@dataclass(frozen=True)
class RuleTrace:
    """Why one rule matched or did not; *skipped* names the cause when it was not tested."""

    rule: str
    matched: bool
    conditions: tuple[ConditionTrace, ...] = ()
    skipped: str | None = None
    #: What the hours of the route made of the time.
    hours: str | None = None


@dataclass(frozen=True)
class Decision:
    """The outcome for one header: a task with destinations, or ``task=None`` and the reason."""

    task: str | None
    destinations: tuple[str, ...]
    route: str | None
    priority: int
    reason: str | None
    #: How much of the change is applied, 0 < strength ≤ 1.
    strength: float = 1.0
    #: Seconds since 1970 UTC before which it is not restored; 0: at once.
    not_before: float = 0.0
    explanation: tuple[RuleTrace, ...] = field(default=(), repr=False, compare=False)


def decide(titles: Titles, header: Dataset, routes: Routes, now: float = 0.0) -> Decision:
    """Apply *routes* to one header at *now* (seconds since 1970 UTC).

    Who is on the opt-out list is ignored before any rule is looked at; then the first enabled rule
    whose conditions all hold wins.
    """
    traces: list[RuleTrace] = []
    refused = opted_out(header, routes)
    if routes.opt_out:
        traces.append(RuleTrace(OPT_OUT, refused is not None))
    winner: Rule | None = None
    for rule in routes.rules:
        if refused is not None or winner is not None:
            first = OPT_OUT if winner is None else winner.name
            traces.append(RuleTrace(rule.name, False, skipped=f"{first!r} matched before"))
            continue
        trace = _trace(rule, titles, header, now)
        traces.append(trace)
        if trace.matched:
            winner = rule
    if refused is not None:
        return Decision(None, (), OPT_OUT, 0, refused, explanation=tuple(traces))
    return _outcome(winner, header, tuple(traces), now)


def opted_out(header: Dataset, routes: Routes) -> str | None:
    """Why a series is not to be restored whatever the rules say, without a word of who it is."""
    for entry in routes.opt_out:
        if entry.lists(header_values(header, entry.keyword)):
            return f"on the opt-out list by {entry.keyword}"
    return None


def _trace(rule: Rule, titles: Titles, header: Dataset, now: float) -> RuleTrace:
    if not rule.enabled:
        return RuleTrace(rule.name, False, skipped="disabled")
    seen = tuple(_see(condition, titles, header) for condition in rule.conditions)
    holds = all(each.holds for each in seen)
    if rule.hours is None:
        return RuleTrace(rule.name, holds, seen)
    opened = rule.hours.contains(now)
    closed = "closed, waits" if rule.waits else "closed, the next route is tried"
    words = f"{rule.hours}: {'open' if opened else closed}"
    return RuleTrace(rule.name, holds and (opened or rule.waits), seen, hours=words)


def _see(condition: Condition, titles: Titles, header: Dataset) -> ConditionTrace:
    values = condition.values(titles, header)
    return ConditionTrace(condition, values, condition.holds(values))


def _outcome(
    winner: Rule | None, header: Dataset, traces: tuple[RuleTrace, ...], now: float
) -> Decision:
    if winner is None:
        modality = text(header, "Modality") or "unknown"
        reason = f"no route matches (modality {modality})"
        return Decision(None, (), None, 0, reason, explanation=traces)
    if winner.task == IGNORE:
        reason = winner.reason or f"route {winner.name!r} says ignore"
        return Decision(None, (), winner.name, 0, reason, explanation=traces)
    return Decision(
        winner.task,
        winner.destinations,
        winner.name,
        winner.priority,
        None,
        winner.strength,
        0.0 if winner.hours is None else winner.hours.next_start(now),
        traces,
    )
