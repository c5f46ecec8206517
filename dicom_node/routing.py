"""Which task a series gets and where its result goes: an ordered table of rules, as data.

``routes.toml`` holds ``[[route]]`` tables.  The first enabled route whose every condition holds
decides; a series that no route matches is ignored with a reason.  Nothing here reads a socket, a
database or a clock: :func:`decide` is a pure function of titles, header and table.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset

from dicom_node.dicom.acceptance import TASK_MODALITY
from dicom_node.dicom.header import numbers, text, texts
from dicom_node.errors import ConfigurationError

IGNORE = "ignore"
EVERY_DESTINATION = "*"

Value = str | float

_NUMERIC = frozenset({"DS", "IS", "FL", "FD", "US", "SS", "UL", "SL", "UV", "SV"})
_BINARY = frozenset({"SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN"})
_TITLE_KEYS = ("called_ae", "calling_ae", "address")
_ALIASES = {"modality": "Modality"}
_OPERATORS = ("equals", "regex", "range", "in", "not_in", "exists")
_ROUTE_KEYS = ("name", "match", "task", "destinations", "priority", "enabled", "reason")


@dataclass(frozen=True)
class Titles:
    """Who sent a series and to which of our names: AE titles and the peer's network address."""

    calling_ae: str = ""
    called_ae: str = ""
    address: str = ""

    def value(self, key: str) -> tuple[Value, ...]:
        """The value that the rule key *key* tests, as a one-element tuple; empty when unknown."""
        text = str(getattr(self, key))
        return (text,) if text else ()


@dataclass(frozen=True)
class Condition:
    """One test of one header attribute or title; *operand* has the operator's own shape."""

    key: str
    operator: str
    operand: Any

    def holds(self, values: tuple[Value, ...]) -> bool:
        """True when any of *values* satisfies the test (``not_in``: when none is in the list)."""
        if self.operator == "exists":
            return bool(values) is self.operand
        if self.operator == "not_in":
            return not any(value in self.operand for value in values)
        return any(self._accepts(value) for value in values)

    def _accepts(self, value: Value) -> bool:
        if self.operator == "equals":
            return bool(value == self.operand)
        if self.operator == "in":
            return value in self.operand
        if self.operator == "regex":
            return re.search(self.operand, str(value)) is not None
        low, high = self.operand
        return isinstance(value, float) and low <= value <= high

    def __str__(self) -> str:
        """The condition as one reads it aloud: ``KVP in range 80..120``."""
        if self.operator == "range":
            return f"{self.key} in range {self.operand[0]:g}..{self.operand[1]:g}"
        if self.operator == "exists":
            return f"{self.key} {'present' if self.operand else 'absent'}"
        operand = list(self.operand) if isinstance(self.operand, tuple) else repr(self.operand)
        return f"{self.key} {self.operator.replace('_', ' ')} {operand}"


@dataclass(frozen=True)
class Rule:
    """One ``[[route]]``: when all conditions hold, *task* for *destinations* (or ``ignore``)."""

    name: str
    task: str
    destinations: tuple[str, ...]
    conditions: tuple[Condition, ...]
    priority: int = 0
    enabled: bool = True
    reason: str | None = None


@dataclass(frozen=True)
class Routes:
    """The routing table in the order of the file."""

    rules: tuple[Rule, ...]
    source: str = "routes.toml"


@dataclass(frozen=True)
class ConditionTrace:
    """What one condition saw in one header."""

    condition: Condition
    values: tuple[Value, ...]
    holds: bool

    def __str__(self) -> str:
        """Reads ``KVP in range 80..120: 140 → no``."""
        shown = "\\".join(f"{v:g}" if isinstance(v, float) else v for v in self.values)
        return f"{self.condition}: {shown or '(absent)'} → {'yes' if self.holds else 'no'}"


@dataclass(frozen=True)
class RuleTrace:
    """Why one rule matched or did not; *skipped* names the cause when it was not tested."""

    rule: str
    matched: bool
    conditions: tuple[ConditionTrace, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True)
class Decision:
    """The outcome for one header: a task with destinations, or ``task=None`` and the reason."""

    task: str | None
    destinations: tuple[str, ...]
    route: str | None
    priority: int
    reason: str | None
    explanation: tuple[RuleTrace, ...] = field(default=(), repr=False, compare=False)


def decide(titles: Titles, header: Dataset, routes: Routes) -> Decision:
    """Apply *routes* to one header; the first enabled rule whose conditions all hold wins."""
    traces: list[RuleTrace] = []
    winner: Rule | None = None
    for rule in routes.rules:
        if winner is not None:
            traces.append(RuleTrace(rule.name, False, skipped=f"{winner.name!r} matched before"))
            continue
        trace = _trace(rule, titles, header)
        traces.append(trace)
        if trace.matched:
            winner = rule
    return _outcome(winner, header, tuple(traces))


def _trace(rule: Rule, titles: Titles, header: Dataset) -> RuleTrace:
    if not rule.enabled:
        return RuleTrace(rule.name, False, skipped="disabled")
    seen = tuple(_see(condition, titles, header) for condition in rule.conditions)
    return RuleTrace(rule.name, all(each.holds for each in seen), seen)


def _see(condition: Condition, titles: Titles, header: Dataset) -> ConditionTrace:
    key = condition.key
    values = titles.value(key) if key in _TITLE_KEYS else header_values(header, key)
    return ConditionTrace(condition, values, condition.holds(values))


def _outcome(winner: Rule | None, header: Dataset, traces: tuple[RuleTrace, ...]) -> Decision:
    if winner is None:
        modality = text(header, "Modality") or "unknown"
        return Decision(None, (), None, 0, f"no route matches (modality {modality})", traces)
    if winner.task == IGNORE:
        reason = winner.reason or f"route {winner.name!r} says ignore"
        return Decision(None, (), winner.name, 0, reason, traces)
    return Decision(winner.task, winner.destinations, winner.name, winner.priority, None, traces)


def header_values(header: Dataset, keyword: str) -> tuple[Value, ...]:
    """All values of one attribute: float for numeric VRs, stripped text otherwise.

    An attribute that is absent, empty or does not parse has no values; one bad element of a
    vendor must not decide whether the rest of the header can be routed.
    """
    if _numeric_vr(dictionary_VR(keyword)):
        return numbers(header, keyword) or ()
    return tuple(value for value in texts(header, keyword) if value)


def _numeric_vr(vr: str) -> bool:
    return set(vr.split(" or ")) <= _NUMERIC


def load_routes(path: Path, destinations: Sequence[str]) -> Routes:
    """Read and validate a routing table; *destinations* are the names node.toml defines.

    Raises:
        ConfigurationError: with every problem of the file, each with its place.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigurationError([f"{path}: cannot be read: {exc.strerror}"]) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigurationError([f"{path}: not valid TOML: {exc}"]) from exc
    return parse_routes(document, destinations, source=str(path))


def parse_routes(
    document: Mapping[str, Any], destinations: Sequence[str], *, source: str = "routes.toml"
) -> Routes:
    """Validate a decoded routing table; raises ConfigurationError with all problems at once."""
    problems = [f"{source}: {key}: unknown key" for key in document if key != "route"]
    tables = document.get("route", [])
    if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise ConfigurationError([*problems, f"{source}: route: must be [[route]] tables"])
    if not tables:
        problems.append(f"{source}: has no [[route]]; nothing would ever be restored")
    reader = _Reader(source, tuple(destinations), problems)
    rules = tuple(reader.rule(index, table) for index, table in enumerate(tables))
    reader.check_names(rules)
    if problems:
        raise ConfigurationError(problems)
    return Routes(rules, source)


class _Reader:
    """Turns tables into rules and collects the problems of all of them."""

    def __init__(self, source: str, destinations: tuple[str, ...], problems: list[str]) -> None:
        self._source = source
        self._destinations = destinations
        self._problems = problems

    def _problem(self, place: str, text: str) -> None:
        self._problems.append(f"{self._source}: {place}: {text}")

    def rule(self, index: int, table: Mapping[str, Any]) -> Rule:
        place = f"route[{index}]"
        for key in table.keys() - set(_ROUTE_KEYS):
            self._problem(f"{place}.{key}", f"unknown key (known: {', '.join(_ROUTE_KEYS)})")
        name = self._typed(place, table, "name", str, "")
        if not name:
            self._problem(f"{place}.name", "is missing; every route needs a name for its reasons")
        task = self._task(place, table)
        return Rule(
            name=name or place,
            task=task,
            destinations=self._names(place, table, task),
            conditions=self._conditions(place, self._typed(place, table, "match", dict, {})),
            priority=self._typed(place, table, "priority", int, 0),
            enabled=self._typed(place, table, "enabled", bool, True),
            reason=self._typed(place, table, "reason", str, None),
        )

    def check_names(self, rules: Sequence[Rule]) -> None:
        seen: set[str] = set()
        for index, rule in enumerate(rules):
            if rule.name in seen:
                self._problem(f"route[{index}].name", f"{rule.name!r} is used twice")
            seen.add(rule.name)

    def _typed(
        self, place: str, table: Mapping[str, Any], key: str, kind: type, default: Any
    ) -> Any:
        value = table.get(key, default)
        if value is default or (isinstance(value, kind) and type(value) is kind):
            return value
        self._problem(f"{place}.{key}", f"must be a {kind.__name__}, not {value!r}")
        return default

    def _task(self, place: str, table: Mapping[str, Any]) -> str:
        task = table.get("task")
        if task in (*TASK_MODALITY, IGNORE):
            return str(task)
        known = ", ".join((*TASK_MODALITY, IGNORE))
        said = "is missing" if task is None else f"{task!r} is unknown"
        self._problem(f"{place}.task", f"{said} (known: {known})")
        return IGNORE

    def _names(self, place: str, table: Mapping[str, Any], task: str) -> tuple[str, ...]:
        names = self._typed(place, table, "destinations", list, [])
        if not names and task != IGNORE:
            self._problem(f"{place}.destinations", 'is empty; name destinations or ["*"]')
        if EVERY_DESTINATION in names:
            return self._destinations
        for name in names:
            if name not in self._destinations:
                known = ", ".join(self._destinations) or "none"
                self._problem(
                    f"{place}.destinations", f"{name!r} is not defined in node.toml ({known})"
                )
        return tuple(str(name) for name in dict.fromkeys(map(str, names)))

    def _conditions(self, place: str, match: Mapping[str, Any]) -> tuple[Condition, ...]:
        found: list[Condition] = []
        for raw_key, test in match.items():
            key = _ALIASES.get(raw_key, raw_key)
            here = f"{place}.match.{raw_key}"
            numeric = self._is_numeric(here, key)
            if numeric is not None:
                found.extend(self._tests(here, key, test, numeric=numeric))
        return tuple(found)

    def _is_numeric(self, place: str, key: str) -> bool | None:
        if key in _TITLE_KEYS:
            return False
        tag = tag_for_keyword(key)
        if tag is None:
            self._problem(place, "is no DICOM keyword (and not called_ae, calling_ae, address)")
            return None
        vr = dictionary_VR(tag)
        if set(vr.split(" or ")) & _BINARY:
            self._problem(place, f"has VR {vr}, which a rule cannot test")
            return None
        return _numeric_vr(vr)

    def _tests(self, place: str, key: str, test: Any, *, numeric: bool) -> list[Condition]:
        if isinstance(test, list):
            test = {"in": test}
        elif not isinstance(test, dict):
            test = {"equals": test}
        if not test:
            self._problem(place, f"has no test (one of {', '.join(_OPERATORS)})")
        if "min" in test or "max" in test:
            bounds = [test.get("min", float("-inf")), test.get("max", float("inf"))]
            test = {k: v for k, v in test.items() if k not in ("min", "max")} | {"range": bounds}
        conditions = []
        for operator, operand in test.items():
            checked = self._operand(f"{place}.{operator}", operator, operand, numeric=numeric)
            if checked is not None:
                conditions.append(Condition(key, operator, checked))
        return conditions

    def _operand(self, place: str, operator: str, operand: Any, *, numeric: bool) -> Any:
        if operator == "exists":
            return self._checked(place, operand, isinstance(operand, bool), "true or false")
        if operator == "range":
            return self._range(place, operand, numeric=numeric)
        if operator == "regex":
            return self._regex(place, operand)
        if operator == "equals":
            return self._scalar(place, operand, numeric=numeric)
        if operator in ("in", "not_in"):
            if not isinstance(operand, list) or not operand:
                return self._checked(place, operand, False, "a list with at least one value")
            values = tuple(self._scalar(place, each, numeric=numeric) for each in operand)
            return None if None in values else values
        self._problem(place, f"unknown test (known: {', '.join(_OPERATORS)}, min, max)")
        return None

    def _checked(self, place: str, operand: Any, good: bool, needed: str) -> Any:
        if good:
            return operand
        self._problem(place, f"must be {needed}, not {operand!r}")
        return None

    def _scalar(self, place: str, operand: Any, *, numeric: bool) -> Value | None:
        if numeric:
            self._checked(place, operand, _is_number(operand), "a number")
            return float(operand) if _is_number(operand) else None
        checked: str | None = self._checked(place, operand, isinstance(operand, str), "text")
        return checked

    def _range(self, place: str, operand: Any, *, numeric: bool) -> tuple[float, float] | None:
        if not numeric:
            self._problem(place, "this attribute is text; use equals, in or regex")
            return None
        pair = isinstance(operand, list) and len(operand) == 2 and all(map(_is_number, operand))
        if not pair or operand[0] > operand[1]:
            self._problem(place, f"must be [lowest, highest] numbers, not {operand!r}")
            return None
        return float(operand[0]), float(operand[1])

    def _regex(self, place: str, operand: Any) -> str | None:
        try:
            re.compile(operand)
        except (re.error, TypeError) as exc:
            self._problem(place, f"is no regular expression: {exc}")
            return None
        return str(operand)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
