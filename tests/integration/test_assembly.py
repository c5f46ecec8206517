"""Series from real senders: who is asked, what comes late, and what reaches the archive of it.

Scenarios T4, T5, T10, T12 and T16 of assembly, under a clock that the test moves; the rest of T3 to
T5 is in `test_receive_scenarios`.
"""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from dicom_node.assembler import Assembler
from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.delivery import DeliveryWorker
from dicom_node.ledger import intake, reports
from dicom_node.query_scu import count_instances, source_peer
from dicom_node.restore_worker import RestoreWorker
from dicom_node.routing import load_routes
from dicom_node.settings import SourceQuery
from dicom_node.storage_scu import send_files
from tests.conftest import ManualClock
from tests.factories import make_series, write_series
from tests.integration.peers import (
    Archive,
    Node,
    Orthanc,
    connected,
    listens,
    reserve_port,
    running,
    serving,
    statuses,
    until,
)
from tests.unit.dicom_node.bench import Gain

QUIET_S = 10.0
DCMQRSCP = Path("/usr/bin/dcmqrscp")


@dataclass
class Line:
    """A whole node in this process, its clock moved by hand, with an archive that counts."""

    node: Node
    assembler: Assembler
    restorer: RestoreWorker
    deliverer: DeliveryWorker
    archive: Archive
    clock: ManualClock

    def bring(self, paths: list[Path], title: str = "CT1", *, abort: bool = False) -> None:
        """Send over an association of its own, until the ledger knows of its end."""
        with connected(self.node.peer(title), paths) as association:
            assert set(statuses(association, paths)) == {0x0000}
            if abort:
                association.abort()
        until(self.node.all_released, "the association is closed in the ledger")

    def run(self, after: float = QUIET_S + 1) -> int:
        """Let time pass, and everything that is then due happen; how many series were concluded."""
        concluded = self.assembler.tick(self.clock.advance(after))
        while self.restorer.run_once(self.clock()):
            pass
        while self.deliverer.run_once():
            pass
        return concluded

    def series(self) -> dict[str, Any]:
        (row,) = reports.series(self.node.ledger)
        return row

    def jobs(self) -> list[dict[str, Any]]:
        return list(reversed(reports.jobs(self.node.ledger)))

    def arrived(self) -> list[Dataset]:
        """What the archive has stored, in the order of its arrival."""
        return [_parsed(self.archive.stored[uid]) for uid in self.archive.received]

    def signals(self) -> dict[str, str]:
        return {each["signal"]: each["verdict"] for each in self.series()["evidence"]}


def _parsed(data: bytes) -> Dataset:
    return dcmread(BytesIO(data), force=True)


@pytest.fixture
def line(
    start_node: Callable[..., Node], clock: ManualClock, tmp_path: Path
) -> Generator[Callable[..., Line]]:
    """Start a node with changed settings."""
    with serving(Archive()) as archive:

        def start(**changes: Any) -> Line:
            pacs = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}
            node = start_node(
                clock=clock,
                assembly={"quiet_s": QUIET_S},
                destinations={"pacs": pacs},
                **changes,
            )
            (tmp_path / "routes.toml").write_text(DEFAULT_ROUTES)
            routes = load_routes(tmp_path / "routes.toml", ["pacs"])
            parts = (node.settings, node.spool, node.ledger)
            return Line(
                node,
                Assembler(*parts, routes),
                RestoreWorker(*parts, Gain(), name="restore-0@here", clock=clock),
                DeliveryWorker(*parts, clock, rng=random.Random(1)),
                archive,
                clock,
            )

        yield start


def by_position(datasets: list[Dataset]) -> list[Dataset]:
    return sorted(datasets, key=lambda each: float(each.ImagePositionPatient[2]))


def each_once(line: Line) -> None:
    """No instance came to the archive twice."""
    assert set(Counter(line.archive.received).values()) == {1}


# Late slices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_t4_a_slice_after_delivery_is_sent_alone_into_the_series_of_the_others(
    line: Callable[..., Line], tmp_path: Path, modality: Any
) -> None:
    node = line()
    sent = by_position(make_series(modality, slices=5, rows=16))
    paths = write_series(sent, tmp_path / "in")
    node.bring(paths[:4])
    node.run()
    assert len(node.archive.received) == 4
    node.bring(paths)
    node.run()
    each_once(node)
    arrived = node.arrived()
    assert len(arrived) == 5
    assert len({each.SeriesInstanceUID for each in arrived}) == 1
    (source,) = arrived[4].SourceImageSequence
    assert source.ReferencedSOPInstanceUID == sent[4].SOPInstanceUID
    assert node.series()["state"] == "complete"


def test_t4_a_slice_of_pet_after_delivery_makes_a_new_series_of_them_all(
    line: Callable[..., Line], tmp_path: Path
) -> None:
    node = line()
    sent = make_series("PT", slices=5, rows=16)
    paths = write_series(sent, tmp_path / "in")
    node.bring(paths[:4])
    node.run()
    assert node.series()["state"] == "incomplete"
    node.bring(paths[4:])
    node.run()
    each_once(node)
    by_series: dict[str, set[str]] = {}
    for each in node.arrived():
        source = str(each.SourceImageSequence[0].ReferencedSOPInstanceUID)
        by_series.setdefault(str(each.SeriesInstanceUID), set()).add(source)
    uids = [str(each.SOPInstanceUID) for each in sent]
    assert sorted(map(len, by_series.values())) == [4, 5]
    assert set(uids) in by_series.values()
    first, second = node.jobs()
    assert (first["revision"], second["revision"]) == (1, 2)
    assert first["derived_series_instance_uid"] in second["note"]


def test_t5_a_sender_that_breaks_off_and_resumes_leaves_no_slice_out_and_none_twice(
    line: Callable[..., Line], tmp_path: Path
) -> None:
    node = line()
    paths = write_series(by_position(make_series("CT", slices=6, rows=16)), tmp_path / "in")
    node.bring(paths[:3], abort=True)
    node.run()
    assert (node.series()["state"], node.signals()["association"]) == ("incomplete", "short")
    node.bring(paths)
    node.run()
    assert (node.series()["state"], len(node.archive.received)) == ("complete", 6)
    each_once(node)


def test_t12_a_series_from_scanner_and_archive_at_once_is_restored_once(
    line: Callable[..., Line], tmp_path: Path
) -> None:
    node = line()
    paths = write_series(make_series("CT", slices=6, rows=16), tmp_path / "in")
    threads = [
        threading.Thread(target=node.bring, args=(part, title))
        for part, title in ((paths, "CT1"), (paths[::-1], "OLDPACS"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert node.run() == 1
    assert [job["instances"] for job in node.jobs()] == [6]
    assert len(node.archive.received) == 6
    words = " ".join(each["words"] for each in node.series()["evidence"])
    assert "released" in words


@pytest.mark.parametrize("title", ["DIFFCODE", "ARCHIVE", "ANYONE"])
def test_t12_our_own_output_sent_back_under_any_title_starts_nothing(
    line: Callable[..., Line], tmp_path: Path, title: str
) -> None:
    node = line()
    node.bring(write_series(make_series("CT", slices=3, rows=16), tmp_path / "in"))
    node.run()
    folder = node.node.spool.root / "outgoing"
    made = sorted(folder.rglob("*.dcm"))
    assert len(made) == 3
    node.bring(made, title)
    node.run()
    node.run()
    assert len(node.jobs()) == 1
    assert len(node.node.instances("ignored")) == 3
    assert len(node.archive.received) == 3


def test_t16_a_clock_that_jumps_between_slices_delivers_each_once(
    line: Callable[..., Line], tmp_path: Path
) -> None:
    node = line()
    paths = write_series(by_position(make_series("CT", slices=6, rows=16)), tmp_path / "in")
    for path, jump in zip(paths, (0, 86_400, -86_400, -7_200, 3_600, 0), strict=True):
        node.clock.advance(jump)
        node.bring([path])
        node.run(0.0)
    for _ in range(3):
        node.run()
    assert len(node.archive.received) == 6
    each_once(node)


def test_a_series_that_never_ends_is_concluded_and_goes_on_as_late_slices(
    line: Callable[..., Line], tmp_path: Path
) -> None:
    node = line()
    paths = write_series(by_position(make_series("CT", slices=6, rows=16)), tmp_path / "in")
    with connected(node.node.peer("CT1"), paths) as association:
        for path in paths[:4]:
            assert statuses(association, [path]) == [0x0000]
            assert node.run(890.0) == 0
        assert node.run(100.0) == 1
        assert (node.series()["state"], node.signals()["overdue"]) == ("incomplete", "short")
        assert set(statuses(association, paths[4:])) == {0x0000}
    until(node.node.all_released, "the association is closed in the ledger")
    node.run()
    assert [job["instances"] for job in node.jobs()] == [4, 2]
    each_once(node)


# Asking the source --------------------------------------------------------------------------------


@contextmanager
def dcmqrscp(folder: Path) -> Generator[int]:
    """A running DCMTK query/retrieve server with an empty storage; its port."""
    port, storage = reserve_port(), folder / "qr"
    storage.mkdir()
    configuration = folder / "dcmqrscp.cfg"
    configuration.write_text(
        f"NetworkTCPPort = {port}\nMaxPDUSize = 16384\nMaxAssociations = 16\n"
        "HostTable BEGIN\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
        f"AETable BEGIN\nCT1QR {storage} RW (100, 1024mb) ANY\nAETable END\n"
    )
    with running([DCMQRSCP, "-c", configuration], folder / "dcmqrscp.log"):
        until(lambda: listens(port), "dcmqrscp listens")
        yield port


@dataclass(frozen=True)
class Source:
    """A scanner's own storage that answers C-FIND."""

    ae_title: str
    port: int

    @property
    def query(self) -> SourceQuery:
        return SourceQuery(ae_title=self.ae_title, host="127.0.0.1", port=self.port)

    @property
    def settings(self) -> dict[str, Any]:
        return {"ct1": {"calling_ae": "CT1", "find": self.query.model_dump()}}


@pytest.fixture(
    params=[
        pytest.param("dcmqrscp", marks=pytest.mark.dcmtk),
        pytest.param("orthanc", marks=pytest.mark.orthanc),
    ]
)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Source]:
    """Two implementations of Query/Retrieve."""
    if request.param == "orthanc":
        orthanc: Orthanc = request.getfixturevalue("orthanc")
        yield Source("ORTHANC", orthanc.dicom_port)
        return
    if not DCMQRSCP.exists():
        pytest.skip(f"missing peer: DCMTK ({DCMQRSCP})")
    with dcmqrscp(tmp_path) as port:
        yield Source("CT1QR", port)


def fill(source: Source, paths: list[Path]) -> None:
    sent = send_files(paths, source_peer(source.query, "DIFFCODE"))
    assert sent.ok, sent


def test_a_source_counts_its_instances(source: Source, tmp_path: Path) -> None:
    series = make_series("CT", slices=7, rows=16)
    fill(source, write_series(series, tmp_path / "in"))
    peer = source_peer(source.query, "DIFFCODE")
    known = str(series[0].StudyInstanceUID), str(series[0].SeriesInstanceUID)
    assert count_instances(peer, *known).expected == 7
    unknown = count_instances(peer, known[0], "1.2.3.4")
    assert (unknown.expected, unknown.trouble) == (None, "does not know the series")


def test_what_the_source_still_has_is_missing_until_it_comes(
    line: Callable[..., Line], source: Source, tmp_path: Path
) -> None:
    node = line(sources=source.settings, policy={"incomplete": "hold"})
    paths = write_series(by_position(make_series("CT", slices=6, rows=16)), tmp_path / "in")
    fill(source, paths)
    node.bring(paths[:4])
    node.run()
    assert (node.series()["state"], node.signals()["c_find"]) == ("incomplete", "short")
    assert "source ct1 has 6 instances, 2 of them are missing here" in node.series()["reason"]
    assert [job["state"] for job in node.jobs()] == ["held"]
    assert node.archive.received == []
    node.bring(paths[4:])
    node.run()
    assert (node.series()["state"], node.signals()["c_find"]) == ("complete", "whole")
    assert [job["state"] for job in node.jobs()] == ["cancelled", "done"]
    assert len(node.archive.received) == 6


def test_a_source_that_breaks_off_and_has_no_more_is_whole(
    line: Callable[..., Line], source: Source, tmp_path: Path
) -> None:
    node = line(sources=source.settings)
    paths = write_series(make_series("CT", slices=4, rows=16), tmp_path / "in")
    fill(source, paths)
    node.bring(paths, abort=True)
    node.run()
    assert (node.series()["state"], node.series()["reason"]) == ("complete", None)


def test_a_source_that_does_not_answer_holds_nothing_up(
    line: Callable[..., Line], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        query = {"ae_title": "CT1", "host": "127.0.0.1", "port": silent.getsockname()[1]}
        node = line(sources={"ct1": {"calling_ae": "CT1", "find": {**query, "timeout_s": 0.5}}})
        node.bring(write_series(make_series("CT", slices=3, rows=16), tmp_path / "in"))
        assert node.run() == 1
    assert (node.series()["state"], node.signals()["c_find"]) == ("complete", "unproven")
    assert len(node.archive.received) == 3


def test_a_forced_series_says_who_asked_for_it_and_why(
    line: Callable[..., Line], tmp_path: Path
) -> None:
    node = line(policy={"incomplete": "refuse"})
    paths = write_series(by_position(make_series("CT", slices=6, rows=16)), tmp_path / "in")
    node.bring([*paths[:2], *paths[3:]])
    node.run()
    assert [job["state"] for job in node.jobs()] == ["refused"]
    uid = node.series()["series_instance_uid"]
    intake.force_series(node.node.ledger, uid, reason="slice lost at the scanner", now=node.clock())
    node.run(0.0)
    assert [job["state"] for job in node.jobs()] == ["refused", "done"]
    assert node.series()["evidence"][0]["words"].endswith("slice lost at the scanner")
    assert len(node.archive.received) == 5
