"""Storage Commitment as SCP: we answer for an original once an archive has committed to keep it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, evt
from pynetdicom.events import Event

from dicom_node import commitment, commitment_scp
from dicom_node.association import STORAGE_COMMITMENT
from dicom_node.commitment import PUSH_MODEL_INSTANCE, Reference, action_information
from dicom_node.commitment_scp import CustodyWorker
from dicom_node.ledger import custody
from dicom_node.ledger.tables import open_ledger
from dicom_node.settings import CommitmentSCPSettings
from dicom_node.storage_scu import send_files
from tests.conftest import ManualClock
from tests.integration.peers import CT, ROOT, Node, Orthanc, ct_slice, reserve_port, until, write
from tests.integration.test_commitment import CommittingArchive, committing

HOUR = 3600.0


@dataclass
class Scanner:
    """A sender that asks for commitment, and listens for reports on a port of its own."""

    port: int = 0
    answer: int = 0x0000
    reports: list[tuple[int, Dataset]] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)

    def on_report(self, event: Event) -> tuple[int, None]:
        if self.answer == 0x0000:
            self.reports.append((event.event_type or 0, event.event_information))
        self.arrived.set()
        return self.answer, None

    def ask(
        self, node: Node, uids: list[str], *, transaction_uid: str = "1.2.3.4", title: str = "CT1",
        sop_class_uid: str = CT,
    ) -> int:  # fmt: skip
        """Ask the node to commit; the status of its answer."""
        entity = AE(ae_title=title)
        entity.acse_timeout = entity.dimse_timeout = 20
        association = entity.associate(
            "127.0.0.1", node.port, [build_context(STORAGE_COMMITMENT)], ae_title="DIFFCODE"
        )
        assert association.is_established
        information = action_information(
            transaction_uid, [Reference(sop_class_uid, uid) for uid in uids]
        )
        answer, _ = association.send_n_action(
            information, 1, STORAGE_COMMITMENT, PUSH_MODEL_INSTANCE
        )
        association.release()
        return int(answer.Status)

    @property
    def verdict(self) -> tuple[int, list[str], dict[str, int]]:
        """The only report: event type, the committed, and the failed with their reasons."""
        ((kind, information),) = self.reports
        committed = information.get("ReferencedSOPSequence") or ()
        failed = information.get("FailedSOPSequence") or ()
        return (
            kind,
            sorted(str(item.ReferencedSOPInstanceUID) for item in committed),
            {str(item.ReferencedSOPInstanceUID): int(item.FailureReason) for item in failed},
        )


@contextmanager
def listening(scanner: Scanner) -> Generator[Scanner]:
    entity = AE(ae_title="CT1")
    context = build_context(STORAGE_COMMITMENT)
    context.scu_role, context.scp_role = False, True
    server = entity.start_server(
        ("127.0.0.1", scanner.port),
        block=False,
        contexts=[context],
        evt_handlers=[(evt.EVT_N_EVENT_REPORT, scanner.on_report)],
    )
    try:
        yield scanner
    finally:
        server.shutdown()


@dataclass
class Site:
    """A node that answers for originals, the archive that it asks, and the scanner."""

    node: Node
    archive: CommittingArchive
    scanner: Scanner
    worker: CustodyWorker
    clock: ManualClock

    def receive(self, folder: Path, count: int = 2) -> list[str]:
        """The scanner sends so many instances; their UIDs."""
        paths = [
            write(ct_slice(number), folder / f"{number}.dcm") for number in range(1, count + 1)
        ]
        assert send_files(paths, self.node.peer("CT1")).ok
        return [f"{ROOT}.1.1.{number}" for number in range(1, count + 1)]

    def work(self) -> None:
        while self.worker.run_once():
            pass


@pytest.fixture
def site(
    start_node: Callable[..., Node], tmp_path: Path, clock: ManualClock
) -> Generator[Callable[..., Site]]:
    """Start a site with changed settings of [commitment_scp]."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(**changes: Any) -> Site:
            archive = stack.enter_context(committing(CommittingArchive()))
            scanner = Scanner(reserve_port())
            given = {
                "enabled": True,
                "archives": ["pacs"],
                "requestors": [{"ae_title": "CT1", "host": "127.0.0.1", "port": scanner.port}],
                **changes,
            }
            ledger = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
            stack.callback(ledger.dispose)
            scp = CommitmentSCPSettings.model_validate(given)
            node = start_node(
                commitment_scp=given,
                destinations={
                    "pacs": {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}
                },
                delivery={"commitment_wait_s": 0},
                handlers=[
                    *commitment.handlers(ledger, clock),
                    *commitment_scp.handlers(scp, ledger, clock),
                ],
            )
            worker = CustodyWorker(node.settings, node.spool, node.ledger, clock)
            return Site(node, archive, scanner, worker, clock)

        yield start


def test_an_original_is_committed_once_the_archive_has_committed_it(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    here = site()
    uids = here.receive(tmp_path)
    with listening(here.scanner):
        assert here.scanner.ask(here.node, uids) == 0x0000
        here.work()
        (asked,) = here.archive.requests
        assert [str(item.ReferencedSOPInstanceUID) for item in asked.ReferencedSOPSequence] == uids
        assert here.scanner.reports == [], "not on our own word"
        assert custody.purgeable(here.node.ledger, uids) == frozenset()
        assert here.archive.send_report(here.node) == 0x0000
        here.work()
    assert here.scanner.verdict == (1, uids, {})
    assert str(here.scanner.reports[0][1].TransactionUID) == "1.2.3.4"
    assert custody.purgeable(here.node.ledger, uids) == set(uids)


def test_what_the_archive_does_not_commit_in_time_is_reported_as_failed(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    here = site(answer_within_s=HOUR, ask_every_s=600)
    uids = here.receive(tmp_path)
    with listening(here.scanner):
        here.scanner.ask(here.node, uids)
        here.work()
        here.archive.refuse = frozenset({1})
        here.archive.send_report(here.node)
        for _ in range(12):
            here.work()
            here.clock.advance(600)
    assert here.scanner.verdict == (2, uids[:1], {uids[1]: 0x0110})
    assert len(here.archive.requests) == 6, "every ten minutes for an hour"
    assert [len(request.ReferencedSOPSequence) for request in here.archive.requests] == [
        2, 1, 1, 1, 1, 1,
    ]  # fmt: skip


def test_what_never_came_and_what_came_as_another_class_fail_at_once(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    here = site()
    (uid,) = here.receive(tmp_path, 1)
    with listening(here.scanner):
        here.scanner.ask(here.node, ["1.2.3.99"])
        here.work()
        assert here.scanner.verdict == (2, [], {"1.2.3.99": 0x0112})
        here.scanner.reports.clear()
        mr = "1.2.840.10008.5.1.4.1.1.4"
        here.scanner.ask(here.node, [uid], transaction_uid="1.2.3.5", sop_class_uid=mr)
        here.work()
    assert here.scanner.verdict == (2, [], {uid: 0x0119})
    assert here.archive.requests == []


def test_a_report_that_is_not_taken_is_brought_again(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    here = site()
    here.scanner.ask(here.node, ["1.2.3.99"])
    here.work()
    assert here.scanner.reports == [], "nobody listens"
    here.clock.advance(10)
    here.scanner.answer = 0x0110
    with listening(here.scanner):
        here.work()
        assert here.scanner.arrived.is_set()
        here.scanner.answer = 0x0000
        here.clock.advance(20)
        here.work()
        here.clock.advance(1e9)
        here.work()
    assert here.scanner.verdict == (2, [], {"1.2.3.99": 0x0112})


def test_a_report_that_nobody_ever_takes_is_given_up(site: Callable[..., Site]) -> None:
    here = site()
    here.scanner.ask(here.node, ["1.2.3.99"])
    attempts = 0
    for _ in range(24 * 5):
        attempts += here.worker.run_once()
        here.clock.advance(HOUR)
    assert 50 < attempts <= 73, "for three days, once an hour"


def test_an_original_that_the_archive_does_not_have_is_forwarded_where_that_is_configured(
    site: Callable[..., Site], tmp_path: Path
) -> None:
    here = site(forward=True, ask_every_s=600)
    uids = here.receive(tmp_path)
    with listening(here.scanner):
        here.scanner.ask(here.node, uids)
        here.work()
        here.archive.refuse = frozenset({0, 1})
        here.archive.send_report(here.node)
        assert here.archive.stored == []
        here.clock.advance(600)
        here.work()
        assert here.archive.stored == uids
        here.archive.refuse = frozenset()
        here.archive.send_report(here.node)
        here.work()
    assert here.scanner.verdict == (1, uids, {})


def test_the_same_request_again_gets_one_report(site: Callable[..., Site], tmp_path: Path) -> None:
    here = site()
    uids = here.receive(tmp_path)
    with listening(here.scanner):
        for _ in range(2):
            assert here.scanner.ask(here.node, uids) == 0x0000
        here.work()
        here.archive.send_report(here.node)
        here.work()
        here.clock.advance(1e6)
        here.work()
    assert len(here.scanner.reports) == 1


@pytest.mark.parametrize(
    ("changes", "title", "uids", "status"),
    [
        ({"enabled": False}, "CT1", ["1.2.3"], 0x0122),
        ({}, "SOMEONE", ["1.2.3"], 0x0124),
        ({}, "CT1", [], 0x0115),
    ],
)
def test_a_request_that_is_not_taken_is_answered_and_not_recorded(
    site: Callable[..., Site], changes: dict[str, Any], title: str, uids: list[str], status: int
) -> None:
    here = site(**changes)
    assert here.scanner.ask(here.node, uids, title=title) == status
    assert not here.worker.run_once()


def test_it_is_off_unless_a_site_turns_it_on() -> None:
    assert not CommitmentSCPSettings().enabled
    with pytest.raises(ValueError, match="needs archives and requestors"):
        CommitmentSCPSettings(enabled=True)


@pytest.mark.orthanc
def test_orthanc_as_a_requestor_hears_that_its_instances_are_committed(
    site: Callable[..., Site], orthanc: Orthanc, tmp_path: Path
) -> None:
    requestor = {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": orthanc.dicom_port}
    here = site(requestors=[requestor])
    uids = here.receive(tmp_path)
    modality = {
        "AET": "DIFFCODE",
        "Host": "127.0.0.1",
        "Port": here.node.port,
        "AllowStorageCommitment": True,
    }
    orthanc.put("/modalities/node", modality)
    import json

    instances = [{"SOPClassUID": CT, "SOPInstanceUID": uid} for uid in uids]
    asked = json.loads(
        orthanc.put("/modalities/node/storage-commitment", {"DicomInstances": instances}, "POST")
    )
    assert orthanc.get(asked["Path"])["Status"] == "Pending"
    here.work()
    here.archive.send_report(here.node)
    here.work()
    until(lambda: orthanc.get(asked["Path"])["Status"] == "Success", "Orthanc hears of it")
    told = {one["SOPInstanceUID"] for one in orthanc.get(asked["Path"])["Success"]}
    assert told == set(uids)
