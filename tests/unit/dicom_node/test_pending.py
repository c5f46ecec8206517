"""One connection before its association: a state machine that never waits."""

from __future__ import annotations

import selectors
import socket
import ssl
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest

from dicom_node.pending import Over, Pending, Stage
from dicom_node.request import INVALID_PARAMETER, AssociateRequest
from dicom_node.tls import ServerCredentials, TLSFiles, client_context
from tests.unit.dicom_node.certificates import Authority
from tests.unit.dicom_node.sockets import until
from tests.unit.dicom_node.test_request import request_pdu

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Generator[Pair]:
    """The peer's end of a TCP connection, and ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname(), timeout=10)
        ours, _ = server.accept()
        with theirs, ours:
            yield theirs, ours


def pending_on(ours: socket.socket, credentials: ServerCredentials | None = None) -> Pending:
    address = ours.getpeername()
    return Pending.accepted(ours, address, credentials, artim_s=50.0, handshake_s=5.0)


def come(pending: Pending) -> AssociateRequest | Over:
    """What comes of what has been sent, once the kernel has brought it."""
    found = until(pending.advance)
    assert isinstance(found, AssociateRequest | Over)
    return found


def test_nothing_comes_before_the_last_octet_and_then_the_request(pair: Pair) -> None:
    theirs, ours = pair
    pending, pdu = pending_on(ours), request_pdu()
    for octet in pdu[:-1]:
        theirs.sendall(bytes((octet,)))
        assert pending.advance() is None
    theirs.sendall(pdu[-1:] + b"next")
    request = come(pending)
    assert isinstance(request, AssociateRequest)
    assert request.pdu == pdu
    who = pending.requestor(request)
    assert (who.calling_ae, who.address, who.certificate_names) == ("CT1", "127.0.0.1", None)
    ours.setblocking(True)
    assert ours.recv(10) == b"next"


@pytest.mark.parametrize("sent", [b"", b"\1", request_pdu()[:40]])
def test_a_peer_that_leaves_is_over_without_a_word(sent: bytes, pair: Pair) -> None:
    theirs, ours = pair
    pending = pending_on(ours)
    theirs.sendall(sent)
    theirs.close()
    assert come(pending) == Over()


def test_a_malformed_request_is_over_with_the_reason_of_an_abort(pair: Pair) -> None:
    theirs, ours = pair
    pending, pdu = pending_on(ours), request_pdu()
    theirs.sendall(pdu[:-5] + b"\3" + pdu[-4:])
    over = come(pending)
    assert isinstance(over, Over)
    assert over.abort == INVALID_PARAMETER
    assert "malformed" in over.why
    assert not over.authentication


def test_after_the_last_word_what_the_peer_sends_is_thrown_away_until_it_leaves(
    pair: Pair,
) -> None:
    theirs, ours = pair
    pending = pending_on(ours)
    pending.answer(b"last", 2.0)
    assert pending.stage is Stage.CLOSING
    assert theirs.recv(10) == b"last"
    theirs.sendall(request_pdu())
    assert pending.advance() is None
    theirs.close()
    assert come(pending) == Over()


def test_a_peer_that_goes_on_sending_after_the_last_word_is_over(pair: Pair) -> None:
    theirs, ours = pair
    pending = pending_on(ours)
    pending.answer(b"last", 2.0)
    theirs.settimeout(0)
    over = None
    while over is None:
        with suppress(BlockingIOError):
            theirs.send(bytes(1 << 16))
        over = pending.advance()
    assert over == Over()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path)


def credentials_of(files: TLSFiles) -> ServerCredentials:
    return ServerCredentials(files, verify_peers=True)


def shake_hands(theirs: socket.socket, pending: Pending, files: TLSFiles) -> ssl.SSLSocket:
    """Both sides in turn; neither blocks."""
    theirs.setblocking(False)
    client = client_context(files).wrap_socket(
        theirs, server_hostname="localhost", do_handshake_on_connect=False
    )
    while pending.stage is Stage.HANDSHAKE:
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
        assert pending.advance() is None
        assert pending.events in (selectors.EVENT_READ, selectors.EVENT_WRITE)
    return client


def test_the_request_gets_a_time_of_its_own_once_tls_stands_and_the_certificate_is_known(
    pair: Pair, authority: Authority
) -> None:
    theirs, ours = pair
    pending = pending_on(ours, credentials_of(authority.issue("node", "localhost")))
    handshake = pending.deadline
    with shake_hands(theirs, pending, authority.issue("ct1", "ct1.example")) as client:
        assert pending.stage is Stage.REQUEST
        assert pending.deadline > handshake + 40
        client.sendall(request_pdu())
        request = come(pending)
        assert isinstance(request, AssociateRequest)
        assert pending.requestor(request).certificate_names == ("ct1.example",)
    pending.socket.close()


def test_a_peer_that_speaks_no_tls_is_over_in_words_and_not_authenticated(
    pair: Pair, authority: Authority
) -> None:
    theirs, ours = pair
    pending = pending_on(ours, credentials_of(authority.issue("node", "localhost")))
    theirs.sendall(request_pdu())
    over = come(pending)
    assert isinstance(over, Over)
    assert over.authentication
    assert over.why.startswith("TLS: ")
    pending.socket.close()
