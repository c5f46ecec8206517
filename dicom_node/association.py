"""Associations in both roles: what we accept and propose, whom we let in, whom we call.

One table of SOP Classes and transfer syntaxes serves the SCP (:func:`contexts_scp`), the SCU
(:func:`contexts_for`) and the conformance statement.  :func:`admit` is the access policy, a pure
function.  Opening an association as SCU is :mod:`dicom_node.requestor`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import pydicom.config
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AllStoragePresentationContexts, _config, build_context
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.presentation import PresentationContext

from dicom_node.settings import Destination, NodeSettings

# Fixed, and free of version numbers: both stand in the file meta information of every received
# instance, and the same instance received by two releases must give the same bytes.
IMPLEMENTATION_CLASS_UID = "2.25.70555003233093753737909946653342864644"
IMPLEMENTATION_VERSION_NAME = "DIFFCODE_NODE"

VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"

# PS3.7 D.3.3.1: 0 or a very large PDU is slower than 128 KiB, the receiver allocates each one.
MAX_PDU = 131_072
# PS3.8 9.3.2.2: context identifiers are the odd numbers 1 to 255.
MAX_CONTEXTS = 128

STORAGE_CLASSES: tuple[str, ...] = tuple(
    str(context.abstract_syntax) for context in AllStoragePresentationContexts
)


@dataclass(frozen=True)
class TransferSyntax:
    """One row of the transfer syntax table; *lossy* ones are accepted on request only."""

    uid: str
    name: str
    lossy: bool = False


# In the acceptor's order of preference: where a peer offers several in one context, the first
# that it offers is taken, so uncompressed little endian wins and a lossy form comes last.
TRANSFER_SYNTAXES: tuple[TransferSyntax, ...] = (
    TransferSyntax(ExplicitVRLittleEndian, "Explicit VR Little Endian"),
    TransferSyntax(ImplicitVRLittleEndian, "Implicit VR Little Endian"),
    TransferSyntax(DeflatedExplicitVRLittleEndian, "Deflated Explicit VR Little Endian"),
    TransferSyntax(ExplicitVRBigEndian, "Explicit VR Big Endian"),
    TransferSyntax(JPEGLSLossless, "JPEG-LS Lossless"),
    TransferSyntax(JPEG2000Lossless, "JPEG 2000 (Lossless Only)"),
    TransferSyntax(HTJ2KLossless, "High-Throughput JPEG 2000 (Lossless Only)"),
    TransferSyntax(HTJ2KLosslessRPCL, "High-Throughput JPEG 2000 RPCL (Lossless Only)"),
    TransferSyntax(JPEGLosslessSV1, "JPEG Lossless, Process 14 Selection Value 1"),
    TransferSyntax(JPEGLossless, "JPEG Lossless, Process 14"),
    TransferSyntax(RLELossless, "RLE Lossless"),
    TransferSyntax(JPEG2000, "JPEG 2000", lossy=True),
    TransferSyntax(HTJ2K, "High-Throughput JPEG 2000", lossy=True),
    TransferSyntax(JPEGLSNearLossless, "JPEG-LS Near-Lossless", lossy=True),
    TransferSyntax(JPEGBaseline8Bit, "JPEG Baseline (Process 1)", lossy=True),
    TransferSyntax(JPEGExtended12Bit, "JPEG Extended (Processes 2 and 4)", lossy=True),
)

EventHandler = tuple[Any, Callable[..., Any]] | tuple[Any, Callable[..., Any], list[Any]]


def configure_protocol() -> None:
    """Set what pynetdicom and pydicom keep as process-wide options to what a node needs.

    PDU and DIMSE logging is off: it costs time on each fragment, and at debug level it writes
    patient data.  Data sets are sent from the file as they are, never decoded and encoded again.
    A value that breaks its VR's rules is data to keep, not a warning to raise.
    """
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = False
    _config.LOG_RESPONSE_IDENTIFIERS = False
    _config.STORE_SEND_CHUNKED_DATASET = True
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)


class _SharedContexts(list[PresentationContext]):
    """The acceptor's contexts, which pynetdicom copies for each connection and never changes.

    Copying 170 contexts takes 30 ms in the accept thread: a port scanner would cost a CPU.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedContexts:
        return self


def transfer_syntaxes() -> list[str]:
    """The transfer syntax UIDs accepted for storage, in order of preference.

    Lossy ones come last: they are taken so that no sender blocks, and refused as a job.
    """
    return [row.uid for row in TRANSFER_SYNTAXES]


def contexts_scp() -> list[PresentationContext]:
    """What we accept: every storage class, Verification and Storage Commitment's reports.

    Classes that are never restored are accepted too: a sender's queue must not block on them.
    """
    uncompressed: list[str | UID] = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    syntaxes: list[str | UID] = [*transfer_syntaxes()]
    commitment = build_context(STORAGE_COMMITMENT, uncompressed)
    # PS3.4 J.3.3: the archive reports on an association that it opens, in the reversed role.
    commitment.scu_role = commitment.scp_role = True
    storage = [build_context(uid, syntaxes) for uid in STORAGE_CLASSES]
    return _SharedContexts([build_context(VERIFICATION, uncompressed), commitment, *storage])


def contexts_for(items: Iterable[tuple[str, str]]) -> list[PresentationContext]:
    """What we propose to send *items*, pairs of (SOP Class UID, transfer syntax UID).

    One context per syntax, so that the peer cannot choose implicit VR where it also takes ours;
    the little endian fallbacks come last.  Raises ValueError when more than 128 are needed.
    """
    pairs = list(dict.fromkeys((str(a), str(t)) for a, t in items))
    classes = dict.fromkeys(abstract for abstract, _ in pairs)
    fallbacks = [
        (abstract, syntax)
        for abstract in classes
        for syntax in (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
        if _needs(abstract, syntax, pairs)
    ]
    wanted = list(dict.fromkeys([*pairs, *fallbacks]))
    if len(wanted) > MAX_CONTEXTS:
        raise ValueError(f"{len(wanted)} presentation contexts are needed, {MAX_CONTEXTS} exist")
    return [build_context(abstract, syntax) for abstract, syntax in wanted]


def _needs(abstract: str, syntax: str, pairs: list[tuple[str, str]]) -> bool:
    """Whether some instance of the class would have to be sent as *syntax* by a plain peer."""
    return any(a == abstract and t != str(ImplicitVRLittleEndian) for a, t in pairs) and (
        syntax == str(ImplicitVRLittleEndian)
        or any(a == abstract and t != str(ExplicitVRLittleEndian) for a, t in pairs)
    )


# --- whom we let in -------------------------------------------------------------------------


@dataclass(frozen=True)
class Requestor:
    """Who asks for an association; titles as they came, padding included."""

    calling_ae: str
    called_ae: str
    address: str


@dataclass(frozen=True)
class AccessRules:
    """Whom the SCP accepts; each empty collection accepts everyone."""

    called: frozenset[str] = frozenset()
    calling: frozenset[str] = frozenset()
    addresses: tuple[IPv4Network | IPv6Network, ...] = ()


def access_rules(settings: NodeSettings) -> AccessRules:
    """The access rules that ``[node]`` and ``[association]`` of the settings state."""
    given = settings.association
    ours = frozenset({settings.node.ae_title, *given.called_ae_titles})
    return AccessRules(
        called=ours if given.require_called_ae_title else frozenset(),
        calling=frozenset(given.calling_ae_titles),
        addresses=tuple(ip_network(network) for network in given.addresses),
    )


@dataclass(frozen=True)
class Admission:
    """The answer to an association request: accepted, or PS3.8 Table 9-21's three numbers."""

    accepted: bool
    why: str
    result: int = 0
    source: int = 0
    diagnostic: int = 0


def normal_title(title: str) -> str:
    """An AE title without the padding that PS3.5 6.2 (and careless peers, NUL) put round it."""
    return title.strip(" \0")


def admit(requestor: Requestor, rules: AccessRules) -> Admission:
    """Accept or reject by titles and address; the reason is for the person at the other end."""
    calling, called = normal_title(requestor.calling_ae), normal_title(requestor.called_ae)
    if rules.called and called not in rules.called:
        why = f"called AE title {called!r} is not one of ours ({', '.join(sorted(rules.called))})"
        return Admission(False, why, result=1, source=1, diagnostic=7)
    if rules.calling and calling not in rules.calling:
        why = f"calling AE title {calling!r} is not in association.calling_ae_titles"
        return Admission(False, why, result=1, source=1, diagnostic=3)
    if rules.addresses and not _within(requestor.address, rules.addresses):
        why = f"address {requestor.address} is not in association.addresses"
        return Admission(False, why, result=1, source=1, diagnostic=1)
    return Admission(True, "accepted")


def _within(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    peer = ip_address(address.partition("%")[0])
    # A dual-stack listener sees an IPv4 peer as ::ffff:a.b.c.d.
    mapped = peer.ipv4_mapped if isinstance(peer, IPv6Address) else None
    return any((mapped or peer) in network for network in networks)


def on_connection(event: Event) -> None:
    """Send each answer at once, and let no peer hold us for ever within a PDU.

    Nagle's algorithm and a delayed ACK cost 40 ms an instance.  pynetdicom's network time-out
    counts between PDUs only; a peer that stops in the middle of one would never be left.
    """
    if (connection := connection_of(event.assoc)) is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(event.assoc.network_timeout)


def connection_of(association: Association) -> socket.socket | None:
    """The socket below an association; None once it is closed."""
    wrapper = association.dul.socket
    return None if wrapper is None else wrapper.socket


@dataclass(frozen=True)
class Peer:
    """An application entity that we open associations to; time limits in seconds."""

    ae_title: str
    host: str
    port: int
    calling_ae: str
    connection_timeout: float = 10.0
    acse_timeout: float = 30.0
    dimse_timeout: float = 60.0
    network_timeout: float = 120.0
    max_pdu: int = MAX_PDU

    @classmethod
    def of(cls, destination: Destination, settings: NodeSettings) -> Peer:
        """The peer that a ``[destinations.NAME]`` table describes."""
        limits = settings.association
        return cls(
            ae_title=destination.ae_title,
            host=destination.host,
            port=destination.port,
            calling_ae=destination.calling_ae_title or settings.node.ae_title,
            connection_timeout=destination.connect_timeout_s,
            acse_timeout=min(destination.timeout_s, limits.acse_timeout_s),
            dimse_timeout=destination.timeout_s,
            network_timeout=max(destination.timeout_s, limits.network_timeout_s),
            max_pdu=limits.max_pdu,
        )

    @property
    def where(self) -> str:
        """The peer as an administrator writes it: ``AET@host:port``."""
        return f"{self.ae_title}@{self.host}:{self.port}"
