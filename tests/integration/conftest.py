"""Fixtures with real sockets: our node, Orthanc and DCMTK's storescp."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dicom_node.audit_trail import AuditTrail
from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.ledger.tables import open_ledger
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_scp import StorageSCP
from dicom_node.transfers import Receipts
from tests.integration.peers import (
    STORESCP,
    Node,
    Orthanc,
    listens,
    reserve_port,
    running,
    running_orthanc,
    until,
)

# The settings of [association] that choose between the two ways to receive.
RECEIVE_PATHS: dict[str, dict[str, Any]] = {
    "stock": {"storage_loop": False},
    "loop": {"storage_loop": True},
}


# A spool on whatever disk the tests have.
ROOMY: dict[str, Any] = {"min_free_bytes": 0, "min_free_percent": 0}


class ElasticSpool(Spool):
    """A spool whose disk a test fills and empties."""

    full = False

    def has_room(self, extra_bytes: int = 0) -> bool:
        return not self.full and super().has_room(extra_bytes)


@pytest.fixture
def receive_path() -> dict[str, Any]:
    """Which way a node of `start_node` receives, of RECEIVE_PATHS; a module may run both."""
    return {}


@pytest.fixture
def start_node(tmp_path: Path, receive_path: dict[str, Any]) -> Generator[Callable[..., Node]]:
    """Start a receiving node with changed settings; all are stopped at the end of the test."""
    with ExitStack() as stack:

        def start(**changes: Any) -> Node:
            changes["association"] = {**receive_path, **changes.get("association", {})}
            settings = node_settings(tmp_path, **changes)
            ledger = open_ledger(settings.ledger.url)
            stack.callback(ledger.dispose)
            spool = ElasticSpool(tmp_path / "spool")
            trail = AuditTrail(settings)
            stack.callback(trail.close)
            scp = StorageSCP(
                settings,
                spool,
                ledger,
                changes.get("clock", time.time),
                handlers=changes.get("handlers", ()),
                receipts=Receipts(trail, ledger, spool, settings.node.ae_title, time.time),
            )
            scp.start()
            stack.callback(scp.stop, 2.0)
            return Node(settings, spool, ledger, scp)

        yield start


def node_settings(folder: Path, **changes: Any) -> NodeSettings:
    """Settings of a node in *folder*; *changes* are whole sections."""
    sections = {
        "node": {"port": reserve_port(), "data_dir": folder},
        "spool": {"path": folder / "spool"},
        "ledger": {"url": f"sqlite:///{folder / 'ledger.sqlite'}"},
        "audit": {"journal": folder / "audit.log"},
    }
    given = {key: value for key, value in changes.items() if key not in ("handlers", "clock")}
    return NodeSettings.model_validate({**sections, **given})


def faulty_settings(folder: Path, receive_path: str) -> NodeSettings:
    """Settings of a receiver that is to fail step by step, with the routes of a new node."""
    settings = node_settings(
        folder,
        association=RECEIVE_PATHS[receive_path],
        spool=ROOMY | {"path": folder / "spool"},
        janitor={"stale_file_s": 0.001},
        # What the role commits by itself would be counted among the steps.
        assembly={"tick_s": 3600.0},
        log={"level": "ERROR"},
        routes=folder / "routes.toml",
    )
    settings.routes.write_text(DEFAULT_ROUTES)
    return settings


@pytest.fixture
def node_scp(start_node: Callable[..., Node]) -> Node:
    """A receiving node with the default settings."""
    return start_node()


@pytest.fixture(scope="session")
def running_peer(
    orthanc_program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Orthanc]:
    """One Orthanc for all tests: it takes seconds to start and to end."""
    with running_orthanc(orthanc_program, tmp_path_factory.mktemp("orthanc")) as peer:
        yield peer


@pytest.fixture
def orthanc(running_peer: Orthanc) -> Orthanc:
    """A running Orthanc with an empty storage."""
    running_peer.forget()
    return running_peer


@dataclass(frozen=True)
class StoreSCP:
    """A running DCMTK storescp and the folder where it keeps what it receives."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]


@pytest.fixture
def storescp_peer(tmp_path: Path) -> Generator[StoreSCP]:
    """A running DCMTK storescp that takes every transfer syntax."""
    if not Path(STORESCP).exists():
        pytest.skip(f"missing peer: DCMTK ({STORESCP})")
    folder, port = tmp_path / "storescp", reserve_port()
    folder.mkdir()
    command = [STORESCP, "--accept-all", "--bit-preserving", "-od", folder, str(port)]
    with running(command, tmp_path / "storescp.log") as process:
        until(lambda: listens(port), "storescp listens")
        yield StoreSCP(port, folder, process)
