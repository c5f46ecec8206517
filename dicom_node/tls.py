"""TLS contexts for both roles, their renewal while running, and TLS failures in words.

The profile is PS3.15 B.12 (BCP 195: RFC 8996 and RFC 9325): TLS 1.2 and 1.3 alone, and for TLS 1.2
only suites with forward secrecy and authenticated encryption (RFC 9325 4.2).
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dicom_node.errors import ConfigurationError
from dicom_node.settings import TLSSettings

# RFC 9325 4.2: ECDHE with AES-GCM; ChaCha20-Poly1305 for machines without AES instructions.
CIPHERS_TLS12 = (
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
)

_WORDS = {
    "WRONG_VERSION_NUMBER": "the other side did not speak TLS",
    "HTTP_REQUEST": "the other side spoke HTTP",
    "UNSUPPORTED_PROTOCOL": "the other side offers no TLS 1.2 or 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the other side takes no TLS 1.2 or 1.3",
    "NO_SHARED_CIPHER": "no cipher suite in common (ours are those of BCP 195)",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the other side found no cipher suite in common,"
    " or wants a certificate from us",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side showed no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the other side wants a certificate from us",
    "TLSV1_ALERT_UNKNOWN_CA": "the other side does not know the authority of our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the other side refuses our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the other side refuses our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the other side says that our certificate has expired",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "the other side cannot use our certificate",
}


@dataclass(frozen=True)
class TLSFiles:
    """PEM files: our certificate chain and its key, and the authorities that peers stand under."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @classmethod
    def of(cls, settings: TLSSettings) -> TLSFiles:
        """The files that ``[tls]`` names."""
        return cls(settings.certificate, settings.key, settings.ca)

    def stamps(self) -> tuple[tuple[int, int] | None, ...]:
        """What changes when a file is replaced or written: inode and time, None where missing."""
        return tuple(map(_stamp, (self.certificate, self.key, self.ca)))


def _stamp(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns) if status is not None else None


def server_context(files: TLSFiles, *, verify_peers: bool) -> ssl.SSLContext:
    """The context of the listener; ConfigurationError where a file cannot be used."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, files)
    context.verify_mode = ssl.CERT_REQUIRED if verify_peers else ssl.CERT_NONE
    # A ticket is a session without a handshake; our associations are long and few.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    return context


def client_context(files: TLSFiles) -> ssl.SSLContext:
    """The context for calling a peer, whose name is checked; ConfigurationError as above."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, files)


def _context(protocol: int, files: TLSFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(":".join(CIPHERS_TLS12))
    context.options |= ssl.OP_NO_COMPRESSION
    if files.certificate is not None and files.key is not None:
        _load_chain(context, files.certificate, files.key)
    if files.ca is not None:
        _load_authorities(context, files.ca)
    return context


def _load_chain(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    def no_password() -> str:
        raise ValueError("the key is encrypted")

    for name, path in (("certificate", certificate), ("key", key)):
        _readable(name, path)
    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ValueError as error:
        raise ConfigurationError([f"tls.key: {key}: {error}"]) from None
    except ssl.SSLError as error:
        why = "they do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "not PEM"
        raise ConfigurationError(
            [f"tls.certificate, tls.key: {certificate}, {key}: {why}"]
        ) from None


def _load_authorities(context: ssl.SSLContext, ca: Path) -> None:
    _readable("ca", ca)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError:
        raise ConfigurationError([f"tls.ca: {ca}: no certificates in PEM"]) from None


def _readable(name: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigurationError([f"tls.{name}: {path}: {error.strerror}"]) from None


class ServerCredentials:
    """The listener's context, made anew when its files change; a bad file keeps the old one.

    Connections that stand keep what they were made with.
    """

    def __init__(self, files: TLSFiles, *, verify_peers: bool) -> None:
        """Load the files; ConfigurationError where one cannot be used."""
        self._files = files
        self._verify_peers = verify_peers
        self._lock = threading.Lock()
        self._stamps = files.stamps()
        self._context = server_context(files, verify_peers=verify_peers)

    @property
    def context(self) -> ssl.SSLContext:
        """The context for the next handshake."""
        return self._context

    def renew(self, *, force: bool = False) -> bool:
        """Load the files again where they have changed, or in any case.

        Returns whether they were loaded; ConfigurationError where they cannot be, once for each
        change, and the old context stays in force.
        """
        with self._lock:
            stamps = self._files.stamps()
            if stamps == self._stamps and not force:
                return False
            self._stamps = stamps
            self._context = server_context(self._files, verify_peers=self._verify_peers)
        return True


def certificate_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The DNS names of a verified certificate, or its common names where it has none.

    *certificate* is the mapping of ``SSLSocket.getpeercert()``.  RFC 9525 6.3: the common name
    counts only in the absence of DNS names.
    """
    if not certificate:
        return ()
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    return tuple(names) or tuple(_common_names(certificate.get("subject", ())))


def _common_names(subject: Iterable[Iterable[tuple[str, str]]]) -> list[str]:
    return [value for part in subject for key, value in part if key == "commonName"]


def expires(files: TLSFiles) -> float:
    """When our own certificate ceases to be valid, in seconds since 1970.

    Raises ConfigurationError where the files cannot be used.
    """
    # The standard library reads a certificate only as that of the other side of a handshake.
    assert files.certificate is not None
    server = server_context(replace(files, ca=None), verify_peers=False)
    client = client_context(TLSFiles(ca=files.certificate))
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    shown = _handshake_with_ourselves(server, client) or {}
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


# X509_V_FLAG_NO_CHECK_TIME of OpenSSL: an expired certificate has an end of validity too.
_NO_CHECK_TIME = 0x200000


def _handshake_with_ourselves(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> Mapping[str, Any] | None:
    """What a client reads of the server's certificate, without a network."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    for _ in range(4):  # flights of a handshake
        for side in (theirs, ours):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return theirs.getpeercert()


def failure_words(error: BaseException) -> str:
    """A failed handshake as a person would say it; no bytes of the peer are quoted."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of the other side is not accepted: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "the TLS handshake did not end in time"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError):
        return "the other side closed the connection within the TLS handshake"
    if isinstance(error, ssl.SSLError) and error.reason:
        return _WORDS.get(error.reason, error.reason.replace("_", " ").lower())
    return "the TLS handshake failed"
