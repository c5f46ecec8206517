"""Audit messages: the schema of PS3.15 A.5.1 and what A.5.3 demands of each."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest
from lxml import etree

from dicom_node import audit
from dicom_node.audit import Message, RemoteNode, Source, Study, to_xml
from tests.unit.dicom_node.audit_journal import parsed, schema

CT = "1.2.840.10008.5.1.4.1.1.2"
AT = 1_780_000_000.25
SCANNER = RemoteNode("CT1", "10.1.2.3")
STUDY = Study("1.2.3", "PID-1", "Doe^Jane", {CT: 3})

MESSAGES: dict[str, Callable[[], Message]] = {
    "start": lambda: audit.application_activity("DIFFCODE", AT, started=True),
    "stop": lambda: audit.application_activity("DIFFCODE", AT, started=False),
    "begin": lambda: audit.begin_transferring("DIFFCODE", SCANNER, [STUDY], AT),
    "sent": lambda: audit.instances_sent("DIFFCODE", SCANNER, STUDY, AT),
    "not sent": lambda: audit.instances_sent("DIFFCODE", SCANNER, STUDY, AT, failed="refused"),
    "received": lambda: audit.instances_received("DIFFCODE", SCANNER, STUDY, AT),
    "refused": lambda: audit.node_refused(
        "DIFFCODE", SCANNER, "no rule lets it in", AT, authentication=True
    ),
}


def message(name: str) -> etree._Element:
    return parsed(to_xml(MESSAGES[name](), Source("diffcode-1", "hospital")))


def codes(element: etree._Element, path: str) -> list[tuple[str | None, str | None, str | None]]:
    return [
        (each.get("csd-code"), each.get("codeSystemName"), each.get("originalText"))
        for each in element.findall(path)
    ]


def values(element: etree._Element, path: str, attribute: str) -> list[str | None]:
    return [each.get(attribute) for each in element.findall(path)]


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_is_valid_by_the_schema_and_on_one_line(name: str) -> None:
    xml = to_xml(MESSAGES[name](), Source("diffcode-1"))
    parsed(xml)
    assert b"\n" not in xml


def test_the_schema_of_the_test_refuses_what_it_should() -> None:
    good = message("received")
    good.remove(good.findall("ActiveParticipant")[0])
    good.remove(good.findall("ActiveParticipant")[0])
    assert not schema().validate(good)


# PS3.15 A.5.3: per message, Event ID, Action, Event Type, and (role, is requestor) by participant.
EVENTS = {
    "start": (("110100", "Application Activity"), "E", "110120", [("110150", "false")]),
    "stop": (("110100", "Application Activity"), "E", "110121", [("110150", "false")]),
    "begin": (("110102", "Begin Transferring DICOM Instances"), "E", None, None),
    "sent": (("110104", "DICOM Instances Transferred"), "R", None, None),
    "received": (("110104", "DICOM Instances Transferred"), "C", None, None),
    "refused": (("110113", "Security Alert"), "E", "110126", None),
}


@pytest.mark.parametrize("name", EVENTS)
def test_each_event_is_coded_as_its_clause_says(name: str) -> None:
    (value, meaning), action, kind, participants = EVENTS[name]
    given = message(name)
    assert codes(given, "EventIdentification/EventID") == [(value, "DCM", meaning)]
    assert values(given, "EventIdentification", "EventActionCode") == [action]
    assert [c[0] for c in codes(given, "EventIdentification/EventTypeCode")] == (
        [kind] if kind else []
    )
    if participants:  # A.5.3.1: the application itself is not the requestor
        first = given.find("ActiveParticipant")
        assert first is not None
        assert (codes(first, "RoleIDCode")[0][0], first.get("UserIsRequestor")) == participants[0]


@pytest.mark.parametrize("name", MESSAGES)
def test_at_most_one_participant_is_the_requestor(name: str) -> None:
    # A.5.2: "The system shall not identify multiple participants as UserIsRequestor."
    assert values(message(name), "ActiveParticipant", "UserIsRequestor").count("true") <= 1


@pytest.mark.parametrize("name", ["begin", "sent", "received"])
def test_a_transfer_names_source_destination_study_and_one_patient(name: str) -> None:
    given = message(name)
    # A.5.3.3 and A.5.3.7: Source Role ID (1), Destination Role ID (1).
    roles = [codes(each, "RoleIDCode")[0][0] for each in given.findall("ActiveParticipant")]
    assert sorted(map(str, roles)) == ["110152", "110153"]
    study, patient = given.findall("ParticipantObjectIdentification")
    kind = "ParticipantObjectIDTypeCode"
    assert codes(study, kind) == [("110180", "DCM", "Study Instance UID")]
    assert codes(patient, kind) == [("2", "RFC-3881", "Patient Number")]
    assert [
        (each.get("ParticipantObjectTypeCode"), each.get("ParticipantObjectTypeCodeRole"))
        for each in (study, patient)
    ] == [("2", "3"), ("1", "1")]
    assert study.get("ParticipantObjectID") == "1.2.3"
    (sop_class,) = study.findall("ParticipantObjectDescription/SOPClass")
    assert (sop_class.get("UID"), sop_class.get("NumberOfInstances")) == (CT, "3")
    assert patient.get("ParticipantObjectID") == "PID-1"
    assert patient.findtext("ParticipantObjectName") == "Doe^Jane"


def test_the_sender_is_the_requestor_of_what_it_sends() -> None:
    for name, requestor in (("received", "CT1"), ("sent", None)):
        by = [
            each.get("UserID")
            for each in message(name).findall("ActiveParticipant")
            if each.get("UserIsRequestor") == "true"
        ]
        assert (by == [requestor]) if requestor else (by != ["CT1"])


def test_titles_and_addresses_are_written_as_the_profile_says() -> None:
    scanner = message("received").find("ActiveParticipant")
    assert scanner is not None
    # A.5.2.2: "AETITLES=" and the titles, separated by semicolons; A.5.2.4: 2 is an IP address.
    assert scanner.get("AlternativeUserID") == "AETITLES=CT1"
    assert scanner.get("NetworkAccessPointID") == "10.1.2.3"
    assert scanner.get("NetworkAccessPointTypeCode") == "2"
    by_name = audit.begin_transferring("DIFFCODE", RemoteNode("P", "pacs.example"), [STUDY], AT)
    pacs = parsed(to_xml(by_name, Source("s"))).findall("ActiveParticipant")[1]
    assert pacs.get("NetworkAccessPointTypeCode") == "1"


def test_a_refusal_says_why_in_words_and_how_grave_it_is() -> None:
    given = message("refused")
    (detail,) = given.findall("ParticipantObjectIdentification/ParticipantObjectDetail")
    assert detail.get("type") == "Alert Description"
    assert base64.b64decode(str(detail.get("value"))) == b"no rule lets it in"
    assert values(given, "EventIdentification", "EventOutcomeIndicator") == ["8"]
    noise = audit.node_refused("DIFFCODE", SCANNER, "it spoke HTTP", AT, authentication=False)
    assert noise.outcome == 4


def test_the_time_is_utc_and_the_source_as_configured() -> None:
    given = message("start")
    assert values(given, "EventIdentification", "EventDateTime") == [
        "2026-05-28T20:26:40.250+00:00"
    ]
    source = given.find("AuditSourceIdentification")
    assert source is not None
    assert source.get("AuditSourceID") == "diffcode-1"
    assert source.get("AuditEnterpriseSiteID") == "hospital"


@pytest.mark.parametrize(
    "name", ['<a href="x">&amp;', "\x00\x1b$B", "Müller^Änne", "]]>\n--", "😀"]
)
def test_a_name_of_any_characters_makes_a_valid_message(name: str) -> None:
    study = Study("1.2.3", name, name, {})
    given = parsed(to_xml(audit.instances_received("D", SCANNER, study, AT), Source("s")))
    patient = given.findall("ParticipantObjectIdentification")[1]
    readable = name.replace("\x00", "?").replace("\x1b", "?").replace("\n", " ")
    assert patient.findtext("ParticipantObjectName") == readable
