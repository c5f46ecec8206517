"""Storage Commitment as SCU: ask a destination to keep what it has stored (PS3.4 J).

Off unless ``delivery.commitment`` is set.  The N-ACTION request names every instance of a
delivered series; the destination's N-EVENT-REPORT comes later, on an association that it opens to
us in the reversed role, and only writes rows.
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
from dicom_node.ledger import outbox, reports
from dicom_node.ledger.tables import ItemState
from dicom_node.observability import get_logger
from dicom_node.requestor import associate

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
) -> str:
    """Ask *peer* with N-ACTION to commit *references*; returns the Transaction UID.

    The row is written first: the report may come before the answer to the request.  *linger_s* is
    how long to wait for a report on the same association, for peers that do not open their own.
    Raises DestinationError or DestinationRefusedError where the request was not taken.
    """
    transaction_uid = str(generate_uid(prefix=None))
    outbox.request_commitment(engine, delivery_id, transaction_uid=transaction_uid, now=clock())
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
    return transaction_uid


def requester(engine: Engine, clock: Clock = time.time) -> Callable[[outbox.Delivery, Peer], None]:
    """What asks for the commitment of a series that has just been delivered."""

    def ask(delivery: outbox.Delivery, peer: Peer) -> None:
        items = reports.delivery(engine, delivery.id)["items"]
        references = [
            Reference(item["sop_class_uid"], item["sop_instance_uid"])
            for item in items
            if item["state"] == ItemState.DELIVERED
        ]
        request(peer, engine, delivery.id, references, clock=clock)

    return ask


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
        known = outbox.report_commitment(
            engine,
            report.transaction_uid,
            committed=report.committed,
            failed=report.failed,
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
