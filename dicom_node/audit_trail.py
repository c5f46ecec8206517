"""Where audit messages go: a local journal, and a syslog server beside it.

The journal is the truth: a line for each message, flushed to disk, readable by the node's account
alone.  The syslog server (RFC 5424 over UDP, RFC 5426, or over TLS, RFC 5425) gets what it can
take; a slow or dead one holds up nobody, since messages for it wait in a queue of limited length
and what does not fit is counted and dropped.  Several processes may write one journal.
"""

from __future__ import annotations

import base64
import os
import queue
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from xml.etree import ElementTree

from prometheus_client import Counter

from dicom_node import tls
from dicom_node.audit import SECURITY_ALERT, Message, Source, to_xml
from dicom_node.errors import ConfigurationError
from dicom_node.observability import get_logger
from dicom_node.settings import NodeSettings

DROPPED = Counter("dicom_node_audit_dropped", "Audit messages that did not reach a sink.", ["sink"])

# RFC 5424 6.2.1: facility 10 (security and authorization), severity 5 (notice).
_PRIORITY: Final = 10 * 8 + 5
# PS3.15 A.6: the MSGID of these messages.
_MSGID: Final = "DICOM+RFC3881"
_APP_NAME: Final = "dicom-node"
_PORTS: Final = {"udp": 514, "tls": 6514}  # RFC 5426 3.3, RFC 5425 4.1
# RFC 5426 3.2: the most that fits a datagram over IPv4.
_DATAGRAM: Final = 65_507
_SEND_S: Final = 10.0
_RETRY_S: Final = 5.0
_TAIL: Final = 1 << 20

_log = get_logger(__name__)


def syslog_line(message: Message, source: Source, *, host: str, process: int) -> bytes:
    """The message as RFC 5424 has it, without line end; the XML is its MSG part, in UTF-8."""
    at = datetime.fromtimestamp(message.at, UTC).isoformat(timespec="milliseconds")
    head = f"<{_PRIORITY}>1 {at} {_printable(host)} {_APP_NAME} {process} {_MSGID} - "
    # RFC 5424 6.4: a byte order mark says that the text is UTF-8.
    return head.encode("ascii") + b"\xef\xbb\xbf" + to_xml(message, source)


def _printable(host: str) -> str:
    # RFC 5424 6: HOSTNAME is 1 to 255 printable ASCII characters without space.
    return re.sub(r"[^!-~]", "?", host)[:255] or "-"


class Journal:
    """The local file; each line is one message and is on disk when :meth:`append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def append(self, line: bytes) -> None:
        """Write one line; OSError where it cannot be.

        The file is opened anew each time, so it may be moved away for rotation at any moment; and
        one write with O_APPEND keeps the lines of several processes apart.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        with self._lock:
            descriptor = os.open(self._path, flags, 0o600)
            try:
                if os.fstat(descriptor).st_mode & 0o077:
                    os.fchmod(descriptor, 0o600)
                _write_all(descriptor, line + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _write_all(descriptor: int, octets: bytes) -> None:
    while octets:
        octets = octets[os.write(descriptor, octets) :]


class SyslogSender:
    """Sends lines to one syslog server from a thread and a queue of its own."""

    def __init__(
        self, server: str, *, limit: int, context: Callable[[], ssl.SSLContext] | None = None
    ) -> None:
        """*server* is ``udp://host:port`` or ``tls://host:port``; *context* is for the latter."""
        parts = urlsplit(server)
        self._kind = parts.scheme
        self._host = parts.hostname or ""
        self._port = parts.port or _PORTS[parts.scheme]
        self._context = context
        self._queue: queue.Queue[bytes] = queue.Queue(limit)
        self._connection: socket.socket | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="syslog", daemon=True)
        self._thread.start()

    def offer(self, line: bytes) -> None:
        """Queue a line; one that does not fit is counted and dropped."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            DROPPED.labels(sink="syslog").inc()

    def close(self, patience_s: float = 1.0) -> None:
        """Send what still waits for at most so long, then leave the rest: the journal has it."""
        self._stopping.set()
        with suppress(queue.Full):
            self._queue.put_nowait(b"")  # wakes an idle thread
        self._thread.join(patience_s)
        left = sum(1 for line in self._queue.queue if line)
        if left:
            DROPPED.labels(sink="syslog").inc(left)

    def _run(self) -> None:
        failing = False
        while not (self._stopping.is_set() and self._queue.empty()):
            line = self._queue.get()
            while line:
                try:
                    self._send(line)
                    failing = False
                    break
                except (OSError, ConfigurationError) as error:
                    self._hang_up()
                    if not failing:  # once for each time that it goes away
                        failing = True
                        _log.warning(
                            "syslog server does not take audit messages",
                            action="audit_syslog",
                            server=f"{self._kind}://{self._host}:{self._port}",
                            error=_words(error),
                        )
                    if self._stopping.wait(_RETRY_S):
                        DROPPED.labels(sink="syslog").inc()
                        break
        self._hang_up()

    def _send(self, line: bytes) -> None:
        if self._connection is None:
            self._connection = self._connect()
        if self._kind == "udp" and len(line) > _DATAGRAM:
            DROPPED.labels(sink="syslog").inc()
        elif self._kind == "udp":
            self._connection.send(line)
        else:
            # RFC 5425 4.3: the length in octets, a space, the message.
            self._connection.sendall(b"%d %s" % (len(line), line))

    def _connect(self) -> socket.socket:
        if self._kind == "udp":
            family, kind, protocol, _, where = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_DGRAM
            )[0]
            connection = socket.socket(family, kind, protocol)
            connection.connect(where)
            return connection
        assert self._context is not None
        plain = socket.create_connection((self._host, self._port), _SEND_S)
        try:
            return self._context().wrap_socket(plain, server_hostname=self._host)
        except BaseException:
            plain.close()
            raise

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(OSError):
                connection.close()


def _words(error: OSError | ConfigurationError) -> str:
    if isinstance(error, ConfigurationError):
        return error.message
    if isinstance(error, ssl.SSLError):
        return tls.failure_words(error)
    return error.strerror or type(error).__name__


class AuditTrail:
    """Takes messages for the journal and the syslog server; no method raises.

    :meth:`write` returns when the message is in the journal; :meth:`post` returns at once, for
    threads that must not wait for a disk.
    """

    def __init__(self, settings: NodeSettings) -> None:
        """A trail that is configured by ``[audit]``."""
        given = settings.audit
        self._source = Source(given.source_id or settings.node.ae_title, given.enterprise_site_id)
        self._host = socket.gethostname()
        self._journal = Journal(given.journal)
        self._journal_failing = False
        files = tls.TLSFiles.of(settings.tls)
        self._syslog = (
            SyslogSender(given.syslog, limit=given.queue, context=lambda: tls.client_context(files))
            if given.syslog is not None
            else None
        )
        self._posted: queue.Queue[Message | None] = queue.Queue(given.queue)
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def write(self, *messages: Message) -> None:
        """Put messages into the journal now and offer them to the syslog server."""
        for message in messages:
            line = syslog_line(message, self._source, host=self._host, process=os.getpid())
            try:
                self._journal.append(line)
                self._journal_failing = False
            except OSError as error:
                self._on_journal_error(error)
            if self._syslog is not None:
                self._syslog.offer(line)

    def post(self, message: Message) -> None:
        """Have a message written soon; one too many is counted and dropped."""
        try:
            self._posted.put_nowait(message)
        except queue.Full:
            DROPPED.labels(sink="journal").inc()

    def close(self) -> None:
        """Write what was posted, and give the syslog server a last second."""
        self._posted.put(None)
        self._thread.join(5.0)
        if self._syslog is not None:
            self._syslog.close()

    def _run(self) -> None:
        while (message := self._posted.get()) is not None:
            self.write(message)

    def _on_journal_error(self, error: OSError) -> None:
        DROPPED.labels(sink="journal").inc()
        if not self._journal_failing:
            self._journal_failing = True
            _log.error("audit journal not written", action="audit_journal", error=error.strerror)


# --- reading it again


@dataclass(frozen=True)
class Alert:
    """A Security Alert of the journal, for a person: when, who, and why."""

    at: str
    peer: str
    address: str
    why: str


def last_alerts(journal: Path, limit: int = 10) -> list[Alert]:
    """The newest Security Alerts near the end of the journal, newest first.

    Nothing else of the journal is looked at, so no patient's name can get out this way.
    Raises OSError where the journal is not readable.
    """
    found = (alert for line in reversed(_tail(journal)) if (alert := _alert(line)) is not None)
    return [alert for _, alert in zip(range(limit), found, strict=False)]


def _tail(journal: Path) -> list[bytes]:
    with journal.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL))
        lines = stream.read().splitlines()
    return lines[1:] if size > _TAIL else lines


def _alert(line: bytes) -> Alert | None:
    _, _, xml = line.partition(b"\xef\xbb\xbf")
    if f'csd-code="{SECURITY_ALERT.value}"'.encode() not in xml:
        return None
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None  # a line that was cut by a full disk
    event, thing = root.find("EventIdentification"), root.find("ParticipantObjectIdentification")
    if event is None or thing is None:
        return None
    return Alert(
        at=event.get("EventDateTime", ""),
        peer=thing.findtext("ParticipantObjectName", ""),
        address=thing.get("ParticipantObjectID", ""),
        why="; ".join(_details(thing.iter("ParticipantObjectDetail"))),
    )


def _details(elements: Iterable[Any]) -> Iterator[str]:
    for element in elements:
        with suppress(ValueError):
            yield base64.b64decode(element.get("value", "")).decode("utf-8", "replace")
