from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from dicom_node.ledger import queue, reports
from dicom_node.ledger.tables import DeliveryState
from tests.unit.dicom_node.ledger.examples import NOW

FinishJob = Callable[..., int]


def _claim(engine: Engine, worker: str = "sender", now: float = NOW + 10) -> queue.Delivery | None:
    return queue.claim_delivery(engine, worker, lease_s=60, now=now)


def _claimed(engine: Engine, now: float = NOW + 10) -> queue.Delivery:
    delivery = _claim(engine, now=now)
    assert delivery is not None
    return delivery


def _conclude(
    engine: Engine,
    delivery: queue.Delivery,
    state: DeliveryState,
    *,
    next_attempt: float | None = None,
    worker: str = "sender",
) -> bool:
    return queue.conclude_delivery(
        engine,
        delivery.id,
        worker,
        state=state,
        reason=None,
        next_attempt=next_attempt,
        now=NOW + 20,
    )


def _delivered(engine: Engine) -> queue.Delivery:
    delivery = _claimed(engine)
    for item in delivery.items:
        queue.record_sent(engine, delivery.id, item.sop_instance_uid, 0x0000, "delivered", NOW)
    assert _conclude(engine, delivery, DeliveryState.DELIVERED)
    return delivery


def test_a_delivery_carries_all_outputs_of_its_job(engine: Engine, finish_job: FinishJob) -> None:
    job_id = finish_job()
    delivery = _claimed(engine)
    assert (delivery.job_id, delivery.destination, delivery.attempts) == (job_id, "pacs", 1)
    assert delivery.first_attempt == NOW + 10
    assert delivery.items[0] == queue.DeliveryItem(
        sop_instance_uid="2.25.1",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        path="outgoing/2.25/2.25.1.dcm",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
    )
    assert len(delivery.items) == 2
    assert _claim(engine) is None


def test_a_retry_begins_at_the_first_unsent_instance(engine: Engine, finish_job: FinishJob) -> None:
    finish_job()
    first = _claimed(engine)
    queue.record_sent(engine, first.id, "2.25.1", 0x0000, "delivered", NOW + 11)
    queue.record_sent(engine, first.id, "2.25.2", 0xA700, "retry", NOW + 12)
    assert _conclude(engine, first, DeliveryState.WAITING, next_attempt=NOW + 100)
    (row,) = reports.deliveries(engine, state="waiting")
    assert (row["sent"], row["total"], row["attempts"]) == (1, 2, 1)
    assert row["next_attempt"] == "2023-11-14T22:15:00.000+00:00"
    assert _claim(engine, now=NOW + 99) is None
    again = _claimed(engine, NOW + 100)
    assert [item.sop_instance_uid for item in again.items] == ["2.25.2"]
    assert (again.attempts, again.first_attempt) == (2, NOW + 10)


def test_what_is_delivered_stays_so(engine: Engine, finish_job: FinishJob) -> None:
    finish_job()
    delivery = _claimed(engine)
    queue.record_sent(engine, delivery.id, "2.25.1", 0xB000, "delivered", NOW)
    queue.record_sent(engine, delivery.id, "2.25.1", 0xA700, "retry", NOW)
    items = reports.delivery(engine, delivery.id)["items"]
    assert (items[0]["state"], items[0]["status"]) == ("delivered", "0xB000")


def test_two_destinations_are_independent(engine: Engine, finish_job: FinishJob) -> None:
    finish_job("pacs", "archive")
    first, second = _claimed(engine), _claimed(engine)
    queue.record_sent(engine, first.id, "2.25.1", 0, "delivered", NOW)
    assert len(reports.delivery(engine, second.id)["items"]) == 2
    assert {each["sent"] for each in reports.deliveries(engine)} == {0, 1}


def test_a_dead_delivery_is_retried_by_hand_with_its_dead_instances(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery = _claimed(engine)
    queue.record_sent(engine, delivery.id, "2.25.1", 0xC000, "dead", NOW)
    assert _conclude(engine, delivery, DeliveryState.DEAD)
    assert _claim(engine, now=NOW + 1e6) is None
    assert queue.retry_delivery(engine, delivery.id, reason="by hand", now=NOW + 1e6)
    assert not queue.retry_delivery(engine, delivery.id, reason="by hand", now=NOW + 1e6)
    again = _claimed(engine, NOW + 1e6)
    assert len(again.items) == 2
    # Patience counts anew, else the first failure would kill it again.
    assert again.first_attempt == NOW + 1e6


def test_a_lease_that_ends_gives_the_delivery_to_another(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery = _claimed(engine)
    assert queue.heartbeat_delivery(engine, delivery.id, "sender", lease_s=60, now=NOW + 40)
    assert queue.expire_delivery_leases(engine, NOW + 99) == 0
    assert queue.expire_delivery_leases(engine, NOW + 101) == 1
    assert _claim(engine, "other", NOW + 101) is not None
    assert not queue.heartbeat_delivery(engine, delivery.id, "sender", lease_s=60, now=NOW)
    assert not _conclude(engine, delivery, DeliveryState.DELIVERED)
    assert reports.delivery(engine, delivery.id)["state"] == "sending"


def test_a_restarted_worker_gives_its_own_deliveries_back_at_once(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job("pacs", "archive")
    assert _claim(engine, "mine")
    assert _claim(engine, "other")
    assert queue.release_delivery_leases(engine, "mine", NOW + 11) == 1
    assert queue.release_delivery_leases(engine, "mine", NOW + 11) == 0


def test_a_destination_that_commits_to_all_ends_the_delivery(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery = _delivered(engine)
    assert queue.request_commitment(engine, delivery.id, transaction_uid="1.9", now=NOW + 30)
    report = {"committed": ["2.25.1", "2.25.2"], "failed": {}, "now": NOW + 40}
    assert queue.report_commitment(engine, "1.9", **report)
    assert not queue.report_commitment(engine, "1.9", **report)
    found = reports.delivery(engine, delivery.id)
    assert (found["state"], found["sent"]) == ("committed", 2)


def test_an_instance_that_is_not_committed_is_sent_once_more(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery = _delivered(engine)
    queue.request_commitment(engine, delivery.id, transaction_uid="1.9", now=NOW + 30)
    assert queue.report_commitment(
        engine, "1.9", committed=["2.25.1"], failed={"2.25.2": 0x0112}, now=NOW + 40
    )
    again = _claimed(engine, NOW + 40)
    assert [item.sop_instance_uid for item in again.items] == ["2.25.2"]


def test_a_report_on_some_instances_leaves_the_delivery_delivered(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery = _delivered(engine)
    queue.request_commitment(engine, delivery.id, transaction_uid="1.9", now=NOW + 30)
    assert queue.report_commitment(engine, "1.9", committed=["2.25.1"], failed={}, now=NOW)
    assert reports.delivery(engine, delivery.id)["state"] == "delivered"


@pytest.mark.parametrize("state", [DeliveryState.WAITING, DeliveryState.DEAD])
def test_commitment_is_asked_for_delivered_series_only(
    engine: Engine, finish_job: FinishJob, state: DeliveryState
) -> None:
    finish_job()
    delivery = _claimed(engine)
    _conclude(engine, delivery, state, next_attempt=NOW)
    assert not queue.request_commitment(engine, delivery.id, transaction_uid="1.9", now=NOW)
    assert not queue.report_commitment(engine, "1.9", committed=[], failed={}, now=NOW)
