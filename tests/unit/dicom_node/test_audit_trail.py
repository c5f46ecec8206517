"""The journal, the syslog server, and what happens when either is slow, dead or full."""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dicom_node import audit
from dicom_node.audit import RemoteNode, Source, Study
from dicom_node.audit_trail import DROPPED, AuditTrail, last_alerts, syslog_line
from dicom_node.settings import NodeSettings
from dicom_node.tls import server_context
from tests.unit.dicom_node.audit_journal import audit_events, parsed
from tests.unit.dicom_node.certificates import Authority
from tests.unit.dicom_node.sockets import until

START = audit.application_activity("DIFFCODE", 1.0, started=True)
PEER = RemoteNode("CT9", "10.9.9.9")


def refusal(why: str, at: float = 2.0) -> audit.Message:
    return audit.node_refused("DIFFCODE", PEER, why, at, authentication=True)


@pytest.fixture
def make_trail(tmp_path: Path) -> Generator[Callable[..., AuditTrail]]:
    made: list[AuditTrail] = []

    def make(tls: dict[str, Any] | None = None, **given: Any) -> AuditTrail:
        settings = {"audit": {"journal": tmp_path / "audit.log", **given}, "tls": tls or {}}
        made.append(AuditTrail(NodeSettings.model_validate(settings)))
        return made[-1]

    yield make
    for trail in made:
        trail.close()


def dropped(sink: str) -> float:
    return DROPPED.labels(sink=sink)._value.get()


def test_a_line_is_what_rfc_5424_asks_for() -> None:
    line = syslog_line(START, Source("s"), host="node 1", process=42)
    head, mark, xml = line.partition(b"\xef\xbb\xbf")
    assert mark
    # PRI = facility 10 × 8 + severity 5; version 1; no structured data.
    assert re.fullmatch(
        rb"<85>1 1970-01-01T00:00:01\.000\+00:00 node\?1 dicom-node 42 DICOM\+RFC3881 - ", head
    )
    parsed(xml)


def test_the_journal_is_for_the_nodes_account_alone(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    journal = tmp_path / "audit.log"
    journal.touch(mode=0o644)
    make_trail().write(START, refusal("x"))
    assert journal.stat().st_mode & 0o777 == 0o600
    assert audit_events(journal) == [("Application Activity", "0"), ("Security Alert", "8")]


def test_a_message_is_in_the_journal_when_write_returns_and_soon_when_posted(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    trail = make_trail()
    trail.write(START)
    assert len(audit_events(tmp_path / "audit.log")) == 1
    trail.post(refusal("x"))
    until(lambda: len(audit_events(tmp_path / "audit.log")) == 2)


def test_closing_writes_what_was_posted(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    trail = make_trail()
    for number in range(50):
        trail.post(refusal(str(number)))
    trail.close()
    assert len(audit_events(tmp_path / "audit.log")) == 50


def test_a_journal_that_was_moved_away_is_begun_anew(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    trail = make_trail()
    trail.write(START)
    os.rename(tmp_path / "audit.log", tmp_path / "audit.log.1")
    trail.write(START)
    assert len(audit_events(tmp_path / "audit.log.1")) == 1
    assert len(audit_events(tmp_path / "audit.log")) == 1


def test_lines_of_several_writers_stay_whole(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    trails = [make_trail(), make_trail()]

    def write(trail: AuditTrail) -> None:
        for number in range(20):
            trail.write(refusal(str(number) * 500))

    threads = [threading.Thread(target=write, args=(trail,)) for trail in trails]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(audit_events(tmp_path / "audit.log")) == 40


def test_a_journal_that_cannot_be_written_is_counted_and_stops_nobody(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    before = dropped("journal")
    make_trail(journal=tmp_path / "no" / "such" / "audit.log").write(START)
    assert dropped("journal") == before + 1


@pytest.fixture
def udp_server() -> Generator[socket.socket]:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        yield server


def test_a_udp_server_gets_each_message_in_a_datagram(
    make_trail: Callable[..., AuditTrail], udp_server: socket.socket
) -> None:
    trail = make_trail(syslog=f"udp://127.0.0.1:{udp_server.getsockname()[1]}")
    trail.write(START, refusal("x"))
    received = [udp_server.recv(65535) for _ in range(2)]
    for datagram in received:
        assert datagram.startswith(b"<85>1 ")
        parsed(datagram.partition(b"\xef\xbb\xbf")[2])


def test_a_tls_server_gets_messages_with_their_length_before_them(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    authority = Authority.make(tmp_path / "tls")
    files = authority.issue("server", "localhost")
    context = server_context(files, verify_peers=False)
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        trail = make_trail(
            tls={"ca": files.ca}, syslog=f"tls://127.0.0.1:{listening.getsockname()[1]}"
        )
        trail.write(START, refusal("x"))
        plain, _ = listening.accept()
        with context.wrap_socket(plain, server_side=True) as secure:
            messages = [_counted(secure) for _ in range(2)]
    for message in messages:
        parsed(message.partition(b"\xef\xbb\xbf")[2])


def _counted(connection: ssl.SSLSocket) -> bytes:
    """RFC 5425 4.3: MSG-LEN, a space, and as many octets."""
    length = b""
    while (octet := connection.recv(1)) != b" ":
        length += octet
    message = b""
    while len(message) < int(length):
        message += connection.recv(int(length) - len(message))
    return message


def test_a_server_that_takes_nothing_holds_up_nobody_and_drops_are_counted(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    authority = Authority.make(tmp_path / "tls")
    before = dropped("syslog")
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        # It accepts connections and never speaks: the handshake hangs.
        where = f"tls://127.0.0.1:{silent.getsockname()[1]}"
        trail = make_trail(tls={"ca": authority.folder / "ca.pem"}, syslog=where, queue=5)
        for number in range(20):
            trail.write(refusal(str(number)))
        assert len(audit_events(tmp_path / "audit.log")) == 20
        assert dropped("syslog") - before >= 20 - 5 - 1


def test_the_last_refusals_are_read_again_newest_first_and_nothing_else(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    trail = make_trail()
    study = Study("1.2.3", "PID-1", "Doe^Jane", {"1.2": 1})
    trail.write(
        refusal("first", 1.0),
        audit.instances_received("DIFFCODE", PEER, study, 2.0),
        refusal("second", 3.0),
    )
    with (tmp_path / "audit.log").open("ab") as stream:
        stream.write(b"<85>1 cut by a full disk")
    alerts = last_alerts(tmp_path / "audit.log")
    assert [alert.why for alert in alerts] == ["second", "first"]
    assert (alerts[0].peer, alerts[0].address) == ("CT9", "10.9.9.9")
    assert alerts[0].at == "1970-01-01T00:00:03.000+00:00"
    assert "Doe" not in repr(alerts)
    assert len(last_alerts(tmp_path / "audit.log", 1)) == 1


def test_a_long_journal_is_read_from_its_end(
    make_trail: Callable[..., AuditTrail], tmp_path: Path
) -> None:
    journal = tmp_path / "audit.log"
    journal.write_bytes(b"x" * (3 << 20) + b"\n")
    make_trail().write(refusal("late"))
    assert [alert.why for alert in last_alerts(journal)] == ["late"]
