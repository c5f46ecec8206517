"""The series that `make run` sends are valid CT, MR and PET Image Storage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.main_job.series import Source, make_phantoms


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, ...]:
    return make_phantoms(tmp_path_factory.mktemp("phantoms"), quick=True)


def _verdict(tool: str, *files: Path) -> str:
    program = Path(sys.executable).with_name(tool)
    if not program.exists():
        pytest.skip(f"missing peer: {tool}")
    command = [str(program), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


def test_dciodvfy_finds_no_error_and_no_warning(phantoms: tuple[Source, ...]) -> None:
    for source in phantoms:
        for path in source.files:
            said = _verdict("dciodvfy", path)
            assert "Error" not in said, f"{source.label}: {said}"
            assert "Warning" not in said, f"{source.label}: {said}"


def test_dcentvfy_finds_each_series_consistent(phantoms: tuple[Source, ...]) -> None:
    for source in phantoms:
        assert "Error" not in _verdict("dcentvfy", *source.files)


def test_every_file_has_its_slice_of_the_truth(phantoms: tuple[Source, ...]) -> None:
    assert [source.label for source in phantoms] == ["chest CT", "brain MR", "body PET"]
    for source in phantoms:
        assert source.truth is not None
        assert len(source.truth) == len(source.files)
