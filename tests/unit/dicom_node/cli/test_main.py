"""The commands of an administrator: what they write, print and return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dicom_node.cli.main import cli
from dicom_node.cli.starter import parse_destination
from dicom_node.settings import load
from tests.factories import make_series, write_series

CLOSED = "pacs=PACS@127.0.0.1:1"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments], prog_name="dicom-node")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    assert run("init", tmp_path / "n", "--to", CLOSED).exit_code == 0
    return tmp_path / "n" / "node.toml"


def test_init_makes_a_node_that_check_config_finds_good(tmp_path: Path) -> None:
    folder = tmp_path / "n"
    arguments = ["--ae-title", "RESTORE", "--port", "11113", "--to", "pacs=ORTHANC@10.0.0.9:4242"]
    assert run("init", folder, *arguments, "--to", "backup=ARC@pacs.example:104").exit_code == 0
    settings = load(folder / "node.toml", environ={})
    assert (settings.node.ae_title, settings.node.port) == ("RESTORE", 11113)
    assert {name: d.host for name, d in settings.destinations.items()} == {
        "pacs": "10.0.0.9",
        "backup": "pacs.example",
    }
    assert (folder / "ledger.sqlite").is_file()
    assert (folder / "spool").is_dir()
    checked = run("check-config", "-c", folder / "node.toml")
    assert checked.exit_code == 0
    assert "destinations: pacs, backup" in checked.stdout


def test_init_overwrites_nothing(config: Path) -> None:
    before = config.read_text()
    again = run("init", config.parent, "--port", "2000")
    assert again.exit_code == 1
    assert "exists" in again.stderr
    assert config.read_text() == before


def test_init_with_a_wrong_value_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run("init", tmp_path / "n", "--ae-title", "A" * 17)
    assert done.exit_code == 1
    assert "node.ae_title" in done.stderr
    assert list((tmp_path / "n").iterdir()) == []


@pytest.mark.parametrize("to", ["pacs", "pacs=ORTHANC", "pacs=ORTHANC@host", "=A@h:1"])
def test_a_destination_that_is_not_written_as_promised_is_a_usage_error(
    tmp_path: Path, to: str
) -> None:
    done = run("init", tmp_path / "n", "--to", to)
    assert done.exit_code == 2
    assert "NAME=AET@HOST:PORT" in done.stderr


def test_a_destination_may_have_an_address_with_colons() -> None:
    assert parse_destination("a=AE@[::1]:104") == (
        "a",
        {"ae_title": "AE", "host": "[::1]", "port": 104},
    )


def test_check_config_names_every_mistake_with_its_place(config: Path) -> None:
    config.write_text('[node]\nport = 0\ncolour = "red"\n[engine]\nbundel = "x"\n')
    done = run("check-config", "-c", config)
    assert done.exit_code == 1
    for place in ("node.port", "node.colour", "engine.bundel"):
        assert f"node.toml: {place}" in done.stderr


def test_check_config_reads_the_routes_too(config: Path) -> None:
    routes = config.parent / "routes.toml"
    routes.write_text('[[route]]\nname = "x"\ntask = "y"\ndestinations = ["nowhere"]\n')
    done = run("check-config", "-c", config)
    assert done.exit_code == 1
    assert "route[0].task" in done.stderr
    assert "route[0].destinations" in done.stderr


def test_serve_refuses_to_start_with_a_wrong_routing_table(config: Path) -> None:
    (config.parent / "routes.toml").write_text("[[route]]\n")
    done = run("serve", "-c", config)
    assert done.exit_code == 1
    assert "route[0].name" in done.stderr


def test_a_command_without_a_configuration_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DICOM_NODE_CONFIG", raising=False)
    assert run("jobs", "list").exit_code == 2


def test_the_environment_can_name_the_configuration(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOM_NODE_CONFIG", str(config))
    assert run("check-config").exit_code == 0


@pytest.mark.parametrize("what", ["jobs", "series", "deliveries"])
def test_an_empty_listing_is_an_empty_array(config: Path, what: str) -> None:
    done = run(what, "list", "-c", config, "--json")
    assert (done.exit_code, json.loads(done.stdout), done.stderr) == (0, [], "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs", "show", "7"],
        ["jobs", "retry", "7"],
        ["jobs", "hold", "7"],
        ["jobs", "release", "--operator", "Ann", "--reason", "seen", "7"],
        ["jobs", "reject", "--operator", "Ann", "--reason", "seen", "7"],
        ["jobs", "cancel", "7"],
        ["series", "show", "1.2.3"],
        ["series", "force", "1.2.3"],
        ["deliveries", "show", "7"],
        ["deliveries", "retry", "7"],
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_refused_with_its_name(config: Path, arguments: list[str]) -> None:
    done = run(*arguments, "-c", config)
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"there is no {arguments[0].replace('ies', 'y').removesuffix('s')}"[:14] in done.stderr
    assert arguments[-1] in done.stderr


@pytest.mark.parametrize("option", [["--state", "sleeping"], ["--since", "yesterday"]])
def test_a_filter_that_means_nothing_is_a_usage_error(config: Path, option: list[str]) -> None:
    assert run("jobs", "list", "-c", config, *option).exit_code == 2


def test_echo_of_an_unknown_destination_names_the_known_ones(config: Path) -> None:
    done = run("echo", "nowhere", "-c", config)
    assert done.exit_code == 2
    assert "known: pacs" in done.stderr


def test_echo_of_a_destination_that_is_down_says_why(config: Path) -> None:
    done = run("echo", "pacs", "-c", config)
    assert done.exit_code == 1
    assert "PACS@127.0.0.1:1: connection refused" in done.stderr


def test_send_to_a_destination_that_is_down_fails(config: Path, tmp_path: Path) -> None:
    write_series(make_series("CT", slices=2), tmp_path / "in")
    done = run("send", tmp_path / "in", "--to", "pacs", "-c", config)
    assert done.exit_code == 1
    assert "0 of 2 stored" in done.stdout
    assert "connection refused" in done.stderr


def test_doctor_gives_each_part_a_line_and_says_what_to_do(config: Path) -> None:
    text = config.read_text().replace('bundle = "compact"', 'bundle = "absent"')
    config.write_text(text)
    done = run("doctor", "-c", config, "--json")
    found = {each["check"]: each for each in json.loads(done.stdout)}
    assert done.exit_code == 1
    assert {"settings", "routes", "spool", "disk", "ledger", "model", "listening"} < set(found)
    assert found["settings"]["state"] == found["routes"]["state"] == "good"
    assert found["ledger"]["state"] == found["spool"]["state"] == "good"
    assert found["model"]["state"] == found["destination pacs"]["state"] == "problem"
    assert all(each["advice"] for each in found.values() if each["state"] != "good")


def test_doctor_lists_every_mistake_of_the_settings(config: Path) -> None:
    config.write_text("[node]\nport = 0\nhost = 3\n")
    done = run("doctor", "-c", config, "--json")
    assert done.exit_code == 1
    assert [each["check"] for each in json.loads(done.stdout)] == ["settings", "settings"]


def test_watch_can_print_one_view(config: Path) -> None:
    done = run("watch", "--once", "-c", config)
    assert done.exit_code == 0
    assert "slices" in done.stdout


def test_route_explain_tells_each_test_of_each_route(config: Path, tmp_path: Path) -> None:
    write_series(make_series("MR", slices=3), tmp_path / "in")
    (tmp_path / "in" / "notes.txt").write_text("no DICOM")
    done = run("route", "explain", tmp_path / "in", "-c", config, "--json")
    assert done.exit_code == 0
    assert "notes.txt" in done.stderr
    (story,) = json.loads(done.stdout)
    assert (story["route"], story["task"], story["destinations"]) == ("mr", "mri_sr", ["pacs"])
    assert story["instances"] == 3
    by_name = {route["name"]: route for route in story["routes"]}
    assert by_name["mr"]["matched"] is True
    assert by_name["pet"]["skipped"] == "'mr' matched before"
    assert by_name["ct"]["tests"] == [
        {
            "test": "Modality equals 'CT'",
            "values": ["MR"],
            "unit": None,
            "holds": False,
            "words": "Modality equals 'CT': MR → no",
        }
    ]


def test_route_explain_reads_as_sentences(config: Path, tmp_path: Path) -> None:
    write_series(make_series("CT", slices=1, localizer=True), tmp_path / "in")
    done = run("route", "explain", tmp_path / "in", "-c", config)
    assert "→ localizer: matches" in done.stdout
    assert "ignored before any route is asked: a localizer" in done.stdout


@pytest.mark.parametrize(
    ("since", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604800)]
)
def test_a_span_counts_back_from_now(
    since: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dicom_node.cli import common

    monkeypatch.setattr(common.time, "time", lambda: 1_000_000.0)
    assert common.Since().convert(since, None, None) == 1_000_000.0 - seconds


def test_a_date_with_an_offset_is_that_moment() -> None:
    from dicom_node.cli import common

    assert common.Since().convert("1970-01-02T01:00:00+01:00", None, None) == 86400.0


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    def walk(command: Any, path: tuple[str, ...]) -> None:
        done = run(*path, "--help")
        assert done.exit_code == 0
        assert command.help, path
        for name, each in getattr(command, "commands", {}).items():
            walk(each, (*path, name))

    walk(cli, ())
