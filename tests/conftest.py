"""Fixtures and rules that every tier of the tests shares."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Read once, when the libraries load. Two test workers with a full team of threads each are
# slower than with one, and sums in one thread are the same on every machine.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "agg")
# Triton's kernels run in its interpreter where there is no GPU: decided when Triton is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
REQUIRE_PEERS = "DICOM_NODE_REQUIRE_PEERS"

# DCMTK by absolute path: pynetdicom puts scripts of the same names first on a venv's PATH.
DCMTK_TOOLS = ("/usr/bin/storescu", "/usr/bin/storescp", "/usr/bin/echoscu", "/usr/bin/dcmdump")
ORTHANC_PLACES = ("/usr/sbin/Orthanc", "/usr/local/sbin/Orthanc", "/opt/orthanc/bin/Orthanc")


def find_orthanc() -> Path | None:
    """The Orthanc server's executable, or None where it is not installed."""
    found = shutil.which("Orthanc")
    places = [*ORTHANC_PLACES, *([found] if found else [])]
    return next((Path(place) for place in places if os.access(place, os.X_OK)), None)


def _missing_dcmtk() -> str | None:
    absent = [tool for tool in DCMTK_TOOLS if not os.access(tool, os.X_OK)]
    return f"DCMTK ({', '.join(absent)})" if absent else None


def _missing_orthanc() -> str | None:
    return None if find_orthanc() else "Orthanc"


def _missing_postgres() -> str | None:
    url = os.environ.get("DICOM_NODE_TEST_POSTGRES")
    return None if url else "PostgreSQL (DICOM_NODE_TEST_POSTGRES names no server)"


def _missing_module(name: str, wanted: str) -> str | None:
    import importlib.util

    return None if importlib.util.find_spec(name) else wanted


PEERS = {
    "dcmtk": _missing_dcmtk,
    "orthanc": _missing_orthanc,
    "postgres": _missing_postgres,
    "ray": lambda: _missing_module("ray", "Ray"),
    "browser": lambda: None if shutil.which("chromium") else "Chromium",
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose peer is not installed, by the peer's name."""
    for marker, missing in PEERS.items():
        if item.get_closest_marker(marker) and (what := missing()):
            pytest.skip(f"missing peer: {what}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where every peer is promised, a test that skips for the want of one has failed."""
    report = yield
    if report.skipped and os.environ.get(REQUIRE_PEERS) == "1" and _wants_a_peer(item, report):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid}: {REQUIRE_PEERS}=1 and the test skipped: {_reason(report)}"
        )
    return report


def _reason(report: pytest.TestReport) -> str:
    detail = report.longrepr
    return str(detail[2]) if isinstance(detail, tuple) else str(detail)


def _wants_a_peer(item: pytest.Item, report: pytest.TestReport) -> bool:
    peers = set(PEERS) - {"ray", "browser"}
    marked = any(item.get_closest_marker(peer) for peer in peers)
    return marked or "missing peer" in _reason(report)


@dataclass
class ManualClock:
    """A clock that a test moves by hand; call it for the seconds since the epoch."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        """Move the clock on and return the new time."""
        self.now += seconds
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still until the test moves it."""
    return ManualClock()


@pytest.fixture
def free_port() -> int:
    """A TCP port on the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared data folder: DIFFCODE_TEST_DATA, else ../shared/data beside the source tree."""
    folder = Path(os.environ.get("DIFFCODE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "dicom").is_dir():
        pytest.skip("no shared data folder (DIFFCODE_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def orthanc_program() -> Path:
    """The Orthanc server's executable; the test skips where it is not installed."""
    program = find_orthanc()
    if program is None:
        pytest.skip("missing peer: Orthanc")
    return program
