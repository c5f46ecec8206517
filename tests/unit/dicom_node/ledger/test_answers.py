from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine

from dicom_node.ledger import answers, queue, reports
from dicom_node.ledger.writer import Writer
from tests.unit.dicom_node.ledger.examples import NOW

FinishJob = Callable[..., int]

STORED: answers.Answer = ("2.25.1", 0x0000, "delivered")


def _claimed(engine: Engine, worker: str = "sender", now: float = NOW + 10) -> queue.Delivery:
    delivery = queue.claim_delivery(engine, worker, lease_s=60, now=now)
    assert delivery is not None
    return delivery


def _states(engine: Engine, delivery: queue.Delivery) -> list[tuple[str, str | None]]:
    items = reports.delivery(engine, delivery.id)["items"]
    return [(each["state"], each["status"]) for each in items]


def test_what_is_delivered_stays_so(engine: Engine, finish_job: FinishJob) -> None:
    finish_job()
    delivery = _claimed(engine)
    answers.record_sent(engine, delivery.id, ("2.25.1", 0xB000, "delivered"), NOW)
    answers.record_sent(engine, delivery.id, ("2.25.1", 0xA700, "retry"), NOW)
    assert _states(engine, delivery)[0] == ("delivered", "0xB000")


def test_each_answer_is_of_its_own_instance(engine: Engine, finish_job: FinishJob) -> None:
    finish_job()
    delivery = _claimed(engine)
    answers.record_sent(engine, delivery.id, ("2.25.2", 0xC000, "dead"), NOW)
    assert _states(engine, delivery) == [("pending", None), ("dead", "0xC000")]


def test_an_answer_extends_the_lease(engine: Engine, finish_job: FinishJob) -> None:
    finish_job()
    delivery = _claimed(engine)
    kept = answers.record_and_keep(
        Writer(engine), delivery.id, "sender", STORED, lease_s=60, now=NOW + 50
    )
    assert kept
    assert _states(engine, delivery)[0] == ("delivered", "0x0000")
    assert queue.expire_delivery_leases(engine, NOW + 109) == 0
    assert queue.expire_delivery_leases(engine, NOW + 111) == 1


def test_an_answer_counts_though_the_delivery_has_gone_to_another(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery = _claimed(engine, "silent")
    queue.expire_delivery_leases(engine, NOW + 71)
    again = _claimed(engine, "other", NOW + 72)
    kept = answers.record_and_keep(
        Writer(engine), delivery.id, "silent", STORED, lease_s=1e6, now=NOW + 73
    )
    assert not kept
    assert _states(engine, again)[0] == ("delivered", "0x0000")
    # The lease is still the other's, as long as it was.
    assert queue.expire_delivery_leases(engine, NOW + 133) == 1
