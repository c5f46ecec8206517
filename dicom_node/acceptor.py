"""Associations that are opened to us: pynetdicom's acceptor behind our own listener.

:mod:`dicom_node.listener` hands over a connection whose A-ASSOCIATE-RQ has been read and admitted.
Here pynetdicom negotiates it and serves it, fed with the request first.  What is used of
pynetdicom is named in its documentation, but for :class:`_RequestedSocket`, which stands on
``AssociationSocket.ready`` and ``recv``; `tests/unit/dicom_node/test_acceptor.py` holds both.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from pydicom.uid import UID
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu_primitives import UserIdentityNegotiation
from pynetdicom.presentation import PresentationContext
from pynetdicom.transport import AddressInformation, AssociationSocket

from dicom_node.access import Admission, Requestor
from dicom_node.association import STORAGE_COMMITMENT, VERIFICATION, EventHandler
from dicom_node.errors import ConfigurationError
from dicom_node.listener import Connected, Listener, Policy, Port, Refusal
from dicom_node.observability import get_logger
from dicom_node.settings import NodeSettings
from dicom_node.tls import ServerCredentials, TLSFiles

# PS3.4 Table B.3-2, a byte and a reserved one each: level of support 2 (full storage SCP), level of
# digital signature support 3 (bit-preserving), element coercion 0 (none).
STORAGE_SUPPORT = bytes((2, 0, 3, 0, 0, 0))

_DRAIN_POLL_S = 0.02
_UNKNOWN_PDU = b"\xff\x00\x00\x00\x00\x00"
_PDU_HEADER = 6

_log = get_logger(__name__)


def ports(settings: NodeSettings) -> list[Port]:
    """Where to listen: without TLS, with it, or both; ConfigurationError for a file of [tls]."""
    node, given = settings.node, settings.tls
    found = [] if given.only else [Port(node.host, node.port)]
    if given.port is not None:
        files = TLSFiles.of(given)
        credentials = ServerCredentials(files, verify_peers=given.verify_peers)
        found.append(Port(node.host, given.port, credentials))
    return found


class Acceptor:
    """The listening application entity: from the ports to established associations."""

    def __init__(
        self,
        settings: NodeSettings,
        entity: AE,
        *,
        contexts: Sequence[PresentationContext],
        handlers: Sequence[EventHandler],
        admit: Callable[[Requestor], Admission],
        refused: Callable[[Refusal], None],
    ) -> None:
        """*entity* gives names, time-outs and the maximum PDU length; its limits are not used.

        Raises ConfigurationError where the files of ``[tls]`` cannot be used.
        """
        self._entity = entity
        self._contexts = list(contexts)
        self._handlers = [*_negotiation_handlers(), *handlers]
        self._active: dict[Association, None] = {}
        self._lock = threading.Lock()
        self._ports = ports(settings)
        self._listener = Listener(
            self._ports,
            Policy.of(settings),
            admit=admit,
            serve=self._serve,
            refused=refused,
        )

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each port: without TLS first, where there is one."""
        return self._listener.addresses

    @property
    def active_associations(self) -> list[Association]:
        """The associations that are negotiated or served now."""
        with self._lock:
            return list(self._active)

    def start(self) -> None:
        """Listen; ConfigurationError where an address cannot be bound."""
        self._listener.start()

    def renew_certificates(self, *, force: bool = False) -> None:
        """Load the TLS files again where they have changed; bad files keep the old in force."""
        for port in self._ports:
            if port.credentials is None:
                continue
            try:
                renewed = port.credentials.renew(force=force)
            except ConfigurationError as error:
                _log.error("certificates kept", action="reload_failed", problems=error.problems)
                continue
            if renewed:
                _log.info("certificates loaded", action="certificates_loaded", port=port.port)

    def stop(self, drain_s: float) -> None:
        """Take no more, let associations end for *drain_s* seconds, abort the rest."""
        self._listener.stop()
        deadline = time.monotonic() + drain_s
        while self.active_associations and time.monotonic() < deadline:
            time.sleep(_DRAIN_POLL_S)
        for association in self.active_associations:
            association.abort()

    def _serve(self, connected: Connected) -> None:
        """Negotiate and serve one association to its end, on the calling thread."""
        connected.socket.settimeout(self._entity.network_timeout)
        association = self._association(connected)
        with self._lock:
            self._active[association] = None
        try:
            evt.trigger(association, evt.EVT_CONN_OPEN, {"address": connected.address})
            association.run_reactor()
        finally:
            _make_sure_of_end(association, connected)
            # A command set that pynetdicom cannot decode ends its thread without a word of the end.
            evt.trigger(association, evt.EVT_CONN_CLOSE, {"address": connected.address})
            with self._lock:
                del self._active[association]

    def _association(self, connected: Connected) -> Association:
        association = Association(self._entity, "acceptor")
        association.set_socket(
            _RequestedSocket(association, connected, self._entity.maximum_pdu_size)
        )
        ours, theirs = association.acceptor, association.requestor
        ours.maximum_length = self._entity.maximum_pdu_size
        ours.ae_title = self._entity.ae_title
        ours.address_info = AddressInformation.from_tuple(connected.local)
        ours.implementation_class_uid = self._entity.implementation_class_uid
        ours.implementation_version_name = self._entity.implementation_version_name
        ours.supported_contexts = self._contexts
        theirs.address_info = AddressInformation.from_tuple(connected.address)
        for event, handler, *arguments in self._handlers:
            association.bind(event, handler, *arguments)
        return association


def _make_sure_of_end(association: Association, connected: Connected) -> None:
    """A fault in the association's thread must not leave that of its upper layer behind."""
    if association.dul.is_alive():
        with suppress(OSError):
            connected.socket.shutdown(socket.SHUT_RDWR)
        association.kill()


class _RequestedSocket(AssociationSocket):
    """A connection whose A-ASSOCIATE-RQ has been read: it is delivered again, then the rest.

    A PDU that is longer than we announced (PS3.8 D.1) is not read: the reader is given a PDU of
    unknown type, which it answers with A-ABORT, and then the end of the connection.
    """

    def __init__(self, association: Association, connected: Connected, max_pdu: int) -> None:
        super().__init__(association, client_socket=connected.socket)
        self._request = bytearray(connected.request.pdu)
        self._address = connected.address[0]
        self._max_pdu = max_pdu
        self._at_header = True
        self._broken = False

    @property
    def ready(self) -> bool:
        """Whether there is something to read."""
        if self._broken:
            return False
        return bool(self._request) or bool(super().ready)

    def recv(self, nr_bytes: int) -> bytearray:
        """Read a PDU's header, then the rest of it: pynetdicom asks for nothing else."""
        if self._request:
            piece = self._request[:nr_bytes]
            del self._request[:nr_bytes]
            return piece
        received = super().recv(nr_bytes)
        if self._at_header and len(received) == _PDU_HEADER:
            (length,) = struct.unpack_from(">L", received, 2)
            if length > self._max_pdu:
                self._broken = True
                _log.warning(
                    "association aborted",
                    action="pdu_too_long",
                    why=f"a PDU of {length} bytes; at most {self._max_pdu} were offered",
                    address=self._address,
                )
                return bytearray(_UNKNOWN_PDU)
            self._at_header = length == 0
        else:
            self._at_header = True
        return received


def _negotiation_handlers() -> list[EventHandler]:
    return [
        (evt.EVT_ASYNC_OPS, _on_asynchronous_operations),
        (evt.EVT_SOP_EXTENDED, _on_sop_class_extended),
        (evt.EVT_USER_ID, _on_user_identity),
    ]


def _on_asynchronous_operations(event: Event) -> tuple[int, int]:
    """PS3.7 D.3.3.3: we serve one operation at a time, and say so where we are asked."""
    return 1, 1


def _on_sop_class_extended(event: Event) -> dict[UID, bytes]:
    """PS3.4 B.3.1: what is stored is what was received, to the last bit.

    What the requestor says of itself changes nothing. Classes that we do not store, or that are of
    another service, are not answered (PS3.7 D.3.3.5.2).
    """
    ours = {context.abstract_syntax for context in event.assoc.acceptor.supported_contexts}
    asked = event.assoc.requestor.sop_class_extended
    stored = ours - {VERIFICATION, STORAGE_COMMITMENT}
    return {uid: STORAGE_SUPPORT for uid in asked if uid in stored}


def _on_user_identity(event: Event) -> tuple[bool, None]:
    """PS3.7 D.3.3.7: an acceptor that does not check identities accepts and does not respond.

    The kind is logged; names, passcodes and tokens are not.
    """
    identity = event.assoc.requestor.user_identity
    kind = identity.user_identity_type if isinstance(identity, UserIdentityNegotiation) else None
    _log.info(
        "user identity not checked",
        action="user_identity",
        kind=_IDENTITIES.get(kind or 0, "unknown"),
        address=event.assoc.requestor.address,
    )
    return True, None


# PS3.7 Table D.3-14.
_IDENTITIES = {
    1: "user name",
    2: "user name and passcode",
    3: "Kerberos",
    4: "SAML",
    5: "JSON Web Token",
}
