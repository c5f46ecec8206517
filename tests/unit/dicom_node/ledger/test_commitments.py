"""Storage Commitment as SCU in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from dicom_node.ledger import answers, commitments, destinations, notices, outbox, queue, reports
from dicom_node.ledger.tables import DeliveryState
from tests.unit.dicom_node.ledger.examples import NOW

FinishJob = Callable[..., int]
LATER = NOW + 3600


def delivered(engine: Engine, *, wants_commitment: bool = True) -> int:
    """A delivery of two instances whose destination has stored both."""
    delivery = queue.claim_delivery(engine, "sender", lease_s=60, now=NOW + 5)
    assert delivery is not None
    for item in delivery.items:
        answers.record_sent(engine, delivery.id, (item.sop_instance_uid, 0, "delivered"), NOW)
    concluded, _ = outbox.conclude_and_follow(
        engine, delivery.id, "sender", state=DeliveryState.DELIVERED, reason=None,
        next_attempt=None, now=NOW + 5, wants_commitment=wants_commitment,
    )  # fmt: skip
    assert concluded
    return delivery.id


def asked(engine: Engine, delivery_id: int, uid: str = "1.9", now: float = NOW) -> None:
    assert commitments.request_commitment(
        engine, delivery_id, transaction_uid=uid, now=now, next_ask=LATER
    )


def report(engine: Engine, uid: str = "1.9", **changes: Any) -> bool:
    values: dict[str, Any] = {"committed": [], "failed": {}, "now": NOW + 40, **changes}
    return commitments.report_commitment(engine, uid, **values)


def state(engine: Engine, delivery_id: int) -> tuple[str, list[str]]:
    found = reports.delivery(engine, delivery_id)
    return found["state"], [item["state"] for item in found["items"]]


def test_a_destination_that_commits_to_all_ends_the_delivery(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery_id = delivered(engine)
    asked(engine, delivery_id)
    assert report(engine, committed=["2.25.1", "2.25.2"])
    assert state(engine, delivery_id) == ("committed", ["committed", "committed"])
    assert report(engine, failed={"2.25.1": 0x0112}), "an answered transaction is known …"
    assert state(engine, delivery_id)[0] == "committed", "… and answered once"
    assert commitments.claim_outstanding(engine, lease_s=60, now=LATER) is None


def test_an_instance_that_the_destination_does_not_have_is_sent_again(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery_id = delivered(engine)
    asked(engine, delivery_id)
    assert report(engine, committed=["2.25.1"], failed={"2.25.2": 0x0112})
    again = queue.claim_delivery(engine, "sender", lease_s=60, now=NOW + 40)
    assert again is not None
    assert [item.sop_instance_uid for item in again.items] == ["2.25.2"]


@pytest.mark.parametrize("reason", [0x0110, 0x0131, 0x0213])
def test_trouble_of_the_destination_is_asked_about_again_and_nothing_is_sent(
    engine: Engine, finish_job: FinishJob, reason: int
) -> None:
    finish_job()
    delivery_id = delivered(engine)
    asked(engine, delivery_id)
    assert report(engine, committed=["2.25.1"], failed={"2.25.2": reason})
    assert state(engine, delivery_id) == ("delivered", ["committed", "delivered"])
    assert commitments.claim_outstanding(engine, lease_s=60, now=LATER - 1) is None
    outstanding = commitments.claim_outstanding(engine, lease_s=60, now=LATER)
    assert outstanding is not None
    assert [uid for _, uid in outstanding.instances] == ["2.25.2"]
    assert outstanding.asks == 1


@pytest.mark.parametrize("reason", [0x0119, 0x0122])
def test_what_a_destination_never_commits_to_is_dead_and_told(
    engine: Engine, finish_job: FinishJob, reason: int
) -> None:
    finish_job()
    delivery_id = delivered(engine)
    asked(engine, delivery_id)
    assert report(engine, committed=["2.25.1"], failed={"2.25.2": reason})
    assert state(engine, delivery_id) == ("dead", ["committed", "delivered"])
    (notice,) = notices.claim(engine, lease_s=60, now=NOW + 50)
    assert (notice.event["stored"], notice.event["committed"]) == (2, 1)


def test_a_request_without_a_report_is_due_again_and_a_late_report_still_counts(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery_id = delivered(engine)
    first = commitments.claim_outstanding(engine, lease_s=60, now=NOW + 5)
    assert first is not None
    assert (first.asks, first.destination) == (0, "pacs")
    assert commitments.claim_outstanding(engine, lease_s=60, now=NOW + 64) is None
    asked(engine, delivery_id, "1.9")
    second = commitments.claim_outstanding(engine, lease_s=60, now=LATER)
    assert second is not None
    asked(engine, delivery_id, "1.10", LATER)
    assert report(engine, "1.9", committed=["2.25.1", "2.25.2"])
    assert state(engine, delivery_id)[0] == "committed"


def test_what_was_given_up_is_dead_until_a_late_report_or_a_person(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery_id = delivered(engine)
    asked(engine, delivery_id)
    assert commitments.give_up(engine, delivery_id, reason="18 requests, no report", now=LATER)
    assert state(engine, delivery_id)[0] == "dead"
    assert report(engine, committed=["2.25.1", "2.25.2"])
    assert state(engine, delivery_id)[0] == "committed"


def test_a_person_who_retries_it_has_it_asked_for_again_without_sending(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery_id = delivered(engine)
    asked(engine, delivery_id)
    commitments.give_up(engine, delivery_id, reason="no report", now=LATER)
    assert queue.retry_delivery(engine, delivery_id, reason="asked", now=LATER)
    again = queue.claim_delivery(engine, "sender", lease_s=60, now=LATER)
    assert again is not None
    assert again.items == ()
    outbox.conclude_and_follow(
        engine, delivery_id, "sender", state=DeliveryState.DELIVERED, reason=None,
        next_attempt=None, now=LATER, wants_commitment=True,
    )  # fmt: skip
    outstanding = commitments.claim_outstanding(engine, lease_s=60, now=LATER)
    assert outstanding is not None
    assert outstanding.asks == 0


def test_a_paused_destination_is_not_asked(engine: Engine, finish_job: FinishJob) -> None:
    finish_job()
    delivered(engine)
    destinations.pause(engine, "pacs", reason="moved", now=NOW)
    assert commitments.claim_outstanding(engine, lease_s=60, now=LATER) is None


def test_a_destination_that_is_not_asked_has_nothing_outstanding(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivered(engine, wants_commitment=False)
    assert commitments.claim_outstanding(engine, lease_s=60, now=NOW + 9e9) is None


@pytest.mark.parametrize("to", [DeliveryState.WAITING, DeliveryState.DEAD])
def test_commitment_is_asked_for_delivered_series_only(
    engine: Engine, finish_job: FinishJob, to: DeliveryState
) -> None:
    finish_job()
    delivery = queue.claim_delivery(engine, "sender", lease_s=60, now=NOW + 5)
    assert delivery is not None
    queue.conclude_delivery(
        engine, delivery.id, "sender", state=to, reason=None, next_attempt=NOW, now=NOW
    )
    assert not commitments.request_commitment(
        engine, delivery.id, transaction_uid="1.9", now=NOW, next_ask=LATER
    )
    assert not report(engine)
