"""C-STORE and C-ECHO as SCP: who is served by what (PS3.4 B).

pynetdicom negotiates.  The storage loop then serves C-STORE and C-ECHO, unless
``association.storage_loop`` is off; pynetdicom serves the rest.  Both give what arrives to one
:class:`StorageReceiver`, which answers 0x0000 once it is durable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from socket import socket
from typing import Any
from weakref import WeakKeyDictionary

from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu import A_ASSOCIATE_AC
from sqlalchemy import Engine

from dicom_node.acceptor import Acceptor
from dicom_node.access import access_rules, admit, normal_title
from dicom_node.association import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    EventHandler,
    configure_protocol,
    contexts_scp,
)
from dicom_node.audit import RemoteNode
from dicom_node.errors import LedgerError
from dicom_node.ledger import intake
from dicom_node.listener import Refusal
from dicom_node.observability import get_logger
from dicom_node.receiver import Answer, Reception, Request, StorageReceiver
from dicom_node.refusals import RefusalLog
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_loop import Context, Handover, StorageLoop, Timeouts, contexts_of
from dicom_node.transfers import Receipts
from dicom_node.upper_layer import CommandSet, Limits

Clock = Callable[[], float]

_log = get_logger(__name__)


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
        receipts: Receipts | None = None,
    ) -> None:
        """*handlers* are bound beside our own, as for Storage Commitment's reports.

        *receipts* tells the audit trail of refusals and of what associations brought.
        """
        self._settings = settings
        self._engine = engine
        self._clock = clock
        self._limits = limits(settings)
        self._receiver = StorageReceiver(spool, engine, clock, self._limits)
        self._rules = access_rules(settings)
        self._receipts = receipts
        self._handlers = [*self._own_handlers(), *handlers]
        self._associations: dict[Association, int] = {}
        self._handovers: WeakKeyDictionary[Association, Handover] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._acceptor: Acceptor | None = None

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of each port that we listen on, without TLS first.

        RuntimeError before :meth:`start` and after :meth:`stop`.
        """
        if self._acceptor is None:
            raise RuntimeError("the storage SCP is not listening")
        return self._acceptor.addresses

    @property
    def address(self) -> tuple[str, int]:
        """The first of :attr:`addresses`."""
        return self.addresses[0]

    def start(self) -> None:
        """Listen; ConfigurationError where an address cannot be bound or a TLS file be used."""
        if self._receipts is not None:
            self._receipts.lost()
        intake.close_lost_associations(self._engine, self._clock())
        acceptor = self._make_acceptor()
        acceptor.start()
        self._acceptor = acceptor
        for host, port in acceptor.addresses:
            _log.info("listening", action="listening", host=host, port=port)

    def _make_acceptor(self) -> Acceptor:
        return Acceptor(
            self._settings,
            _entity(self._settings),
            contexts=contexts_scp(self._settings.association.extra_storage_classes),
            handlers=self._handlers,
            admit=lambda requestor: admit(requestor, self._rules),
            refused=RefusalLog(self._on_refused),
        )

    def _on_refused(self, refusal: Refusal, left_out: int) -> None:
        if self._receipts is not None:
            more = f" ({left_out} more before it)" if left_out else ""
            self._receipts.refused(
                RemoteNode(refusal.calling_ae, refusal.address),
                f"{refusal.why}{more}",
                authentication=refusal.authentication or refusal.admission is not None,
            )

    def renew_certificates(self, *, force: bool = False) -> None:
        """Load the files of ``[tls]`` again where they have changed, or in any case."""
        if self._acceptor is not None:
            self._acceptor.renew_certificates(force=force)

    def stop(self, drain_s: float = 5.0) -> None:
        """Stop listening, let open associations end for *drain_s* seconds, abort the rest."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is not None:
            acceptor.stop(drain_s)

    def _own_handlers(self) -> list[EventHandler]:
        return [
            (evt.EVT_PDU_SENT, self._on_sent),
            (evt.EVT_ESTABLISHED, self._on_established),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_RELEASED, self._on_end, ["released"]),
            (evt.EVT_ABORTED, self._on_end, ["aborted"]),
            (evt.EVT_CONN_CLOSE, self._on_close),
        ]

    def _on_sent(self, event: Event) -> None:
        """Lend the connection to the loop as soon as the association is accepted."""
        if self._settings.association.storage_loop and isinstance(event.pdu, A_ASSOCIATE_AC):
            self._handover(event.assoc).lend()

    def _handover(self, association: Association) -> Handover:
        with self._lock:
            return self._handovers.setdefault(association, Handover())

    def _on_established(self, event: Event) -> None:
        association = event.assoc
        try:
            self._open(event)
        finally:
            # The DUL's thread waits for it, whatever happens here.
            if self._settings.association.storage_loop:
                self._handover(association).use(
                    association, lambda connection: self._loop(association, connection).run()
                )

    def _loop(self, association: Association, connection: socket) -> StorageLoop:
        with self._lock:
            association_id = self._associations.get(association)

        def begin(context: Context, command: CommandSet) -> Reception:
            return self._receiver.begin(
                Request(
                    sop_class_uid=command.sop_class_uid,
                    sop_instance_uid=command.sop_instance_uid,
                    transfer_syntax_uid=context.transfer_syntax,
                    association_id=association_id,
                )
            )

        return StorageLoop(
            connection,
            contexts_of(association),
            begin,
            limits=self._limits,
            timeouts=Timeouts(association.network_timeout, association.dimse_timeout),
        )

    def _open(self, event: Event) -> None:
        request: Any = event.assoc.requestor.primitive
        try:
            opened = intake.open_association(
                self._engine,
                calling_ae=normal_title(request.calling_ae_title or ""),
                called_ae=normal_title(request.called_ae_title or ""),
                address=event.assoc.requestor.address or "",
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
        request: Any = event.request
        answer = self._receiver.receive(
            Request(
                sop_class_uid=str(request.AffectedSOPClassUID or ""),
                sop_instance_uid=str(request.AffectedSOPInstanceUID or ""),
                transfer_syntax_uid=str(event.context.transfer_syntax),
                association_id=association_id,
            ),
            request.DataSet.getbuffer() if request.DataSet is not None else b"",
        )
        return _response(answer)

    def _on_close(self, event: Event) -> None:
        """The connection went without a word, or its event overtook that of the release."""
        self._on_end(event, "released" if event.assoc.is_released else "aborted")

    def _on_end(self, event: Event, outcome: intake.Outcome) -> None:
        with self._lock:
            association_id = self._associations.pop(event.assoc, None)
            handover = self._handovers.pop(event.assoc, None)
        if handover is not None:
            handover.end()
        if association_id is None:
            return
        if self._receipts is not None:
            self._receipts.ended(association_id)
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
    entity.maximum_pdu_size = given.max_pdu
    entity.acse_timeout = given.acse_timeout_s
    entity.dimse_timeout = given.dimse_timeout_s
    entity.network_timeout = given.network_timeout_s
    return entity


def limits(settings: NodeSettings) -> Limits:
    """What ``[limits]`` and ``[association]`` allow a peer."""
    given = settings.limits
    return Limits(
        pdu=settings.association.max_pdu,
        data_set=given.max_data_set_bytes,
        elements=given.max_elements,
        inflated=given.max_inflated_bytes,
    )


def _response(answer: Answer) -> int | Dataset:
    """The status alone, or with Error Comment (0000,0902), which peers show to people."""
    if not answer.comment:
        return answer.status
    response = Dataset()
    response.Status = answer.status
    response.ErrorComment = answer.comment
    return response
