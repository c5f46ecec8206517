"""C-STORE and C-ECHO as SCP: check, make durable, record, answer (PS3.4 B).

0x0000 goes out only when the bytes lie flushed in the spool and the row is committed.  The
stored bytes are the bytes received; a data set is never decoded and encoded again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dsutils import create_file_meta, encode_file_meta
from pynetdicom.events import Event
from pynetdicom.transport import ThreadedAssociationServer
from sqlalchemy import Engine

from dicom_node.access import Requestor, access_rules, admit, normal_title
from dicom_node.association import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    EventHandler,
    configure_protocol,
    contexts_scp,
    on_connection,
)
from dicom_node.dicom.header import (
    RESTORABLE,
    InstanceSummary,
    instance_summary,
    read_header,
    valid_uid,
    why_ignored,
)
from dicom_node.dicom.stream import check_whole
from dicom_node.errors import (
    ConfigurationError,
    LedgerError,
    MismatchError,
    NodeError,
    PermanentError,
    SpoolFullError,
    UnreadableInstanceError,
)
from dicom_node.ledger import intake, queue
from dicom_node.ledger.tables import InstanceState
from dicom_node.observability import get_logger
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool

Clock = Callable[[], float]

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700

_PREAMBLE = b"\0" * 128 + b"DICM"
_PIXEL_DATA = frozenset({(0x7FE0, 0x0010), (0x7FE0, 0x0009), (0x7FE0, 0x0008)})
_DRAIN_POLL_S = 0.02

_log = get_logger(__name__)


@dataclass(frozen=True)
class Incoming:
    """One C-STORE request: the command set's two UIDs and the data set as it was sent."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    data_set: bytes
    association_id: int | None = None

    @classmethod
    def of(cls, event: Event, association_id: int | None) -> Incoming:
        """The request of an EVT_C_STORE event; a missing parameter becomes empty."""
        request = event.request
        stream = getattr(request, "DataSet", None)
        return cls(
            sop_class_uid=str(getattr(request, "AffectedSOPClassUID", None) or ""),
            sop_instance_uid=str(getattr(request, "AffectedSOPInstanceUID", None) or ""),
            transfer_syntax_uid=str(event.context.transfer_syntax),
            data_set=stream.getvalue() if stream is not None else b"",
            association_id=association_id,
        )

    def as_file(self) -> bytes:
        """The instance as a PS3.10 file; the same instance always gives the same bytes."""
        meta = create_file_meta(
            sop_class_uid=UID(self.sop_class_uid),
            sop_instance_uid=UID(self.sop_instance_uid),
            transfer_syntax=UID(self.transfer_syntax_uid),
            implementation_uid=UID(IMPLEMENTATION_CLASS_UID),
            implementation_version=IMPLEMENTATION_VERSION_NAME,
        )
        return b"".join((_PREAMBLE, encode_file_meta(meta), self.data_set))


def check_instance(incoming: Incoming, file: bytes) -> tuple[InstanceSummary, Dataset]:
    """The identity and header of an instance that may be acknowledged.

    Raises UnreadableInstanceError for a data set that ends early, does not parse or has no
    valid UIDs, MismatchError where it contradicts the command set (PS3.4 B.2.3).
    """
    if not incoming.data_set:
        raise UnreadableInstanceError("the request has no data set")
    tags = check_whole(incoming.data_set, incoming.transfer_syntax_uid)
    header = read_header(file)
    summary = instance_summary(header)
    if summary.sop_class_uid != incoming.sop_class_uid:
        raise MismatchError("SOP Class UID differs between command and data set")
    if summary.sop_instance_uid != incoming.sop_instance_uid:
        raise MismatchError("SOP Instance UID differs between command and data set")
    if summary.sop_class_uid in RESTORABLE and not tags & _PIXEL_DATA:
        raise UnreadableInstanceError("the data set ends early: no pixel data")
    return summary, header


class StorageReceiver:
    """Takes one instance at a time through check, spool and ledger to its DIMSE status."""

    def __init__(self, spool: Spool, engine: Engine, clock: Clock) -> None:
        self._spool = spool
        self._engine = engine
        self._clock = clock

    def receive(self, incoming: Incoming) -> tuple[int, str]:
        """Store one instance; its status and, for a failure, why in at most 64 characters."""
        try:
            state = self._store(incoming)
        except PermanentError as error:
            self._reject(incoming, error)
            return error.dimse_status, error.message[:64]
        except NodeError as error:
            _log.error(
                "instance not stored",
                action="instance_refused",
                sop_instance_uid=incoming.sop_instance_uid,
                error=error.message,
            )
            return error.dimse_status, error.message[:64]
        _log.debug(
            "instance stored",
            action="instance_stored",
            sop_instance_uid=incoming.sop_instance_uid,
            state=state.value,
        )
        return SUCCESS, ""

    def _store(self, incoming: Incoming) -> InstanceState:
        if not self._spool.has_room(len(incoming.data_set)):
            raise SpoolFullError("the spool has no room; try again later")
        if not valid_uid(incoming.sop_instance_uid) or not valid_uid(incoming.sop_class_uid):
            raise UnreadableInstanceError("the command set names no valid SOP Instance")
        file = incoming.as_file()
        summary, header = check_instance(incoming, file)
        ignored = why_ignored(header) or self._why_own(summary)
        # File before row: a crash between the two leaves an orphan file, which is adopted.
        stored = self._spool.write(file)
        instance = intake.ReceivedInstance(
            sop_instance_uid=summary.sop_instance_uid,
            sop_class_uid=summary.sop_class_uid,
            study_instance_uid=summary.study_instance_uid,
            series_instance_uid=summary.series_instance_uid,
            modality=summary.modality,
            transfer_syntax_uid=incoming.transfer_syntax_uid,
            path=stored.path,
            sha256=stored.sha256,
            size=stored.size,
            association_id=incoming.association_id,
            ignored_reason=ignored,
        )
        return intake.record_instance(self._engine, instance, self._clock())

    def _why_own(self, summary: InstanceSummary) -> str | None:
        own = queue.is_own_output(
            self._engine,
            sop_instance_uid=summary.sop_instance_uid,
            series_instance_uid=summary.series_instance_uid,
        )
        return "our own output: it came back to us" if own else None

    def _reject(self, incoming: Incoming, error: PermanentError) -> None:
        """Keep what was refused, for support; failing to do so does not change the answer."""
        _log.warning(
            "instance rejected",
            action="instance_rejected",
            status=f"0x{error.dimse_status:04X}",
            reason=error.message,
        )
        uid = incoming.sop_instance_uid if valid_uid(incoming.sop_instance_uid) else None
        try:
            kept = self._spool.quarantine(_rejected_bytes(incoming), error.message)
            intake.reject_instance(
                self._engine,
                sop_instance_uid=uid,
                path=kept.path,
                reason=error.message,
                association_id=incoming.association_id,
                now=self._clock(),
            )
        except NodeError as failure:
            _log.error(
                "rejected instance not kept", action="quarantine_failed", error=failure.message
            )


def _rejected_bytes(incoming: Incoming) -> bytes:
    """A rejected instance as a file, or its bare data set where its UIDs make no file."""
    if valid_uid(incoming.sop_instance_uid) and valid_uid(incoming.sop_class_uid):
        return incoming.as_file()
    return incoming.data_set


class StorageSCP:
    """The listening application entity of the receive role."""

    def __init__(
        self,
        settings: NodeSettings,
        spool: Spool,
        engine: Engine,
        clock: Clock = time.time,
        *,
        handlers: Sequence[EventHandler] = (),
    ) -> None:
        """*handlers* are bound beside our own, as for Storage Commitment's reports."""
        self._settings = settings
        self._engine = engine
        self._clock = clock
        self._receiver = StorageReceiver(spool, engine, clock)
        self._rules = access_rules(settings)
        self._handlers = [*self._own_handlers(), *handlers]
        self._associations: dict[Association, int] = {}
        self._lock = threading.Lock()
        self._server: ThreadedAssociationServer | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that we listen on; RuntimeError before :meth:`start`."""
        if self._server is None:
            raise RuntimeError("the storage SCP is not listening")
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def start(self) -> None:
        """Listen; ConfigurationError where the address cannot be bound."""
        intake.close_lost_associations(self._engine, self._clock())
        node, given = self._settings.node, self._settings.association
        entity = _entity(self._settings)
        try:
            self._server = entity.start_server(
                (node.host, node.port),
                block=False,
                evt_handlers=self._handlers,
                contexts=contexts_scp(),
            )
        except OSError as error:
            why = f"node.host, node.port: cannot listen on {node.host}:{node.port}"
            raise ConfigurationError([f"{why}: {error.strerror or error}"]) from error
        host, port = self.address
        _log.info(
            "listening", action="listening", host=host, port=port, limit=given.max_associations
        )

    def stop(self, drain_s: float = 5.0) -> None:
        """Stop listening, let open associations end for *drain_s* seconds, abort the rest."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        deadline = time.monotonic() + drain_s
        while server.active_associations and time.monotonic() < deadline:
            time.sleep(_DRAIN_POLL_S)
        for association in server.active_associations:
            association.abort()

    def _own_handlers(self) -> list[EventHandler]:
        return [
            (evt.EVT_CONN_OPEN, on_connection),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_ESTABLISHED, self._on_established),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_RELEASED, self._on_end, ["released"]),
            (evt.EVT_ABORTED, self._on_end, ["aborted"]),
            (evt.EVT_CONN_CLOSE, self._on_close),
        ]

    def _on_requested(self, event: Event) -> None:
        admission = admit(_requestor(event), self._rules)
        if admission.accepted:
            return
        _log.warning(
            "association rejected",
            action="association_rejected",
            why=admission.why,
            address=event.assoc.requestor.address,
        )
        event.assoc.acse.send_reject(admission.result, admission.source, admission.diagnostic)
        event.assoc.kill()

    def _on_established(self, event: Event) -> None:
        requestor = _requestor(event)
        try:
            opened = intake.open_association(
                self._engine,
                calling_ae=normal_title(requestor.calling_ae),
                called_ae=normal_title(requestor.called_ae),
                address=requestor.address,
                now=self._clock(),
            )
        except LedgerError as error:
            # The association stays up: each C-STORE is answered 0xA700 until the ledger is back.
            _log.error("association not recorded", action="ledger_down", error=error.message)
            return
        with self._lock:
            self._associations[event.assoc] = opened

    def _on_store(self, event: Event) -> int | Dataset:
        with self._lock:
            association_id = self._associations.get(event.assoc)
        try:
            status, why = self._receiver.receive(Incoming.of(event, association_id))
        except Exception as error:
            # Nothing says that the instance is at fault, so the sender should keep it.
            _log.error("C-STORE failed", action="unexpected_error", error=type(error).__name__)
            status, why = OUT_OF_RESOURCES, "internal error; try again later"
        return _response(status, why)

    def _on_close(self, event: Event) -> None:
        """The connection went without a word, or its event overtook that of the release."""
        self._on_end(event, "released" if event.assoc.is_released else "aborted")

    def _on_end(self, event: Event, outcome: intake.Outcome) -> None:
        with self._lock:
            association_id = self._associations.pop(event.assoc, None)
        if association_id is None:
            return
        try:
            intake.close_association(self._engine, association_id, outcome, self._clock())
        except LedgerError as error:
            _log.error("association end not recorded", action="ledger_down", error=error.message)


def _entity(settings: NodeSettings) -> AE:
    configure_protocol()
    given = settings.association
    entity = AE(ae_title=settings.node.ae_title)
    entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    entity.maximum_associations = given.max_associations
    entity.maximum_pdu_size = given.max_pdu
    entity.acse_timeout = given.acse_timeout_s
    entity.dimse_timeout = given.dimse_timeout_s
    entity.network_timeout = given.network_timeout_s
    return entity


def _requestor(event: Event) -> Requestor:
    request: Any = event.assoc.requestor.primitive
    return Requestor(
        calling_ae=request.calling_ae_title or "",
        called_ae=request.called_ae_title or "",
        address=event.assoc.requestor.address or "",
    )


def _response(status: int, why: str) -> int | Dataset:
    """The status alone, or with Error Comment (0000,0902), which peers show to people."""
    if not why:
        return status
    response = Dataset()
    response.Status = status
    response.ErrorComment = why
    return response
