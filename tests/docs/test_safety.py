"""The risk analysis is held to the tests that it names, and to the gates and commands there are."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

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


def test_every_gate_is_the_control_of_a_hazard(repository: Path) -> None:
    named = {gate for row in _hazards(repository) for gate in re.findall(r"`(\w+\*?)`", row[5])}
    families = tuple(each.rstrip("*") for each in named if each.endswith("*"))
    assert [gate for gate in GATES if gate not in named and not gate.startswith(families)] == []


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


def _printed(repository: Path, page: str) -> list[str]:
    """The commands of the page's validation recipe."""
    lines = (repository / page).read_text(encoding="utf-8").splitlines()
    first = lines.index("    diffcode restore water.npy water-restored.npy --task ct_denoise")
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("    diffcode "))
    return [line.strip() for line in lines[first:last]]


def _phantoms(folder: Path) -> None:
    """Phantoms as a scanner would give them, with something wherever the pages look."""
    noise = np.random.default_rng(3)
    rows, columns = np.ogrid[:512, :512]
    water = np.where(np.hypot(rows - 256, columns - 256) < 240, 0.0, -1000.0)
    rod, signal = water.copy(), water.copy()
    for row, column in ((181, 331), (200, 256)):
        rod[np.hypot(row - rows, column - columns) < 9] = 100
    for row, column in ((256, 256), (256, 300)):
        signal[np.hypot(row - rows, column - columns) < 6] = 20
    activity = np.ones((24, 160, 160))
    for place in ((12, 61, 48), (20, 64, 80)):
        squares = (
            ((axis - middle) * size) ** 2
            for axis, middle, size in zip(np.ogrid[:24, :160, :160], place, (3, 4, 4), strict=True)
        )
        activity[sum(squares) < 18.5**2] = 8
    made = {
        "water": water[None] + noise.normal(0, 20, (2, 512, 512)),
        "rods": rod[None] + noise.normal(0, 5, (2, 512, 512)),
        "present": signal[None] + noise.normal(0, 20, (40, 512, 512)),
        "absent": water[None] + noise.normal(0, 20, (40, 512, 512)),
        "nema": activity,
    }
    for name, volume in made.items():
        np.save(folder / f"{name}.npy", volume.astype(np.float32))
        if name != "water":  # the first command restores it
            np.save(folder / f"{name}-restored.npy", volume.astype(np.float32))


@pytest.mark.slow
def test_the_validation_recipe_runs_as_it_is_printed(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.cli.main import main

    monkeypatch.chdir(tmp_path)
    _phantoms(tmp_path)
    printed = [
        line for page in ("docs/safety.md", "docs/gates.md") for line in _printed(repository, page)
    ]
    measured = {shlex.split(line)[2] for line in printed if line.startswith("diffcode phantom")}
    assert measured == {"nps", "mtf", "lcd", "recovery"}
    for line in dict.fromkeys(printed):
        done = CliRunner().invoke(main, shlex.split(line)[1:], prog_name="diffcode")
        # A gate may well fail in a phantom, and then says so by its exit code.
        assert done.exit_code == 0 or ("gates" in line and done.exit_code == 1), done.output
        if "phantom" in line or "--json" in line:
            assert json.loads(done.stdout, parse_constant=pytest.fail), line
