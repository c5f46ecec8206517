"""Destinations that misbehave: the ledger is right for each instance, and every delivery ends."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pynetdicom.events import Event

from dicom_node.delivery import DeliveryWorker
from dicom_node.ledger import destinations, notices, queue, reports
from tests.conftest import ManualClock
from tests.integration.conftest import node_settings
from tests.integration.peers import (
    Archive,
    Node,
    Orthanc,
    outgoing_series,
    reserve_port,
    running_orthanc,
    serving,
    until,
)
from tests.integration.proxy import P_DATA, RELEASE_RQ, Proxy, proxying

HOUR = 3600.0


def worker(
    node: Node, port: int, clock: ManualClock, *, name: str = "deliver-0", **destination: Any
) -> DeliveryWorker:
    """A delivery worker of the only destination, pacs, that listens on *port*."""
    pacs = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": port, **destination}
    settings = node_settings(
        node.spool.root.parent,
        destinations={"pacs": pacs},
        delivery={"first_s": 10, "factor": 2, "max_s": 600, "give_up_after_s": 8 * HOUR},
    )
    return DeliveryWorker(settings, node.spool, node.ledger, clock, name=name, rng=random.Random(1))


def run_to_the_end(deliver: DeliveryWorker, clock: ManualClock, node: Node) -> int:
    """Let simulated time pass until no delivery is open; how often one was attempted."""
    attempts = 0
    for _ in range(2000):
        while deliver.run_once():
            attempts += 1
        if all(row["state"] in ("delivered", "dead") for row in reports.deliveries(node.ledger)):
            return attempts
        clock.advance(60)
    raise AssertionError("a delivery never ends")


def the_delivery(node: Node) -> dict[str, Any]:
    (row,) = reports.deliveries(node.ledger)
    return reports.delivery(node.ledger, row["id"])


def item_states(node: Node) -> list[str]:
    return [item["state"] for item in the_delivery(node)["items"]]


def assert_each_stored_once(node: Node, orthanc: Orthanc) -> None:
    """Orthanc has each delivered instance, has stored it once, and has nothing else."""
    items = the_delivery(node)["items"]
    delivered = {item["sop_instance_uid"] for item in items if item["state"] == "delivered"}
    assert orthanc.stores() == Counter(dict.fromkeys(delivered, 1))
    assert len(orthanc.get("/instances")) == len(delivered)


def notice_of(node: Node, clock: ManualClock) -> Any:
    found = notices.claim(node.ledger, lease_s=60, now=clock())
    return found[0].event if found else None


@pytest.mark.orthanc
def test_a_destination_that_is_down_for_two_hours_gets_each_instance_once(
    node_scp: Node, orthanc: Orthanc, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])
    port, began = reserve_port(), clock()
    deliver = worker(node_scp, port, clock)
    attempts = 0
    while clock() < began + 2 * HOUR:
        attempts += deliver.run_once()
        clock.advance(5)
    # 10, 20, 40, 80, 160 and 320 s, then every 600 s, each shortened by up to a fifth.
    assert 16 <= attempts <= 22
    row = the_delivery(node_scp)
    assert (row["state"], row["sent"], row["attempts"]) == ("waiting", 0, attempts)
    assert destinations.states(node_scp.ledger)["pacs"].failures == attempts
    with proxying(Proxy(orthanc.dicom_port), port=port) as proxy:
        run_to_the_end(deliver, clock, node_scp)
    assert item_states(node_scp) == ["delivered"] * 5
    assert_each_stored_once(node_scp, orthanc)
    assert proxy.pdus.count(P_DATA) == 2 * 5, "each was sent once: a command and a data set"
    assert destinations.states(node_scp.ledger)["pacs"].failures == 0
    assert notice_of(node_scp, clock) is None


@pytest.mark.orthanc
def test_an_association_that_breaks_midway_is_resumed_at_the_first_unsent_instance(
    node_scp: Node, orthanc: Orthanc, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])

    def cut_in_the_fourth(number: int, kind: int) -> str:
        # The association request is the first PDU; then a command and a data set for each.
        return "cut" if number == 1 + 3 * 2 + 2 else "pass"

    with proxying(Proxy(orthanc.dicom_port, cut_in_the_fourth)) as proxy:
        deliver = worker(node_scp, proxy.port, clock)
        assert deliver.run_once()
        assert the_delivery(node_scp)["state"] == "waiting"
        assert item_states(node_scp) == ["delivered"] * 3 + ["pending"] * 2
        run_to_the_end(deliver, clock, node_scp)
    assert item_states(node_scp) == ["delivered"] * 5
    assert_each_stored_once(node_scp, orthanc)
    assert proxy.associations == 2
    # Four commands and three data sets came through at first, two of each afterwards.
    assert proxy.pdus.count(P_DATA) == 8 + 4


@pytest.mark.orthanc
def test_a_destination_that_takes_one_byte_a_second_is_left_in_time_and_tried_again(
    node_scp: Node, orthanc: Orthanc, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])
    slow = {"now": True}

    def trickle(number: int, kind: int) -> str:
        return "trickle" if slow["now"] and kind == P_DATA else "pass"

    with proxying(Proxy(orthanc.dicom_port, trickle)) as proxy:
        deliver = worker(node_scp, proxy.port, clock, timeout_s=0.5)
        assert deliver.run_once()
        row = the_delivery(node_scp)
        assert row["state"] == "waiting"
        assert "no answer" in row["reason"]
        assert item_states(node_scp) == ["pending"] * 5
        slow["now"] = False
        patient = worker(node_scp, proxy.port, clock)
        run_to_the_end(patient, clock, node_scp)
    assert item_states(node_scp) == ["delivered"] * 5
    assert_each_stored_once(node_scp, orthanc)


@pytest.mark.orthanc
def test_a_destination_that_never_releases_has_the_series_all_the_same(
    node_scp: Node, orthanc: Orthanc, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])

    def keep_the_release(number: int, kind: int) -> str:
        return "drop" if kind == RELEASE_RQ else "pass"

    with proxying(Proxy(orthanc.dicom_port, keep_the_release)) as proxy:
        deliver = worker(node_scp, proxy.port, clock, timeout_s=1.0)
        assert run_to_the_end(deliver, clock, node_scp) == 1
    assert RELEASE_RQ in proxy.pdus
    assert item_states(node_scp) == ["delivered"] * 5
    assert_each_stored_once(node_scp, orthanc)
    assert proxy.associations == 1


@pytest.mark.orthanc
def test_orthanc_that_takes_implicit_vr_alone_gets_the_same_pixels(
    node_scp: Node, orthanc_program: Path, clock: ManualClock, tmp_path: Path
) -> None:
    files = outgoing_series(node_scp, ["pacs"], slices=2)
    folder = tmp_path / "implicit"
    folder.mkdir()
    syntaxes = ["1.2.840.10008.1.2"]
    with running_orthanc(orthanc_program, folder, AcceptedTransferSyntaxes=syntaxes) as peer:
        run_to_the_end(worker(node_scp, peer.dicom_port, clock), clock, node_scp)
        kept = peer.files()
    assert item_states(node_scp) == ["delivered"] * 2
    for path in files:
        ours = dcmread(path)
        stored = tmp_path / "stored.dcm"
        stored.write_bytes(kept[str(ours.SOPInstanceUID)])
        theirs = dcmread(stored)
        assert theirs.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2"
        assert theirs.PixelData == ours.PixelData


Script = Callable[[int], int | None]


@pytest.mark.orthanc
@pytest.mark.parametrize(
    ("script", "states", "asked"),
    [
        pytest.param(lambda n: 0xA700 if n == 3 else 0, "ddddd", 6, id="A700 on the third"),
        pytest.param(lambda n: 0xB000, "ddddd", 5, id="B000 warning"),
        pytest.param(lambda n: 0x0111, "ddddd", 5, id="0111 duplicate"),
        pytest.param(lambda n: 0xA900 if n == 2 else 0, "dxddd", 5, id="A900 on the second"),
        pytest.param(lambda n: 0x0122, "xxxxx", 5, id="0122 class refused"),
        pytest.param(lambda n: 0x0110 if n == 2 else 0, "ddddd", 6, id="0110 on the second"),
        pytest.param(lambda n: None if n == 3 else 0, "ddddd", 6, id="aborts midway"),
    ],
)
def test_a_series_ends_delivered_or_dead_and_each_instance_is_stored_at_most_once(
    script: Script, states: str, asked: int, node_scp: Node, orthanc: Orthanc, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])
    with proxying(Proxy(orthanc.dicom_port, status=script)) as proxy:
        run_to_the_end(worker(node_scp, proxy.port, clock), clock, node_scp)
    words = {"d": "delivered", "x": "dead"}
    assert item_states(node_scp) == [words[letter] for letter in states]
    dead = "x" in states
    assert the_delivery(node_scp)["state"] == ("dead" if dead else "delivered")
    assert proxy.asked == asked
    assert_each_stored_once(node_scp, orthanc)
    event = notice_of(node_scp, clock)
    assert (event is not None) == dead
    if event is not None:
        assert event["stored"] == states.count("d")


@pytest.mark.orthanc
def test_an_instance_whose_answer_is_lost_is_sent_again_and_no_other_is(
    node_scp: Node, orthanc: Orthanc, clock: ManualClock
) -> None:
    """Nobody can know then whether it was stored; the archive has it once, as it has one UID."""
    outgoing_series(node_scp, ["pacs"])
    with proxying(Proxy(orthanc.dicom_port, lost=lambda number: number == 3)) as proxy:
        run_to_the_end(worker(node_scp, proxy.port, clock), clock, node_scp)
    assert item_states(node_scp) == ["delivered"] * 5
    assert len(orthanc.get("/instances")) == 5
    sent = [orthanc.stores()[item["sop_instance_uid"]] for item in the_delivery(node_scp)["items"]]
    assert sent == [1, 1, 2, 1, 1]


@pytest.mark.orthanc
def test_a_destination_that_does_not_know_us_is_dead_lettered_and_told(
    node_scp: Node, orthanc_program: Path, clock: ManualClock, tmp_path: Path
) -> None:
    outgoing_series(node_scp, ["pacs"])
    folder = tmp_path / "strict"
    folder.mkdir()
    strict = {f"DicomAlwaysAllow{each}": False for each in ("Store", "Echo", "Get", "Find")}
    with running_orthanc(orthanc_program, folder, **strict) as peer:
        deliver = worker(node_scp, peer.dicom_port, clock)
        assert run_to_the_end(deliver, clock, node_scp) == 1, "it is not asked again"
        assert item_states(node_scp) == ["pending"] * 5
        event = notice_of(node_scp, clock)
        assert event["reason"].endswith("our calling AE title 'DIFFCODE' is not known there")
        assert (event["stored"], event["instances"]) == (0, 5)
        assert peer.get("/instances") == []
        # Its administrator adds us, and ours sends again.
        peer.put("/modalities/node", {"AET": "DIFFCODE", "Host": "127.0.0.1", "Port": 104})
        number = the_delivery(node_scp)["id"]
        assert queue.retry_delivery(node_scp.ledger, number, reason="known now", now=clock())
        assert run_to_the_end(deliver, clock, node_scp) == 1
        deliver.close()
        assert_each_stored_once(node_scp, peer)
    assert item_states(node_scp) == ["delivered"] * 5


def test_a_destination_that_is_down_longer_than_our_patience_is_dead_lettered(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])
    began = clock()
    run_to_the_end(worker(node_scp, reserve_port(), clock), clock, node_scp)
    assert 8 * HOUR <= clock() - began <= 8 * HOUR + 120
    assert notice_of(node_scp, clock)["reason"].startswith("given up: ARCHIVE@127.0.0.1")


def test_while_a_destination_is_down_one_series_tries_it_and_the_others_wait(
    node_scp: Node, clock: ManualClock
) -> None:
    for number in range(4):
        outgoing_series(node_scp, ["pacs"], slices=1, series=20 + number)
    deliver = worker(node_scp, reserve_port(), clock)
    assert deliver.run_once()
    assert not deliver.run_once(), "the destination is held"
    states = [row["state"] for row in reports.deliveries(node_scp.ledger)]
    assert sorted(states) == ["queued", "queued", "queued", "waiting"]


def test_series_that_wait_for_one_destination_share_an_association(
    node_scp: Node, clock: ManualClock
) -> None:
    for number in range(4):
        outgoing_series(node_scp, ["pacs"], slices=3, series=20 + number)
    associations: list[Any] = []

    def remember(number: int, event: Event) -> int:
        associations.append(event.assoc)
        return 0x0000

    with serving(Archive(remember)) as archive:
        run_to_the_end(worker(node_scp, archive.port, clock), clock, node_scp)
        assert len(archive.stored) == 12
        assert len(set(associations)) == 1
        until(lambda: associations[0].is_released, "the association is released")


def test_an_association_carries_as_many_instances_as_its_destination_allows(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"], slices=5)
    associations: list[Any] = []

    def remember(number: int, event: Event) -> int:
        associations.append(event.assoc)
        return 0x0000

    with serving(Archive(remember)) as archive:
        limited = worker(node_scp, archive.port, clock, instances_per_association=2)
        run_to_the_end(limited, clock, node_scp)
    assert [associations.count(one) for one in dict.fromkeys(associations)] == [2, 2, 1]
    assert item_states(node_scp) == ["delivered"] * 5


def test_workers_keep_together_to_the_limit_of_a_destination(
    node_scp: Node, clock: ManualClock
) -> None:
    for number in range(6):
        outgoing_series(node_scp, ["pacs"], slices=2, series=20 + number)
    lock, seen, most = threading.Lock(), set[Any](), [0]

    def watch(number: int, event: Event) -> int:
        with lock:
            seen.add(event.assoc)
            # One that was released may take a moment to say so. One that should not be there
            # waits for this lock with its instance, and stays.
            deadline = time.monotonic() + 2
            while (busy := sum(one.is_established for one in seen)) > 2:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            most[0] = max(most[0], busy)
        return 0x0000

    with serving(Archive(watch)) as archive:
        workers = [
            worker(node_scp, archive.port, clock, name=f"deliver-{number}", max_associations=2)
            for number in range(4)
        ]
        gate = threading.Barrier(4)

        def run(one: DeliveryWorker) -> None:
            gate.wait(10)
            while any(row["state"] != "delivered" for row in reports.deliveries(node_scp.ledger)):
                one.run_once()

        threads = [threading.Thread(target=run, args=(one,)) for one in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(archive.stored) == len(archive.received) == 12
    assert most[0] <= 2


def test_a_paused_destination_gets_nothing_and_a_resumed_one_everything(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"])
    destinations.pause(node_scp.ledger, "pacs", reason="moves", now=clock())
    with serving(Archive()) as archive:
        deliver = worker(node_scp, archive.port, clock)
        clock.advance(24 * HOUR)
        assert not deliver.run_once()
        destinations.resume(node_scp.ledger, "pacs", now=clock())
        assert deliver.run_once()
    assert the_delivery(node_scp)["state"] == "delivered"
    assert len(archive.received) == 5


def test_a_class_that_the_destination_does_not_take_is_dead_and_named(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["pacs"], slices=2)
    with serving(Archive(), syntaxes=["1.2.840.10008.1.2.4.50"]) as archive:
        run_to_the_end(worker(node_scp, archive.port, clock), clock, node_scp)
    row = the_delivery(node_scp)
    assert row["state"] == "dead"
    assert "none of the SOP Classes and transfer syntaxes" in row["reason"]
    assert archive.asked == 0
