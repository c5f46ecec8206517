"""Storage Commitment in both roles, and STOW-RS as a client, as the node is configured."""

from __future__ import annotations

from collections.abc import Iterator

from pydicom.uid import UID

from dicom_node import association, commitment, commitment_scp
from dicom_node.conformance.markdown import table, yes
from dicom_node.ledger import custody
from dicom_node.ledger.commitments import remedy
from dicom_node.settings import NodeSettings

_REMEDIES = {
    "send": "the instance is sent again, and asked for again",
    "ask": "it is asked for again",
    "none": "the delivery is dead, a person is told",
}
# PS3.3 C.14.1.1.
_REASONS = (
    (0x0110, "Processing failure"),
    (0x0112, "No such object instance"),
    (0x0119, "Class/instance conflict"),
    (0x0122, "Referenced SOP Class not supported"),
    (0x0131, "Duplicate Transaction UID"),
    (0x0213, "Resource limitation"),
)


def asks(settings: NodeSettings) -> bool:
    """Whether any destination is asked for Storage Commitment."""
    wanted = settings.delivery.commitment
    given = [each.commitment for each in settings.destinations.values()]
    return any(wanted if one is None else one for one in given) or (wanted and not given)


def contexts() -> list[list[str]]:
    """The contexts that are proposed to ask a destination."""
    uid = association.STORAGE_COMMITMENT
    return [
        [UID(uid).name, uid, f"{name} VR Little Endian", "SCU"] for name in ("Explicit", "Implicit")
    ]


def as_scu(settings: NodeSettings) -> Iterator[str]:
    """What is asked of destinations, and what their answers come to."""
    yield "### 3.5 Storage Commitment as SCU"
    if not asks(settings):
        yield "Not asked for (delivery.commitment)."
        return
    delivery = settings.delivery
    yield f"""After each delivery an N-ACTION (action type {commitment.REQUEST_COMMITMENT}) to
`{commitment.PUSH_MODEL_INSTANCE}` names every instance of the series, with a new Transaction UID.
The N-EVENT-REPORT is taken on the same association, for {delivery.commitment_wait_s:g} s, or on one
that the destination opens, and answered with {commitment.SUCCESS:04X},
{commitment.INVALID_ARGUMENT:04X} (a report that names no request of ours) or
{commitment.RESOURCE_LIMITATION:04X} (it could not be recorded). Without a report the request is
made again after {delivery.commitment_timeout_s:g} s, under a new Transaction UID; a late report
of an earlier one counts. After {delivery.commitment_asks} requests the delivery is dead and a
person is told. What is not committed:"""
    yield table(
        ["Failure Reason", "Meaning", "What follows"],
        [[f"{code:04X}", words, _REMEDIES[remedy(code)]] for code, words in _REASONS],
    )


def as_scp(settings: NodeSettings) -> Iterator[str]:
    """Whom the node answers for originals, and on whose word."""
    yield "### 3.6 Storage Commitment as SCP"
    scp = settings.commitment_scp
    if not scp.enabled:
        yield (
            "Off (commitment_scp.enabled): a request is answered with"
            f" {commitment_scp.CLASS_NOT_SUPPORTED:04X}."
        )
        return
    yield f"""An instance is committed once one of these archives has committed to keep the
original: {", ".join(scp.archives)}. The node asks them by N-ACTION, every
{scp.ask_every_s:g} s for what they have not committed, and reports at the latest
{scp.answer_within_s / 3600:g} h after the request. Originals that it is asked about stay in its
spool until then. It {"sends" if scp.forward else "does not send"} an archive originals that the
archive lacks. Who may ask, and where the report goes, on an association that the node opens with
the SCP role (PS3.7 D.3.3.4):"""
    yield table(
        ["Requestor", "Address", "TLS"],
        [[each.ae_title, f"{each.host}:{each.port}", yes(each.tls)] for each in scp.requestors],
    )
    yield "The N-ACTION is answered with:"
    yield table(
        ["Status", "When"],
        [
            [f"{commitment.SUCCESS:04X}", "the request is recorded"],
            [f"{commitment_scp.NOT_AUTHORIZED:04X}", "the calling AE title is not in the table"],
            [f"{commitment.INVALID_ARGUMENT:04X}", "no valid Transaction UID or references"],
            [f"{commitment_scp.NO_SUCH_OBJECT:04X}", "another SOP Instance than the well-known"],
            [f"{commitment_scp.NO_SUCH_ACTION:04X}", "another action type than 1"],
            [f"{commitment.RESOURCE_LIMITATION:04X}", "it could not be recorded"],
        ],
    )
    yield "Failure Reasons in a report:"
    yield table(
        ["Failure Reason", "When"],
        [
            [f"{custody.NO_SUCH_INSTANCE:04X}", "the node has not received the instance"],
            [f"{custody.CLASS_INSTANCE_CONFLICT:04X}", "it was received under another SOP Class"],
            [f"{custody.PROCESSING_FAILURE:04X}", "no archive has committed to it in time"],
        ],
    )


def stow(settings: NodeSettings) -> Iterator[str]:
    """The DICOMweb servers that series are stored on."""
    yield "### 3.7 DICOMweb: STOW-RS as a client"
    if not settings.stow:
        yield "No server is configured (stow)."
        return
    yield table(
        ["Destination", "Service", "Authentication", "Instances of one request"],
        [
            [
                name,
                each.url,
                "Bearer" if each.token else "Basic" if each.username else "None",
                each.instances_per_request,
            ]
            for name, each in settings.stow.items()
        ],
    )
    yield """Store Instances (PS3.18 10.5): POST of `multipart/related; type="application/dicom"` to
`/studies`, answered as `application/dicom+json`. Warning Reason and Failure Reason of each instance
are read as a C-STORE status is; an instance that the answer does not name is sent again. As a
whole, 401, 403, 404, 405, 501 and a redirection refuse the node for good; 408, 425, 429 and 5xx are
tried again; 400, 413, 415 and 422 of several instances are tried one by one."""
