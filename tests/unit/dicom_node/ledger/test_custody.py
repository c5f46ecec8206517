"""What peers ask us to answer for, and what may be purged."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine

from dicom_node.ledger import answers, commitments, custody, outbox, queue
from dicom_node.ledger.tables import DeliveryState
from tests.unit.dicom_node.ledger.examples import NOW, SERIES

CT = "1.2.840.10008.5.1.4.1.1.2"
FIRST, SECOND = f"{SERIES}.1", f"{SERIES}.2"


def asks(engine: Engine, *uids: str, transaction_uid: str = "1.7", requestor: str = "CT1") -> bool:
    return custody.record_request(
        engine,
        transaction_uid=transaction_uid,
        requestor=requestor,
        originals=[custody.Original(CT, uid) for uid in uids],
        archives=["pacs"],
        now=NOW,
    )


def claimed(engine: Engine, now: float = NOW) -> custody.Request:
    request = custody.claim_request(engine, lease_s=60, now=now)
    assert request is not None
    return request


def test_a_request_knows_which_originals_have_come(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1)
    assert asks(engine, FIRST, "1.2.99")
    request = claimed(engine)
    assert (request.requestor, request.transaction_uid) == ("CT1", "1.7")
    assert {one.sop_instance_uid: one.received_class_uid for one in request.open} == {
        FIRST: CT,
        "1.2.99": None,
    }
    assert custody.claim_request(engine, lease_s=60, now=NOW + 59) is None


def test_the_same_request_again_is_one_request(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1)
    assert asks(engine, FIRST)
    assert not asks(engine, FIRST)
    assert asks(engine, FIRST, requestor="CT2"), "another sender may use the same number"


def test_a_request_is_concluded_once_an_archive_has_committed_each_original(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1, 2)
    asks(engine, FIRST, SECOND)
    request = claimed(engine)
    custody.record_inquiry(engine, request.id, archive="pacs", transaction_uid="1.8", now=NOW)
    assert custody.report_inquiry(engine, "1.8", committed=[FIRST], now=NOW)
    assert custody.conclude_request(engine, request.id, NOW) is None
    custody.ask_again(engine, request.id, asks=1, not_before=NOW + 600)
    assert custody.report_inquiry(engine, "1.8", committed=[SECOND, "1.2.99"], now=NOW + 1)
    again = claimed(engine, NOW + 1)
    assert (again.open, again.asks) == ((), 1)
    verdict = custody.conclude_request(engine, request.id, NOW + 1)
    assert verdict == custody.Verdict(
        (custody.Original(CT, FIRST), custody.Original(CT, SECOND)), ()
    )


def test_what_an_archive_has_committed_is_known_to_the_next_who_asks(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1)
    asks(engine, FIRST)
    request = claimed(engine)
    custody.record_inquiry(engine, request.id, archive="pacs", transaction_uid="1.8", now=NOW)
    custody.report_inquiry(engine, "1.8", committed=[FIRST], now=NOW)
    asks(engine, FIRST, transaction_uid="1.77")
    verdicts = [custody.conclude_request(engine, number, NOW) for number in (1, 2)]
    assert [verdict.committed for verdict in verdicts if verdict] == [
        (custody.Original(CT, FIRST),)
    ] * 2


def test_an_original_of_an_archive_that_is_no_longer_configured_is_not_committed(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1)
    asks(engine, FIRST)
    request = claimed(engine)
    custody.record_inquiry(engine, request.id, archive="old", transaction_uid="1.8", now=NOW)
    custody.report_inquiry(engine, "1.8", committed=[FIRST], now=NOW)
    asks(engine, FIRST, transaction_uid="1.77")
    assert custody.conclude_request(engine, 2, NOW) is None


def test_a_report_of_a_transaction_that_was_not_asked_changes_nothing(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1)
    asks(engine, FIRST)
    assert not custody.report_inquiry(engine, "1.8", committed=[FIRST], now=NOW)
    assert custody.conclude_request(engine, 1, NOW) is None


def test_a_verdict_names_what_failed_and_why(engine: Engine, receive: Callable[..., None]) -> None:
    receive(1)
    asks(engine, FIRST, "1.2.99")
    custody.fail_items(engine, 1, {"1.2.99": custody.NO_SUCH_INSTANCE, FIRST: 0x0110})
    verdict = custody.conclude_request(engine, 1, NOW)
    assert verdict is not None
    assert {one.sop_instance_uid: reason for one, reason in verdict.failed} == {
        "1.2.99": 0x0112,
        FIRST: 0x0110,
    }


def test_a_report_is_brought_again_until_it_is_taken_or_given_up(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1)
    asks(engine, FIRST)
    custody.fail_items(engine, 1, {FIRST: 0x0110})
    custody.conclude_request(engine, 1, NOW)
    custody.report_again(engine, 1, attempts=1, not_before=NOW + 10, now=NOW)
    assert claimed(engine, NOW + 10).report_attempts == 1
    custody.reported(engine, 1, NOW + 10)
    assert custody.claim_request(engine, lease_s=60, now=NOW + 9e9) is None


def test_an_original_is_not_purged_while_a_peer_waits_for_our_word(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1, 2)
    assert custody.purgeable(engine, [FIRST, SECOND]) == {FIRST, SECOND}
    asks(engine, FIRST)
    assert custody.purgeable(engine, [FIRST, SECOND]) == {SECOND}
    custody.record_inquiry(engine, 1, archive="pacs", transaction_uid="1.8", now=NOW)
    assert custody.purgeable(engine, [FIRST]) == frozenset()
    custody.report_inquiry(engine, "1.8", committed=[FIRST], now=NOW)
    assert custody.purgeable(engine, [FIRST]) == {FIRST}


def test_an_original_whose_sender_was_told_to_keep_it_may_go(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1)
    asks(engine, FIRST)
    custody.fail_items(engine, 1, {FIRST: 0x0110})
    assert custody.purgeable(engine, [FIRST]) == {FIRST}


def test_an_original_is_kept_until_what_was_made_of_it_has_arrived(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job("pacs", "backup")
    for destination in ("pacs", "backup"):
        assert custody.purgeable(engine, [FIRST]) == frozenset(), destination
        delivery = queue.claim_delivery(engine, "w", lease_s=60, now=NOW + 5)
        assert delivery is not None
        for item in delivery.items:
            answers.record_sent(engine, delivery.id, (item.sop_instance_uid, 0, "delivered"), NOW)
        outbox.conclude_and_follow(
            engine, delivery.id, "w", state=DeliveryState.DELIVERED, reason=None,
            next_attempt=None, now=NOW, wants_commitment=delivery.destination == "backup",
        )  # fmt: skip
    assert custody.purgeable(engine, [FIRST]) == frozenset(), "backup is asked to commit"
    commitments.request_commitment(
        engine, delivery.id, transaction_uid="1.9", now=NOW, next_ask=NOW + 60
    )
    commitments.report_commitment(engine, "1.9", committed=["2.25.1", "2.25.2"], failed={}, now=NOW)
    assert custody.purgeable(engine, [FIRST]) == {FIRST}


def test_an_original_whose_delivery_is_dead_is_kept(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job()
    delivery = queue.claim_delivery(engine, "w", lease_s=60, now=NOW + 5)
    assert delivery is not None
    queue.conclude_delivery(
        engine, delivery.id, "w", state=DeliveryState.DEAD, reason="", next_attempt=None, now=NOW
    )
    assert custody.purgeable(engine, [FIRST]) == frozenset()
