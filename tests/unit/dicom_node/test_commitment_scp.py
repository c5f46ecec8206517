"""The messages of Storage Commitment as SCP (PS3.4 Tables J.3-1 and J.3-2)."""

from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from dicom_node.commitment import Reference, action_information, read_report
from dicom_node.commitment_scp import event_information, read_request, requestor_named
from dicom_node.dicom.header import quiet_pydicom
from dicom_node.ledger.custody import Original, Verdict
from dicom_node.settings import CommitmentSCPSettings

CT = "1.2.840.10008.5.1.4.1.1.2"
ONE, TWO = Original(CT, "1.2.3.1"), Original(CT, "1.2.3.2")


def test_a_request_is_read_as_it_is_written() -> None:
    asked = action_information("1.2.9", [Reference(CT, "1.2.3.1"), Reference(CT, "1.2.3.2")])
    assert read_request(asked) == ("1.2.9", [ONE, TWO])


@pytest.mark.parametrize(
    ("transaction_uid", "uid"),
    [("", "1.2.3"), ("1.2.9", "../../x"), ("1.2.9", ""), ("1..2", "1.2")],
)
def test_a_request_with_a_uid_that_is_none_is_refused(transaction_uid: str, uid: str) -> None:
    with quiet_pydicom():
        asked = action_information(transaction_uid, [Reference(CT, uid)])
    with pytest.raises(ValueError, match="no transaction, or no instances"):
        read_request(asked)


def test_a_request_about_nothing_is_refused() -> None:
    empty = Dataset()
    empty.TransactionUID = "1.2.9"
    with pytest.raises(ValueError, match="no instances"):
        read_request(empty)


def test_a_report_names_what_is_committed_and_what_failed_with_its_reason() -> None:
    kind, information = event_information("1.2.9", Verdict((ONE,), ((TWO, 0x0112),)))
    assert kind == 2
    report = read_report(information)
    assert report.transaction_uid == "1.2.9"
    assert report.committed == ("1.2.3.1",)
    assert report.failed == {"1.2.3.2": 0x0112}


def test_a_report_without_failures_is_of_the_other_kind_and_has_no_failed_sequence() -> None:
    kind, information = event_information("1.2.9", Verdict((ONE, TWO), ()))
    assert kind == 1
    assert "FailedSOPSequence" not in information


def test_only_those_who_are_named_may_ask() -> None:
    given = CommitmentSCPSettings.model_validate(
        {"requestors": [{"ae_title": "CT1", "host": "10.1.2.3", "port": 104}]}
    )
    found = requestor_named(given, "CT1")
    assert found is not None
    assert found.host == "10.1.2.3"
    assert requestor_named(given, "CT2") is None
