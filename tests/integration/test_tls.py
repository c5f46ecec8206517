"""DICOM over TLS in both roles, with DCMTK and with our own requestor as peers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dicom_node.association import Peer
from dicom_node.settings import Destination
from dicom_node.storage_scu import echo, send_files
from dicom_node.tls import TLSFiles
from tests.integration.peers import (
    STORESCU,
    Node,
    ct_slice,
    listens,
    reserve_port,
    run_sender,
    running,
    until,
    write,
)
from tests.unit.dicom_node.certificates import Authority

ECHOSCU, STORESCP = "/usr/bin/echoscu", "/usr/bin/storescp"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "tls")


@pytest.fixture
def secure(authority: Authority, start_node: Callable[..., Node]) -> Callable[..., Node]:
    """Start a node with a TLS port beside its plain one; changes are of ``[tls]`` and others."""

    def start(tls: dict[str, Any] | None = None, **changes: Any) -> Node:
        files = authority.issue("node", "localhost")
        given = {
            "port": reserve_port(),
            "certificate": files.certificate,
            "key": files.key,
            "ca": files.ca,
        }
        return start_node(tls={**given, **(tls or {})}, **changes)

    return start


def tls_port(node: Node) -> int:
    """The TLS port of a node that listens on both."""
    return node.scp.addresses[-1][1]


def peer(node: Node, files: TLSFiles, calling: str = "CT1", **limits: Any) -> Peer:
    """The node's TLS port as a sender with these files configures it."""
    return Peer("DIFFCODE", "127.0.0.1", tls_port(node), calling, tls=files, **limits)


def dcmtk_tls(files: TLSFiles) -> list[str]:
    return ["+tls", str(files.key), str(files.certificate), "+cf", str(files.ca)]


@pytest.mark.dcmtk
@pytest.mark.parametrize("profile", ["+py", "+px", "+pz"])
def test_storescu_stores_over_mutual_tls_in_each_of_its_bcp_195_profiles(
    profile: str, secure: Callable[..., Node], authority: Authority, tmp_path: Path
) -> None:
    node = secure()
    files = authority.issue("ct1", "ct1.example")
    path = write(ct_slice(1), tmp_path / "1.dcm")
    where = ["-aec", "DIFFCODE", "localhost", str(tls_port(node))]
    run_sender([STORESCU, profile, *dcmtk_tls(files), *where, path])
    assert [row["state"] for row in node.instances()] == ["received"]


@pytest.mark.dcmtk
def test_the_plain_port_stays_beside_the_tls_port(
    secure: Callable[..., Node], tmp_path: Path
) -> None:
    node = secure()
    run_sender([ECHOSCU, "-aec", "DIFFCODE", "127.0.0.1", str(node.port)])


def test_the_plain_port_can_be_closed(secure: Callable[..., Node], authority: Authority) -> None:
    node = secure({"only": True})
    assert len(node.scp.addresses) == 1
    assert not listens(node.settings.node.port)
    assert echo(peer(node, authority.issue("ct1", "ct1.example"))).ok


def test_our_own_sender_stores_over_mutual_tls(
    secure: Callable[..., Node], authority: Authority, tmp_path: Path
) -> None:
    node = secure()
    paths = [write(ct_slice(number), tmp_path / f"{number}.dcm") for number in (1, 2, 3)]
    report = send_files(paths, peer(node, authority.issue("ct1", "ct1.example")))
    assert report.ok
    assert len(node.instances()) == 3


@pytest.mark.dcmtk
def test_our_own_sender_stores_with_dcmtk_over_mutual_tls(
    authority: Authority, tmp_path: Path
) -> None:
    archive, ours = authority.issue("pacs", "localhost"), authority.issue("node", "node.example")
    folder, port = tmp_path / "kept", reserve_port()
    folder.mkdir()
    command = [STORESCP, *dcmtk_tls(archive), "-od", folder, str(port)]
    with running(command, tmp_path / "storescp.log"):
        until(lambda: listens(port), "storescp listens")
        to = Peer("ANY", "localhost", port, "DIFFCODE", tls=ours)
        assert send_files([write(ct_slice(1), tmp_path / "1.dcm")], to).ok
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no certificate", "the other side wants a certificate from us"),
        ("stranger", "the other side does not know the authority of our certificate"),
        ("expired", "the other side says that our certificate has expired"),
        ("wrong name", "the certificate of the other side is not accepted: Hostname mismatch"),
        ("unknown authority", "the certificate of the other side is not accepted: self-signed"),
        ("plain port", "the other side did not speak TLS"),
    ],
)
def test_echo_says_in_words_why_tls_failed(
    fault: str,
    words: str,
    secure: Callable[..., Node],
    authority: Authority,
    tmp_path: Path,
) -> None:
    node = secure()
    good = authority.issue("ct1", "ct1.example")
    other = Authority.make(tmp_path / "other", "Other CA")
    stranger = other.issue("ct1", "ct1.example")
    peers = {
        "no certificate": peer(node, TLSFiles(ca=good.ca)),
        "stranger": peer(node, replace(stranger, ca=good.ca)),
        "expired": peer(node, authority.issue("late", "ct1.example", days=-1)),
        "wrong name": replace(peer(node, good), server_name="pacs.example"),
        "unknown authority": peer(node, replace(good, ca=stranger.ca)),
        "plain port": replace(peer(node, good), port=node.port),
    }
    answer = echo(peers[fault])
    assert not answer.ok
    assert "TLS" in answer.words
    assert words in answer.words


def test_a_destination_with_tls_takes_the_files_of_the_tls_table(
    secure: Callable[..., Node], authority: Authority
) -> None:
    node = secure()
    to = Destination(ae_title="DIFFCODE", host="localhost", port=tls_port(node), tls=True)
    assert echo(Peer.of(to, node.settings)).ok


def test_a_rule_lets_in_by_the_name_that_the_certificate_proves(
    secure: Callable[..., Node], authority: Authority
) -> None:
    allow = [{"calling_ae": "CT1", "certificate": "ct1.example"}]
    node = secure(association={"allow": allow})
    assert echo(peer(node, authority.issue("ct1", "ct1.example"))).ok
    assert not echo(peer(node, authority.issue("ct2", "ct2.example"))).ok
    assert "rejected permanently" in echo(node.peer("CT1")).words  # without TLS


def test_a_new_certificate_is_shown_without_a_restart(
    secure: Callable[..., Node], authority: Authority
) -> None:
    node = secure()
    files = authority.issue("ct1", "ct1.example")
    renewed = replace(peer(node, files), server_name="renewed.example")
    assert "Hostname mismatch" in echo(renewed).words
    authority.issue("node", "renewed.example")
    node.scp.renew_certificates()
    assert echo(renewed).ok


@contextmanager
def silent(port: int, count: int) -> Generator[list[socket.socket]]:
    """Connections that say nothing for as long as the block lasts."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(count)
        ]


def still_open(connections: list[socket.socket]) -> int:
    """How many of them the other side has not closed."""
    count = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            count += bool(connection.recv(1))
        except BlockingIOError:
            count += 1
    return count


def test_an_echo_is_quick_while_thirty_silent_peers_hold_each_port(
    secure: Callable[..., Node], authority: Authority
) -> None:
    # Longer than a slow machine needs for the test: the peers are to hold their connections.
    node = secure({"handshake_timeout_s": 100.0}, association={"acse_timeout_s": 100.0})
    files = authority.issue("ct1", "ct1.example")
    with silent(node.port, 30) as plain, silent(tls_port(node), 30) as waiting:
        for to in (node.peer("CT1"), peer(node, files)):
            # The best of ten: a peer that holds up others holds up each of them, a busy machine
            # only some.
            assert min(_seconds(to) for _ in range(10)) < 0.2
        # Only then does the figure say what it should: they did hold their connections.
        assert still_open(plain) == still_open(waiting) == 30


def _seconds(to: Peer) -> float:
    begun = time.monotonic()
    assert echo(to).ok
    return time.monotonic() - begun


def test_a_client_that_never_says_hello_is_closed_in_time(secure: Callable[..., Node]) -> None:
    node = secure({"handshake_timeout_s": 0.1})
    with silent(tls_port(node), 1) as (connection,):
        connection.settimeout(10)
        assert connection.recv(1) == b""


def test_plain_dicom_and_http_on_the_tls_port_are_turned_away(
    secure: Callable[..., Node], authority: Authority
) -> None:
    node = secure()
    plain = replace(node.peer("CT1"), port=tls_port(node))
    assert not echo(plain).ok
    with socket.create_connection(("127.0.0.1", tls_port(node)), timeout=10) as web:
        web.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with_reset = _read_to_end(web)
        assert b"HTTP" not in with_reset
    assert echo(peer(node, authority.issue("ct1", "ct1.example"))).ok


def _read_to_end(connection: socket.socket) -> bytes:
    octets = b""
    try:
        while piece := connection.recv(4096):
            octets += piece
    except ConnectionError:
        pass
    return octets
