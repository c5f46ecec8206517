"""`make run` from a stranger's seat: another process, real peers, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydicom import dcmread

from examples.main_job.series import make_phantoms
from restoration.bundle import write_bundle
from restoration.diffcode import DiffCode, DiffCodeConfig
from tests.integration.peers import until

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("ct_denoise", "mri_sr", "pet_synthesis")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model: the path is under test, not the images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    model = DiffCode(DiffCodeConfig.preset("tiny", variant="v1"))
    fields = {"name": "tiny", "version": "1", "licence": "Apache-2.0", "tasks": list(TASKS)}
    write_bundle(folder, model, {**fields, "created": "2026-01-01T00:00:00Z"})
    return folder


def _command(bundle: Path, out: Path, *options: str) -> list[str]:
    program = [sys.executable, "-m", "examples.main_job"]
    return [*program, "--quick", "--bundle", str(bundle), "--out", str(out), *options]


def _run(bundle: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(bundle, out, *options),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def _processes_of(folder: Path) -> list[str]:
    """Command lines of running processes that name *folder*."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and entry.parent.name != str(os.getpid()):
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.orthanc
@pytest.mark.dcmtk
@pytest.mark.timeout(300)
def test_three_phantom_series_reach_orthanc_and_nothing_keeps_running(
    bundle: Path, tmp_path: Path
) -> None:
    done = _run(bundle, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Orthanc" in done.stdout
    assert "storescu" in done.stdout
    assert all(task in done.stdout for task in TASKS)
    assert done.stdout.count("delivered") == 3
    pictures = sorted((tmp_path / "out/pictures").glob("*.png"))
    assert [picture.name.split("-")[0] for picture in pictures] == list(TASKS)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert _processes_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_folder_of_series_reaches_our_own_archive(bundle: Path, tmp_path: Path) -> None:
    sources = make_phantoms(tmp_path / "in", quick=True)
    mr = next(source for source in sources if source.label == "brain MR")
    folder = str(mr.files[0].parent)
    done = _run(bundle, tmp_path / "out", "--own-archive", "--series", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "own storage SCP" in done.stdout
    fetched = [dcmread(path) for path in (tmp_path / "out/fetched").rglob("*.dcm")]
    assert len(fetched) == len(mr.files)
    assert {str(each.StudyInstanceUID) for each in fetched} == {
        str(dcmread(path).StudyInstanceUID) for path in mr.files
    }
    assert mr.series_instance_uid not in {str(each.SeriesInstanceUID) for each in fetched}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ended_by_sigterm_it_leaves_nothing_running(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            _command(bundle, out, "--own-archive"), cwd=ROOT, stdout=log, stderr=log
        )
        try:
            until(lambda: (out / "node/node.log").exists(), "a running node", 120)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 128 + signal.SIGTERM
        finally:
            process.kill()
            process.wait()
    assert _processes_of(tmp_path) == []
