"""Connections until an association is asked for: accept, TLS, A-ASSOCIATE-RQ, admission.

One thread watches every connection that has not asked for an association yet; none of them costs
a thread, and none can hold up another (each is a :class:`dicom_node.pending.Pending`).  Each has
an absolute deadline for its TLS handshake and for its A-ASSOCIATE-RQ (the ARTIM timer of PS3.8
9.1.5), which bytes that trickle in do not move.  Only a peer that has sent a whole request and is
admitted reaches pynetdicom, on a thread of its own (:mod:`dicom_node.acceptor`).

    listener = Listener(ports, policy, admit=…, serve=…, refused=…)
    listener.start()
    …
    listener.stop()

*serve* is called on a new thread with the :class:`Connected` and may keep it as long as the
association lives; the listener closes the socket after it returns.  A peer that is turned away is
answered by A-ASSOCIATE-RJ or A-ABORT and told to *refused* in words.
"""

from __future__ import annotations

import errno
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from dicom_node import tls
from dicom_node.access import ACCEPTED, TOO_MANY, Admission, Requestor, origin, refuse
from dicom_node.errors import ConfigurationError
from dicom_node.observability import get_logger
from dicom_node.pending import Over, Pending, Stage, hang_up, name
from dicom_node.request import AssociateRequest, abort_pdu, reject_pdu
from dicom_node.settings import NodeSettings

#: Connections of one address that wait to be accepted by the kernel.
BACKLOG: Final = 128

_ACCEPTS_A_TURN = 64
_LINGER_S = 2.0

_log = get_logger(__name__)


@dataclass(frozen=True)
class Port:
    """One address to listen on; with *credentials* for TLS."""

    host: str
    port: int
    credentials: tls.ServerCredentials | None = None


@dataclass(frozen=True)
class Policy:
    """How many connections are held, and how long each may take (seconds)."""

    artim_s: float = 15.0
    handshake_s: float = 5.0
    max_pending: int = 256
    max_pending_per_address: int = 128
    max_associations: int = 50
    max_associations_per_address: int = 25

    @classmethod
    def of(cls, settings: NodeSettings) -> Policy:
        """What ``[association]`` and ``[tls]`` of the settings say."""
        given = settings.association
        return cls(
            artim_s=given.acse_timeout_s,
            handshake_s=settings.tls.handshake_timeout_s,
            max_pending=given.max_pending,
            max_pending_per_address=given.max_pending_per_address,
            max_associations=given.max_associations,
            max_associations_per_address=given.max_associations_per_address,
        )


@dataclass(frozen=True)
class Connected:
    """An admitted peer: its blocking socket, who it is, and the A-ASSOCIATE-RQ that was read."""

    socket: socket.socket
    address: tuple[str, int]
    local: tuple[str, int]
    requestor: Requestor
    request: AssociateRequest


@dataclass(frozen=True)
class Refusal:
    """A peer that was turned away, in words; without its bytes, and without patient data."""

    address: str
    why: str
    calling_ae: str = ""
    admission: Admission | None = None  # None: no A-ASSOCIATE-RQ could be answered
    #: The peer could not be authenticated: a failed TLS handshake.
    authentication: bool = False


def open_port(port: Port) -> socket.socket:
    """A listening socket; ConfigurationError where the address cannot be bound."""
    try:
        family, _, _, _, where = socket.getaddrinfo(
            port.host, port.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            listening.listen(BACKLOG)
            listening.setblocking(False)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        keys = "node.host, tls.port" if port.credentials else "node.host, node.port"
        why = f"{keys}: cannot listen on {port.host}:{port.port}"
        raise ConfigurationError([f"{why}: {error.strerror or error}"]) from error
    return listening


class Listener:
    """Listens on one or two ports and hands admitted peers over; see the module."""

    def __init__(
        self,
        ports: Sequence[Port],
        policy: Policy,
        *,
        admit: Callable[[Requestor], Admission],
        serve: Callable[[Connected], None],
        refused: Callable[[Refusal], None],
    ) -> None:
        self._ports = ports
        self._policy = policy
        self._admit = admit
        self._serve = serve
        self._refused = refused
        self._listening: list[tuple[socket.socket, Port]] = []
        self._pending: dict[Pending, None] = {}  # oldest first
        self._waiting: Counter[str] = Counter()
        self._serving: Counter[str] = Counter()
        self._lock = threading.Lock()  # of _serving
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each port, in the order in which they were given."""
        return [name(listening.getsockname()) for listening, _ in self._listening]

    @property
    def pending(self) -> int:
        """How many connections have not become associations."""
        return len(self._pending)

    @property
    def serving(self) -> int:
        """How many associations are served."""
        with self._lock:
            return self._serving.total()

    def start(self) -> None:
        """Listen; ConfigurationError where an address cannot be bound."""
        try:
            for port in self._ports:
                self._listening.append((open_port(port), port))
        except ConfigurationError:
            for listening, _ in self._listening:
                listening.close()
            raise
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        for listening, port in self._listening:
            self._selector.register(listening, selectors.EVENT_READ, port)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread.start()

    def stop(self) -> None:
        """Take no more connections and drop the pending; associations that stand are not touched.

        A second call does nothing.
        """
        if self._thread.is_alive() and not self._stopping.is_set():
            self._stopping.set()
            with suppress(OSError):  # busy with connections, it has seen the end by itself
                self._wake.send(b"\0")
            self._thread.join()
            self._wake.close()

    # --- the watching thread

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                for key, _ in self._selector.select(self._patience()):
                    self._on_ready(key)
                self._expire(time.monotonic())
        finally:
            self._close_all()

    def _on_ready(self, key: selectors.SelectorKey) -> None:
        if isinstance(key.data, Port):
            assert isinstance(key.fileobj, socket.socket)
            self._accept(key.fileobj, key.data)
        elif isinstance(key.data, Pending) and key.data in self._pending:
            try:
                self._advance(key.data)
            except Exception as error:  # one connection must not end the thread of all
                _log.error("connection dropped", action="unexpected_error", error=_type(error))
                self._drop(key.data)

    def _patience(self) -> float | None:
        if not self._pending:
            return None
        first = min(pending.deadline for pending in self._pending)
        return max(0.0, first - time.monotonic())

    def _accept(self, listening: socket.socket, port: Port) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                connection, address = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._on_accept_error(error)
                return
            try:
                self._greet(connection, name(address), port)
            except (OSError, ValueError):  # it was gone before it was greeted
                connection.close()

    def _on_accept_error(self, error: OSError) -> None:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            return  # a peer that was gone before it was accepted
        _log.error("no descriptor for a connection", action="no_descriptors", error=error.strerror)
        if self._pending:
            self._drop(next(iter(self._pending)))
        else:
            self._stopping.wait(0.1)

    def _greet(self, connection: socket.socket, address: tuple[str, int], port: Port) -> None:
        self._make_room(origin(address[0]))
        pending = Pending.accepted(
            connection,
            address,
            port.credentials,
            artim_s=self._policy.artim_s,
            handshake_s=self._policy.handshake_s,
        )
        self._pending[pending] = None
        self._waiting[pending.who] += 1
        self._selector.register(pending.socket, pending.events, pending)

    def _make_room(self, who: str) -> None:
        """The oldest of the address gives way, or of the address that holds the most.

        So a flood drives out its own connections, and whoever asks at once is served.
        """
        if self._waiting[who] >= self._policy.max_pending_per_address:
            self._evict(who)
        elif len(self._pending) >= self._policy.max_pending:
            self._evict(max(self._waiting, key=self._waiting.__getitem__))

    def _evict(self, who: str) -> None:
        oldest = next(pending for pending in self._pending if pending.who == who)
        if oldest.stage is not Stage.CLOSING:
            why = "it had too many connections without an association; the oldest was closed"
            self._tell(Refusal(oldest.peer, why))
        self._drop(oldest)

    def _advance(self, pending: Pending) -> None:
        events = pending.events
        come = pending.advance()
        if pending.events != events:
            self._selector.modify(pending.socket, pending.events, pending)
        if isinstance(come, AssociateRequest):
            self._on_request(pending, come)
        elif come is not None:
            self._on_over(pending, come)

    def _on_over(self, pending: Pending, over: Over) -> None:
        if over.why:
            self._tell(Refusal(pending.peer, over.why, authentication=over.authentication))
        if over.abort is None:
            self._drop(pending)
        else:
            pending.answer(abort_pdu(over.abort), self._linger_s)

    def _on_request(self, pending: Pending, request: AssociateRequest) -> None:
        requestor = pending.requestor(request)
        admission = self._judge(pending.who, request, requestor)
        if admission.accepted:
            self._hand_over(pending, requestor, request)
            return
        self._tell(Refusal(pending.peer, admission.why, request.calling_ae, admission))
        pending.answer(reject_pdu(admission), self._linger_s)

    @property
    def _linger_s(self) -> float:
        return min(_LINGER_S, self._policy.artim_s)

    def _judge(self, who: str, request: AssociateRequest, requestor: Requestor) -> Admission:
        fault = request.fault()
        if fault is not None:
            return fault
        admission = self._admit(requestor)
        if not admission.accepted:
            return admission
        with self._lock:
            if self._serving.total() >= self._policy.max_associations:
                return refuse("as many associations are open as are allowed", *TOO_MANY)
            if self._serving[who] >= self._policy.max_associations_per_address:
                why = "as many associations are open as are allowed from one address"
                return refuse(why, *TOO_MANY)
        return ACCEPTED

    def _hand_over(self, pending: Pending, requestor: Requestor, request: AssociateRequest) -> None:
        self._forget(pending)
        connected = Connected(pending.socket, pending.address, pending.local, requestor, request)
        with self._lock:
            self._serving[pending.who] += 1
        thread = threading.Thread(
            target=self._serve_one, args=(connected, pending.who), name="association", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._done(connected, pending.who)
            _log.error("no thread for an association", action="no_threads")

    def _serve_one(self, connected: Connected, who: str) -> None:
        try:
            connected.socket.setblocking(True)
            self._serve(connected)
        except Exception as error:
            _log.error("association ended", action="unexpected_error", error=_type(error))
        finally:
            self._done(connected, who)

    def _done(self, connected: Connected, who: str) -> None:
        with self._lock:
            self._serving[who] -= 1
            if not self._serving[who]:
                del self._serving[who]
        hang_up(connected.socket)

    def _expire(self, now: float) -> None:
        for pending in [each for each in self._pending if each.deadline <= now]:
            if pending.stage is not Stage.CLOSING:
                words = f"no end of {pending.stage.value} in time"
                self._tell(Refusal(pending.peer, f"{words}; the connection was closed"))
            self._drop(pending)

    def _tell(self, refusal: Refusal) -> None:
        try:
            self._refused(refusal)
        except Exception as error:
            _log.error("refusal not recorded", action="unexpected_error", error=_type(error))

    def _forget(self, pending: Pending) -> None:
        pending.stage = Stage.GONE
        self._selector.unregister(pending.socket)
        del self._pending[pending]
        self._waiting[pending.who] -= 1
        if not self._waiting[pending.who]:
            del self._waiting[pending.who]

    def _drop(self, pending: Pending) -> None:
        if pending.stage is not Stage.GONE:
            self._forget(pending)
            hang_up(pending.socket)

    def _close_all(self) -> None:
        for pending in list(self._pending):
            self._drop(pending)
        for listening, _ in self._listening:
            listening.close()
        self._selector.close()
        self._woken.close()


def _type(error: BaseException) -> str:
    return type(error).__name__
