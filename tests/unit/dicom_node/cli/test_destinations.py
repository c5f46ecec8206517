"""``dicom-node destinations``: list, echo, pause, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dicom_node.cli.main import cli
from dicom_node.ledger import destinations
from dicom_node.ledger.tables import open_ledger

FUTURE = 4e9


@pytest.fixture
def config(tmp_path: Path, free_port: int) -> Path:
    """A node.toml with a DICOM and a DICOMweb destination, neither of which is there."""
    path = tmp_path / "node.toml"
    path.write_text(
        f"""
        [destinations.pacs]
        ae_title = "ARCHIVE"
        host = "127.0.0.1"
        port = {free_port}
        [stow.web]
        url = "http://127.0.0.1:{free_port}/dicom-web"
        """
    )
    return path


def run(config: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["destinations", *words, "-c", str(config)])


def listed(config: Path) -> dict[str, dict[str, Any]]:
    done = run(config, "list", "--json")
    assert done.exit_code == 0, done.output
    return {row["destination"]: row for row in json.loads(done.stdout)}


def test_destinations_of_both_kinds_are_listed(config: Path, free_port: int) -> None:
    rows = listed(config)
    assert rows["pacs"] == {
        "destination": "pacs",
        "kind": "dicom",
        "address": f"ARCHIVE@127.0.0.1:{free_port}",
        "state": "open",
        "until": None,
        "failures": 0,
        "reason": None,
        "open": 0,
        "dead": 0,
    }
    assert rows["web"]["kind"] == "stow"
    assert "ARCHIVE@" in run(config, "list").stdout


def test_a_destination_is_paused_with_a_reason_and_resumed(config: Path) -> None:
    assert run(config, "pause", "pacs", "--reason", "moves").stdout == "pacs: paused\n"
    assert run(config, "pause", "pacs").stdout == "pacs: is paused already\n"
    row = listed(config)["pacs"]
    assert (row["state"], row["reason"]) == ("paused", "moves")
    assert listed(config)["web"]["state"] == "open"
    assert run(config, "resume", "pacs").stdout == "pacs: resumed\n"
    assert run(config, "resume", "pacs").stdout == "pacs: was neither paused nor held\n"
    assert listed(config)["pacs"]["state"] == "open"


def test_a_destination_that_is_held_says_until_when(config: Path, tmp_path: Path) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    destinations.hold(ledger, "web", until=FUTURE, reason="HTTP 503")
    ledger.dispose()
    row = listed(config)["web"]
    assert (row["state"], row["reason"], row["failures"]) == ("held", "HTTP 503", 1)
    assert row["until"] == "2096-10-02T07:06:40+00:00"


def test_echo_asks_all_and_says_which_do_not_answer(config: Path) -> None:
    done = run(config, "echo", "--json")
    assert done.exit_code == 1
    assert "no answer: pacs, web" in done.stderr
    rows = json.loads(done.stdout)
    assert [row["ok"] for row in rows] == [False, False]
    assert "connection refused" in rows[0]["words"]
    assert run(config, "echo", "web").stderr.strip() == "Error: no answer: web"


@pytest.mark.parametrize("command", ["echo", "pause", "resume"])
def test_a_name_that_is_not_configured_is_a_mistake_of_usage(config: Path, command: str) -> None:
    done = run(config, command, "pasc")
    assert done.exit_code == 2
    assert "'pasc' is not in node.toml (known: pacs, web)" in done.stderr
