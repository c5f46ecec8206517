"""Associations in both roles: what we accept and propose, and whom we call.

One table of SOP Classes and transfer syntaxes serves the SCP (:func:`contexts_scp`), the SCU
(:func:`contexts_for`) and the conformance statement.  Whom we let in is :mod:`dicom_node.access`;
listening is :mod:`dicom_node.listener`, calling :mod:`dicom_node.requestor`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pydicom.config
from pydicom.uid import (
    HEVCM10P51,
    HEVCMP51,
    HTJ2K,
    JPEG2000,
    JPEG2000MC,
    MPEG2MPHL,
    MPEG2MPHLF,
    MPEG2MPML,
    MPEG2MPMLF,
    MPEG4HP41,
    MPEG4HP41BD,
    MPEG4HP41BDF,
    MPEG4HP41F,
    MPEG4HP42STEREO,
    MPEG4HP42STEREOF,
    MPEG4HP422D,
    MPEG4HP422DF,
    MPEG4HP423D,
    MPEG4HP423DF,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEG2000MCLossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AllStoragePresentationContexts, _config, build_context, register_uid
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.presentation import PresentationContext
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.transport import AssociationSocket

from dicom_node.settings import Destination, NodeSettings
from dicom_node.tls import TLSFiles

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
    """One row of the transfer syntax table; *lossy* ones may have lost: `dicom.lossy` judges."""

    uid: str
    name: str
    lossy: bool = False


# Videos come in storage classes that are kept and never restored; their bytes are not looked at.
# JPIP and SMPTE ST 2110 are left out: they refer to pixel data that are elsewhere.
_VIDEO = (
    MPEG2MPML,
    MPEG2MPMLF,
    MPEG2MPHL,
    MPEG2MPHLF,
    MPEG4HP41,
    MPEG4HP41F,
    MPEG4HP41BD,
    MPEG4HP41BDF,
    MPEG4HP422D,
    MPEG4HP422DF,
    MPEG4HP423D,
    MPEG4HP423DF,
    MPEG4HP42STEREO,
    MPEG4HP42STEREOF,
    HEVCMP51,
    HEVCM10P51,
)

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
    TransferSyntax(JPEG2000MCLossless, "JPEG 2000 Part 2 Multi-component (Lossless Only)"),
    TransferSyntax(RLELossless, "RLE Lossless"),
    TransferSyntax(JPEG2000, "JPEG 2000", lossy=True),
    TransferSyntax(HTJ2K, "High-Throughput JPEG 2000", lossy=True),
    TransferSyntax(JPEGLSNearLossless, "JPEG-LS Near-Lossless", lossy=True),
    TransferSyntax(JPEGBaseline8Bit, "JPEG Baseline (Process 1)", lossy=True),
    TransferSyntax(JPEGExtended12Bit, "JPEG Extended (Processes 2 and 4)", lossy=True),
    TransferSyntax(JPEG2000MC, "JPEG 2000 Part 2 Multi-component", lossy=True),
    *(TransferSyntax(uid, UID(uid).name, lossy=True) for uid in _VIDEO),
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


def transfer_syntaxes() -> list[str]:
    """The transfer syntax UIDs accepted for storage, in order of preference.

    Lossy ones come last: they are taken so that no sender blocks, and refused as a job.
    """
    return [row.uid for row in TRANSFER_SYNTAXES]


def contexts_scp(extra: Iterable[str] = ()) -> list[PresentationContext]:
    """What we accept: every storage class, Verification and Storage Commitment's reports.

    Classes that are never restored are accepted too: a sender's queue must not block on them.
    *extra* are storage classes that the standard's table does not list: private or newer ones.
    """
    uncompressed: list[str | UID] = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    syntaxes: list[str | UID] = [*transfer_syntaxes()]
    commitment = build_context(STORAGE_COMMITMENT, uncompressed)
    # PS3.4 J.3.3: the archive reports on an association that it opens, in the reversed role.
    commitment.scu_role = commitment.scp_role = True
    storage = [build_context(uid, syntaxes) for uid in storage_classes(extra)]
    return [build_context(VERIFICATION, uncompressed), commitment, *storage]


def storage_classes(extra: Iterable[str] = ()) -> tuple[str, ...]:
    """The storage SOP Classes that are accepted, *extra* ones made known to the protocol layer."""
    more = [uid for uid in dict.fromkeys(extra) if uid not in STORAGE_CLASSES]
    for uid in more:
        # Without it a C-STORE of a class that was negotiated would abort the association.
        register_uid(uid, f"Extra_{uid.replace('.', '_')}", StorageServiceClass)
    return (*STORAGE_CLASSES, *more)


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


def on_connection(event: Event) -> None:
    """Send each answer at once, and let no peer hold us for ever within a PDU.

    Nagle's algorithm and a delayed ACK cost 40 ms an instance.  pynetdicom's network time-out
    counts between PDUs only; a peer that stops in the middle of one would never be left.
    """
    if (connection := connection_of(event.assoc)) is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(event.assoc.network_timeout)


class Rewound:
    """An association's socket with octets before it that are read first."""

    def __init__(self, wrapper: AssociationSocket, unread: bytes = b"") -> None:
        self._wrapper = wrapper
        self._unread = bytearray(unread)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    @property
    def ready(self) -> bool:
        """Whether there is something to read."""
        return bool(self._unread) or bool(self._wrapper.ready)

    def recv(self, nr_bytes: int) -> bytearray:
        """Read so many octets: what was unread ends with a whole PDU, as each read does."""
        if not self._unread:
            return self._wrapper.recv(nr_bytes)
        received = self._unread[:nr_bytes]
        del self._unread[:nr_bytes]
        return received


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
    #: Call over TLS with these files; None: without.
    tls: TLSFiles | None = None
    #: The name that the peer's certificate must bear, where it is not *host*.
    server_name: str | None = None

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
            tls=TLSFiles.of(settings.tls) if destination.tls else None,
            server_name=destination.server_name,
        )

    @property
    def where(self) -> str:
        """The peer as an administrator writes it: ``AET@host:port``."""
        return f"{self.ae_title}@{self.host}:{self.port}"
