"""Reading ``routes.toml``: rules, opt-out list, and every mistake of it at once with its place."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from dicom_node.conditions import OPERATORS, Condition, Key, Value, in_unit
from dicom_node.dicom.acceptance import TASK_MODALITY
from dicom_node.dicom.quantities import REFERENCES, convert, measured
from dicom_node.errors import ConfigurationError
from dicom_node.hours import DAYS, Hours, days_of, span_of
from dicom_node.settings.places import Places

__all__ = ["IGNORE", "OptOut", "Routes", "Rule", "load_routes", "parse_routes"]

IGNORE = "ignore"
EVERY_DESTINATION = "*"

_ROUTE_KEYS = (
    "name", "match", "task", "destinations", "priority", "strength", "hours", "enabled", "reason",
)  # fmt: skip
_HOURS_KEYS = ("open", "days", "zone", "closed")
_HASHED = "sha256:"

Place = tuple[str | int, ...]


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
    #: How much of the change is applied, 0 < strength ≤ 1.
    strength: float = 1.0
    hours: Hours | None = None
    #: Outside its hours, take the series and wait for them; else leave it to the next rule.
    waits: bool = False


@dataclass(frozen=True)
class OptOut:
    """Values of one attribute whose series are never restored; hashes stand for values unsaid."""

    keyword: str
    values: frozenset[str]
    hashes: frozenset[str]

    def lists(self, found: Sequence[Value]) -> bool:
        """Whether one of the values of a header is listed."""
        words = [str(value) for value in found]
        return any(
            word in self.values or sha256(word.encode()).hexdigest() in self.hashes
            for word in words
        )


@dataclass(frozen=True)
class Routes:
    """The routing table in the order of the file, and who is never restored."""

    rules: tuple[Rule, ...]
    source: str = "routes.toml"
    opt_out: tuple[OptOut, ...] = ()


def load_routes(path: Path, destinations: Sequence[str]) -> Routes:
    """Read and validate a routing table; *destinations* are the names node.toml defines.

    Raises:
        ConfigurationError: with every problem of the file, each as ``file:line: key.path: why``.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as exc:
        raise ConfigurationError([f"{path}: cannot be read: {exc.strerror}"]) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigurationError([f"{path}: not valid TOML: {exc}"]) from exc
    return parse_routes(document, destinations, source=str(path), text=text, folder=path.parent)


def parse_routes(
    document: Mapping[str, Any],
    destinations: Sequence[str],
    *,
    source: str = "routes.toml",
    text: str = "",
    folder: Path | None = None,
) -> Routes:
    """Validate a decoded routing table; raises ConfigurationError with all problems at once.

    *text* is what it was decoded from, for lines in messages; the files of the opt-out list are
    relative to *folder*.
    """
    reader = _Reader(source, tuple(destinations), Places(text), folder)
    for key in document.keys() - {"route", "opt_out"}:
        reader.problem((key,), "unknown key")
    tables = document.get("route", [])
    if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        reader.problem(("route",), "must be [[route]] tables")
        tables = []
    elif not tables:
        reader.problem((), "has no [[route]]; nothing would ever be restored")
    rules = tuple(reader.rule(index, table) for index, table in enumerate(tables))
    reader.check_names(rules)
    opt_out = tuple(reader.opt_outs(document.get("opt_out", {})))
    if reader.problems:
        raise ConfigurationError(reader.problems)
    return Routes(rules, source, opt_out)


class _Reader:
    """Turns tables into rules and collects the problems of all of them."""

    def __init__(
        self, source: str, destinations: tuple[str, ...], places: Places, folder: Path | None
    ) -> None:
        self._source = source
        self._destinations = destinations
        self._places = places
        self._folder = folder
        self.problems: list[str] = []

    def problem(self, place: Place, text: str) -> None:
        """Note a mistake at a key."""
        line = self._places.line(place)
        where = self._source if line is None else f"{self._source}:{line}"
        self.problems.append(": ".join(part for part in (where, _spelled(place), text) if part))

    def rule(self, index: int, table: Mapping[str, Any]) -> Rule:
        """One ``[[route]]`` table."""
        place: Place = ("route", index)
        for key in table.keys() - set(_ROUTE_KEYS):
            self.problem((*place, key), f"unknown key (known: {', '.join(_ROUTE_KEYS)})")
        name = self._typed(place, table, "name", str, "")
        if not name:
            self.problem((*place, "name"), "is missing; every route needs a name for its reasons")
        task = self._task(place, table)
        hours, waits = self._hours((*place, "hours"), table.get("hours"))
        return Rule(
            name=name or _spelled(place),
            task=task,
            destinations=self._names(place, table, task),
            conditions=tuple(
                self._conditions((*place, "match"), self._typed(place, table, "match", dict, {}))
            ),
            priority=self._typed(place, table, "priority", int, 0),
            enabled=self._typed(place, table, "enabled", bool, True),
            reason=self._typed(place, table, "reason", str, None),
            strength=self._strength((*place, "strength"), table.get("strength", 1.0)),
            hours=hours,
            waits=waits,
        )

    def check_names(self, rules: Sequence[Rule]) -> None:
        """Every name once: it is how a person knows the route."""
        seen: set[str] = set()
        for index, rule in enumerate(rules):
            if rule.name in seen:
                self.problem(("route", index, "name"), f"{rule.name!r} is used twice")
            seen.add(rule.name)

    def opt_outs(self, table: Any) -> Iterator[OptOut]:
        """The ``[opt_out]`` table: keyword = list of values, or { file = "…" }."""
        if not isinstance(table, dict):
            self.problem(("opt_out",), "must be a table of keyword = [values]")
            return
        for name, given in table.items():
            place: Place = ("opt_out", name)
            key = self._key(place, name)
            if key is None:
                continue
            if key.numeric is not False:
                self.problem(place, "an opt-out list names text: identifiers and UIDs")
                continue
            listed = self._listed(place, given)
            hashed = [value for value in listed if value.startswith(_HASHED)]
            for value in hashed:
                if not re.fullmatch(r"sha256:[0-9a-f]{64}", value):
                    self.problem(place, "a hash is sha256: and 64 hexadecimal digits")
            plain = frozenset(listed) - frozenset(hashed)
            yield OptOut(key.name, plain, frozenset(v.removeprefix(_HASHED) for v in hashed))

    def _listed(self, place: Place, given: Any) -> list[str]:
        if isinstance(given, list) and all(isinstance(each, str) for each in given):
            return [each.strip() for each in given]
        if not isinstance(given, dict) or set(given) != {"file"} or not given["file"]:
            self.problem(place, 'must be a list of text or { file = "…" }')
            return []
        path = (self._folder or Path()) / str(given["file"])
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self.problem((*place, "file"), f"cannot be read: {error}")
            return []
        return [word for line in lines if (word := line.strip()) and not word.startswith("#")]

    def _typed(
        self, place: Place, table: Mapping[str, Any], key: str, kind: type, default: Any
    ) -> Any:
        value = table.get(key, default)
        if value is default or (isinstance(value, kind) and type(value) is kind):
            return value
        self.problem((*place, key), f"must be a {kind.__name__}, not {value!r}")
        return default

    def _task(self, place: Place, table: Mapping[str, Any]) -> str:
        task = table.get("task")
        if task in (*TASK_MODALITY, IGNORE):
            return str(task)
        known = ", ".join((*TASK_MODALITY, IGNORE))
        said = "is missing" if task is None else f"{task!r} is unknown"
        self.problem((*place, "task"), f"{said} (known: {known})")
        return IGNORE

    def _strength(self, place: Place, value: Any) -> float:
        if _is_number(value) and 0 < value <= 1:
            return float(value)
        self.problem(place, f"must be a number above 0 and up to 1, not {value!r}")
        return 1.0

    def _hours(self, place: Place, given: Any) -> tuple[Hours | None, bool]:
        if given is None:
            return None, False
        if not isinstance(given, dict):
            self.problem(place, 'must be a table, as { open = ["22:00-06:00"], closed = "wait" }')
            return None, False
        for key in given.keys() - set(_HOURS_KEYS):
            self.problem((*place, key), f"unknown key (known: {', '.join(_HOURS_KEYS)})")
        closed = given.get("closed", "wait")
        if closed not in ("wait", "skip"):
            self.problem((*place, "closed"), f'must be "wait" or "skip", not {closed!r}')
        spans = [
            self._read((*place, "open"), span_of, each) for each in _list_of(given.get("open"))
        ]
        if not spans:
            self.problem((*place, "open"), 'is empty; name spans of the day, as "22:00-06:00"')
        days = self._read((*place, "days"), days_of, _list_of(given.get("days", DAYS)))
        zone = given.get("zone")
        if zone is not None:
            self._read((*place, "zone"), _known_zone, zone)
        known = tuple(span for span in spans if span is not None)
        if not known or not days:
            return None, False
        return Hours(known, days, None if zone is None else str(zone)), closed == "wait"

    def _read(self, place: Place, reader: Any, value: Any) -> Any:
        """What *reader* makes of a value; None, and a problem, where it cannot."""
        try:
            return reader(value)
        except (ValueError, TypeError, AttributeError) as error:
            self.problem(place, str(error))
            return None

    def _names(self, place: Place, table: Mapping[str, Any], task: str) -> tuple[str, ...]:
        names = self._typed(place, table, "destinations", list, [])
        if not names and task != IGNORE:
            self.problem((*place, "destinations"), 'is empty; name destinations or ["*"]')
        if EVERY_DESTINATION in names:
            return self._destinations
        for name in names:
            if name not in self._destinations:
                known = ", ".join(self._destinations) or "none"
                text = f"{name!r} is not defined in node.toml ({known})"
                self.problem((*place, "destinations"), text)
        return tuple(str(name) for name in dict.fromkeys(map(str, names)))

    def _key(self, place: Place, name: str) -> Key | None:
        try:
            return Key.of(name)
        except ValueError as error:
            self.problem(place, str(error))
            return None

    def _conditions(
        self, place: Place, match: Mapping[str, Any], within: str = ""
    ) -> Iterator[Condition]:
        for name, test in match.items():
            here = (*place, name)
            full = f"{within}.{name}" if within else name
            if isinstance(test, dict) and any(key not in _TESTS for key in test):
                nested = [key for key in test if key[:1].isupper()]
                if nested:
                    # Sequence.Keyword = … is a table within a table in TOML.
                    yield from self._conditions(here, {k: test[k] for k in nested}, full)
                    test = {k: v for k, v in test.items() if k not in nested}
                    if not test:
                        continue
            key = self._key(here, full)
            if key is not None:
                yield from self._tests(here, key, test)

    def _tests(self, place: Place, key: Key, test: Any) -> list[Condition]:
        if isinstance(test, list):
            test = {"in": test}
        elif not isinstance(test, dict):
            test = {"equals": test}
        if not test:
            self.problem(place, f"has no test (one of {', '.join(OPERATORS)})")
        test = dict(test)
        reference = self._reference((*place, "of"), key, test.pop("of", None))
        if "min" in test or "max" in test:
            bounds = [test.pop("min", float("-inf")), test.pop("max", float("inf"))]
            test["range"] = bounds
        found = []
        for operator, operand in test.items():
            checked = self._operand((*place, operator), key, operator, operand)
            if checked is not None:
                found.append(Condition(key, operator, checked, reference))
        return found

    def _reference(self, place: Place, key: Key, given: Any) -> tuple[float, str] | None:
        wanted = key.name == "dose_fraction"
        if given is None:
            if wanted:
                units = ", ".join(REFERENCES)
                self.problem(place, f'is missing: the reference, as "10 mGy" (units: {units})')
            return None
        if not wanted:
            self.problem(place, "only dose_fraction has a reference")
            return None
        found = self._read(place, measured, given)
        if found is None:
            return None
        for unit in REFERENCES:
            try:
                value = convert(found[0], found[1], unit)
            except ValueError:
                continue
            if value > 0:
                return value, unit
        self.problem(place, f"must be above 0 in one of {', '.join(REFERENCES)}, not {given!r}")
        return None

    def _operand(self, place: Place, key: Key, operator: str, operand: Any) -> Any:
        if operator == "exists":
            return self._checked(place, operand, isinstance(operand, bool), "true or false")
        if operator == "range":
            return self._range(place, operand, key)
        if operator == "regex":
            return self._regex(place, operand)
        if operator == "equals":
            return self._scalar(place, operand, key)
        if operator in ("in", "not_in"):
            if not isinstance(operand, list) or not operand:
                return self._checked(place, operand, False, "a list with at least one value")
            values = tuple(self._scalar(place, each, key) for each in operand)
            return None if None in values else values
        if operator == "network" and key.name == "address":
            network = self._read(place, lambda each: ip_network(str(each), strict=False), operand)
            return None if network is None else str(network)
        self.problem(place, f"unknown test (known: {', '.join(OPERATORS)}, min, max)")
        return None

    def _checked(self, place: Place, operand: Any, good: bool, needed: str) -> Any:
        if good:
            return operand
        self.problem(place, f"must be {needed}, not {operand!r}")
        return None

    def _scalar(self, place: Place, operand: Any, key: Key) -> Value | None:
        if key.numeric or (key.numeric is None and _is_number(operand)):
            return self._number(place, operand, key)
        checked: str | None = self._checked(place, operand, isinstance(operand, str), "text")
        return checked

    def _number(self, place: Place, operand: Any, key: Key) -> float | None:
        """A number in the key's unit; one that is written needs it where the key is a quantity."""
        if isinstance(operand, str) and key.unit is not None:
            return self._with_unit(place, operand, key)
        if not _is_number(operand):
            needed = "a number" if key.unit is None else f'a number, or text as "3 {key.unit}"'
            self._checked(place, operand, False, needed)
            return None
        if key.needs_unit and operand not in (float("-inf"), float("inf")):
            self.problem(place, f'needs its unit, as "{operand} {key.unit}"')
        return float(operand)

    def _with_unit(self, place: Place, operand: str, key: Key) -> float | None:
        found = self._read(place, measured, operand)
        if found is None:
            return None
        value, unit = found
        converted: float | None = self._read(place, lambda each: in_unit(each, unit, key), value)
        return converted

    def _range(self, place: Place, operand: Any, key: Key) -> tuple[float, float] | None:
        if key.numeric is False:
            self.problem(place, "this attribute is text; use equals, in or regex")
            return None
        low = high = None
        if isinstance(operand, list) and len(operand) == 2:
            low, high = (self._number(place, each, key) for each in operand)
            if low is None or high is None:
                return None
        if low is None or high is None or low > high:
            self.problem(place, f"must be [lowest, highest] numbers, not {operand!r}")
            return None
        return low, high

    def _regex(self, place: Place, operand: Any) -> str | None:
        try:
            re.compile(operand)
        except (re.error, TypeError) as exc:
            self.problem(place, f"is no regular expression: {exc}")
            return None
        return str(operand)


_TESTS = frozenset({*OPERATORS, "min", "max", "of"})


def _spelled(place: Place) -> str:
    """A place as a person writes it: ``route[0].match.KVP``."""
    words = ""
    for part in place:
        words += f"[{part}]" if isinstance(part, int) else f".{part}" if words else part
    return words


def _known_zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except Exception as error:
        raise ValueError(f"{name!r} is no time zone (as Europe/Berlin)") from error


def _list_of(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
