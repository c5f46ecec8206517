"""``dicom-node restore``: the worker's path on a folder, without network or ledger."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from pydicom import dcmread

from dicom_node.cli.main import cli
from restoration.bundle import write_bundle
from restoration.diffcode import DiffCode, DiffCodeConfig
from tests.factories import make_series, write_series

TASKS = ["mri_sr", "ct_denoise", "pet_synthesis"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments], prog_name="dicom-node")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields = {"name": "tiny", "version": "0", "licence": "Apache-2.0", "tasks": TASKS}
        write_bundle(folder / "tiny", DiffCode(DiffCodeConfig.preset("tiny")), fields)
    done = run("init", folder / "n", "--bundle", folder / "tiny")
    assert done.exit_code == 0, done.stderr
    written = folder / "n" / "node.toml"
    # The network was never trained, and what it makes is not at issue here.
    text = re.sub(r"(?m)^(on_fail|on_warn|uncalibrated) = .*$", r'\1 = "pass"', written.read_text())
    written.write_text(re.sub(r"(?m)^actions = .*$", "actions = {}", text))
    return written


def test_a_series_is_restored_into_a_folder_of_its_own(config: Path, tmp_path: Path) -> None:
    sent = make_series("MR", slices=2, rows=16)
    write_series(sent, tmp_path / "in")
    done = run("restore", tmp_path / "in", tmp_path / "out", "-c", config, "--json")
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["state"], row["task"], row["instances"]) == ("done", "mri_sr", 2)
    assert set(row["seconds"]) == {"load", "restore", "derive"}
    made = [dcmread(path) for path in Path(row["out"]).iterdir()]
    assert {each.SeriesInstanceUID for each in made} == {row["derived_series_instance_uid"]}
    assert {each.SourceImageSequence[0].ReferencedSOPInstanceUID for each in made} == {
        each.SOPInstanceUID for each in sent
    }


def test_the_same_series_again_gives_the_same_uids(config: Path, tmp_path: Path) -> None:
    write_series(make_series("CT", slices=2, rows=16), tmp_path / "in")
    for out in ("first", "second"):
        assert run("restore", tmp_path / "in", tmp_path / out, "-c", config).exit_code == 0
    first, second = (
        {path.relative_to(tmp_path / out) for path in (tmp_path / out).rglob("*.dcm")}
        for out in ("first", "second")
    )
    assert first == second
    assert len(first) == 2


def test_what_is_refused_or_ignored_says_why_and_ends_with_1(config: Path, tmp_path: Path) -> None:
    write_series(make_series("CT", slices=3, rows=16, plane="sagittal"), tmp_path / "in" / "a")
    phase = ["ORIGINAL", "PRIMARY", "P"]
    write_series(make_series("MR", slices=2, rows=16, ImageType=phase), tmp_path / "in" / "b")
    done = run("restore", tmp_path / "in", tmp_path / "out", "-c", config, "--json")
    assert done.exit_code == 1
    rows = {row["state"]: row["reason"] for row in json.loads(done.stdout)}
    assert "sagittal" in rows["refused"]
    assert "phase image" in rows["ignored"]
    assert not (tmp_path / "out").exists()


def test_a_task_that_does_not_fit_the_series_is_refused(config: Path, tmp_path: Path) -> None:
    write_series(make_series("CT", slices=2, rows=16), tmp_path / "in")
    arguments = [tmp_path / "in", tmp_path / "out", "--task", "mri_sr", "-c", config]
    done = run("restore", *arguments)
    assert done.exit_code == 1
    assert "task mri_sr restores MR, not CT" in done.stdout


def test_a_folder_without_dicom_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = run("restore", tmp_path / "in", tmp_path / "out", "-c", config)
    assert done.exit_code == 1
    assert "no DICOM series" in done.stderr


def test_what_a_gate_holds_is_written_only_when_asked_for(config: Path, tmp_path: Path) -> None:
    strict = config.with_name("strict.toml")
    strict.write_text(config.read_text().replace('on_fail = "pass"', 'on_fail = "hold"'))
    write_series(make_series("CT", slices=2, rows=32), tmp_path / "in")
    words = [tmp_path / "in", tmp_path / "out", "-c", strict, "--json"]
    done = run("restore", *words)
    assert done.exit_code == 1
    (row,) = json.loads(done.stdout)
    assert row["state"] == "held"
    assert "gate " in row["reason"]
    assert not (tmp_path / "out").exists()
    assert run("restore", *words, "--write-held").exit_code == 0
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 2
