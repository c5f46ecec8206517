"""Storage Commitment as SCU: ask a destination to keep what it has stored (PS3.4 J).

Off unless ``delivery.commitment``, or that of the destination, is set.  The N-ACTION request names
every instance of a delivered series; the N-EVENT-REPORT comes in the reversed role, on the same
association or later on one that the destination opens to us, and only writes rows.  Where none
comes in time, it is asked for again, with a new Transaction UID.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import build_context, evt
from pynetdicom.events import Event
from sqlalchemy import Engine

from dicom_node.association import STORAGE_COMMITMENT, EventHandler, Peer
from dicom_node.dicom.header import quiet_pydicom, text
from dicom_node.errors import DestinationError, DestinationRefusedError, LedgerError
from dicom_node.ledger import commitments, custody
from dicom_node.observability import get_logger
from dicom_node.requestor import associate
from dicom_node.settings import NodeSettings

Clock = Callable[[], float]

# PS3.4 J.3.5: the well-known SOP Instance of the Push Model; action type 1 requests.
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
REQUEST_COMMITMENT = 1

# PS3.7 C.5: answers to an N-EVENT-REPORT.
SUCCESS = 0x0000
INVALID_ARGUMENT = 0x0115
RESOURCE_LIMITATION = 0x0213
# PS3.3 C.14.1.1: processing failure, where a failed item states no reason.
_UNSTATED = 0x0110

_log = get_logger(__name__)


@dataclass(frozen=True)
class Reference:
    """One SOP Instance that the destination is asked to keep."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True)
class Report:
    """One N-EVENT-REPORT: what is committed, and what failed with its Failure Reason."""

    transaction_uid: str
    committed: tuple[str, ...]
    failed: Mapping[str, int]


def request(
    peer: Peer,
    engine: Engine,
    delivery_id: int,
    references: Sequence[Reference],
    *,
    clock: Clock,
    linger_s: float = 0.0,
    timeout_s: float | None = None,
) -> str:
    """Ask *peer* with N-ACTION to commit *references*; returns the Transaction UID.

    The row is written first: the report may come before the answer to the request.  *linger_s* is
    how long to wait for a report on the same association; *timeout_s*, after which the request is
    due again (None: never).
    Raises DestinationError or DestinationRefusedError where the request was not taken.
    """
    transaction_uid = str(generate_uid(prefix=None))
    now = clock()
    commitments.request_commitment(
        engine,
        delivery_id,
        transaction_uid=transaction_uid,
        now=now,
        next_ask=None if timeout_s is None else now + timeout_s,
    )
    ask(peer, engine, transaction_uid, references, clock=clock, linger_s=linger_s)
    return transaction_uid


def ask(
    peer: Peer,
    engine: Engine,
    transaction_uid: str,
    references: Sequence[Reference],
    *,
    clock: Clock,
    linger_s: float = 0.0,
) -> None:
    """The N-ACTION of a transaction whose row is written; raises as :func:`request`."""
    reported = threading.Event()
    context = build_context(STORAGE_COMMITMENT, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    with associate(
        peer, [context], handlers=[*handlers(engine, clock, reported)], as_scp=[STORAGE_COMMITMENT]
    ) as association:
        answer, _ = association.send_n_action(
            action_information(transaction_uid, references),
            REQUEST_COMMITMENT,
            STORAGE_COMMITMENT,
            PUSH_MODEL_INSTANCE,
        )
        _check(peer, answer)
        reported.wait(linger_s)


class CommitmentWorker:
    """Asks for what is due: of each delivered series until it is committed, or given up."""

    def __init__(self, settings: NodeSettings, engine: Engine, clock: Clock = time.time) -> None:
        self._settings = settings
        self._engine = engine
        self._clock = clock

    def run_once(self) -> bool:
        """Ask for one series; False when none is due."""
        delivery = self._settings.delivery
        outstanding = commitments.claim_outstanding(
            self._engine, lease_s=delivery.lease_s, now=self._clock()
        )
        if outstanding is None:
            return False
        if outstanding.asks >= delivery.commitment_asks:
            reason = f"not committed after {outstanding.asks} requests"
            self._give_up(outstanding, reason)
        else:
            self._ask(outstanding)
        return True

    def _ask(self, outstanding: commitments.Outstanding) -> None:
        destination = self._settings.destinations.get(outstanding.destination)
        if destination is None:
            self._give_up(outstanding, "the destination is no longer configured")
            return
        delivery = self._settings.delivery
        try:
            request(
                Peer.of(destination, self._settings),
                self._engine,
                outstanding.delivery_id,
                [Reference(*one) for one in outstanding.instances],
                clock=self._clock,
                linger_s=delivery.commitment_wait_s,
                timeout_s=delivery.commitment_timeout_s,
            )
        except DestinationRefusedError as error:
            self._give_up(outstanding, error.message)
        except DestinationError as error:
            # It counts as a request, and is due again as one without a report.
            _log.warning(
                "commitment not requested",
                action="commitment",
                delivery=outstanding.delivery_id,
                error=error.message,
            )

    def _give_up(self, outstanding: commitments.Outstanding, reason: str) -> None:
        now = self._clock()
        if commitments.give_up(self._engine, outstanding.delivery_id, reason=reason, now=now):
            _log.error(
                "delivery not committed",
                action="commitment",
                delivery=outstanding.delivery_id,
                destination=outstanding.destination,
                reason=reason,
            )


def action_information(transaction_uid: str, references: Sequence[Reference]) -> Dataset:
    """The Action Information of PS3.4 Table J.3-1."""
    information = Dataset()
    information.TransactionUID = transaction_uid
    items = []
    for reference in references:
        item = Dataset()
        item.ReferencedSOPClassUID = reference.sop_class_uid
        item.ReferencedSOPInstanceUID = reference.sop_instance_uid
        items.append(item)
    information.ReferencedSOPSequence = DicomSequence(items)
    return information


def _check(peer: Peer, answer: Dataset) -> None:
    status = int(answer.Status) if "Status" in answer else None
    if status is None:
        raise DestinationError(f"{peer.where}: no answer to the Storage Commitment request")
    if status == RESOURCE_LIMITATION:
        raise DestinationError(f"{peer.where}: no resources for Storage Commitment for now")
    if status != SUCCESS:
        raise DestinationRefusedError(
            f"{peer.where}: refuses the Storage Commitment request (0x{status:04X})"
        )


def handlers(
    engine: Engine, clock: Clock = time.time, reported: threading.Event | None = None
) -> list[EventHandler]:
    """What the listening application entity binds to take the reports."""
    return [(evt.EVT_N_EVENT_REPORT, on_report, [engine, clock, reported])]


def on_report(
    event: Event, engine: Engine, clock: Clock, reported: threading.Event | None
) -> tuple[int, None]:
    """Write the rows of a report; its answer tells the archive whether to report again."""
    try:
        with quiet_pydicom():
            report = read_report(event.event_information)
    except Exception as error:
        # pynetdicom decodes here; whatever a peer can send must still be answered.
        _log.warning("report does not parse", action="commitment", error=type(error).__name__)
        return INVALID_ARGUMENT, None
    status = record_report(engine, report, clock())
    if reported is not None:
        reported.set()
    return status, None


def read_report(information: Dataset) -> Report:
    """The Event Information of PS3.4 Table J.3-2."""
    failed = {
        text(item, "ReferencedSOPInstanceUID"): int(item.get("FailureReason") or _UNSTATED)
        for item in information.get("FailedSOPSequence") or ()
    }
    committed = (
        text(item, "ReferencedSOPInstanceUID")
        for item in information.get("ReferencedSOPSequence") or ()
    )
    return Report(text(information, "TransactionUID"), tuple(committed), failed)


def record_report(engine: Engine, report: Report, now: float) -> int:
    """Write a report to the ledger; the DIMSE status to answer it with."""
    try:
        known = commitments.report_commitment(
            engine,
            report.transaction_uid,
            committed=report.committed,
            failed=report.failed,
            now=now,
        ) or custody.report_inquiry(
            # An archive's report on originals, which peers have asked us to answer for.
            engine,
            report.transaction_uid,
            committed=report.committed,
            now=now,
        )
    except LedgerError as error:
        _log.error("report not recorded", action="ledger_down", error=error.message)
        return RESOURCE_LIMITATION
    _log.info(
        "commitment reported",
        action="commitment",
        transaction_uid=report.transaction_uid,
        known=known,
        committed=len(report.committed),
        failed=len(report.failed),
    )
    return SUCCESS if known else INVALID_ARGUMENT
