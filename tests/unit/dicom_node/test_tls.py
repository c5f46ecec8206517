"""TLS contexts, their renewal, and what a failed handshake is called."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from dicom_node.errors import ConfigurationError
from dicom_node.tls import (
    CIPHERS_TLS12,
    ServerCredentials,
    TLSFiles,
    certificate_names,
    client_context,
    expires,
    failure_words,
    server_context,
)
from tests.unit.dicom_node.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path)


@contextmanager
def agreed(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost"
) -> Generator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    """The server's and the client's end of a handshake that succeeds."""
    theirs, ours = _shake_hands(server, client, name)
    with theirs if isinstance(theirs, ssl.SSLSocket) else nullcontext():
        assert isinstance(ours, ssl.SSLSocket), ours
        with ours:
            assert isinstance(theirs, ssl.SSLSocket), theirs
            yield theirs, ours


def refused(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost"
) -> tuple[str, str]:
    """What the server and the client call a handshake that fails."""
    theirs, ours = _shake_hands(server, client, name)
    assert isinstance(ours, OSError)
    assert isinstance(theirs, OSError)
    return failure_words(theirs), failure_words(ours)


Outcome = ssl.SSLSocket | OSError


def _shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str
) -> tuple[Outcome, Outcome]:
    left, right = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(_wrapped, left, server, None)
        ours = _wrapped(right, client, name)
        theirs = serving.result(10)
    if isinstance(theirs, OSError) and isinstance(ours, ssl.SSLSocket):
        with ours:  # in TLS 1.3 a client hears of its refusal with the first octets
            try:
                ours.recv(1)
            except OSError as error:
                return theirs, error
    return theirs, ours


def _wrapped(end: socket.socket, context: ssl.SSLContext, name: str | None) -> Outcome:
    try:
        return context.wrap_socket(end, server_side=name is None, server_hostname=name)
    except OSError as error:
        end.close()
        return error


def test_both_sides_prove_who_they_are(authority: Authority) -> None:
    server = server_context(authority.issue("node", "localhost"), verify_peers=True)
    client = client_context(authority.issue("ct1", "ct1.example"))
    with agreed(server, client) as (theirs, ours):
        assert certificate_names(theirs.getpeercert()) == ("ct1.example",)
        assert ours.version() == "TLSv1.3"


def test_a_common_name_counts_where_there_are_no_dns_names(authority: Authority) -> None:
    server = server_context(authority.issue("node", "localhost"), verify_peers=True)
    client = client_context(authority.issue("old", common_name="MODALITY7"))
    with agreed(server, client) as (theirs, _ours):
        assert certificate_names(theirs.getpeercert()) == ("MODALITY7",)
    assert certificate_names(None) == certificate_names({}) == ()


def test_tls_1_2_is_spoken_with_suites_of_bcp_195_alone(authority: Authority) -> None:
    server = server_context(authority.issue("node", "localhost"), verify_peers=False)
    client = client_context(TLSFiles(ca=authority.folder / "ca.pem"))
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with agreed(server, client) as (_theirs, ours):
        cipher = ours.cipher()
        assert cipher is not None
        assert cipher[0] in CIPHERS_TLS12
    offered = {each["name"] for each in server.get_ciphers() if each["protocol"] == "TLSv1.2"}
    assert offered == set(CIPHERS_TLS12)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_1_1_is_refused_and_told_so(authority: Authority) -> None:
    server = server_context(authority.issue("node", "localhost"), verify_peers=False)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(authority.folder / "ca.pem")
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.minimum_version = ssl.TLSVersion.TLSv1_1
    client.maximum_version = ssl.TLSVersion.TLSv1_1
    theirs, ours = refused(server, client)
    assert theirs == "the other side offers no TLS 1.2 or 1.3"
    assert ours == "the other side takes no TLS 1.2 or 1.3"


def test_a_cipher_suite_without_forward_secrecy_is_refused(authority: Authority) -> None:
    server = server_context(authority.issue("node", "localhost"), verify_peers=False)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(authority.folder / "ca.pem")
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers("AES256-GCM-SHA384")
    theirs, ours = refused(server, client)
    assert "no cipher suite in common" in theirs
    assert "no cipher suite in common" in ours


def test_a_peer_without_a_certificate_is_refused_where_one_is_asked_for(
    authority: Authority,
) -> None:
    server = server_context(authority.issue("node", "localhost"), verify_peers=True)
    theirs, ours = refused(server, client_context(TLSFiles(ca=authority.folder / "ca.pem")))
    assert theirs == "the other side showed no certificate"
    assert ours == "the other side wants a certificate from us"


@pytest.mark.parametrize(
    ("days", "stranger", "words"),
    [(-1, False, "certificate has expired"), (30, True, "unable to get local issuer certificate")],
)
def test_a_certificate_that_proves_nothing_is_refused_with_the_reason(
    days: int, stranger: bool, words: str, authority: Authority, tmp_path: Path
) -> None:
    signer = Authority.make(tmp_path / "other", "Other CA") if stranger else authority
    files = signer.issue("ct1", "ct1.example", days=days)
    shown = TLSFiles(files.certificate, files.key, authority.folder / "ca.pem")
    server = server_context(authority.issue("node", "localhost"), verify_peers=True)
    assert words in refused(server, client_context(shown))[0]


def test_a_peer_that_is_not_who_we_called_is_refused(authority: Authority) -> None:
    server = server_context(authority.issue("node", "localhost"), verify_peers=False)
    client = client_context(TLSFiles(ca=authority.folder / "ca.pem"))
    assert "Hostname mismatch" in refused(server, client, "pacs.example")[1]


def test_a_new_certificate_is_loaded_when_its_file_changes(authority: Authority) -> None:
    files = authority.issue("node", "first.example")
    credentials = ServerCredentials(files, verify_peers=False)
    before = credentials.context
    assert not credentials.renew()
    assert credentials.context is before
    authority.issue("node", "second.example")
    assert credentials.renew()
    client = client_context(TLSFiles(ca=files.ca))
    with agreed(credentials.context, client, "second.example") as (_, ours):
        assert ours.version() == "TLSv1.3"


def test_a_bad_file_keeps_the_old_certificate_and_is_told_once(authority: Authority) -> None:
    files = authority.issue("node", "localhost")
    credentials = ServerCredentials(files, verify_peers=False)
    before = credentials.context
    assert files.certificate is not None
    files.certificate.write_text("half a certificate")
    with pytest.raises(ConfigurationError, match="not PEM"):
        credentials.renew()
    assert credentials.context is before
    assert not credentials.renew()


def test_a_file_that_cannot_be_used_is_named(authority: Authority, tmp_path: Path) -> None:
    files, other = authority.issue("node", "localhost"), authority.issue("other", "localhost")
    cases = [
        (TLSFiles(tmp_path / "none.pem", files.key), r"tls\.certificate: .*No such file"),
        (TLSFiles(files.certificate, other.key), "they do not belong together"),
        (TLSFiles(files.certificate, files.key, files.key), r"tls\.ca: .*no certificates"),
    ]
    for bad, words in cases:
        with pytest.raises(ConfigurationError, match=words):
            server_context(bad, verify_peers=False)


def test_an_encrypted_key_is_refused_and_nobody_is_asked(authority: Authority) -> None:
    files = authority.issue("node", "localhost")
    assert files.key is not None
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigurationError, match="the key is encrypted"):
        server_context(files, verify_peers=False)


def test_a_missing_file_is_a_change_too(authority: Authority) -> None:
    files = authority.issue("node", "localhost")
    credentials = ServerCredentials(files, verify_peers=False)
    assert files.key is not None
    os.rename(files.key, files.key.with_suffix(".away"))
    with pytest.raises(ConfigurationError, match=r"tls\.key"):
        credentials.renew()


@pytest.mark.parametrize("days", [10, -3])
def test_the_end_of_validity_is_read_of_good_and_of_expired_certificates(
    days: int, authority: Authority
) -> None:
    end = expires(authority.issue("node", "node.example", days=days))
    assert end == pytest.approx(time.time() + days * 86_400, abs=60)
