"""The risk analysis is held to the tests that it names, and to the gates and commands there are."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from dicom_node.settings.gates import GATES

_COLUMNS = 8


@cache
def _page(repository: Path) -> str:
    return (repository / "docs/safety.md").read_text(encoding="utf-8")


def _hazards(repository: Path) -> list[list[str]]:
    lines = re.findall(r"(?m)^\| H\d+ .*\|$", _page(repository))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _defined(repository: Path) -> set[str]:
    return {
        name
        for path in (repository / "tests").rglob("test_*.py")
        for name in re.findall(r"(?m)^(?:async )?def (test_\w+)\(", path.read_text("utf-8"))
    }


def test_every_test_that_the_risk_analysis_names_exists(repository: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", _page(repository)))
    assert len(named) > 30
    assert named - _defined(repository) == set()


def test_every_hazard_has_every_column_and_a_verification(repository: Path) -> None:
    hazards = _hazards(repository)
    assert [row[0] for row in hazards] == [f"H{n}" for n in range(1, len(hazards) + 1)]
    for row in hazards:
        assert len(row) == _COLUMNS, row[0]
        assert all(row), row[0]
        assert row[4] in "12345", row[0]
        assert "`test_" in row[6], row[0]


def test_every_gate_that_is_named_is_one(repository: Path) -> None:
    for row in _hazards(repository):
        for sentence in re.findall(r"gates? ((?:`\w+\*?`(?:, )?)+)", row[5]):
            for gate in re.findall(r"`(\w+\*?)`", sentence):
                known = [name for name in GATES if name.startswith(gate.rstrip("*"))]
                assert gate in GATES or (gate.endswith("*") and known), gate


@pytest.mark.parametrize("program", ["dicom-node", "diffcode"])
def test_every_command_that_is_named_exists(repository: Path, program: str) -> None:
    from dicom_node.cli.main import cli as node
    from training.cli.main import main as diffcode

    root = {"dicom-node": node, "diffcode": diffcode}[program]
    named = re.findall(rf"{program} ([a-z]+)(?: ([a-z]+))?", _page(repository))
    assert named
    for first, second in named:
        command = root.commands.get(first)
        assert command is not None, first
        inner = getattr(command, "commands", None)
        assert inner is None or second in inner, (first, second)


def test_the_page_says_first_that_it_is_research_software(repository: Path) -> None:
    beginning = _page(repository)[:400]
    assert "research software" in beginning
    assert "not a medical device" in beginning
