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
LIMIT_S = 540
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


def _run(bundle: Path, out: Path, *options: str) -> tuple[int, str]:
    """Exit code and all that was printed."""
    process = subprocess.Popen(
        _command(bundle, out, *options),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.terminate()
        process.wait()
    return process.returncode, printed


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
@pytest.mark.timeout(600)
def test_three_phantom_series_reach_orthanc_and_nothing_keeps_running(
    bundle: Path, tmp_path: Path
) -> None:
    code, printed = _run(bundle, tmp_path / "out")
    assert code == 0, printed
    assert "Orthanc" in printed
    assert "storescu" in printed
    assert all(task in printed for task in TASKS)
    assert printed.count("delivered") == 3
    pictures = sorted((tmp_path / "out/pictures").glob("*.png"))
    assert [picture.name.split("-")[0] for picture in pictures] == list(TASKS)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert _processes_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_of_series_reaches_our_own_archive(bundle: Path, tmp_path: Path) -> None:
    sources = make_phantoms(tmp_path / "in", quick=True)
    mr = next(source for source in sources if source.label == "brain MR")
    folder = str(mr.files[0].parent)
    code, printed = _run(
        bundle, tmp_path / "out", "--own-archive", "--series", folder, "--gates", "warn"
    )
    assert code == 0, printed
    assert "own storage SCP" in printed
    fetched = [dcmread(path) for path in (tmp_path / "out/fetched").rglob("*.dcm")]
    assert len(fetched) == len(mr.files)
    assert {str(each.StudyInstanceUID) for each in fetched} == {
        str(dcmread(path).StudyInstanceUID) for path in mr.files
    }
    assert mr.series_instance_uid not in {str(each.SeriesInstanceUID) for each in fetched}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_ended_early_it_leaves_nothing_running(
    bundle: Path, tmp_path: Path, end: signal.Signals
) -> None:
    out = tmp_path / "out"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            _command(bundle, out, "--own-archive"), cwd=ROOT, stdout=log, stderr=log
        )
        try:
            until(lambda: (out / "node/node.log").exists(), "a running node", 240)
            process.send_signal(end)
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
    until(lambda: not _processes_of(tmp_path), "no process of this run", 60)
