"""A site's own expectations of its routing table: headers or files, and what must become of them.

``dicom-node route test`` reads ``[[expect]]`` tables of a TOML file and compares each with what the
table decides, so that a change of the rules shows what else it changes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.valuerep import format_number_as_ds

from dicom_node.dicom.division import representative
from dicom_node.dicom.header import quiet_pydicom, read_header
from dicom_node.errors import ConfigurationError, UnreadableInstanceError
from dicom_node.routing import Decision, Routes, Titles, decide
from dicom_node.settings.places import Places

__all__ = ["Expectation", "load_expectations", "mismatches"]

_OUTCOMES = ("route", "task", "destinations", "priority", "strength", "waits", "reason")
_GIVEN = ("name", "file", "header", "calling_ae", "called_ae", "address", "at")


@dataclass(frozen=True)
class Expectation:
    """One header with its sender and time, and what is expected of the table."""

    name: str
    header: Dataset
    titles: Titles = field(default_factory=Titles)
    at: float = 0.0
    #: By the name of an outcome: what it must be. "none" as a route: no route matches.
    wanted: Mapping[str, Any] = field(default_factory=dict)

    def decision(self, routes: Routes) -> Decision:
        """What the table decides."""
        return decide(self.titles, self.header, routes, self.at)


def mismatches(expectation: Expectation, decision: Decision) -> list[str]:
    """How a decision departs from what was expected, one line each; empty: it does not."""
    found: dict[str, Any] = {
        "route": decision.route or "none",
        "task": decision.task or "ignore",
        "destinations": list(decision.destinations),
        "priority": decision.priority,
        "strength": decision.strength,
        "waits": decision.not_before > expectation.at,
        "reason": decision.reason or "",
    }
    return [
        f"{key}: expected {wanted!r}, got {found[key]!r}"
        for key, wanted in expectation.wanted.items()
        if found[key] != wanted
    ]


def load_expectations(path: Path) -> list[Expectation]:
    """Read a file of expectations; ConfigurationError with every mistake and its place."""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigurationError([f"{path}: cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError([f"{path}: not valid TOML: {error}"]) from error
    reader = _Reader(path, Places(text))
    made = reader.read(document)
    if reader.problems:
        raise ConfigurationError(reader.problems)
    return made


class _Reader:
    """Turns tables into expectations and collects the problems of all of them."""

    def __init__(self, path: Path, places: Places) -> None:
        self._path = path
        self._places = places
        self.problems: list[str] = []

    def _problem(self, index: int | None, key: str, text: str) -> None:
        place: tuple[str | int, ...] = (key,) if index is None else ("expect", index, key)
        line = self._places.line(place)
        spelled = key if index is None else f"expect[{index}].{key}"
        self.problems.append(f"{self._path}:{line or 1}: {spelled}: {text}")

    def read(self, document: Mapping[str, Any]) -> list[Expectation]:
        """Every ``[[expect]]`` table."""
        for key in document.keys() - {"expect"}:
            self._problem(None, key, "unknown key")
        tables = document.get("expect", [])
        if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
            self._problem(None, "expect", "must be [[expect]] tables")
            return []
        if not tables:
            self._problem(None, "expect", "there is none; a test of nothing always passes")
        return [self._expectation(index, table) for index, table in enumerate(tables)]

    def _expectation(self, index: int, table: Mapping[str, Any]) -> Expectation:
        for key in table.keys() - {*_GIVEN, *_OUTCOMES}:
            self._problem(index, key, f"unknown key (known: {', '.join((*_GIVEN, *_OUTCOMES))})")
        wanted = {key: table[key] for key in _OUTCOMES if key in table}
        if not wanted:
            self._problem(index, "name", f"expects nothing (one of {', '.join(_OUTCOMES)})")
        name = str(table.get("name") or f"expect[{index}]")
        titles = Titles(*(str(table.get(k, "")) for k in ("calling_ae", "called_ae", "address")))
        return Expectation(
            name, self._header(index, table), titles, self._moment(index, table), wanted
        )

    def _header(self, index: int, table: Mapping[str, Any]) -> Dataset:
        """That of a file, with what the table gives beside it put over it."""
        header = Dataset()
        if "file" in table:
            path = self._path.parent / str(table["file"])
            try:
                header = representative([read_header(path)])
            except (OSError, UnreadableInstanceError) as error:
                self._problem(index, "file", f"{path} cannot be read: {error}")
        elif "header" not in table:
            self._problem(index, "name", "gives neither file nor header")
        given = table.get("header", {})
        if not isinstance(given, dict):
            self._problem(index, "header", "must be a table of keyword = value")
            return header
        for keyword, value in given.items():
            self._set(index, header, keyword, value)
        return header

    def _set(self, index: int, header: Dataset, keyword: str, value: Any) -> None:
        if tag_for_keyword(keyword) is None:
            self._problem(index, "header", f"{keyword} is no DICOM keyword")
            return
        try:
            with quiet_pydicom():
                setattr(header, keyword, _element(keyword, value))
        except (ValueError, TypeError) as error:
            self._problem(index, "header", f"{keyword}: {error}")

    def _moment(self, index: int, table: Mapping[str, Any]) -> float:
        at = table.get("at", 0.0)
        try:
            moment = at if isinstance(at, datetime) else datetime.fromisoformat(str(at))
        except ValueError:
            if at != 0.0:
                self._problem(index, "at", "must be a date and time, as 2026-01-31T23:00:00+01:00")
            return 0.0
        return moment.timestamp()


def _element(keyword: str, value: Any) -> Any:
    """A TOML value as pydicom takes it: items for a sequence, text for decimal strings."""
    vr = dictionary_VR(keyword)
    if vr == "SQ":
        return [_item(each) for each in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        return [_element(keyword, each) for each in value]
    if vr == "DS" and isinstance(value, int | float):
        return format_number_as_ds(float(value))
    return value


def _item(values: Any) -> Dataset:
    if not isinstance(values, dict):
        raise TypeError("a sequence is a list of tables")
    item = Dataset()
    for keyword, value in values.items():
        if tag_for_keyword(keyword) is None:
            raise ValueError(f"{keyword} is no DICOM keyword")
        setattr(item, keyword, _element(keyword, value))
    return item
