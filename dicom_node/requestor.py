"""Associations that we open: one context manager, and in words why one could not be opened.

pynetdicom reports a failed association as a set of flags and a log line.  Here it becomes an error
whose type says whether to try again and whose text says what an administrator should look at.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.pdu_primitives import A_ASSOCIATE, SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext

from dicom_node import tls
from dicom_node.access import DIAGNOSTICS
from dicom_node.association import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    EventHandler,
    Peer,
    configure_protocol,
    connection_of,
    on_connection,
)
from dicom_node.errors import ConfigurationError, DestinationError, DestinationRefusedError

# How long to listen for the alert of a TLS 1.3 peer that refuses our certificate.
_ALERT_S = 1.0
# How long the upper layer may take to end once its association has.
_END_S = 2.0
# Between two looks at whether the thread of an association is still there.
_LOOK_S = 0.05


@dataclass
class _Progress:
    """How far an association request came; set by the event handlers."""

    connected: bool = False
    socket: socket.socket | None = None
    rejection: A_ASSOCIATE | None = None
    started: float = field(default_factory=time.monotonic)


@contextmanager
def associate(
    peer: Peer,
    contexts: Sequence[PresentationContext],
    *,
    handlers: Sequence[EventHandler] = (),
    as_scp: Collection[str] = (),
    as_scu: bool = True,
) -> Iterator[Association]:
    """An established association with *peer*, released on the way out, aborted on an exception.

    *as_scp* names SOP Classes for which we also offer the SCP role (PS3.7 D.3.3.4), or with not
    *as_scu* that alone.
    Raises :class:`DestinationError` when the peer cannot be reached or asks to try again later,
    :class:`DestinationRefusedError` when it rejects us for good.
    """
    roles = [_role(uid, as_scu) for uid in as_scp]
    association = _request(peer, contexts, handlers, roles)
    keep_answers(association)
    connection = connection_of(association)
    try:
        yield association
    except GeneratorExit:
        # A caller that has sent enough ends its loop: a PACS takes an abort for a failure.
        _release(association)
        raise
    except BaseException:
        association.abort()
        raise
    else:
        _release(association)
    finally:
        # The upper layer ends on a thread of its own, and may yet have to hear of a reset.
        association.dul.join(_END_S)
        if connection is not None and not association.dul.is_alive():
            # pynetdicom forgets the socket of a connection that was reset.
            connection.close()


class _Checkpoint(threading.Event):
    """Where the thread of an association rests while another sends a request and awaits its answer.

    pynetdicom 3.0.4 says that the thread rests by a flag which is also set for a moment when it
    passes (``Association._run_reactor``). Who believes it then sends, and the thread that has
    passed takes the answer and drops it: the request times out though the peer has served it.
    Here :meth:`clear` returns only once the thread does rest.
    """

    def __init__(self, thread: threading.Thread) -> None:
        super().__init__()
        self._thread = thread
        self._changed = threading.Condition()
        self._open = True
        self._resting = False

    def is_set(self) -> bool:
        """Whether the thread may pass."""
        return self._open

    def set(self) -> None:
        """Let the thread pass."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Let the thread rest, and wait until it does, or has ended."""
        with self._changed:
            self._open = False
            if threading.current_thread() is self._thread:
                return
            while not self._resting and not self._open and self._thread.is_alive():
                self._changed.wait(_LOOK_S)

    def wait(self, timeout: float | None = None) -> bool:
        """Pass, or rest until that is allowed."""
        with self._changed:
            while not self._open:
                self._resting = True
                self._changed.notify_all()
                self._changed.wait(timeout)
                self._resting = False
                if timeout is not None:
                    break
            return self._open


def keep_answers(association: Association) -> None:
    """Let no answer on an established association be lost to the thread that watches it."""
    association._reactor_checkpoint = _Checkpoint(association)


def _release(association: Association) -> None:
    if association.is_established:
        # A missing release response ends at the ACSE time-out inside release().
        association.release()


def _request(
    peer: Peer,
    contexts: Sequence[PresentationContext],
    handlers: Sequence[EventHandler],
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation],
) -> Association:
    progress = _Progress()
    bound: list[EventHandler] = [
        (evt.EVT_ACSE_SENT, _on_acse, [progress]),
        (evt.EVT_CONN_OPEN, _on_open, [progress]),
        (evt.EVT_PDU_RECV, _on_pdu, [progress]),
        *handlers,
    ]
    try:
        association = _entity(peer).associate(
            peer.host,
            peer.port,
            contexts=list(contexts),
            ae_title=peer.ae_title,
            max_pdu=peer.max_pdu,
            ext_neg=list(roles),
            tls_args=_tls_arguments(peer, progress),
            evt_handlers=bound,
        )
    except OSError as error:
        raise DestinationError(f"{peer.where}: {_network_words(error, peer)}") from error
    if not association.is_established:
        if progress.socket is not None:
            # pynetdicom drops the socket of a refused connection without closing it.
            progress.socket.close()
        raise _failure(association, peer, progress)
    return association


@dataclass(frozen=True)
class _Wrapper:
    """What pynetdicom uses of an SSLContext; keeps the socket, which a failed handshake leaks."""

    context: ssl.SSLContext
    progress: _Progress

    def wrap_socket(self, plain: socket.socket, **arguments: Any) -> ssl.SSLSocket:
        """Wrap, and remember the socket to close."""
        secure = self.context.wrap_socket(plain, **arguments)
        self.progress.socket = secure
        return secure


def _tls_arguments(peer: Peer, progress: _Progress) -> tuple[ssl.SSLContext, str] | None:
    """The context and the name to call with; DestinationRefusedError where our files are bad."""
    if peer.tls is None:
        return None
    try:
        context = tls.client_context(peer.tls)
    except ConfigurationError as error:
        raise DestinationRefusedError(f"{peer.where}: {'; '.join(error.problems)}") from error
    return cast(ssl.SSLContext, _Wrapper(context, progress)), peer.server_name or peer.host


def _entity(peer: Peer) -> AE:
    configure_protocol()
    entity = AE(ae_title=peer.calling_ae)
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    entity.connection_timeout = peer.connection_timeout
    entity.acse_timeout = peer.acse_timeout
    entity.dimse_timeout = peer.dimse_timeout
    entity.network_timeout = peer.network_timeout
    return entity


def _on_acse(event: Event, progress: _Progress) -> None:
    """Keep the socket of the request, which is made before it is queued."""
    progress.socket = progress.socket or connection_of(event.assoc)


def _on_open(event: Event, progress: _Progress) -> None:
    progress.connected = True
    on_connection(event)


def _on_pdu(event: Event, progress: _Progress) -> None:
    """Keep a rejection: pynetdicom takes one that comes at once for a lost connection."""
    if isinstance(event.pdu, A_ASSOCIATE_RJ):
        progress.rejection = event.pdu.to_primitive()


def _role(uid: str, as_scu: bool) -> SCP_SCU_RoleSelectionNegotiation:
    role = SCP_SCU_RoleSelectionNegotiation()
    role.sop_class_uid = uid
    role.scu_role, role.scp_role = as_scu, True
    return role


def _failure(
    association: Association, peer: Peer, progress: _Progress
) -> DestinationError | DestinationRefusedError:
    rejection = progress.rejection
    if rejection is not None:
        words = f"{peer.where}: {_rejection_words(rejection, peer)}"
        # PS3.8 Table 9-21: result 1 is permanent, 2 transient.
        return DestinationRefusedError(words) if rejection.result == 1 else DestinationError(words)
    if not progress.connected:
        return DestinationError(f"{peer.where}: {_why_unreachable(peer) or _WORKED}")
    if time.monotonic() - progress.started >= peer.acse_timeout:
        return DestinationError(
            f"{peer.where}: connected, but no answer to the association request"
            f" within {peer.acse_timeout:g} s"
        )
    answer = association.acceptor.primitive
    if answer is not None and answer.result == 0:
        return DestinationRefusedError(
            f"{peer.where}: accepts none of the SOP Classes and transfer syntaxes we propose"
        )
    # A TLS 1.3 peer that refuses our certificate says so after the handshake has ended for us.
    why = _why_unreachable(peer) if peer.tls is not None else ""
    return DestinationError(
        f"{peer.where}: "
        + (why or "closed the connection during association negotiation; is it a DICOM port?")
    )


def _rejection_words(answer: A_ASSOCIATE, peer: Peer) -> str:
    """PS3.8 Table 9-21 in the words of the person who has to change a configuration."""
    ours = {
        (1, 3): f"our calling AE title {peer.calling_ae!r} is not known there",
        (1, 7): f"the called AE title {peer.ae_title!r} is not known there",
        (3, 2): "it has as many associations as it allows",
    }
    numbers = answer.result_source or 0, answer.diagnostic or 0
    why = ours.get(numbers) or DIAGNOSTICS.get(numbers, "for a reason that is no DICOM reason")
    kind = "permanently" if answer.result == 1 else "for now"
    return f"association rejected {kind}: {why}"


def _why_unreachable(peer: Peer) -> str:
    """Connect again and say what goes wrong: pynetdicom keeps no reason of a failed connection.

    Empty where a TLS connection now works.
    """
    try:
        with socket.create_connection((peer.host, peer.port), peer.connection_timeout) as plain:
            return _tls_words(peer, plain) if peer.tls is not None else _WORKED
    except OSError as error:
        return _network_words(error, peer)


_WORKED = "the connection failed, and worked when tried again"


def _tls_words(peer: Peer, plain: socket.socket) -> str:
    """What is wrong with TLS to *peer*; empty where it lets us speak."""
    assert peer.tls is not None
    context = tls.client_context(peer.tls)
    try:
        with context.wrap_socket(plain, server_hostname=peer.server_name or peer.host) as secure:
            secure.settimeout(_ALERT_S)
            secure.recv(1)
    except TimeoutError:
        return ""  # it waits for us to begin, as a DICOM peer should
    except OSError as error:
        return f"TLS: {tls.failure_words(error)}"
    return ""


def _network_words(error: OSError, peer: Peer) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused; nothing listens on that port"
    if isinstance(error, TimeoutError):
        return f"no connection within {peer.connection_timeout:g} s; host down or port filtered"
    if isinstance(error, socket.gaierror):
        return f"host name {peer.host!r} is not known"
    return error.strerror or type(error).__name__


@contextmanager
def hang_up_after(association: Association, limit_s: float) -> Iterator[None]:
    """Close the connection when the block takes longer than *limit_s* seconds.

    pynetdicom's abort waits for what it has queued; a peer that has stopped reading, or reads a
    byte a second, would keep the caller with it.
    """

    def hang_up() -> None:
        if (connection := connection_of(association)) is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(limit_s, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
