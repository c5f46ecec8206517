"""A node without sockets and without a network."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from dicom_node.ledger.tables import open_ledger
from tests.conftest import ManualClock
from tests.unit.dicom_node.bench import Bench, bench


@pytest.fixture(scope="session")
def empty_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ledger, migrated once for all tests."""
    path = tmp_path_factory.mktemp("bench") / "ledger.sqlite"
    open_ledger(f"sqlite:///{path}").dispose()
    return path


@pytest.fixture
def bench_ledger(tmp_path: Path, empty_ledger: Path) -> Generator[Engine]:
    """A ledger of the test's own."""
    path = tmp_path / "ledger.sqlite"
    shutil.copy(empty_ledger, path)
    engine = open_ledger(f"sqlite:///{path}")
    yield engine
    engine.dispose()


@pytest.fixture
def node(tmp_path: Path, bench_ledger: Engine, clock: ManualClock) -> Bench:
    """A bench with the default settings."""
    return bench(tmp_path, bench_ledger, clock)
