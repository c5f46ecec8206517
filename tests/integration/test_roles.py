"""The services of the roles, built as `serve` builds them, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from dicom_node.audit_trail import AuditTrail
from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.errors import ConfigurationError
from dicom_node.ledger import reports
from dicom_node.settings import NodeSettings
from dicom_node.storage_scu import echo, send_files
from dicom_node.supervisor.process import Signals
from dicom_node.supervisor.roles import DeliverService, ReceiveService, build_service
from tests.factories import make_series, write_series
from tests.integration.peers import Archive, Peer, outgoing_series, reserve_port, serving, until
from tests.unit.dicom_node.audit_journal import audit_events
from tests.unit.dicom_node.certificates import Authority


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., NodeSettings]:
    (tmp_path / "routes.toml").write_text(DEFAULT_ROUTES)

    def make(**sections: Any) -> NodeSettings:
        usual = {
            "routes": tmp_path / "routes.toml",
            "node": {"port": reserve_port(), "data_dir": tmp_path},
            "spool": {"path": tmp_path / "spool", "min_free_bytes": 0, "min_free_percent": 0},
            "ledger": {"url": f"sqlite:///{tmp_path / 'ledger.sqlite'}"},
            "assembly": {"quiet_s": 0.1},
            "audit": {"journal": tmp_path / "audit.log"},
        }
        return NodeSettings.model_validate({**usual, **sections})

    return make


@pytest.fixture
def receive(settings: Callable[..., NodeSettings]) -> Generator[ReceiveService]:
    given = settings()
    trail = AuditTrail(given)
    service = ReceiveService(given, trail)
    yield service
    service.close()
    trail.close()


def concluded(service: ReceiveService, series_uid: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        service.turn(time.time())
        listed = reports.series(service._ledger)
        found = [s for s in listed if s["series_instance_uid"] == series_uid]
        return found[0] if found and found[0]["state"] != "receiving" else None

    result: dict[str, Any] = until(look, "the series is concluded")
    return result


def send(service: ReceiveService, folder: Path, name: str) -> str:
    sent = make_series("CT", slices=2, rows=16, series=name)
    report = send_files(
        write_series(sent, folder / name),
        Peer("DIFFCODE", "127.0.0.1", service._settings.node.port, "TESTER"),
    )
    assert report.ok, report
    return str(sent[0].SeriesInstanceUID)


def test_what_is_sent_to_the_receive_role_becomes_a_job(
    receive: ReceiveService, tmp_path: Path
) -> None:
    uid = send(receive, tmp_path, "one")
    assert concluded(receive, uid)["state"] == "complete"
    assert [job["series_instance_uid"] for job in reports.jobs(receive._ledger)] == [uid]


def test_routes_are_read_again_and_a_bad_table_keeps_the_old(
    receive: ReceiveService, tmp_path: Path
) -> None:
    (tmp_path / "routes.toml").write_text("[[route]]\n")
    receive.reload()
    assert concluded(receive, send(receive, tmp_path, "bad"))["state"] == "complete"
    (tmp_path / "routes.toml").write_text(
        '[[route]]\nname = "none"\ntask = "ignore"\nreason = "closed"\n'
    )
    receive.reload()
    found = concluded(receive, send(receive, tmp_path, "new"))
    assert (found["state"], found["reason"]) == ("ignored", "closed")


def states(node: Any) -> list[str]:
    """Of every delivery in the ledger."""
    return [each["state"] for each in reports.deliveries(node.ledger)]


def test_the_deliver_role_empties_the_outbox(
    start_node: Callable[..., Any],
) -> None:
    with serving(Archive()) as archive:
        to = {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}
        node = start_node(destinations={"pacs": to})
        outgoing_series(node, ["pacs"], slices=3)
        trail, signals = AuditTrail(node.settings), Signals()
        service = DeliverService(node.settings, signals.stop, trail)
        try:
            until(lambda: states(node) == ["delivered"], "the delivery")
        finally:
            signals.stop.set()
            service.close()
            trail.close()
        assert len(archive.stored) == 3
    events = [name for name, _ in audit_events(node.settings.audit.journal)]
    assert events == ["Begin Transferring DICOM Instances", "DICOM Instances Transferred"]


def test_a_role_that_cannot_start_says_which_setting_is_wrong(
    settings: Callable[..., NodeSettings],
) -> None:
    given = settings(engine={"bundle": "no-such-bundle"})
    with pytest.raises(ConfigurationError, match="no-such-bundle"):
        build_service("restore", given, Signals(), AuditTrail(given))


@pytest.mark.parametrize("told", ["by SIGHUP", "by the file"])
def test_the_receive_role_shows_a_new_certificate_without_a_restart(
    told: str, settings: Callable[..., NodeSettings], tmp_path: Path
) -> None:
    authority = Authority.make(tmp_path / "tls")
    files = authority.issue("node", "first.example")
    tls = {"port": reserve_port(), "ca": files.ca, "certificate": files.certificate}
    given = settings(tls={**tls, "key": files.key}, janitor={"interval_s": 0.001})
    trail = AuditTrail(given)
    service = ReceiveService(given, trail)
    try:
        port = given.tls.port
        assert port is not None
        to = Peer("DIFFCODE", "127.0.0.1", port, "T", tls=files, server_name="second.example")
        assert "Hostname mismatch" in echo(to).words
        authority.issue("node", "second.example")
        if told == "by SIGHUP":
            service.reload()
        else:
            service.turn(time.time())
        assert echo(to).ok
    finally:
        service.close()
        trail.close()
