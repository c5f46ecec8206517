"""Restored series on their way to DICOMweb servers: a strict one of ours, and Orthanc's plugin."""

from __future__ import annotations

import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from dicom_node.delivery import DeliveryWorker
from dicom_node.ledger import destinations, notices, reports
from dicom_node.stow import WebPeer, check
from tests.conftest import ManualClock
from tests.integration.conftest import node_settings
from tests.integration.peers import (
    Node,
    Orthanc,
    data_set_bytes,
    outgoing_series,
    reserve_port,
    running_orthanc,
)
from tests.integration.stow_server import StowServer, stowing

DICOMWEB_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def worker(node: Node, url: str, clock: ManualClock, **server: Any) -> DeliveryWorker:
    """A delivery worker whose only destination, web, is a DICOMweb server."""
    settings = node_settings(
        node.spool.root.parent,
        stow={"web": {"url": url, **server}},
        delivery={"first_s": 10, "factor": 2, "max_s": 600, "give_up_after_s": 7200},
    )
    return DeliveryWorker(settings, node.spool, node.ledger, clock, rng=random.Random(1))


def run_to_the_end(deliver: DeliveryWorker, clock: ManualClock, node: Node) -> None:
    for _ in range(500):
        while deliver.run_once():
            pass
        if all(row["state"] in ("delivered", "dead") for row in reports.deliveries(node.ledger)):
            return
        clock.advance(60)
    raise AssertionError("a delivery never ends")


def the_delivery(node: Node) -> dict[str, Any]:
    (row,) = reports.deliveries(node.ledger)
    return reports.delivery(node.ledger, row["id"])


def items(node: Node) -> list[tuple[str, str | None]]:
    return [(item["state"], item["status"]) for item in the_delivery(node)["items"]]


def test_a_series_is_stored_byte_by_byte_and_exactly_once(
    node_scp: Node, clock: ManualClock
) -> None:
    files = outgoing_series(node_scp, ["web"])
    with stowing(StowServer()) as server:
        run_to_the_end(worker(node_scp, server.url, clock), clock, node_scp)
    assert server.problems == []
    assert set(server.stored.values()) == {path.read_bytes() for path in files}
    assert len(server.stores) == 5
    assert items(node_scp) == [("delivered", "0x0000")] * 5


def test_a_request_holds_as_many_instances_as_is_configured(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["web"])
    with stowing(StowServer()) as server:
        deliver = worker(node_scp, server.url, clock, instances_per_request=2)
        run_to_the_end(deliver, clock, node_scp)
    assert [len(uids) for uids in server.requests] == [2, 2, 1]


def test_a_large_request_goes_in_chunks(node_scp: Node, clock: ManualClock) -> None:
    from dicom_node.storage_scu import Sendable
    from dicom_node.stow import WebLink
    from tests.integration.peers import ct_slice, write

    side = 600
    pixels = {"Rows": side, "Columns": side, "PixelData": bytes(2 * side * side)}
    path = write(ct_slice(1, **pixels), node_scp.spool.root / "large.dcm")
    with stowing(StowServer()) as server:
        link = WebLink(WebPeer(server.url))
        assert [one.outcome for one in link.send([Sendable.of(path)])] == ["delivered"]
        link.close()
    assert list(server.stored.values()) == [path.read_bytes()]


def test_an_instance_that_failed_for_good_is_dead_and_the_others_are_delivered(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["web"])

    def second_fails(number: int, uids: list[str]) -> tuple[int, dict[str, int]]:
        statuses = dict.fromkeys(uids, 0x0000)
        statuses[uids[1]] = 0xC000
        statuses[uids[3]] = 0xB000
        return 202, statuses

    with stowing(StowServer(second_fails)) as server:
        run_to_the_end(worker(node_scp, server.url, clock), clock, node_scp)
    assert the_delivery(node_scp)["state"] == "dead"
    delivered = ("delivered", "0x0000")
    expected = [delivered, ("dead", "0xC000"), delivered, ("delivered", "0xB000"), delivered]
    assert items(node_scp) == expected
    (notice,) = notices.claim(node_scp.ledger, lease_s=60, now=clock())
    assert notice.event["reason"] == "1 refused: answered 0xC000"


def test_an_instance_that_failed_for_now_is_sent_again_alone(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["web"])

    def full_at_first(number: int, uids: list[str]) -> tuple[int, dict[str, int]]:
        statuses = dict.fromkeys(uids, 0x0000)
        if number == 1:
            statuses[uids[2]] = 0xA700
        return (202 if number == 1 else 200), statuses

    with stowing(StowServer(full_at_first)) as server:
        deliver = worker(node_scp, server.url, clock)
        assert deliver.run_once()
        assert the_delivery(node_scp)["state"] == "waiting"
        assert [state for state, _ in items(node_scp)].count("delivered") == 4
        run_to_the_end(deliver, clock, node_scp)
    assert [len(uids) for uids in server.requests] == [5, 1]
    assert sorted(server.stores) == sorted(set(server.stores))
    assert len(server.stores) == 5


def test_a_conflict_that_names_every_instance_is_judged_by_instance(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["web"], slices=3)

    def none_stored(number: int, uids: list[str]) -> tuple[int, dict[str, int]]:
        return 409, dict(zip(uids, (0x0122, 0xA900, 0xC000), strict=True))

    with stowing(StowServer(none_stored)) as server:
        run_to_the_end(worker(node_scp, server.url, clock), clock, node_scp)
    assert len(server.requests) == 1
    assert items(node_scp) == [("dead", "0x0122"), ("dead", "0xA900"), ("dead", "0xC000")]


def test_a_bad_request_is_taken_apart_so_that_one_instance_does_not_doom_the_others(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["web"])
    bad: list[str] = []

    def refuses_the_second(number: int, uids: list[str]) -> Any:
        bad[:] = bad or [uids[1]]
        if bad[0] in uids:
            return 400, b"what is this?"
        return 200, dict.fromkeys(uids, 0x0000)

    with stowing(StowServer(refuses_the_second)) as server:
        run_to_the_end(worker(node_scp, server.url, clock), clock, node_scp)
    states = [state for state, _ in items(node_scp)]
    assert states == ["delivered", "dead", "delivered", "delivered", "delivered"]
    assert len(server.stores) == 4


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_waited_for(code: int, node_scp: Node, clock: ManualClock) -> None:
    outgoing_series(node_scp, ["web"])

    def at_first(number: int, uids: list[str]) -> Any:
        return (code, b"") if number == 1 else (200, dict.fromkeys(uids, 0x0000))

    with stowing(StowServer(at_first)) as server:
        deliver = worker(node_scp, server.url, clock)
        assert deliver.run_once()
        assert the_delivery(node_scp)["reason"] == f"{server.url}: HTTP {code}"
        assert destinations.states(node_scp.ledger)["web"].failures == 1
        run_to_the_end(deliver, clock, node_scp)
    assert len(server.stores) == 5
    assert items(node_scp) == [("delivered", "0x0000")] * 5


def test_a_server_that_is_down_is_waited_for(node_scp: Node, clock: ManualClock) -> None:
    outgoing_series(node_scp, ["web"])
    server = StowServer(port=reserve_port())
    deliver = worker(node_scp, server.url, clock)
    assert deliver.run_once()
    assert the_delivery(node_scp)["state"] == "waiting"
    with stowing(server, port=server.port):
        run_to_the_end(deliver, clock, node_scp)
    assert len(server.stores) == 5


@pytest.mark.parametrize(("code", "words"), [(403, "may not store"), (404, "no such service")])
def test_a_server_that_refuses_us_is_dead_at_once(
    code: int, words: str, node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["web"])
    with stowing(StowServer(lambda number, uids: (code, b""))) as server:
        run_to_the_end(worker(node_scp, server.url, clock), clock, node_scp)
    assert len(server.requests) == 1
    row = the_delivery(node_scp)
    assert row["state"] == "dead"
    assert words in row["reason"]


def test_a_server_that_never_answers_is_left_in_time(node_scp: Node, clock: ManualClock) -> None:
    import socket

    outgoing_series(node_scp, ["web"], slices=1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/dicom-web"
        assert worker(node_scp, url, clock, timeout_s=0.3).run_once()
    assert "no answer within 0.3 s" in the_delivery(node_scp)["reason"]


def test_credentials_open_the_door_and_wrong_ones_do_not(
    node_scp: Node, clock: ManualClock
) -> None:
    outgoing_series(node_scp, ["web"], slices=1)
    with stowing(StowServer(authorization="Bearer secret")) as server:
        assert check(WebPeer(server.url)).words == (
            f"{server.url}: HTTP 401: it does not accept our credentials"
        )
        peer = WebPeer(server.url, headers=(("Authorization", "Bearer secret"),))
        assert check(peer).ok
        assert "secret" not in repr(peer)
        run_to_the_end(worker(node_scp, server.url, clock, token="secret"), clock, node_scp)
    assert len(server.stores) == 1


@pytest.fixture
def dicomweb(orthanc_program: Path, tmp_path: Path) -> Generator[Orthanc]:
    """A running Orthanc with its DICOMweb plugin."""
    if not DICOMWEB_PLUGIN.exists():
        pytest.skip(f"missing peer: Orthanc's DICOMweb plugin ({DICOMWEB_PLUGIN})")
    folder = tmp_path / "dicomweb"
    folder.mkdir()
    plugin = {"Plugins": [str(DICOMWEB_PLUGIN)], "DicomWeb": {"Root": "/dicom-web/"}}
    with running_orthanc(orthanc_program, folder, **plugin) as peer:
        yield peer


@pytest.mark.orthanc
def test_orthanc_stores_a_series_by_stow_rs_bit_by_bit(
    node_scp: Node, dicomweb: Orthanc, clock: ManualClock, tmp_path: Path
) -> None:
    files = outgoing_series(node_scp, ["web"], slices=7)
    url = f"http://127.0.0.1:{dicomweb.http_port}/dicom-web"
    assert check(WebPeer(url)).words == f"{url}: answers"
    run_to_the_end(worker(node_scp, url, clock, instances_per_request=3), clock, node_scp)
    assert items(node_scp) == [("delivered", "0x0000")] * 7
    assert len(dicomweb.get("/instances")) == 7
    kept = set()
    for data in dicomweb.files().values():
        path = tmp_path / "kept.dcm"
        path.write_bytes(data)
        kept.add(data_set_bytes(path))
    assert kept == {data_set_bytes(path) for path in files}
