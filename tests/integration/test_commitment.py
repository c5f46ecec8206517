"""Storage Commitment with archives that report on their own association, on ours, or in part."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.events import Event

from dicom_node import commitment
from dicom_node.association import STORAGE_COMMITMENT, contexts_scp
from dicom_node.commitment import PUSH_MODEL_INSTANCE, CommitmentWorker
from dicom_node.delivery import DeliveryWorker
from dicom_node.ledger import reports
from dicom_node.ledger.tables import open_ledger
from tests.conftest import ManualClock
from tests.integration.conftest import node_settings
from tests.integration.peers import Node, Orthanc, outgoing_series, reserve_port, until


@dataclass
class CommittingArchive:
    """A pynetdicom archive that stores everything and takes commitment requests."""

    answer: int = 0x0000
    refuse: frozenset[int] = frozenset()
    """Positions in a request that are reported as failed."""
    on_same_association: bool = False
    requests: list[Dataset] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    port: int = 0

    def on_store(self, event: Event) -> int:
        self.stored.append(str(event.request.AffectedSOPInstanceUID))
        return 0x0000

    def on_action(self, event: Event) -> tuple[int, None]:
        self.requests.append(event.action_information)
        if self.on_same_association:
            threading.Thread(target=self._report_on, args=[event.assoc]).start()
        return self.answer, None

    def report(self, number: int = -1) -> tuple[int, Dataset]:
        """What is reported of a request: the event type and its information (PS3.4 J.3.3)."""
        request = self.requests[number]
        information = Dataset()
        information.TransactionUID = request.TransactionUID
        kept, failed = [], []
        for position, item in enumerate(request.ReferencedSOPSequence):
            if position in self.refuse:
                item.FailureReason = 0x0112
                failed.append(item)
            else:
                kept.append(item)
        information.ReferencedSOPSequence = Sequence(kept)
        if failed:
            information.FailedSOPSequence = Sequence(failed)
        return (2 if failed else 1), information

    def send_report(self, node: Node, number: int = -1) -> int:
        """Report to the node on an association of our own, in the reversed role."""
        entity = AE(ae_title="ARCHIVE")
        entity.acse_timeout = entity.dimse_timeout = 20
        association = entity.associate(
            "127.0.0.1",
            node.port,
            contexts=[build_context(STORAGE_COMMITMENT)],
            ext_neg=[build_role(STORAGE_COMMITMENT, scp_role=True)],
        )
        assert association.is_established
        try:
            return self._report_on(association, number)
        finally:
            association.release()

    def _report_on(self, association: Any, number: int = -1) -> int:
        kind, information = self.report(number)
        status, _ = association.send_n_event_report(
            information, kind, STORAGE_COMMITMENT, PUSH_MODEL_INSTANCE
        )
        return int(status.Status)


@contextmanager
def committing(archive: CommittingArchive) -> Generator[CommittingArchive]:
    entity = AE(ae_title="ARCHIVE")
    server = entity.start_server(
        ("127.0.0.1", 0),
        block=False,
        contexts=contexts_scp(),
        evt_handlers=[
            (evt.EVT_C_STORE, archive.on_store),
            (evt.EVT_N_ACTION, archive.on_action),
        ],
    )
    archive.port = int(server.server_address[1])
    try:
        yield archive
    finally:
        server.shutdown()


@pytest.fixture
def node(start_node: Callable[..., Node], tmp_path: Any, clock: ManualClock) -> Node:
    """A node whose listener takes commitment reports."""
    ledger = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    started = start_node(handlers=commitment.handlers(ledger, clock))
    ledger.dispose()
    return started


def workers(
    node: Node, port: int, clock: ManualClock, title: str = "ARCHIVE", **delivery: Any
) -> tuple[DeliveryWorker, CommitmentWorker]:
    """What delivers to *port*, and what asks for the commitment of what is delivered."""
    destination = {"ae_title": title, "host": "127.0.0.1", "port": port}
    settings = node_settings(
        node.spool.root.parent,
        destinations={"pacs": destination},
        delivery={"commitment": True, "commitment_wait_s": 0, **delivery},
    )
    deliver = DeliveryWorker(
        settings, node.spool, node.ledger, clock, name="deliver-0", rng=random.Random(1)
    )
    return deliver, CommitmentWorker(settings, node.ledger, clock)


def deliver(node: Node, port: int, clock: ManualClock, title: str = "ARCHIVE", **more: Any) -> None:
    """Deliver what is due and ask for its commitment."""
    sender, asker = workers(node, port, clock, title, **more)
    assert sender.run_once()
    assert asker.run_once()
    assert not asker.run_once()


def the_delivery(node: Node) -> dict[str, Any]:
    (row,) = reports.deliveries(node.ledger)
    return reports.delivery(node.ledger, row["id"])


def test_a_series_is_committed_when_the_archive_reports_every_instance(
    node: Node, clock: ManualClock
) -> None:
    outgoing_series(node, ["pacs"], slices=3)
    with committing(CommittingArchive()) as archive:
        deliver(node, archive.port, clock)
        assert the_delivery(node)["state"] == "delivered"
        (request,) = archive.requests
        named = [str(item.ReferencedSOPInstanceUID) for item in request.ReferencedSOPSequence]
        assert named == archive.stored
        assert archive.send_report(node) == 0x0000
    assert the_delivery(node)["state"] == "committed"


def test_an_instance_that_the_archive_did_not_keep_is_sent_again(
    node: Node, clock: ManualClock
) -> None:
    outgoing_series(node, ["pacs"], slices=3)
    with committing(CommittingArchive(refuse=frozenset({1}))) as archive:
        deliver(node, archive.port, clock)
        assert archive.send_report(node) == 0x0000
        assert the_delivery(node)["state"] == "queued"
        lost = archive.stored[1]
        deliver(node, archive.port, clock)
        assert archive.stored[3:] == [lost]
        assert the_delivery(node)["state"] == "delivered"


def test_a_report_of_an_unknown_transaction_is_answered_and_changes_nothing(
    node: Node, clock: ManualClock
) -> None:
    outgoing_series(node, ["pacs"], slices=2)
    with committing(CommittingArchive()) as archive:
        deliver(node, archive.port, clock)
        archive.requests[0].TransactionUID = "1.2.3.4"
        assert archive.send_report(node) == 0x0115
    assert the_delivery(node)["state"] == "delivered"


def test_a_report_on_the_association_of_the_request_is_taken(
    node: Node, clock: ManualClock
) -> None:
    outgoing_series(node, ["pacs"], slices=2)
    with committing(CommittingArchive(on_same_association=True)) as archive:
        deliver(node, archive.port, clock, commitment_wait_s=20)
    assert the_delivery(node)["state"] == "committed"


def test_the_same_report_again_is_answered_with_success(node: Node, clock: ManualClock) -> None:
    outgoing_series(node, ["pacs"], slices=2)
    with committing(CommittingArchive()) as archive:
        deliver(node, archive.port, clock)
        assert archive.send_report(node) == 0x0000
        assert archive.send_report(node) == 0x0000
    assert the_delivery(node)["state"] == "committed"


def test_a_request_that_is_not_reported_in_time_is_made_again(
    node: Node, clock: ManualClock
) -> None:
    outgoing_series(node, ["pacs"], slices=2)
    with committing(CommittingArchive()) as archive:
        sender, asker = workers(node, archive.port, clock, commitment_timeout_s=3600)
        assert sender.run_once()
        assert asker.run_once()
        clock.advance(3599)
        assert not asker.run_once()
        clock.advance(1)
        assert asker.run_once()
        first, second = archive.requests
        assert first.TransactionUID != second.TransactionUID
        assert not sender.run_once(), "nothing is sent again"
        assert archive.send_report(node, 0) == 0x0000, "a late report of the first counts"
    assert the_delivery(node)["state"] == "committed"


def test_a_destination_that_never_reports_ends_as_dead_and_told(
    node: Node, clock: ManualClock
) -> None:
    from dicom_node.ledger import notices

    outgoing_series(node, ["pacs"], slices=2)
    with committing(CommittingArchive()) as archive:
        sender, asker = workers(
            node, archive.port, clock, commitment_timeout_s=3600, commitment_asks=3
        )
        assert sender.run_once()
        for _ in range(10):
            asker.run_once()
            clock.advance(3600)
        assert len(archive.requests) == 3
    row = the_delivery(node)
    assert (row["state"], row["reason"]) == ("dead", "not committed after 3 requests")
    assert [item["state"] for item in row["items"]] == ["delivered"] * 2
    (notice,) = notices.claim(node.ledger, lease_s=1, now=clock())
    assert (notice.event["stored"], notice.event["committed"]) == (2, 0)


def test_a_destination_that_is_down_when_asked_is_asked_again(
    node: Node, clock: ManualClock
) -> None:
    outgoing_series(node, ["pacs"], slices=2)
    with committing(CommittingArchive()) as archive:
        sender, _ = workers(node, archive.port, clock)
        assert sender.run_once()
    _, asker = workers(node, reserve_port(), clock)
    assert asker.run_once()
    assert the_delivery(node)["state"] == "delivered"
    clock.advance(4 * 3600)
    with committing(CommittingArchive()) as archive:
        _, asker = workers(node, archive.port, clock)
        assert asker.run_once()
        assert archive.send_report(node) == 0x0000
    assert the_delivery(node)["state"] == "committed"


def test_a_refused_request_is_dead_and_says_so(node: Node, clock: ManualClock) -> None:
    outgoing_series(node, ["pacs"], slices=2)
    with committing(CommittingArchive(answer=0x0122)) as archive:
        deliver(node, archive.port, clock)
    row = the_delivery(node)
    assert row["state"] == "dead"
    assert "refuses the Storage Commitment request (0x0122)" in row["reason"]
    assert [item["state"] for item in row["items"]] == ["delivered"] * 2


@pytest.mark.orthanc
def test_orthanc_commits_to_a_delivered_series(
    node: Node, orthanc: Orthanc, clock: ManualClock
) -> None:
    modality = {
        "AET": "DIFFCODE",
        "Host": "127.0.0.1",
        "Port": node.port,
        "AllowStorageCommitment": True,
    }
    orthanc.put("/modalities/node", modality)
    outgoing_series(node, ["pacs"], slices=3)
    deliver(node, orthanc.dicom_port, clock, title="ORTHANC")
    until(lambda: the_delivery(node)["state"] == "committed", "Orthanc's report", 30)
