"""What fuzzing has found worth keeping, replayed; and the fuzzer itself for a moment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from tests.fuzz.association import AssociationTarget
from tests.fuzz.run import CORPUS, kept
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS
from tests.integration.conftest import RECEIVE_PATHS


@pytest.mark.parametrize("name", TARGETS)
def test_every_kept_input_leaves_the_target_as_it_must(name: str) -> None:
    inputs = [*enumerate(SEEDS[name]()), *kept(name)]
    assert len(inputs) > len(SEEDS[name]()), f"{name}.zip is empty"
    for which, data in inputs:
        try:
            TARGETS[name](data)
        except Exception as error:
            error.add_note(f"input {which} of {name}")
            raise


@pytest.fixture(params=RECEIVE_PATHS)
def target(request: pytest.FixtureRequest) -> Generator[tuple[str, AssociationTarget]]:
    """A listening node, and which way it receives."""
    with closing(AssociationTarget(request.param)) as made:
        yield request.param, made


@pytest.mark.slow
def test_t7_every_kept_association_ends_and_nothing_is_written_outside_the_spool(
    target: tuple[str, AssociationTarget],
) -> None:
    name, send = target
    inputs = [*enumerate(SEEDS[name]()), *kept(name)]
    assert len(inputs) > len(SEEDS[name]()), f"{name}.zip is empty"
    for which, data in inputs:
        try:
            send(data)
        except Exception as error:
            error.add_note(f"input {which} of {name}")
            raise


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_run_of_the_fuzzer_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("atheris", reason="atheris is made for Linux on x86-64")
    monkeypatch.setenv("DICOM_NODE_FUZZ_FOLDER", str(tmp_path))
    command = [sys.executable, "-m", "tests.fuzz.run", "--minutes", "1", "--seed", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CORPUS.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("no finding") == len(SEEDS)


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < 500_000
