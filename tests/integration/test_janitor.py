"""A disk that fills and empties under a receiving node, and files that leave it once delivered."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from dicom_node import purge
from dicom_node.audit_trail import AuditTrail
from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.disk import Disk, Marks, Space
from dicom_node.janitor import Janitor
from dicom_node.ledger import intake, reports
from dicom_node.ledger.retention import Ages
from dicom_node.ledger.tables import instances, open_ledger, writing
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_scp import StorageSCP
from dicom_node.supervisor.process import Signals
from dicom_node.supervisor.roles import DeliverService, open_stores
from tests.integration.conftest import RECEIVE_PATHS, node_settings
from tests.integration.peers import (
    Archive,
    Node,
    connected,
    ct_slice,
    outgoing_series,
    serving,
    statuses,
    until,
    write,
)

SUCCESS, OUT_OF_RESOURCES = 0x0000, 0xA700


class Shelf(Disk):
    """A disk of 1000 bytes of which a test says how many are free."""

    free = 1000

    def space(self) -> Space:
        return Space(self.free, Marks(low=200, high=250))

    def has_room(self, extra_bytes: int = 0) -> bool:
        # What is sent is larger than this disk; its marks are what is tested.
        return super().has_room(0)


@pytest.fixture(params=RECEIVE_PATHS)
def shelved(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A receiving node on a shelf."""
    settings = node_settings(tmp_path, association=RECEIVE_PATHS[request.param])
    with ExitStack() as stack:
        ledger = open_ledger(settings.ledger.url)
        stack.callback(ledger.dispose)
        spool = Spool(settings.spool.path)
        spool.disk = Shelf(spool.root)
        scp = StorageSCP(settings, spool, ledger, time.time)
        scp.start()
        stack.callback(scp.stop, 2.0)
        yield Node(settings, spool, ledger, scp)


def test_a_node_closes_at_the_lower_mark_and_opens_at_the_upper(
    shelved: Node, tmp_path: Path
) -> None:
    free = [1000, 200, 199, 200, 249, 250, 201]
    paths = [write(ct_slice(n), tmp_path / "out" / f"{n}.dcm") for n in range(len(free))]
    answers = []
    with connected(shelved.peer(), paths) as association:
        for left, path in zip(free, paths, strict=True):
            shelved.spool.disk.free = left  # type: ignore[attr-defined]
            answers += statuses(association, [path])
    short, good = OUT_OF_RESOURCES, SUCCESS
    assert answers == [good, good, short, short, short, good, good]
    assert len(shelved.instances("received")) == answers.count(good)
    assert len(shelved.stored()) == answers.count(good)


def delivered_node(
    start_node: Callable[..., Node], archive: Archive, **sections: Any
) -> tuple[Node, list[Path]]:
    """A node that has delivered a series of three; the files of its results."""
    to = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}
    node = start_node(destinations={"pacs": to}, **sections)
    paths = outgoing_series(node, ["pacs"], slices=3)
    return node, paths


def received_files(node: Node) -> int:
    return len(list((node.spool.root / "incoming").glob("??/*.dcm")))


def deliver(node: Node) -> None:
    trail = AuditTrail(node.settings)
    service = DeliverService(node.settings, Signals().stop, trail)
    try:
        until(lambda: service.turn(time.time()) is False, "nothing is left to send")
    finally:
        service.close()
        trail.close()


def test_a_series_leaves_the_spool_once_the_archive_has_it_and_not_before(
    start_node: Callable[..., Node],
) -> None:
    tomorrow = time.time() + 86_400
    everything = Ages(tomorrow, None, None)
    with serving(Archive()) as archive:
        node, results = delivered_node(start_node, archive)
        originals = received_files(node)
        assert originals == 3
        assert not purge.purge(node.ledger, node.spool, everything, tomorrow)
        deliver(node)
        assert len(archive.stored) == 3
        gone = purge.purge(node.ledger, node.spool, everything, tomorrow)
    assert gone.files.total() == originals + 3
    assert received_files(node) == 0
    assert not any(path.exists() for path in results)
    # The ledger knows of all of it.
    assert all(row["purged"] for row in node.instances("received"))
    (job,) = reports.jobs(node.ledger)
    assert job["deliveries"][0]["sent"] == 3
    told = reports.instance(node.ledger, node.instances()[0]["sop_instance_uid"])["story"]
    assert told[-1]["happened"] == "purged"


def test_a_short_disk_lets_go_of_what_is_delivered_and_of_nothing_else(
    start_node: Callable[..., Node], tmp_path: Path
) -> None:
    with serving(Archive()) as archive:
        node, results = delivered_node(start_node, archive, retention={"delivered_s": 1e9})
        deliver(node)
    waits = write(ct_slice(1, series=99), tmp_path / "out" / "1.dcm")
    with connected(node.peer(), [waits]) as association:
        assert statuses(association, [waits]) == [SUCCESS]
    node.spool.disk = Shelf(node.spool.root)
    janitor = Janitor(node.settings, node.ledger, node.spool)
    assert janitor.turn(time.time() + 86_400)
    assert all(path.exists() for path in results)
    node.spool.disk.free = 220  # between the marks: still open, and short
    assert janitor.turn(time.time() + 2 * 86_400)
    assert not any(path.exists() for path in results)
    (left,) = node.stored()
    assert left == waits.read_bytes()[-len(left) :]


def test_an_instance_that_was_purged_and_comes_again_is_taken_and_kept(
    start_node: Callable[..., Node], tmp_path: Path
) -> None:
    with serving(Archive()) as archive:
        node, _ = delivered_node(start_node, archive)
        deliver(node)
    path = write(ct_slice(1, series=5), tmp_path / "out" / "1.dcm")
    with connected(node.peer(), [path]) as association:
        assert statuses(association, [path]) == [SUCCESS]
    uid = str(ct_slice(1, series=5).SOPInstanceUID)
    (row,) = [each for each in node.instances() if each["sop_instance_uid"] == uid]
    # As if it had been delivered long ago: marked, and its file removed.
    with writing(node.ledger) as connection:
        connection.execute(
            update(instances).where(instances.c.id == row["id"]).values(purged_at=time.time() - 9)
        )
    os.unlink(node.spool.resolve(row["path"]))
    with connected(node.peer(), [path]) as association:
        assert statuses(association, [path]) == [SUCCESS]
    assert node.spool.resolve(row["path"]).exists()
    # At the next start the node finds the file, and that it is younger than the removal.
    purge.finish(node.ledger, node.spool, time.time())
    assert node.spool.resolve(row["path"]).exists()
    assert row["path"] in intake.known_paths(node.ledger)


def test_the_roles_take_both_marks_from_the_settings(tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(DEFAULT_ROUTES)
    settings: NodeSettings = node_settings(
        tmp_path,
        spool={"path": tmp_path / "spool", "min_free_bytes": 1000, "min_free_percent": 0,
               "resume_factor": 3.0},
    )  # fmt: skip
    ledger, spool = open_stores(settings)
    ledger.dispose()
    assert spool.disk.space().marks == Marks(low=1000, high=3000)
