"""``dicom-node route``: what the table makes of files, and whether it is what the site expects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dicom_node.cli.main import cli
from tests.factories import make_series, write_series

ROUTES = """
[opt_out]
PatientID = ["OUT-1"]
[[route]]
name = "night"
task = "mri_sr"
destinations = ["pacs"]
strength = 0.7
hours = { open = "19:00-07:00", closed = "wait" }
[route.match]
modality = "MR"
echo_time = { min = "50 ms" }
[[route]]
name = "rest"
task = "ct_denoise"
destinations = ["pacs"]
match = { modality = "CT" }
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments], prog_name="dicom-node")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("route") / "n"
    assert run("init", folder, "--to", "pacs=PACS@127.0.0.1:104").exit_code == 0
    (folder / "routes.toml").write_text(ROUTES)
    return folder / "node.toml"


def explained(config: Path, folder: Path, *options: str) -> list[dict[str, object]]:
    done = run("route", "explain", folder, "-c", config, "--json", *options)
    assert done.exit_code == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def test_each_volume_of_a_series_is_explained(config: Path, tmp_path: Path) -> None:
    early, late = (
        make_series("MR", slices=3, EchoTime=te, seed=i) for i, te in enumerate(("8", "90"))
    )
    for dataset in late:
        dataset.SeriesInstanceUID = early[0].SeriesInstanceUID
    write_series([*early, *late], tmp_path / "in")
    stories = explained(config, tmp_path / "in", "--at", "2026-01-28T12:00:00")
    routes = {story["volume"]: (story["route"], story["strength"]) for story in stories}
    assert routes == {"echo_time=8": (None, 1.0), "echo_time=90": ("night", 0.7)}
    (waiting,) = [story for story in stories if story["route"]]
    assert str(waiting["not_before"]).startswith("2026-01-28T19:00:00")


def test_the_words_give_the_value_its_unit_and_the_hours(config: Path, tmp_path: Path) -> None:
    write_series(make_series("MR", slices=1), tmp_path / "in")
    done = run("route", "explain", tmp_path / "in", "-c", config, "--at", "2026-01-28T12:00:00")
    assert "echo_time in range 50..inf ms: 90 ms → yes" in done.stdout
    assert "19:00-07:00: closed, waits" in done.stdout
    assert "mri_sr to pacs, strength 0.7, not before 2026-01-28T19:00" in done.stdout


def test_who_is_on_the_opt_out_list_is_said_to_be(config: Path, tmp_path: Path) -> None:
    write_series(make_series("CT", slices=1, PatientID="OUT-1"), tmp_path / "in")
    (story,) = explained(config, tmp_path / "in")
    assert (story["route"], story["reason"]) == ("opt_out", "on the opt-out list by PatientID")


def test_another_table_can_be_tried_before_it_is_put_in_force(config: Path, tmp_path: Path) -> None:
    write_series(make_series("MR", slices=1), tmp_path / "in")
    other = tmp_path / "new.toml"
    other.write_text('[[route]]\nname = "new"\ntask = "ignore"\nreason = "not yet"\n')
    (story,) = explained(config, tmp_path / "in", "--routes", str(other))
    assert (story["route"], story["reason"]) == ("new", "not yet")
    other.write_text('[[route]]\nname = "new"\ntask = "ignored"\n')
    done = run("route", "explain", tmp_path / "in", "-c", config, "--routes", other)
    assert done.exit_code == 1
    assert f"{other}:3: route[0].task: 'ignored' is unknown" in done.stderr


FIXTURE = """
[[expect]]
name = "an ordinary CT"
header = { Modality = "CT" }
route = "rest"
[[expect]]
name = "a T1 is left alone"
header = { Modality = "MR", EchoTime = 10 }
route = "NAME"
"""


def test_expectations_that_hold_end_with_0(config: Path, tmp_path: Path) -> None:
    (tmp_path / "fixture.toml").write_text(FIXTURE.replace("NAME", "none"))
    done = run("route", "test", tmp_path / "fixture.toml", "-c", config)
    assert done.exit_code == 0, done.stderr
    assert "2 of 2 expectations hold" in done.stdout


def test_one_that_does_not_hold_ends_with_1_and_says_how(config: Path, tmp_path: Path) -> None:
    (tmp_path / "fixture.toml").write_text(FIXTURE.replace("NAME", "night"))
    done = run("route", "test", tmp_path / "fixture.toml", "-c", config)
    assert done.exit_code == 1
    assert "FAIL a T1 is left alone" in done.stdout
    assert "route: expected 'night', got 'none'" in done.stdout
    done = run("route", "test", tmp_path / "fixture.toml", "-c", config, "--json")
    assert done.exit_code == 1
    assert [row["passed"] for row in json.loads(done.stdout)] == [True, False]


def test_a_folder_without_dicom_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = run("route", "explain", tmp_path / "in", "-c", config)
    assert done.exit_code == 1
    assert "no DICOM series" in done.stderr
