"""Audit messages (PS3.15 A.5): what happened, who took part, to which patient's study.

Messages are data; :func:`to_xml` writes them by the schema of A.5.1.  Each function that makes
one names its clause of A.5.3.  Patient identifiers stand here because A.5.3 demands them, and
nowhere else but in the images themselves; where the messages go is :mod:`dicom_node.audit_trail`.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Final, Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

Action = Literal["C", "R", "U", "D", "E"]  # create, read, update, delete, execute
#: A.5.2: 0 success, 4 minor failure, 8 serious failure, 12 major failure.
Outcome = Literal[0, 4, 8, 12]


@dataclass(frozen=True)
class Code:
    """A coded value: PS3.16 Annex D unless the scheme says otherwise."""

    value: str
    meaning: str
    scheme: str = "DCM"


APPLICATION_ACTIVITY: Final = Code("110100", "Application Activity")
BEGIN_TRANSFERRING: Final = Code("110102", "Begin Transferring DICOM Instances")
INSTANCES_TRANSFERRED: Final = Code("110104", "DICOM Instances Transferred")
SECURITY_ALERT: Final = Code("110113", "Security Alert")

APPLICATION_START: Final = Code("110120", "Application Start")
APPLICATION_STOP: Final = Code("110121", "Application Stop")
NODE_AUTHENTICATION: Final = Code("110126", "Node Authentication")

APPLICATION: Final = Code("110150", "Application")
APPLICATION_LAUNCHER: Final = Code("110151", "Application Launcher")
DESTINATION_ROLE: Final = Code("110152", "Destination Role ID")
SOURCE_ROLE: Final = Code("110153", "Source Role ID")

STUDY_INSTANCE_UID: Final = Code("110180", "Study Instance UID")
NODE_ID: Final = Code("110182", "Node ID")
PATIENT_NUMBER: Final = Code("2", "Patient Number", "RFC-3881")

_PERSON, _SYSTEM = "1", "2"  # ParticipantObjectTypeCode
_ROLE_PATIENT, _ROLE_REPORT, _ROLE_SECURITY_RESOURCE = "1", "3", "13"
_MACHINE_NAME, _IP_ADDRESS = "1", "2"  # NetworkAccessPointTypeCode
_APPLICATION_SERVER = "4"  # AuditSourceTypeCode

# XML 1.0 2.2 forbids these even as references.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Source:
    """The system that reports (AuditSourceIdentification), as the configuration names it."""

    source_id: str
    enterprise_site_id: str | None = None


@dataclass(frozen=True)
class Participant:
    """A process that took part; *ae_titles* become its Alternative User ID (A.5.2.2)."""

    user_id: str
    requestor: bool
    role: Code | None = None
    ae_titles: tuple[str, ...] = ()
    address: str | None = None

    @classmethod
    def this_process(
        cls, ae_title: str, *, requestor: bool, role: Code | None = None
    ) -> Participant:
        """This process: A.5.2.1 asks for the process identifier of the operating system."""
        return cls(str(os.getpid()), requestor, role, (ae_title,))


@dataclass(frozen=True)
class Thing:
    """A participant object: its identifier, of which kind, and what else is known of it."""

    identifier: str
    kind: Code
    type_code: str
    role: str
    name: str = ""
    #: Instances by SOP Class UID; of a study alone.
    sop_classes: Mapping[str, int] | None = None
    #: Details by their type; A.5.1 has their values in base64.
    details: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Message:
    """One audit message; *at* is in seconds since 1970."""

    event: Code
    action: Action
    outcome: Outcome
    at: float
    participants: tuple[Participant, ...]
    things: tuple[Thing, ...] = ()
    event_type: Code | None = None
    description: str = ""


@dataclass(frozen=True)
class Study:
    """What of one study was transferred; patient identifiers as the instances have them."""

    study_instance_uid: str
    patient_id: str
    patient_name: str
    sop_classes: Mapping[str, int]


@dataclass(frozen=True)
class RemoteNode:
    """The other end of an association."""

    ae_title: str
    address: str

    def participant(self, *, requestor: bool, role: Code) -> Participant:
        """The remote process, of which only title and address are known."""
        return Participant(self.ae_title, requestor, role, (self.ae_title,), self.address)


def application_activity(ae_title: str, at: float, *, started: bool) -> Message:
    """A process of the node has started or stops (A.5.3.1)."""
    return Message(
        APPLICATION_ACTIVITY,
        "E",
        0,
        at,
        (
            Participant.this_process(ae_title, requestor=False, role=APPLICATION),
            Participant(f"uid {os.getuid()}", True, APPLICATION_LAUNCHER),
        ),
        event_type=APPLICATION_START if started else APPLICATION_STOP,
    )


def begin_transferring(
    ae_title: str, to: RemoteNode, studies: Sequence[Study], at: float
) -> Message:
    """The node begins to send studies of one patient (A.5.3.3)."""
    return Message(
        BEGIN_TRANSFERRING,
        "E",
        0,
        at,
        (
            Participant.this_process(ae_title, requestor=True, role=SOURCE_ROLE),
            to.participant(requestor=False, role=DESTINATION_ROLE),
        ),
        (*map(_study_thing, studies), _patient_thing(studies[0])),
    )


def instances_sent(
    ae_title: str, to: RemoteNode, study: Study, at: float, *, failed: str = ""
) -> Message:
    """The node has sent instances of a study, or failed to (A.5.3.7).

    The action is Read: the sender does not know what the receiver held before.
    """
    return Message(
        INSTANCES_TRANSFERRED,
        "R",
        4 if failed else 0,
        at,
        (
            Participant.this_process(ae_title, requestor=True, role=SOURCE_ROLE),
            to.participant(requestor=False, role=DESTINATION_ROLE),
        ),
        (_study_thing(study), _patient_thing(study)),
        description=failed,
    )


def instances_received(
    ae_title: str,
    sender: RemoteNode,
    study: Study,
    at: float,
    *,
    held: bool = False,
    description: str = "",
) -> Message:
    """The node has received instances of a study on one association (A.5.3.7).

    The action is Create, or Read where it *held* them already and what it holds stays as it is.
    """
    return Message(
        INSTANCES_TRANSFERRED,
        "R" if held else "C",
        0,
        at,
        (
            sender.participant(requestor=True, role=SOURCE_ROLE),
            Participant.this_process(ae_title, requestor=False, role=DESTINATION_ROLE),
        ),
        (_study_thing(study), _patient_thing(study)),
        description=description,
    )


def node_refused(
    ae_title: str, peer: RemoteNode, why: str, at: float, *, authentication: bool
) -> Message:
    """A peer was turned away (A.5.3.11, Node Authentication).

    A peer that failed to prove who it is, or that no rule lets in, is a serious failure: the
    action was ended.  One that merely speaks another protocol, or nothing, is a minor one.
    """
    return Message(
        SECURITY_ALERT,
        "E",
        8 if authentication else 4,
        at,
        (
            Participant.this_process(ae_title, requestor=True),
            Participant(
                peer.ae_title or peer.address,
                False,
                ae_titles=(peer.ae_title,) if peer.ae_title else (),
                address=peer.address,
            ),
        ),
        (
            Thing(
                peer.address,
                NODE_ID,
                _SYSTEM,
                _ROLE_SECURITY_RESOURCE,
                name=peer.ae_title or peer.address,
                details={"Alert Description": why},
            ),
        ),
        event_type=NODE_AUTHENTICATION,
        description=why,
    )


def _study_thing(study: Study) -> Thing:
    return Thing(
        study.study_instance_uid,
        STUDY_INSTANCE_UID,
        _SYSTEM,
        _ROLE_REPORT,
        name=study.study_instance_uid,
        sop_classes=study.sop_classes,
    )


def _patient_thing(study: Study) -> Thing:
    return Thing(study.patient_id, PATIENT_NUMBER, _PERSON, _ROLE_PATIENT, name=study.patient_name)


# --- the schema of A.5.1


def to_xml(message: Message, source: Source) -> bytes:
    """The message in UTF-8 on one line, without a declaration (RFC 5424 6.4 has none either)."""
    root = Element("AuditMessage")
    _event(root, message)
    for participant in message.participants:
        _participant(root, participant)
    _source(root, source)
    for thing in message.things:
        _thing(root, thing)
    text = ElementTree.tostring(root, encoding="unicode")
    return text.replace("\r", " ").replace("\n", " ").encode()


def _event(root: Element, message: Message) -> None:
    at = datetime.fromtimestamp(message.at, UTC).isoformat(timespec="milliseconds")
    event = SubElement(
        root,
        "EventIdentification",
        EventActionCode=message.action,
        EventDateTime=at,
        EventOutcomeIndicator=str(message.outcome),
    )
    _coded(event, "EventID", message.event)
    if message.event_type is not None:
        _coded(event, "EventTypeCode", message.event_type)
    if message.description:
        SubElement(event, "EventOutcomeDescription").text = _clean(message.description)


def _participant(root: Element, participant: Participant) -> None:
    given = {
        "UserID": _clean(participant.user_id),
        "UserIsRequestor": str(participant.requestor).lower(),
    }
    if participant.ae_titles:
        given["AlternativeUserID"] = _clean(f"AETITLES={';'.join(participant.ae_titles)}")
    if participant.address is not None:
        given["NetworkAccessPointID"] = _clean(participant.address)
        given["NetworkAccessPointTypeCode"] = _access_point(participant.address)
    element = SubElement(root, "ActiveParticipant", given)
    if participant.role is not None:
        _coded(element, "RoleIDCode", participant.role)


def _access_point(address: str) -> str:
    try:
        ip_address(address.partition("%")[0])
    except ValueError:
        return _MACHINE_NAME
    return _IP_ADDRESS


def _source(root: Element, source: Source) -> None:
    given = {"AuditSourceID": _clean(source.source_id)}
    if source.enterprise_site_id is not None:
        given["AuditEnterpriseSiteID"] = _clean(source.enterprise_site_id)
    element = SubElement(root, "AuditSourceIdentification", given)
    SubElement(element, "AuditSourceTypeCode", {"csd-code": _APPLICATION_SERVER})


def _thing(root: Element, thing: Thing) -> None:
    element = SubElement(
        root,
        "ParticipantObjectIdentification",
        ParticipantObjectID=_clean(thing.identifier),
        ParticipantObjectTypeCode=thing.type_code,
        ParticipantObjectTypeCodeRole=thing.role,
    )
    _coded(element, "ParticipantObjectIDTypeCode", thing.kind)
    SubElement(element, "ParticipantObjectName").text = _clean(thing.name)
    for kind, value in (thing.details or {}).items():
        encoded = base64.b64encode(value.encode("utf-8", "replace")).decode("ascii")
        SubElement(element, "ParticipantObjectDetail", type=kind, value=encoded)
    if thing.sop_classes is not None:
        description = SubElement(element, "ParticipantObjectDescription")
        for uid, count in sorted(thing.sop_classes.items()):
            SubElement(description, "SOPClass", UID=uid, NumberOfInstances=str(count))


def _coded(parent: Element, tag: str, code: Code) -> None:
    given = {"csd-code": code.value, "codeSystemName": code.scheme, "originalText": code.meaning}
    SubElement(parent, tag, given)


def _clean(text: str) -> str:
    return _NO_XML.sub("?", text)
