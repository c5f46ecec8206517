from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine

from dicom_node.ledger import answers, destinations, notices, outbox, queue, reports
from dicom_node.ledger.tables import DeliveryState, writing
from tests.unit.dicom_node.ledger.examples import NOW, judged, new_job, output

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
        answers.record_sent(engine, delivery.id, (item.sop_instance_uid, 0x0000, "delivered"), NOW)
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
    answers.record_sent(engine, first.id, ("2.25.1", 0x0000, "delivered"), NOW + 11)
    answers.record_sent(engine, first.id, ("2.25.2", 0xA700, "retry"), NOW + 12)
    assert _conclude(engine, first, DeliveryState.WAITING, next_attempt=NOW + 100)
    (row,) = reports.deliveries(engine, state="waiting")
    assert (row["sent"], row["total"], row["attempts"]) == (1, 2, 1)
    assert row["next_attempt"] == "2023-11-14T22:15:00.000+00:00"
    assert _claim(engine, now=NOW + 99) is None
    again = _claimed(engine, NOW + 100)
    assert [item.sop_instance_uid for item in again.items] == ["2.25.2"]
    assert (again.attempts, again.first_attempt) == (2, NOW + 10)


def test_two_destinations_are_independent(engine: Engine, finish_job: FinishJob) -> None:
    finish_job("pacs", "archive")
    first, second = _claimed(engine), _claimed(engine)
    answers.record_sent(engine, first.id, ("2.25.1", 0, "delivered"), NOW)
    assert len(reports.delivery(engine, second.id)["items"]) == 2
    assert {each["sent"] for each in reports.deliveries(engine)} == {0, 1}


def test_a_dead_delivery_is_retried_by_hand_with_its_dead_instances(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    delivery = _claimed(engine)
    answers.record_sent(engine, delivery.id, ("2.25.1", 0xC000, "dead"), NOW)
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


def test_a_destination_that_is_held_is_left_alone_until_then(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job("pacs", "backup")
    destinations.hold(engine, "pacs", until=NOW + 60, reason="out of resources")
    assert _claimed(engine, NOW + 10).destination == "backup"
    assert queue.claim_delivery(engine, "w", lease_s=60, now=NOW + 59) is None
    delivery = _claimed(engine, NOW + 60)
    assert (delivery.destination, delivery.failures) == ("pacs", 1)


def test_a_destination_that_answers_is_no_longer_held(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    destinations.hold(engine, "pacs", until=NOW + 60, reason="down")
    destinations.answers(engine, "pacs")
    assert _claimed(engine, NOW + 10).failures == 0


def test_nothing_goes_to_a_paused_destination_until_it_is_resumed(
    engine: Engine, finish_job: FinishJob
) -> None:
    finish_job()
    assert destinations.pause(engine, "pacs", reason="it is moved", now=NOW)
    assert not destinations.pause(engine, "pacs", reason="again", now=NOW)
    assert destinations.states(engine)["pacs"].why_closed(NOW) == "paused: it is moved"
    assert queue.claim_delivery(engine, "w", lease_s=60, now=NOW + 9e9) is None
    assert not outbox.is_due(engine, "pacs", NOW + 10)
    assert destinations.resume(engine, "pacs", now=NOW + 20)
    assert not destinations.resume(engine, "pacs", now=NOW + 20)
    assert _claimed(engine, NOW + 20).destination == "pacs"


def test_to_resume_makes_due_what_waits_there(engine: Engine, finish_job: FinishJob) -> None:
    finish_job()
    delivery = _claimed(engine)
    _conclude(engine, delivery, DeliveryState.WAITING, next_attempt=NOW + 3600)
    destinations.hold(engine, "pacs", until=NOW + 3600, reason="down")
    assert destinations.resume(engine, "pacs", now=NOW + 60)
    assert _claimed(engine, NOW + 60).id == delivery.id


def _two_series(engine: Engine, make_jobs: Callable[..., list[int]]) -> None:
    """Two deliveries to pacs."""
    for number, job_id in enumerate(
        make_jobs(new_job((1,), volume_key="a"), new_job((2,), volume_key="b")), start=1
    ):
        assert queue.claim(engine, "worker", lease_s=60, now=NOW) is not None
        assert queue.finish(
            engine,
            job_id,
            "worker",
            judged=judged("pacs"),
            outputs=[output(number)],
            derived_series_instance_uid=f"2.25.{number}",
            model_sha256="a" * 64,
            seconds={},
            note=None,
            now=NOW,
        )


def test_a_destination_takes_as_many_deliveries_at_once_as_its_limit(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    _two_series(engine, make_jobs)
    claim: dict[str, Any] = {"lease_s": 60, "now": NOW + 1}
    one = queue.claim_delivery(engine, "a", **claim)
    assert one is not None
    assert queue.claim_delivery(engine, "b", **claim) is None
    other = queue.claim_delivery(engine, "b", limits={"pacs": 2}, **claim)
    assert other is not None
    assert other.id != one.id
    _, following = outbox.conclude_and_follow(
        engine, one.id, "a", state=DeliveryState.DELIVERED, reason=None, next_attempt=None,
        now=NOW + 2, following=outbox.Following(60),
    )  # fmt: skip
    assert following is None, "the other has it"


def test_the_next_delivery_there_is_taken_with_the_conclusion_of_the_last(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    _two_series(engine, make_jobs)
    one = _claimed(engine)
    assert outbox.is_due(engine, "pacs", NOW + 10)
    concluded, following = outbox.conclude_and_follow(
        engine, one.id, "sender", state=DeliveryState.DELIVERED, reason=None, next_attempt=None,
        now=NOW + 2, following=outbox.Following(60),
    )  # fmt: skip
    assert concluded
    assert following is not None
    assert reports.delivery(engine, following.id)["state"] == "sending"
    assert not outbox.is_due(engine, "pacs", NOW + 10)


def test_a_dead_delivery_leaves_a_notice_without_a_word_of_the_peer(
    engine: Engine, finish_job: FinishJob
) -> None:
    job_id = finish_job()
    delivery = _claimed(engine)
    answers.record_sent(engine, delivery.id, ("2.25.1", 0, "delivered"), NOW + 11)
    outbox.conclude_and_follow(
        engine, delivery.id, "sender", state=DeliveryState.DEAD, next_attempt=None, now=NOW + 12,
        reason="1 refused: answered 0xC000 (Doe^John is unknown)", told="1 refused: 0xC000",
    )  # fmt: skip
    (notice,) = notices.claim(engine, lease_s=60, now=NOW + 12)
    assert notice.event == {
        "event": "delivery_dead", "delivery": delivery.id, "job": job_id, "destination": "pacs",
        "reason": "1 refused: 0xC000", "stored": 1, "committed": 0, "instances": 2, "at": NOW + 12,
    }  # fmt: skip
    assert notices.claim(engine, lease_s=60, now=NOW + 12) == ()
    notices.told(engine, [notice], {notice.id: ["mail"]})
    notices.postpone(engine, [notice], NOW + 100, "the webhook is down")
    (again,) = notices.claim(engine, lease_s=60, now=NOW + 100)
    assert (again.told, again.attempts) == (("mail",), 2)
    notices.finish(engine, [again], notices.TOLD, NOW + 101)
    assert notices.claim(engine, lease_s=60, now=NOW + 9e9) == ()


def test_what_follows_soon_after_a_notice_of_a_destination_is_taken_together(
    engine: Engine,
) -> None:
    def dies(destination: str, delivery: int, now: float) -> None:
        with writing(engine) as connection:
            notices.write(connection, {"destination": destination, "delivery": delivery}, now)

    def taken(now: float) -> list[int]:
        found = notices.claim(engine, lease_s=60, now=now, apart_s=600)
        if found:
            notices.finish(engine, found, notices.TOLD, now)
        return [each.event["delivery"] for each in found]

    dies("pacs", 1, NOW)
    assert taken(NOW) == [1], "the first is told at once"
    for delivery in (2, 3, 4):
        dies("pacs", delivery, NOW + delivery)
    assert taken(NOW + 10) == []
    dies("other", 5, NOW + 10)
    assert taken(NOW + 10) == [5], "no destination holds back another"
    assert taken(NOW + 599) == []
    assert taken(NOW + 600) == [2, 3, 4]
    dies("pacs", 6, NOW + 9000)
    assert taken(NOW + 9000) == [6], "a calm destination is told of at once again"
