"""Transfers as audit messages: from the ledger's rows and the headers in the spool.

What was received is told for an association as a whole, one message for each study, from what the
ledger holds of it.  So nothing is done for an instance, nothing is kept in memory, and what a
killed process had received is told by the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sqlalchemy import Engine

from dicom_node import audit
from dicom_node.audit import RemoteNode, Study
from dicom_node.audit_trail import AuditTrail
from dicom_node.dicom.header import quiet_pydicom, read_header, text
from dicom_node.errors import NodeError
from dicom_node.ledger import reports
from dicom_node.observability import get_logger
from dicom_node.spool import Spool

Clock = Callable[[], float]

_log = get_logger(__name__)


@dataclass(frozen=True)
class Receipts:
    """Tells the audit trail of what associations have brought."""

    trail: AuditTrail
    engine: Engine
    spool: Spool
    ae_title: str
    clock: Clock

    def refused(self, peer: RemoteNode, why: str, *, authentication: bool) -> None:
        """A peer was turned away; returns at once."""
        self.trail.post(
            audit.node_refused(
                self.ae_title, peer, why, self.clock(), authentication=authentication
            )
        )

    def ended(self, association_id: int, *, lost: bool = False) -> None:
        """Tell of an association that ends; call before its end is recorded.

        A crash between the two tells of it twice: a trail may repeat, it must not omit.
        """
        try:
            for held, read in ((False, reports.transfers), (True, reports.repeats)):
                for study, rows in _by_study(read(self.engine, association_id)):
                    peer = RemoteNode(rows[0].calling_ae, rows[0].address)
                    self.trail.write(
                        audit.instances_received(
                            self.ae_title,
                            peer,
                            _study(self.spool, study, rows),
                            self.clock(),
                            held=held,
                            description="the receiving process was killed" if lost else "",
                        )
                    )
        except NodeError as error:
            _log.error("association not audited", action="audit", error=error.message)

    def lost(self) -> None:
        """Tell of what a killed process left open; call before those are closed."""
        try:
            left = reports.open_associations(self.engine)
        except NodeError as error:
            _log.error("lost associations not audited", action="audit", error=error.message)
            return
        for association_id in left:
            self.ended(association_id, lost=True)


class Item(Protocol):
    """What is told of one instance that is sent."""

    @property
    def path(self) -> str:
        """Its file in the spool."""

    @property
    def sop_class_uid(self) -> str:
        """Its SOP Class."""


@dataclass(frozen=True)
class Dispatches:
    """Tells the audit trail of series that the node sends."""

    trail: AuditTrail
    spool: Spool
    ae_title: str
    clock: Clock

    def begun(self, to: RemoteNode, items: Sequence[Item]) -> Study | None:
        """An attempt to send *items* of one series begins; the study that :meth:`ended` takes."""
        identity = _identity(self.spool, [item.path for item in items])
        if identity is None:
            _log.error("delivery not audited", action="audit", error="no header can be read")
            return None
        study = Study(*identity, Counter(item.sop_class_uid for item in items))
        self.trail.write(audit.begin_transferring(self.ae_title, to, [study], self.clock()))
        return study

    def ended(
        self, to: RemoteNode, begun: Study | None, delivered: Mapping[str, int], why: str
    ) -> None:
        """The attempt has ended: *delivered* by SOP Class, and *why* not all of them.

        What succeeded and what failed are two messages (A.5.2).
        """
        if begun is None:
            return
        left = Counter(begun.sop_classes)
        left.subtract(delivered)
        for classes, failed in ((delivered, ""), (+left, why or "the attempt was interrupted")):
            if classes:
                study = replace(begun, sop_classes=dict(classes))
                self.trail.write(
                    audit.instances_sent(self.ae_title, to, study, self.clock(), failed=failed)
                )


def _by_study(
    transfers: Iterable[reports.Transfer],
) -> list[tuple[str, list[reports.Transfer]]]:
    studies: dict[str, list[reports.Transfer]] = {}
    for transfer in transfers:
        studies.setdefault(transfer.study_instance_uid, []).append(transfer)
    return list(studies.items())


def _study(spool: Spool, uid: str, rows: Sequence[reports.Transfer]) -> Study:
    sop_classes = {row.sop_class_uid: row.instances for row in rows}
    _, patient_id, patient_name = _identity(spool, [row.path for row in rows]) or ("", "", "")
    return Study(uid, patient_id, patient_name, sop_classes)


def _identity(spool: Spool, paths: Iterable[str]) -> tuple[str, str, str] | None:
    """Study, Patient ID and Patient's Name of the first instance that can be read."""
    for path in paths:
        try:
            with quiet_pydicom():
                header = read_header(spool.resolve(path))
                return (
                    text(header, "StudyInstanceUID"),
                    text(header, "PatientID"),
                    text(header, "PatientName"),
                )
        except (NodeError, OSError):
            continue
    return None
