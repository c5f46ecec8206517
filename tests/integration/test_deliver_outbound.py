"""What a deliver process does as a whole: deliveries on threads, requests, reports and notices."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from pynetdicom.events import Event

from dicom_node.delivery import DeliveryWorker
from dicom_node.ledger import reports
from dicom_node.outbound import Outbound
from tests.conftest import ManualClock
from tests.integration.conftest import node_settings
from tests.integration.peers import Archive, Node, outgoing_series, serving, until


def outbound(
    node: Node, clock: ManualClock, ports: dict[str, int], stop: threading.Event
) -> Outbound:
    """Two workers, started."""
    settings = node_settings(
        node.spool.root.parent,
        destinations={
            name: {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": port}
            for name, port in ports.items()
        },
        delivery={"idle_poll_s": 0.02},
    )
    names = ["deliver-0", "deliver-1"]
    made = Outbound(settings, node.spool, node.ledger, names=names, stop=stop, clock=clock)
    made.start()
    return made


def states(node: Node) -> dict[str, str]:
    return {row["destination"]: row["state"] for row in reports.deliveries(node.ledger)}


def test_a_slow_destination_does_not_hold_the_others(node_scp: Node, clock: ManualClock) -> None:
    outgoing_series(node_scp, ["slow", "fast"], slices=3)
    fast_has_all = threading.Event()

    def wait_for_the_other(number: int, event: Event) -> int:
        return 0x0000 if fast_has_all.wait(30) else 0xA700

    def count(number: int, event: Event) -> int:
        if number == 3:
            fast_has_all.set()
        return 0x0000

    with serving(Archive(wait_for_the_other)) as slow, serving(Archive(count)) as fast:
        stop = threading.Event()
        running = outbound(node_scp, clock, {"slow": slow.port, "fast": fast.port}, stop)
        until(lambda: set(states(node_scp).values()) == {"delivered"}, "both are delivered", 40)
        stop.set()
        running.close()
    assert len(slow.received) == len(fast.received) == 3


def test_what_is_in_hand_is_given_back_when_the_process_ends(
    node_scp: Node, clock: ManualClock
) -> None:
    # The third may be on its way when the answer to the second is looked at.
    outgoing_series(node_scp, ["pacs"], slices=4)
    stop, later = threading.Event(), threading.Event()

    def stop_at_the_second(number: int, event: Event) -> int:
        if number == 2:
            stop.set()
        return 0x0000

    with serving(Archive(stop_at_the_second)) as archive:
        first = outbound(node_scp, clock, {"pacs": archive.port}, stop)
        assert stop.wait(20)
        first.close()
        assert states(node_scp) == {"pacs": "waiting"}
        second = outbound(node_scp, clock, {"pacs": archive.port}, later)
        until(lambda: states(node_scp) == {"pacs": "delivered"}, "the rest is delivered")
        later.set()
        second.close()
    assert len(archive.received) == len(set(archive.received)) == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_does_not_go_on_without_a_worker(
    node_scp: Node, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(_: Any) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(DeliveryWorker, "run_once", fault)
    stop = threading.Event()
    running = outbound(node_scp, clock, {}, stop)

    def ended() -> bool:
        try:
            running.turn()
        except RuntimeError as error:
            return "a delivery worker has ended" in str(error)
        return False

    until(ended, "the process says so")
    stop.set()
    running.close()
