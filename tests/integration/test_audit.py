"""The audit trail of a real node: what associations brought, who was refused, and what was sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from dicom_node.audit_trail import AuditTrail, last_alerts
from dicom_node.ledger import intake
from dicom_node.storage_scu import echo
from dicom_node.transfers import Receipts
from tests.integration.peers import CT, Node, connected, ct_slice, statuses, until, write
from tests.unit.dicom_node.audit_journal import audit_events, audit_messages

TRANSFERRED = "DICOM Instances Transferred"


def journal(node: Node) -> Path:
    return node.settings.audit.journal


def transfers(node: Node) -> list[etree._Element]:
    """The messages of received studies, once every association has ended."""
    until(node.all_released, "every association has ended")
    return [
        message
        for message in audit_messages(journal(node))
        if message.find(f"EventIdentification/EventID[@originalText='{TRANSFERRED}']") is not None
    ]


def told(message: etree._Element) -> tuple[str | None, str | None, dict[str | None, str | None]]:
    """Study, patient and instances by SOP Class of a transfer."""
    study, patient = message.findall("ParticipantObjectIdentification")
    classes = study.findall("ParticipantObjectDescription/SOPClass")
    return (
        study.get("ParticipantObjectID"),
        patient.get("ParticipantObjectID"),
        {each.get("UID"): each.get("NumberOfInstances") for each in classes},
    )


@pytest.mark.parametrize("end", ["release", "abort"])
def test_an_association_is_one_message_for_each_study(
    end: str, node_scp: Node, tmp_path: Path
) -> None:
    first = [ct_slice(number) for number in (1, 2, 3)]
    other = ct_slice(4, StudyInstanceUID="1.2.99", SeriesInstanceUID="1.2.99.1", PatientID="TWO")
    paths = [write(each, tmp_path / f"{n}.dcm") for n, each in enumerate([*first, other])]
    with connected(node_scp.peer("CT1"), paths) as association:
        assert set(statuses(association, paths)) == {0x0000}
        if end == "abort":
            association.abort()
    found = [told(message) for message in transfers(node_scp)]
    assert sorted(found, key=str) == sorted(
        [(str(first[0].StudyInstanceUID), "PHANTOM", {CT: "3"}), ("1.2.99", "TWO", {CT: "1"})],
        key=str,
    )


def test_what_is_sent_again_is_told_as_held_already(node_scp: Node, tmp_path: Path) -> None:
    # PS3.15 A.5.3.7: Read where the receiver holds the instances and need not change them.
    first, second, new = (write(ct_slice(n), tmp_path / f"{n}.dcm") for n in (1, 2, 3))
    study, patient = str(ct_slice(1).StudyInstanceUID), "PHANTOM"
    for paths in ([first, second], [first, second, second, new]):
        with connected(node_scp.peer("CT1"), paths) as association:
            assert set(statuses(association, paths)) == {0x0000}
        until(node_scp.all_released, "the association has ended")
    found = [(action(message), told(message)) for message in transfers(node_scp)]
    assert found == [
        ("C", (study, patient, {CT: "2"})),
        ("C", (study, patient, {CT: "1"})),
        ("R", (study, patient, {CT: "2"})),
    ]


def test_other_bytes_are_told_as_new_once_and_as_held_when_they_come_again(
    node_scp: Node, tmp_path: Path
) -> None:
    kept = write(ct_slice(1), tmp_path / "kept.dcm")
    other = write(ct_slice(1, PatientComments="other bytes"), tmp_path / "other.dcm")
    for paths in ([kept], [other], [other]):
        with connected(node_scp.peer("CT1"), paths) as association:
            assert statuses(association, paths) == [0x0000]
    # A conflict opens no series, so that the ledger's open associations say nothing of its end.
    until(lambda: len(transfers(node_scp)) == 3, "every association is told of")
    assert sorted(map(str, map(action, transfers(node_scp)))) == ["C", "C", "R"]


def action(message: etree._Element) -> str | None:
    """Event Action Code of a message."""
    event = message.find("EventIdentification")
    assert event is not None
    return event.get("EventActionCode")


def test_an_association_without_instances_is_no_transfer(node_scp: Node) -> None:
    assert echo(node_scp.peer()).ok
    assert transfers(node_scp) == []


def test_what_a_killed_process_had_received_is_told_by_the_next(
    node_scp: Node, tmp_path: Path
) -> None:
    path = write(ct_slice(1), tmp_path / "1.dcm")
    with connected(node_scp.peer("CT1"), [path]) as association:
        assert statuses(association, [path]) == [0x0000]
        # The ledger is what a process leaves that is killed here.
        trail = AuditTrail(node_scp.settings)
        receipts = Receipts(trail, node_scp.ledger, node_scp.spool, "DIFFCODE", lambda: 1.0)
        receipts.lost()
        trail.close()
        (message,) = audit_messages(journal(node_scp))
        assert told(message)[2] == {CT: "1"}
        said = message.findtext("EventIdentification/EventOutcomeDescription")
        assert said == "the receiving process was killed"
        assert intake.close_lost_associations(node_scp.ledger, 2.0) == 1


def test_a_refused_sender_is_a_security_alert_that_doctor_can_read(
    start_node: Callable[..., Node],
) -> None:
    node = start_node(association={"allow": [{"calling_ae": "CT1"}]})
    for _ in range(3):
        assert not echo(node.peer("STRANGER")).ok
    alerts = until(lambda: _alerts(node), "the refusal is in the journal")
    assert [(alert.peer, alert.address) for alert in alerts] == [("STRANGER", "127.0.0.1")]
    assert alerts[0].why == "calling AE title 'STRANGER' is in no rule of association.allow"
    assert audit_events(journal(node)) == [("Security Alert", "8")]


def _alerts(node: Node) -> list[Any]:
    return last_alerts(journal(node)) if journal(node).exists() else []
