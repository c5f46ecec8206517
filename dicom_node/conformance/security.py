"""Security: TLS profile, who may associate, the audit trail, and what is never logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dicom_node import audit, tls
from dicom_node.conformance.markdown import table, yes
from dicom_node.settings import NodeSettings

__all__ = ["sections"]

# Each kind of message: its event, and the function that makes it and says when.
_MESSAGES = (
    (audit.APPLICATION_ACTIVITY, audit.application_activity),
    (audit.BEGIN_TRANSFERRING, audit.begin_transferring),
    (audit.INSTANCES_TRANSFERRED, audit.instances_sent),
    (audit.INSTANCES_TRANSFERRED, audit.instances_received),
    (audit.SECURITY_ALERT, audit.node_refused),
)


def sections(settings: NodeSettings) -> Iterator[str]:
    """The chapter on security."""
    yield "## 6 Security"
    yield from _transport(settings)
    yield from _audit(settings)
    yield "### 6.3 Associations and applications"
    yield (
        "Access is by called and calling AE title, address and certificate: see 3.3. The node has"
        " no users; its configuration and its data are guarded by the permissions of its files."
    )
    yield "### 6.4 Confidentiality"
    yield (
        "Received and restored instances lie in the spool as they are, patient's attributes"
        " included, and so does the audit trail. Logs, errors and metrics name instances by UID"
        " and never by patient. The node removes no identification (PS3.15 E): what it is sent"
        " identified it sends on identified."
    )


def _transport(settings: NodeSettings) -> Iterator[str]:
    given = settings.tls
    yield "### 6.1 Secure transport"
    yield (
        "DICOM over TLS by the BCP 195 profile (PS3.15 B.12): TLS 1.2 and 1.3. Older versions,"
        " compression and renegotiation are not offered."
    )
    listens = f"port {given.port}" if given.port is not None else "no"
    clients = [name for name, each in settings.destinations.items() if each.tls]
    yield table(
        ["", "Value"],
        [
            ["Listens with TLS", listens],
            ["Listens without TLS", yes(not given.only)],
            ["Peers that call must show a certificate", yes(given.verify_peers)],
            ["Destinations called with TLS", ", ".join(clients) or "none"],
            ["Longest handshake, s", f"{given.handshake_timeout_s:g}"],
        ],
    )
    yield "Cipher suites of TLS 1.2, in order; TLS 1.3 has its own three:"
    yield table(["Suite (OpenSSL's name)"], [[suite] for suite in tls.CIPHERS_TLS12])


def _audit(settings: NodeSettings) -> Iterator[str]:
    given = settings.audit
    yield "### 6.2 Audit trail"
    yield (
        "Messages of the Basic Application Level Confidentiality audit trail (PS3.15 A.5) go to a"
        " local journal"
        + (f" and by syslog to `{given.syslog}`" if given.syslog else "")
        + "; RFC 5424 messages over UDP (RFC 5426) or TLS (RFC 5425)."
    )
    yield table(
        ["Event ID", "Meaning", "When (PS3.15 A.5.3)"],
        [
            [f"{event.value}, {event.scheme}", event.meaning, _said(make)]
            for event, make in _MESSAGES
        ],
    )
    yield table(
        ["", "Value"],
        [
            ["Audit Source ID", given.source_id or settings.node.ae_title],
            ["Audit Enterprise Site ID", given.enterprise_site_id or "not sent"],
            ["Audit repository", given.syslog or "none"],
        ],
    )


def _said(make: Callable[..., object]) -> str:
    return (make.__doc__ or "").partition("\n")[0].rstrip(".")
