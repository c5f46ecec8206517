"""Storage Commitment's two data sets."""

from __future__ import annotations

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from dicom_node.commitment import Reference, action_information, read_report

CT = "1.2.840.10008.5.1.4.1.1.2"


def failed(uid: str, reason: int | None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPInstanceUID = uid
    if reason is not None:
        item.FailureReason = reason
    return item


def test_a_request_names_each_instance_once_with_its_class() -> None:
    information = action_information("1.2.3", [Reference(CT, "1.2.4"), Reference(CT, "1.2.5")])
    assert information.TransactionUID == "1.2.3"
    named = [
        (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID)
        for item in information.ReferencedSOPSequence
    ]
    assert named == [(CT, "1.2.4"), (CT, "1.2.5")]


def test_a_report_of_success_lists_what_is_committed() -> None:
    report = read_report(action_information("1.2.3", [Reference(CT, "1.2.4")]))
    assert (report.transaction_uid, report.committed, report.failed) == ("1.2.3", ("1.2.4",), {})


def test_a_report_of_failures_keeps_each_reason() -> None:
    information = action_information("1.2.3", [])
    # PS3.3 C.14.1.1: 0x0112 no such object instance; an absent reason is a processing failure.
    information.FailedSOPSequence = Sequence([failed("1.2.4", 0x0112), failed("1.2.5", None)])
    assert read_report(information).failed == {"1.2.4": 0x0112, "1.2.5": 0x0110}
