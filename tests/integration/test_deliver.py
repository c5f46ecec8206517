"""Restored series on their way to real destinations, with the ledger's word for each instance."""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom.events import Event

from dicom_node.association import Peer, contexts_for
from dicom_node.delivery import DeliveryWorker
from dicom_node.ledger import reports
from dicom_node.requestor import associate
from dicom_node.storage_scu import Sendable, StoreLink, echo, send_files
from tests.conftest import ManualClock
from tests.integration.conftest import StoreSCP, node_settings
from tests.integration.peers import (
    CT,
    Archive,
    Node,
    Orthanc,
    ct_slice,
    data_set_bytes,
    outgoing_series,
    reserve_port,
    series_files,
    serving,
    until,
    write,
)

IMPLICIT = "1.2.840.10008.1.2"


def worker(
    node: Node, port: int, clock: ManualClock, *, timeout_s: float = 60, **changes: Any
) -> DeliveryWorker:
    """A delivery worker whose only destination, pacs, listens on *port*."""
    pacs = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": port, "timeout_s": timeout_s}
    settings = node_settings(
        node.spool.root.parent,
        destinations={"pacs": pacs},
        delivery={"first_s": 10, "factor": 2, "max_s": 60, "give_up_after_s": 100},
    )
    return DeliveryWorker(settings, node.spool, node.ledger, clock, rng=random.Random(1), **changes)


def the_delivery(node: Node) -> dict[str, Any]:
    """The only delivery in the ledger, with its items."""
    (row,) = reports.deliveries(node.ledger)
    return reports.delivery(node.ledger, row["id"])


def item_states(node: Node) -> list[str]:
    return [item["state"] for item in the_delivery(node)["items"]]


def peer_at(port: int, **limits: Any) -> Peer:
    return Peer("ARCHIVE", "127.0.0.1", port, "DIFFCODE", **limits)


def test_a_series_is_delivered_byte_by_byte_and_exactly_once(
    node_scp: Node, clock: ManualClock
) -> None:
    files = outgoing_series(node_scp, ["pacs"])
    with serving(Archive()) as archive:
        deliver = worker(node_scp, archive.port, clock)
        assert deliver.run_once()
        assert not deliver.run_once()
    assert set(archive.stored.values()) == {data_set_bytes(path) for path in files}
    assert len(archive.received) == len(files)
    assert the_delivery(node_scp)["state"] == "delivered"
    assert item_states(node_scp) == ["delivered"] * 5


@pytest.mark.parametrize("status", [0x0111, 0xB000, 0xB006, 0xB007])
def test_a_duplicate_and_a_warning_count_as_delivered(
    status: int, node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"], slices=2)
    with serving(Archive(lambda number, event: status)) as archive:
        worker(node_scp, archive.port, clock).run_once()
    assert the_delivery(node_scp)["state"] == "delivered"
    assert [item["status"] for item in the_delivery(node_scp)["items"]] == [f"0x{status:04X}"] * 2


def test_a_destination_that_is_down_is_waited_for(node_scp: Node, clock: ManualClock) -> None:
    outgoing_series(node_scp, ["pacs"])
    port = reserve_port()
    deliver = worker(node_scp, port, clock)
    assert deliver.run_once()
    row = the_delivery(node_scp)
    assert row["state"] == "waiting"
    assert "connection refused" in row["reason"]
    assert not deliver.run_once(), "it is not due before its wait is over"
    clock.advance(10)
    with serving(Archive(), port=port) as archive:
        assert deliver.run_once()
    assert len(archive.stored) == 5
    assert the_delivery(node_scp)["state"] == "delivered"


def test_a_destination_that_stays_down_is_given_up(node_scp: Node, clock: ManualClock) -> None:
    outgoing_series(node_scp, ["pacs"])
    deliver = worker(node_scp, reserve_port(), clock)
    attempts = 0
    for _ in range(200):
        attempts += deliver.run_once()
        clock.advance(1)
    row = the_delivery(node_scp)
    assert row["state"] == "dead"
    assert row["reason"].startswith("given up: ")
    # Waits of 10, 20, 40 and 60 s, each shortened by at most a fifth, until 100 s have gone by.
    assert 4 <= attempts <= 6


def test_out_of_resources_on_the_third_instance_goes_on_from_there(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])

    def third_is_refused(number: int, event: Event) -> int:
        return 0xA700 if number == 3 else 0x0000

    with serving(Archive(third_is_refused)) as archive:
        deliver = worker(node_scp, archive.port, clock)
        deliver.run_once()
        assert the_delivery(node_scp)["state"] == "waiting"
        assert item_states(node_scp) == ["delivered"] * 2 + ["pending"] * 3
        assert archive.asked == 3
        clock.advance(60)
        deliver.run_once()
    assert the_delivery(node_scp)["state"] == "delivered"
    assert archive.asked == 6
    assert len(archive.stored) == 5


def test_an_instance_that_is_not_understood_is_dead_and_the_others_arrive(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])

    def second_is_wrong(number: int, event: Event) -> int:
        return 0xC000 if number == 2 else 0x0000

    with serving(Archive(second_is_wrong)) as archive:
        worker(node_scp, archive.port, clock).run_once()
    row = the_delivery(node_scp)
    assert row["state"] == "dead"
    assert "0xC000" in row["reason"]
    assert item_states(node_scp) == ["delivered", "dead", "delivered", "delivered", "delivered"]


def test_a_dead_instance_is_remembered_when_the_rest_arrives_later(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])
    script = {2: 0xC000, 3: 0xA700}
    with serving(Archive(lambda number, event: script.get(number, 0))) as archive:
        deliver = worker(node_scp, archive.port, clock)
        deliver.run_once()
        assert the_delivery(node_scp)["state"] == "waiting"
        clock.advance(60)
        deliver.run_once()
    row = the_delivery(node_scp)
    assert row["state"] == "dead"
    assert row["reason"] == "1 refused: answered 0xC000"


def test_an_association_aborted_midway_is_resumed(node_scp: Node, clock: ManualClock) -> None:
    outgoing_series(node_scp, ["pacs"])

    def abort_the_fourth(number: int, event: Event) -> int | None:
        if number == 4:
            event.assoc.abort()
            return None
        return 0x0000

    with serving(Archive(abort_the_fourth)) as archive:
        deliver = worker(node_scp, archive.port, clock)
        deliver.run_once()
        row = the_delivery(node_scp)
        assert row["state"] == "waiting"
        assert "aborted" in row["reason"]
        clock.advance(60)
        deliver.run_once()
    assert the_delivery(node_scp)["state"] == "delivered"
    assert len(archive.received) == len(set(archive.received)) == 5


def test_a_destination_that_does_not_answer_in_time_is_tried_later(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"], slices=2)
    answering = threading.Event()

    def silent(number: int, event: Event) -> int:
        answering.wait(30)
        return 0x0000

    with serving(Archive(silent)) as archive:
        worker(node_scp, archive.port, clock, timeout_s=0.5).run_once()
        answering.set()
    row = the_delivery(node_scp)
    assert row["state"] == "waiting"
    assert "no answer" in row["reason"]


class WokenLate(Queue[Any]):
    """What pynetdicom puts answers into, on a machine too busy to wake who waits for one."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if block:
            until(lambda: not self.empty(), "an answer comes")
            time.sleep(0.1)
        return super().get(block, timeout)


def test_no_answer_is_lost_to_the_thread_that_watches_the_association(tmp_path: Path) -> None:
    """pynetdicom's own thread, on the way when the request went out, must not take the answer."""
    path = write(ct_slice(1), tmp_path / "1.dcm")
    with serving(Archive()) as archive:
        peer = peer_at(archive.port, dimse_timeout=1)
        contexts = contexts_for([(CT, str(ExplicitVRLittleEndian))])
        with associate(peer, contexts) as association:
            checkpoint = association._reactor_checkpoint
            passes = checkpoint.wait

            def pass_late(timeout: float | None = None) -> bool:
                passed = passes(timeout)
                time.sleep(0.05)
                return passed

            checkpoint.wait = pass_late  # type: ignore[method-assign]
            association.dimse.msg_queue = WokenLate()
            answers = [association.send_c_store(path) for _ in range(3)]
    assert [answer.get("Status") for answer in answers] == [0x0000] * 3
    assert archive.asked == 3


def test_a_destination_that_does_not_know_us_is_dead_at_once(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])
    with serving(Archive(), calling=["SOMEONE"]) as archive:
        worker(node_scp, archive.port, clock).run_once()
    row = the_delivery(node_scp)
    assert row["state"] == "dead"
    assert "our calling AE title 'DIFFCODE' is not known there" in row["reason"]


def test_a_destination_that_takes_only_implicit_vr_gets_the_same_pixels(
    node_scp: Node, clock: ManualClock
) -> None:
    files = outgoing_series(node_scp, ["pacs"], slices=1)
    headers: list[Any] = []

    def keep(number: int, event: Event) -> int:
        headers.append((str(event.context.transfer_syntax), event.dataset))
        return 0x0000

    with serving(Archive(keep), syntaxes=[IMPLICIT]) as archive:
        worker(node_scp, archive.port, clock).run_once()
    ((syntax, dataset),) = headers
    assert syntax == IMPLICIT
    assert dataset.PixelData == dcmread(files[0]).PixelData
    assert the_delivery(node_scp)["state"] == "delivered"


def test_a_shutdown_ends_the_delivery_after_the_instance_in_hand(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])
    stop = threading.Event()

    def stop_at_the_second(number: int, event: Event) -> int:
        if number == 2:
            stop.set()
        return 0x0000

    with serving(Archive(stop_at_the_second)) as archive:
        worker(node_scp, archive.port, clock, stop=stop).run_once()
        row = the_delivery(node_scp)
        assert (row["state"], row["reason"]) == ("waiting", "interrupted by shutdown")
        worker(node_scp, archive.port, clock).run_once()
    assert the_delivery(node_scp)["state"] == "delivered"
    assert archive.asked == 5


def test_a_worker_that_lost_its_lease_leaves_the_delivery_alone(
    node_scp: Node, clock: ManualClock
) -> None:
    from dicom_node.ledger import queue

    outgoing_series(node_scp, ["pacs"])

    def take_it_away(number: int, event: Event) -> int:
        if number == 2:
            clock.advance(10_000)
            queue.expire_delivery_leases(node_scp.ledger, clock())
        return 0x0000

    with serving(Archive(take_it_away)) as archive:
        worker(node_scp, archive.port, clock).run_once()
    # What was on its way when the loss was seen is answered still.
    assert archive.asked == 3
    assert the_delivery(node_scp)["state"] == "queued"
    assert item_states(node_scp) == ["delivered"] * 3 + ["pending"] * 2


def test_a_destination_that_was_removed_from_the_settings_is_dead(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["elsewhere"])
    worker(node_scp, reserve_port(), clock).run_once()
    row = the_delivery(node_scp)
    assert row["state"] == "dead"
    assert "no longer configured" in row["reason"]


@pytest.mark.orthanc
def test_orthanc_receives_a_restored_series_bit_by_bit(
    node_scp: Node, orthanc: Orthanc, clock: ManualClock, tmp_path: Path
) -> None:
    files = outgoing_series(node_scp, ["pacs"], slices=7)
    deliver = worker(node_scp, orthanc.dicom_port, clock)
    assert deliver.run_once()
    assert the_delivery(node_scp)["state"] == "delivered"
    assert len(orthanc.get("/instances")) == 7
    assert len(orthanc.get("/series")) == 1
    kept = set()
    for uid, data in orthanc.files().items():
        path = tmp_path / f"{uid}.dcm"
        path.write_bytes(data)
        kept.add(data_set_bytes(path))
    assert kept == {data_set_bytes(path) for path in files}


@pytest.mark.dcmtk
def test_storescp_receives_a_restored_series_bit_by_bit(
    node_scp: Node, storescp_peer: StoreSCP, clock: ManualClock
) -> None:
    files = outgoing_series(node_scp, ["pacs"])
    assert worker(node_scp, storescp_peer.port, clock).run_once()
    assert the_delivery(node_scp)["state"] == "delivered"
    kept = {data_set_bytes(path) for path in storescp_peer.folder.iterdir()}
    assert kept == {data_set_bytes(path) for path in files}


@pytest.mark.dcmtk
def test_a_peer_that_freezes_is_left_and_the_rest_is_sent_later(
    storescp_peer: StoreSCP, tmp_path: Path
) -> None:
    side = 3000
    pixels = {"Rows": side, "Columns": side, "PixelData": bytes(2 * side * side)}
    small, large = ct_slice(1), ct_slice(2, **pixels)
    items = [
        Sendable.of(write(dataset, tmp_path / f"{dataset.InstanceNumber}.dcm"))
        for dataset in (small, large)
    ]
    link = StoreLink(peer_at(storescp_peer.port, acse_timeout=20, network_timeout=1))
    assert [one.outcome for one in link.send(items[:1])] == ["delivered"]
    # What a process that does not read leaves in the kernel's buffers is less than this instance.
    storescp_peer.process.send_signal(signal.SIGSTOP)
    try:
        assert [one.outcome for one in link.send(items[1:])] == ["retry"]
    finally:
        storescp_peer.process.send_signal(signal.SIGCONT)
        link.close()


@pytest.mark.orthanc
def test_send_stores_real_series_of_every_transfer_syntax(
    orthanc: Orthanc, shared_data: Path
) -> None:
    folders = [shared_data / "dicom" / name for name in ("ct_ts_variants", "mr_hitachi_iso2022")]
    seen: list[tuple[int, int]] = []
    report = send_files(
        [*folders, shared_data / "README.md"],
        peer_at(orthanc.dicom_port),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report.ok, report
    assert report.delivered == report.total == len(seen) == 12
    assert seen[-1] == (12, 12)
    assert [path.name for path, _ in report.unreadable] == ["README.md"]
    assert len(orthanc.get("/instances")) == 12


def test_send_decompresses_for_a_peer_that_takes_plain_data_only(shared_data: Path) -> None:
    (path, *_) = (
        path
        for path in series_files(shared_data / "dicom" / "ct_ts_variants")
        if "jpegls" in path.name
    )
    pixels: list[bytes] = []

    def keep(number: int, event: Event) -> int:
        pixels.append(bytes(event.dataset.PixelData))
        return 0x0000

    with serving(Archive(keep), syntaxes=[IMPLICIT]) as archive:
        report = send_files([path], peer_at(archive.port))
    assert report.ok
    assert pixels == [dcmread(path).pixel_array.astype("<i2").tobytes()]


def test_send_reports_a_class_that_the_peer_does_not_take(tmp_path: Path) -> None:
    mr = write(ct_slice(1, SOPClassUID="1.2.840.10008.5.1.4.1.1.4"), tmp_path / "1.dcm")
    ct = write(ct_slice(2), tmp_path / "2.dcm")
    with serving(Archive(), syntaxes=["1.2.840.10008.1.2.1"]) as archive:
        report = send_files([mr, ct], peer_at(archive.port))
    assert not report.ok
    assert [one.outcome for one in report.sent] == ["dead", "delivered"]
    assert report.sent[0].status == 0x0122


def test_send_uses_more_associations_where_one_has_too_few_contexts(tmp_path: Path) -> None:
    from dicom_node.association import STORAGE_CLASSES

    paths = [
        write(ct_slice(number, SOPClassUID=uid), tmp_path / f"{number}.dcm")
        for number, uid in enumerate(STORAGE_CLASSES[:50])
    ]
    with serving(Archive()) as archive:
        report = send_files(paths, peer_at(archive.port))
    assert report.delivered == 50


def test_echo_says_what_is_wrong_in_words(node_scp: Node) -> None:
    assert echo(node_scp.peer()).words == f"DIFFCODE@127.0.0.1:{node_scp.port}: answers"
    port = reserve_port()
    assert echo(peer_at(port)).words == (
        f"ARCHIVE@127.0.0.1:{port}: connection refused; nothing listens on that port"
    )
    unknown = Peer("ARCHIVE", "no-such-host.invalid", 104, "DIFFCODE")
    assert "host name 'no-such-host.invalid' is not known" in echo(unknown).words


def test_echo_does_not_wait_for_ever_for_a_silent_or_foreign_server() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = int(silent.getsockname()[1])
        answer = echo(peer_at(port, acse_timeout=0.5))
        assert "no answer to the association request within 0.5 s" in answer.words
        peer, _ = silent.accept()
        peer.close()

    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = int(foreign.getsockname()[1])

        def hang_up() -> None:
            connection, _ = foreign.accept()
            connection.recv(1)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert "is it a DICOM port?" in echo(peer_at(port, acse_timeout=5)).words
        thread.join(10)


def test_the_lease_of_a_dead_process_is_given_back_at_start(
    node_scp: Node, clock: ManualClock
) -> None:
    from dicom_node.ledger import queue

    outgoing_series(node_scp, ["pacs"])
    assert queue.claim_delivery(node_scp.ledger, "deliver-0", lease_s=120, now=clock())
    with serving(Archive()) as archive:
        deliver = worker(node_scp, archive.port, clock, name="deliver-0")
        assert not deliver.run_once()
        assert deliver.recover() == 1
        assert deliver.run_once()
    assert the_delivery(node_scp)["state"] == "delivered"
