"""The whole story of an instance, from its association to the day when its file left the spool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from dicom_node.errors import NotFoundError
from dicom_node.ledger import answers, commitments, intake, outbox, queue, reports, retention
from dicom_node.ledger.retention import Ages
from dicom_node.ledger.tables import DeliveryState
from tests.unit.dicom_node.ledger.examples import NOW, SERIES, instance


def words(story: list[dict[str, Any]]) -> list[str]:
    return [" | ".join(filter(None, (e["what"], e["happened"], e["detail"]))) for e in story]


@pytest.fixture
def lived(engine: Engine, finish_job: Callable[..., int]) -> Engine:
    """A ledger in which the first slice went all the way, at one moment for each step."""
    association = intake.open_association(
        engine, calling_ae="CT1", called_ae="DIFFCODE", address="10.0.0.1", now=NOW - 9
    )
    for number in (1, 2):
        intake.record_instance(engine, instance(number, association_id=association), NOW - 8)
    intake.close_association(engine, association, "aborted", NOW - 7)
    intake.record_instance(engine, instance(1, association_id=association), NOW - 6)
    finish_job("pacs")
    delivery = queue.claim_delivery(engine, "worker", lease_s=60, now=NOW + 10)
    assert delivery is not None
    answers.record_sent(engine, delivery.id, ("2.25.1", 0xB000, "delivered"), NOW + 11)
    answers.record_sent(engine, delivery.id, ("2.25.2", 0xA700, "retry"), NOW + 12)
    conclude(engine, delivery.id, DeliveryState.WAITING, NOW + 13, "answered 0xA700")
    again = queue.claim_delivery(engine, "worker", lease_s=60, now=NOW + 20)
    assert again is not None
    answers.record_sent(engine, again.id, ("2.25.2", 0, "delivered"), NOW + 21)
    conclude(engine, again.id, DeliveryState.DELIVERED, NOW + 22)
    commitments.request_commitment(
        engine, again.id, transaction_uid="1.9", now=NOW + 30, next_ask=None
    )
    commitments.report_commitment(
        engine, "1.9", committed=["2.25.1", "2.25.2"], failed={}, now=NOW + 31
    )
    ages = Ages(NOW + 40, None, None)
    retention.mark(engine, retention.removable(engine, ages), ages, NOW + 40)
    return engine


def conclude(
    engine: Engine, delivery_id: int, state: DeliveryState, now: float, why: str | None = None
) -> None:
    concluded, _ = outbox.conclude_and_follow(
        engine,
        delivery_id,
        "worker",
        state=state,
        reason=why,
        next_attempt=None,
        now=now,
        wants_commitment=True,
    )
    assert concluded


def test_one_instance_tells_everything_in_the_order_of_time(lived: Engine) -> None:
    story = reports.instance(lived, f"{SERIES}.1")["story"]
    assert [each["at"] for each in story] == sorted(each["at"] for each in story)
    digest = instance(1).sha256[:12]
    assert words(story) == [
        "association 1 | opened | CT1 at 10.0.0.1 calls DIFFCODE",
        f"instance | received | 1000 bytes, sha256 {digest}…",
        "series | receiving",
        "association 1 | aborted",
        "instance | duplicate",
        "series | complete",
        "job 1 | queued",
        "job 1 | running | worker",
        "job 1 | done",
        "delivery 1 to pacs | queued | pacs",
        "delivery 1 to pacs | sending",
        "delivery 1 to pacs | waiting | answered 0xA700",
        "delivery 1 to pacs | sending",
        "delivery 1 to pacs | delivered",
        "commitment of pacs | asked for | transaction 1.9",
        "delivery 1 to pacs | committed",
        "result 2.25.1 at pacs | committed | answered 0xB000",
        "commitment of pacs | reported",
        "instance | purged | its file left the spool",
        "result 2.25.1 | purged | its file left the spool",
    ]


def test_the_result_tells_the_same_story(lived: Engine) -> None:
    source, result = (reports.instance(lived, uid) for uid in (f"{SERIES}.1", "2.25.1"))
    assert result["story"] == source["story"]
    assert result["source_sop_instance_uid"] == f"{SERIES}.1"
    assert result["outputs"] == source["outputs"]


def test_a_job_tells_of_its_series_and_deliveries_and_not_of_each_instance(lived: Engine) -> None:
    told = words(reports.job(lived, 1)["story"])
    assert told[0] == "association 1 | opened | CT1 at 10.0.0.1 calls DIFFCODE"
    assert told[-1] == "commitment of pacs | reported"
    assert not [line for line in told if line.startswith(("instance", "result"))]


def test_an_instance_that_was_rejected_later_was_received_first(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    make_jobs()
    intake.quarantine_instance(
        engine, f"{SERIES}.1", path="quarantine/1.dcm", reason="does not decode", now=NOW + 5
    )
    told = words(reports.instance(engine, f"{SERIES}.1")["story"])
    assert told[0].startswith("instance | received")
    assert "instance | rejected | does not decode" in told


def test_an_instance_that_never_came_has_no_story(engine: Engine) -> None:
    with pytest.raises(NotFoundError, match=r"no instance 9\.9"):
        reports.instance(engine, "9.9")
