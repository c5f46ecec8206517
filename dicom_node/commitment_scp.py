"""Storage Commitment as SCP, for those who send to us (PS3.4 J): off unless a site turns it on.

A scanner may delete its copy on our word.  So we do not give our own word but an archive's: an
instance is committed once one of ``commitment_scp.archives`` has committed to keep the original.
The request is written down before it is answered; the report comes on an association that we open
to the requestor, in the reversed role.  Until then the original stays in the spool: `custody`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import build_context, evt
from pynetdicom.events import Event
from sqlalchemy import Engine

from dicom_node.access import normal_title
from dicom_node.association import STORAGE_COMMITMENT, EventHandler, Peer
from dicom_node.backoff import next_attempt
from dicom_node.commitment import (
    INVALID_ARGUMENT,
    PUSH_MODEL_INSTANCE,
    REQUEST_COMMITMENT,
    RESOURCE_LIMITATION,
    SUCCESS,
    Reference,
    ask,
)
from dicom_node.dicom.header import quiet_pydicom, text, valid_uid
from dicom_node.errors import DestinationError, LedgerError, NodeError
from dicom_node.ledger import custody
from dicom_node.ledger.custody import OpenOriginal, Original, Verdict
from dicom_node.observability import get_logger
from dicom_node.requestor import associate
from dicom_node.settings import CommitmentRequestor, CommitmentSCPSettings, NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_scu import Sendable, send_all
from dicom_node.tls import TLSFiles

Clock = Callable[[], float]

# PS3.7 C.5.
CLASS_NOT_SUPPORTED, NO_SUCH_ACTION, NO_SUCH_OBJECT, NOT_AUTHORIZED = 0x0122, 0x0123, 0x0112, 0x0124
# PS3.4 J.3.3: event types.
_ALL_COMMITTED, _FAILURES_EXIST = 1, 2

_log = get_logger(__name__)


def handlers(
    settings: CommitmentSCPSettings, engine: Engine, clock: Clock = time.time
) -> list[EventHandler]:
    """What the listening application entity binds to take requests."""
    return [(evt.EVT_N_ACTION, on_action, [settings, engine, clock])]


def on_action(
    event: Event, settings: CommitmentSCPSettings, engine: Engine, clock: Clock
) -> tuple[int, None]:
    """Write a request down; Success once it is durable."""
    requestor = normal_title(str(event.assoc.requestor.ae_title))
    status = _why_refused(event, requestor, settings)
    if status is None:
        status = _record(event, requestor, settings, engine, clock())
    _log.info(
        "commitment asked of us",
        action="commitment_request",
        requestor=requestor,
        status=f"0x{status:04X}",
    )
    return status, None


def _why_refused(event: Event, requestor: str, settings: CommitmentSCPSettings) -> int | None:
    if not settings.enabled:
        return CLASS_NOT_SUPPORTED
    if requestor_named(settings, requestor) is None:
        return NOT_AUTHORIZED
    if getattr(event.request, "RequestedSOPInstanceUID", None) != PUSH_MODEL_INSTANCE:
        return NO_SUCH_OBJECT
    return None if event.action_type == REQUEST_COMMITMENT else NO_SUCH_ACTION


def _record(
    event: Event, requestor: str, settings: CommitmentSCPSettings, engine: Engine, now: float
) -> int:
    try:
        with quiet_pydicom():
            transaction_uid, originals = read_request(event.action_information)
    except Exception as error:
        # pynetdicom decodes here; whatever a peer can send must still be answered.
        _log.warning("request does not parse", action="commitment", error=type(error).__name__)
        return INVALID_ARGUMENT
    try:
        custody.record_request(
            engine,
            transaction_uid=transaction_uid,
            requestor=requestor,
            originals=originals,
            archives=settings.archives,
            now=now,
        )
    except LedgerError as error:
        _log.error("request not recorded", action="ledger_down", error=error.message)
        return RESOURCE_LIMITATION
    return SUCCESS


def read_request(information: Dataset) -> tuple[str, list[Original]]:
    """The Action Information of PS3.4 Table J.3-1; ValueError where a UID is none."""
    transaction_uid = text(information, "TransactionUID")
    originals = [
        Original(text(item, "ReferencedSOPClassUID"), text(item, "ReferencedSOPInstanceUID"))
        for item in information.get("ReferencedSOPSequence") or ()
    ]
    named = [transaction_uid, *(uid for one in originals for uid in _uids(one))]
    if not originals or not all(valid_uid(uid) for uid in named):
        raise ValueError("no transaction, or no instances")
    return transaction_uid, originals


def event_information(transaction_uid: str, verdict: Verdict) -> tuple[int, Dataset]:
    """The event type and the Event Information of a report (PS3.4 Table J.3-2)."""
    information = Dataset()
    information.TransactionUID = transaction_uid
    if verdict.committed:
        information.ReferencedSOPSequence = DicomSequence(map(_item, verdict.committed))
    if not verdict.failed:
        return _ALL_COMMITTED, information
    failed = []
    for original, reason in verdict.failed:
        item = _item(original)
        item.FailureReason = reason
        failed.append(item)
    information.FailedSOPSequence = DicomSequence(failed)
    return _FAILURES_EXIST, information


def requestor_named(settings: CommitmentSCPSettings, ae_title: str) -> CommitmentRequestor | None:
    """The requestor of that AE title, where it may ask."""
    return next((each for each in settings.requestors if each.ae_title == ae_title), None)


class CustodyWorker:
    """Brings each request to its report: asks the archives, waits, and tells the requestor."""

    def __init__(
        self,
        settings: NodeSettings,
        spool: Spool,
        engine: Engine,
        clock: Clock = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._settings = settings
        self._scp = settings.commitment_scp
        self._spool = spool
        self._engine = engine
        self._clock = clock
        # Jitter only spreads retries; it guards nothing.
        self._rng = rng or random.Random()

    def run_once(self) -> bool:
        """Take one request a step on; False when none is due."""
        lease = self._settings.delivery.lease_s
        request = custody.claim_request(self._engine, lease_s=lease, now=self._clock())
        if request is None:
            return False
        left = self._judge(request) if request.open else []
        if left:
            self._ask(request, left)
        else:
            self._report(request)
        return True

    def _judge(self, request: custody.Request) -> list[OpenOriginal]:
        """What archives are to be asked for; the verdict on the others is final."""
        is_late = self._clock() >= request.received_at + self._scp.answer_within_s
        reasons = {one.sop_instance_uid: _failure(one, is_late) for one in request.open}
        final = {uid: reason for uid, reason in reasons.items() if reason is not None}
        if final:
            custody.fail_items(self._engine, request.id, final)
        return [one for one in request.open if reasons[one.sop_instance_uid] is None]

    def _ask(self, request: custody.Request, left: Sequence[OpenOriginal]) -> None:
        for name in self._scp.archives:
            try:
                if self._scp.forward and request.asks:
                    # It was asked once, and has not committed to them: it may not have them.
                    self._forward(name, left)
                self._inquire(request, name, left)
            except NodeError as error:
                _log.warning(
                    "archive not asked", action="commitment", archive=name, error=error.message
                )
        end = request.received_at + self._scp.answer_within_s
        due = min(self._clock() + self._scp.ask_every_s, end)
        custody.ask_again(self._engine, request.id, asks=request.asks + 1, not_before=due)

    def _forward(self, archive: str, left: Sequence[OpenOriginal]) -> None:
        items = [
            Sendable(
                self._spool.resolve(one.path),
                one.sop_class_uid,
                one.sop_instance_uid,
                one.transfer_syntax_uid,
            )
            for one in left
            if one.path and one.transfer_syntax_uid
        ]
        sent = list(send_all(self._archive(archive), items))
        stored = sum(one.outcome == "delivered" for one in sent)
        _log.info(
            "originals forwarded", action="forwarded", archive=archive, stored=stored, of=len(left)
        )

    def _inquire(self, request: custody.Request, name: str, left: Sequence[OpenOriginal]) -> None:
        peer, transaction_uid = self._archive(name), str(generate_uid(prefix=None))
        custody.record_inquiry(
            self._engine,
            request.id,
            archive=name,
            transaction_uid=transaction_uid,
            now=self._clock(),
        )
        ask(
            peer,
            self._engine,
            transaction_uid,
            [Reference(one.sop_class_uid, one.sop_instance_uid) for one in left],
            clock=self._clock,
            linger_s=self._settings.delivery.commitment_wait_s,
        )

    def _archive(self, name: str) -> Peer:
        return Peer.of(self._settings.destinations[name], self._settings)

    def _report(self, request: custody.Request) -> None:
        verdict = custody.conclude_request(self._engine, request.id, self._clock())
        if verdict is None:
            return  # something was asked for meanwhile; it is due again as its lease ends
        try:
            self._send_report(request, verdict)
        except NodeError as error:
            self._report_later(request, error.message)
            return
        custody.reported(self._engine, request.id, self._clock())
        _log.info(
            "commitment reported to its requestor",
            action="commitment_reported",
            requestor=request.requestor,
            committed=len(verdict.committed),
            failed=len(verdict.failed),
        )

    def _send_report(self, request: custody.Request, verdict: Verdict) -> None:
        peer = self._requestor(request.requestor)
        kind, information = event_information(request.transaction_uid, verdict)
        contexts = [
            build_context(STORAGE_COMMITMENT, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        ]
        with associate(peer, contexts, as_scp=[STORAGE_COMMITMENT], as_scu=False) as association:
            try:
                answer, _ = association.send_n_event_report(
                    information, kind, STORAGE_COMMITMENT, PUSH_MODEL_INSTANCE
                )
            except ValueError as error:
                # pynetdicom's word for a context that was not accepted in this role.
                raise DestinationError(f"{peer.where}: takes no reports") from error
        status = int(answer.Status) if "Status" in answer else None
        if status != SUCCESS:
            words = "no answer" if status is None else f"0x{status:04X}"
            raise DestinationError(f"{peer.where}: did not take the report ({words})")

    def _requestor(self, ae_title: str) -> Peer:
        found = requestor_named(self._scp, ae_title)
        if found is None:
            raise DestinationError(f"requestor {ae_title!r} is no longer configured")
        node, limits = self._settings.node, self._settings.association
        return Peer(
            ae_title=found.ae_title,
            host=found.host,
            port=found.port,
            calling_ae=node.ae_title,
            acse_timeout=limits.acse_timeout_s,
            dimse_timeout=limits.dimse_timeout_s,
            network_timeout=limits.network_timeout_s,
            max_pdu=limits.max_pdu,
            tls=TLSFiles.of(self._settings.tls) if found.tls else None,
        )

    def _report_later(self, request: custody.Request, why: str) -> None:
        now, attempts = self._clock(), request.report_attempts + 1
        due = next_attempt(
            attempts,
            first_attempt=request.concluded_at or now,
            now=now,
            backoff=self._settings.delivery,
            jitter=self._rng.random(),
        )
        _log.warning(
            "report not taken",
            action="commitment",
            requestor=request.requestor,
            error=why,
            given_up=due is None,
        )
        custody.report_again(self._engine, request.id, attempts=attempts, not_before=due, now=now)


def _failure(one: OpenOriginal, is_late: bool) -> int | None:
    """The Failure Reason that is final for an original, or None while an archive may commit."""
    if one.received_class_uid is None:
        return custody.NO_SUCH_INSTANCE
    if one.received_class_uid != one.sop_class_uid:
        return custody.CLASS_INSTANCE_CONFLICT
    return custody.PROCESSING_FAILURE if is_late else None


def _uids(one: Original) -> tuple[str, str]:
    return one.sop_class_uid, one.sop_instance_uid


def _item(one: Original) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = _uids(one)
    return item
