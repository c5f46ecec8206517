"""What goes over the network: overview, implementation model, application entity, contexts."""

from __future__ import annotations

from collections.abc import Iterator

from pydicom.uid import UID, ExplicitVRLittleEndian

from dicom_node import acceptor, association
from dicom_node.access import DIAGNOSTICS
from dicom_node.conformance import commitment, query
from dicom_node.conformance.markdown import table, yes
from dicom_node.dicom.documents import OBJECT_CLASSES
from dicom_node.dicom.image_classes import CLASSES
from dicom_node.dicom.rejection import KEY_OBJECT_SELECTION
from dicom_node.errors import (
    LedgerError,
    MismatchError,
    NodeError,
    SpoolFullError,
    UnreadableInstanceError,
)
from dicom_node.settings import NodeSettings, Section
from dicom_node.storage_scu import classify_status

__all__ = [
    "application_entity",
    "communication_profiles",
    "created_classes",
    "implementation_model",
    "overview",
    "settings_table",
    "store_statuses",
]

_MEANS = {
    "delivered": "stored; not sent again",
    "retry": "not stored; sent again later",
    "dead": "not stored; not sent again, a person is told",
}
# Of each kind that PS3.4 B.2.3 and PS3.7 C list, one or both ends.
_ANSWERS = (
    (0x0000, "Success"),
    (0x0111, "Duplicate SOP Instance"),
    (0xB000, "Warning: Coercion of Data Elements"),
    (0xB006, "Warning: Elements Discarded"),
    (0xB007, "Warning: Data Set does not match SOP Class"),
    (0xA700, "Refused: Out of Resources (A7xx)"),
    (0xA900, "Error: Data Set does not match SOP Class (A9xx)"),
    (0xC000, "Error: Cannot understand (Cxxx)"),
    (0x0110, "Processing Failure"),
    (0x0122, "SOP Class not supported"),
    (0x0124, "Not Authorized"),
    (0x0213, "Resource Limitation"),
)


def created_classes(settings: NodeSettings) -> list[str]:
    """The storage classes that the node makes instances of and sends."""
    wanted = {"SR": settings.report.sr, "PR": settings.report.gsps}
    objects = (uid for uid, modality in OBJECT_CLASSES.items() if wanted[modality])
    return [*CLASSES, *objects, KEY_OBJECT_SELECTION]


def store_statuses() -> list[tuple[int, str, str]]:
    """Each status that a C-STORE is answered with: code, meaning in PS3.4 B.2.3, and when."""
    causes: list[tuple[type[NodeError], str, str]] = [
        (SpoolFullError, "Refused: Out of Resources", "no room, or the disk does not write"),
        (LedgerError, "Refused: Out of Resources", "the ledger does not answer"),
        (
            MismatchError,
            "Error: Data Set does not match SOP Class",
            "SOP Class or Instance UID differ between command and data set",
        ),
        (
            UnreadableInstanceError,
            "Error: Cannot understand",
            "the data set ends early or does not parse, a UID is not valid, or a limit of"
            " [limits] is passed",
        ),
    ]
    success = (
        "stored and recorded; also a duplicate, another instance under the same UID (kept apart),"
        " and what is never restored"
    )
    failures = [(kind.dimse_status, meaning, when) for kind, meaning, when in causes]
    return [(0x0000, "Success", success), *failures]


def overview(settings: NodeSettings) -> Iterator[str]:
    """The overview: services, and the storage classes in both roles."""
    yield "## 1 Overview"
    yield (
        "The node receives CT, MR and PET images by C-STORE, restores them with a neural network"
        " and stores the result as new series of the same study on other systems. Originals are"
        " not changed, and are sent on only where commitment_scp.forward says so."
    )
    asks, answers = commitment.asks(settings), settings.commitment_scp.enabled
    yield "### 1.1 Network services"
    yield table(
        ["Service", "User (SCU)", "Provider (SCP)"],
        [
            ["Verification", "Yes", "Yes"],
            ["Storage", "Yes", "Yes"],
            ["Storage Commitment Push Model", yes(asks), yes(answers)],
            ["Query/Retrieve: C-FIND, Study Root", yes(query.asks(settings)), "No"],
            ["C-MOVE, C-GET, Worklist, MPPS, Print", "No", "No"],
            ["DICOMweb: STOW-RS", yes(bool(settings.stow)), "No"],
            ["Media interchange", "No", "No"],
        ],
    )
    yield "### 1.2 Storage SOP Classes"
    yield (
        "Every class in the table is accepted. Those that are restored are created as well, each"
        " from its own kind; what is not restored is acknowledged with Success, kept and left"
        " alone, so that no sender's queue blocks."
    )
    made = created_classes(settings)
    extra = settings.association.extra_storage_classes
    yield table(
        ["SOP Class", "UID", "SCP", "Restored", "SCU"],
        [
            [UID(uid).name, uid, "Yes", yes(uid in CLASSES), yes(uid in made)]
            for uid in association.storage_classes(extra)
        ],
    )
    yield "### 1.3 Transfer syntaxes"
    yield (
        "In the order of preference as acceptor. A source that was compressed with loss, or in JPEG"
        " 2000 that may have lost something and with no Lossy Image Compression of 00, is"
        f" {'restored' if settings.policy.accept_lossy else 'not restored'} (policy.accept_lossy)."
    )
    yield table(
        ["Transfer syntax", "UID", "SCP", "SCU", "Lossy"],
        [
            [row.name, row.uid, "Yes", yes(row.uid in _proposed(made)), yes(row.lossy)]
            for row in association.TRANSFER_SYNTAXES
        ],
    )


def _proposed(classes: list[str]) -> set[str]:
    contexts = association.contexts_for((uid, ExplicitVRLittleEndian) for uid in classes)
    return {str(syntax) for each in contexts for syntax in each.transfer_syntax}


def implementation_model(settings: NodeSettings) -> Iterator[str]:
    """Application data flow and the sequence of activities."""
    yield "## 2 Implementation model"
    yield "### 2.1 Application data flow"
    yield f"""One application entity, `{settings.node.ae_title}`, does all of it:

    modality, archive                       {settings.node.ae_title}                         archive
    ── C-ECHO, C-STORE ──▶  receive ▶ assemble ▶ restore ▶ deliver  ── C-STORE ──▶
                                                                    ── N-ACTION ─▶
                            ◀───────────────────── N-EVENT-REPORT (where it is asked for) ──"""
    yield "### 2.2 Functional definition"
    quiet = settings.assembly.quiet_s
    yield f"""1. An instance is answered with Success when its bytes are durable and its record
   committed.
2. A series is concluded when no association that brought it is open and nothing has come for
   {quiet:g} s, or for the quiet time of its source; at once where the counts of its headers show it
   whole. Missing instances, by counts, gaps or C-FIND, make it incomplete.
3. The routing table decides by header and titles whether, how, and for whom it is restored.
4. Each volume of the series is restored; what lies outside the model's domain, or outside the
   policy, is refused with a reason and nothing is sent.
5. The restored series is sent to every destination of its route until each instance is stored.
   The bytes are written once and sent again as they are.
6. A late instance of CT or MR is restored and sent alone into the same derived series; PET is
   quantified as a set, and makes a new series."""
    yield "### 2.3 Loops"
    yield (
        "An instance that this software made is acknowledged and left alone. It is known by its"
        " SOP or Series Instance UID in the ledger, by the equipment that made it or contributed"
        " to it, and by the coding scheme of its derivation code."
    )


def application_entity(settings: NodeSettings) -> Iterator[str]:
    """The one AE: association policies, initiation, acceptance, contexts, statuses."""
    ae_title = settings.node.ae_title
    yield "## 3 Application entity"
    yield "### 3.1 General association policy"
    given = settings.association
    yield table(
        ["", "Value"],
        [
            ["AE title", ae_title],
            ["Application Context Name", "1.2.840.10008.3.1.1.1"],
            ["Implementation Class UID", association.IMPLEMENTATION_CLASS_UID],
            ["Implementation Version Name", association.IMPLEMENTATION_VERSION_NAME],
            ["Maximum PDU length offered, bytes", given.max_pdu],
            ["Associations accepted at the same time", given.max_associations],
            ["… from one address", given.max_associations_per_address],
            [
                "Associations initiated at the same time",
                f"{settings.delivery.workers} for each deliver process",
            ],
            ["Outstanding operations (asynchronous window)", "1, not extended"],
        ],
    )
    yield "### 3.2 Negotiation beyond presentation contexts"
    yield table(
        ["Item", "As acceptor", "As initiator"],
        [
            [
                "SOP Class Extended, Storage",
                f"answered with {_hexadecimal(acceptor.STORAGE_SUPPORT)}: level 2, signatures"
                " bit-preserved, no coercion (PS3.4 B.3.1)",
                "not proposed",
            ],
            [
                "SCP/SCU role selection",
                "both roles for Storage Commitment, where the peer proposes them",
                "SCP role for Storage Commitment",
            ],
            ["Asynchronous operations window", "answered with 1, 1", "not proposed"],
            ["User identity", "accepted, not checked, not answered", "not proposed"],
        ],
    )
    yield from _acceptance(settings)
    yield from _initiation(settings)


def _hexadecimal(value: bytes) -> str:
    return value.hex(" ").upper() + "H"


def _acceptance(settings: NodeSettings) -> Iterator[str]:
    given = settings.association
    yield "### 3.3 Association acceptance: real-world activity *receive*"
    titles = ", ".join([settings.node.ae_title, *given.called_ae_titles])
    called = f"one of {titles}" if given.require_called_ae_title else "any"
    yield f"Called AE title: {called}. Who may call:"
    yield table(
        ["Calling AE title", "Address", "Certificate"],
        [
            [rule.calling_ae or "any", rule.address or "any", rule.certificate or "any"]
            for rule in given.allow
        ]
        or [["any", "any", "any"]],
    )
    yield "Presentation contexts:"
    transfer = "all of 1.3"
    commitment_row = [
        "Storage Commitment Push Model",
        association.STORAGE_COMMITMENT,
        "Implicit and Explicit VR Little Endian",
        "SCU, as the peer reverses the roles"
        + ("; SCP" if settings.commitment_scp.enabled else ""),
        "None",
    ]
    yield table(
        ["Abstract syntax", "UID", "Transfer syntaxes", "Role", "Extended negotiation"],
        [
            [
                "Verification",
                association.VERIFICATION,
                "Implicit and Explicit VR Little Endian",
                "SCP",
                "None",
            ],
            commitment_row,
            ["every Storage SOP Class of 1.2", "see 1.2", transfer, "SCP", "see 3.2"],
        ],
    )
    yield (
        "An association is accepted when at least its titles and address are; contexts are judged"
        " one by one. It is rejected with:"
    )
    yield table(
        ["Source", "Diagnostic", "Meaning (PS3.8 Table 9-21)"],
        [[source, code, words] for (source, code), words in DIAGNOSTICS.items()],
    )
    yield "C-STORE is answered with:"
    yield table(
        ["Status", "Meaning", "When"],
        [[f"{code:04X}", meaning, when] for code, meaning, when in store_statuses()],
    )
    yield (
        "A failure carries Error Comment (0000,0902). The node neither coerces nor discards an"
        " element of what it stores; the stored data set is the one received, byte for byte."
    )


def _initiation(settings: NodeSettings) -> Iterator[str]:
    yield "### 3.4 Association initiation: real-world activity *deliver*"
    delivery = settings.delivery
    yield (
        "One association after the other for each destination, up to the number below at the same"
        " time; series that wait go over the same one. A delivery that fails is tried again"
        f" after {delivery.first_s:g} s, then after {delivery.factor:g} times as long, at most"
        f" {delivery.max_s:g} s, and given up {delivery.give_up_after_s / 3600:g} h after the"
        " first try; a fifth of each wait at most is taken off at random. It goes on with the"
        " first instance that was not stored. While a destination does not answer, or is out of"
        " resources, one series tries it and the others wait."
    )
    yield table(
        ["Destination", "AE title", "Address", "Calling AE title", "TLS", "Associations"],
        [
            [
                name,
                each.ae_title,
                f"{each.host}:{each.port}",
                each.calling_ae_title or settings.node.ae_title,
                yes(each.tls),
                each.max_associations,
            ]
            for name, each in settings.destinations.items()
        ],
    )
    made = created_classes(settings)
    contexts = association.contexts_for((uid, ExplicitVRLittleEndian) for uid in made)
    yield "Presentation contexts proposed, one transfer syntax in each:"
    yield table(
        ["Abstract syntax", "UID", "Transfer syntax", "Role"],
        [
            *(
                [
                    UID(str(each.abstract_syntax)).name,
                    each.abstract_syntax,
                    UID(str(each.transfer_syntax[0])).name,
                    "SCU",
                ]
                for each in contexts
            ),
            *(commitment.contexts() if commitment.asks(settings) else ()),
        ],
    )
    yield (
        "Only the classes of the series in hand are proposed. Restored instances are written as"
        " Explicit VR Little Endian; a peer that takes Implicit alone gets them converted, values"
        " unchanged. `dicom-node echo` and `send` propose Verification, and what their files need."
    )
    yield "A C-STORE response is read as:"
    yield table(
        ["Status", "Meaning", "For the instance"],
        [
            *([f"{code:04X}", words, _MEANS[classify_status(code)]] for code, words in _ANSWERS),
            ["none", "time-out, A-ABORT, release", _MEANS[classify_status(None)]],
        ],
    )
    yield from commitment.as_scu(settings)
    yield from commitment.as_scp(settings)
    yield from commitment.stow(settings)
    yield from query.as_scu(settings)


def communication_profiles(settings: NodeSettings) -> Iterator[str]:
    """Transport, addresses, and the limits of an association."""
    yield "## 4 Communication profiles"
    where = []
    if not settings.tls.only:
        where.append(["DICOM Upper Layer over TCP", settings.node.host, settings.node.port])
    if settings.tls.port is not None:
        where.append(["DICOM Upper Layer over TLS", settings.node.host, settings.tls.port])
    yield "TCP/IP, version 4 and 6. The node listens on:"
    yield table(["Profile", "Address", "Port"], where)
    yield "Limits of associations and messages, as configured:"
    yield settings_table("association", settings.association)
    yield settings_table("limits", settings.limits)


def settings_table(name: str, section: Section) -> str:
    """The plain keys of one table of node.toml: key, value, and what it is."""
    rows = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            shown = f"{value:g}" if isinstance(value, float) else value
            rows.append([f"{name}.{key}", shown, field.description])
    return table(["Key", "Value", "Meaning"], rows)
