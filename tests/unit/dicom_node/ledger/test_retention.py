"""What may leave the spool, on both engines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import Engine, update

from dicom_node.errors import PermanentError
from dicom_node.ledger import answers, custody, intake, queue, retention, tables
from dicom_node.ledger.retention import Ages, Kind, Removable
from dicom_node.ledger.states import Verdict
from dicom_node.ledger.tables import DeliveryState, writing
from tests.unit.dicom_node.ledger import examples
from tests.unit.dicom_node.ledger.examples import NOW, SERIES, instance, judged, new_job

#: The deliveries below end then.
SENT = NOW + 20
LATER = SENT + 100
ALL = Ages(LATER, LATER, LATER)


def kinds(engine: Engine, ages: Ages = ALL) -> dict[Kind, list[str]]:
    found: dict[Kind, list[str]] = {}
    for one in retention.removable(engine, ages):
        found.setdefault(one.kind, []).append(one.path)
    return {kind: sorted(paths) for kind, paths in found.items()}


def deliver(engine: Engine, *, state: DeliveryState = DeliveryState.DELIVERED) -> None:
    """Attempt the next due delivery; every instance is acknowledged."""
    delivery = queue.claim_delivery(engine, "worker", lease_s=60, now=SENT - 1)
    assert delivery is not None
    for item in delivery.items:
        uid = item.sop_instance_uid
        answers.record_sent(engine, delivery.id, (uid, 0, "delivered"), SENT)
    assert queue.conclude_delivery(
        engine, delivery.id, "worker", state=state, reason=None, next_attempt=None, now=SENT
    )


def test_what_has_arrived_goes_with_what_was_made_of_it(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job("pacs")
    assert kinds(engine) == {}
    deliver(engine)
    assert kinds(engine) == {
        Kind.ORIGINAL: ["incoming/00/1.dcm", "incoming/00/2.dcm"],
        Kind.RESULT: ["outgoing/2.25/2.25.1.dcm", "outgoing/2.25/2.25.2.dcm"],
    }


@pytest.mark.parametrize("state", [DeliveryState.WAITING, DeliveryState.DEAD])
def test_a_delivery_that_has_not_arrived_keeps_everything(
    engine: Engine, finish_job: Callable[..., int], state: DeliveryState
) -> None:
    finish_job("pacs")
    deliver(engine, state=state)
    assert kinds(engine) == {}


def test_one_destination_of_two_is_not_enough(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job("pacs", "archive")
    deliver(engine)
    assert kinds(engine) == {}
    deliver(engine)
    assert set(kinds(engine)) == {Kind.ORIGINAL, Kind.RESULT}


def test_a_commitment_that_is_awaited_keeps_everything(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job("pacs")
    deliver(engine)
    with writing(engine) as connection:
        connection.execute(update(tables.deliveries).values(commitment_due=NOW))
    assert kinds(engine) == {}


def test_an_original_that_a_peer_asks_us_to_answer_for_stays(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job("pacs")
    deliver(engine)
    asked = custody.Original("1.2.840.10008.5.1.4.1.1.2", f"{SERIES}.1")
    custody.record_request(
        engine,
        transaction_uid="1.9",
        requestor="CT1",
        originals=[asked],
        archives=["pacs"],
        now=SENT,
    )
    assert kinds(engine)[Kind.ORIGINAL] == ["incoming/00/2.dcm"]


def test_a_result_without_destination_was_never_delivered(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    (job_id,) = make_jobs(new_job(destinations=()))
    finish(engine, job_id, judged())
    assert kinds(engine) == {}


@pytest.mark.parametrize("act", ["queued", "running", "held"])
def test_a_job_that_has_not_ended_keeps_its_originals(
    engine: Engine, make_jobs: Callable[..., list[int]], act: str
) -> None:
    (job_id,) = make_jobs()
    if act == "running":
        queue.claim(engine, "worker", lease_s=60, now=NOW)
    if act == "held":
        queue.hold(engine, job_id, reason="look", now=NOW)
    assert kinds(engine) == {}


def test_age_counts_from_the_last_delivery(engine: Engine, finish_job: Callable[..., int]) -> None:
    finish_job("pacs")
    deliver(engine)
    assert kinds(engine, Ages(SENT - 0.1, None, None)) == {}
    assert set(kinds(engine, Ages(SENT, None, None))) == {Kind.ORIGINAL, Kind.RESULT}
    assert kinds(engine, Ages(None, LATER, LATER)) == {}


def test_originals_that_nothing_is_made_of_have_an_age_of_their_own(
    engine: Engine, make_jobs: Callable[..., list[int]], receive: Callable[..., None]
) -> None:
    (job_id,) = make_jobs()
    assert queue.claim(engine, "worker", lease_s=60, now=NOW)
    queue.refuse(engine, job_id, "worker", "lossy", NOW + 5)
    receive(9, series_instance_uid="7", ignored_reason="localizer")
    wanted = {Kind.UNRESTORED: [f"incoming/00/{number}.dcm" for number in (1, 2, 9)]}
    assert kinds(engine) == wanted
    assert kinds(engine, Ages(LATER, None, LATER)) == {}
    # The refusal is younger than the arrival.
    assert kinds(engine, Ages(None, NOW + 4, None)) == {Kind.UNRESTORED: ["incoming/00/9.dcm"]}


def test_a_series_that_is_being_received_loses_nothing(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1, 2)
    assert kinds(engine) == {}


def finish(engine: Engine, job_id: int, verdict: queue.Judged) -> None:
    examples.claim_job(engine)
    examples.finish_job(engine, job_id, verdict, now=NOW + 3)


def test_a_result_that_a_gate_refused_goes_as_what_was_not_restored(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    (job_id,) = make_jobs()
    finish(engine, job_id, judged("pacs", verdict=Verdict.REFUSE))
    assert set(kinds(engine)) == {Kind.UNRESTORED, Kind.DISCARDED}
    assert kinds(engine, Ages(LATER, None, LATER)) == {}


def test_the_quarantine_has_its_own_age(engine: Engine, receive: Callable[..., None]) -> None:
    receive(1)
    intake.record_instance(
        engine, instance(1, sha256="f" * 64), NOW, lambda path, why: "quarantine/f.dcm"
    )
    intake.reject_instance(
        engine,
        sop_instance_uid=None,
        path="quarantine/g.dcm",
        reason="not DICOM",
        association_id=None,
        now=NOW + 50,
    )
    assert kinds(engine) == {Kind.QUARANTINED: ["quarantine/f.dcm", "quarantine/g.dcm"]}
    assert kinds(engine, Ages(LATER, LATER, NOW)) == {Kind.QUARANTINED: ["quarantine/f.dcm"]}
    assert kinds(engine, Ages(LATER, LATER, None)) == {}


def test_what_is_marked_is_gone_and_found_again_after_a_crash(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job("pacs")
    deliver(engine)
    chosen = retention.removable(engine, ALL)
    assert retention.mark(engine, chosen, ALL, LATER) == chosen
    assert kinds(engine) == {}
    paths = [one.path for one in chosen]
    assert retention.marked(engine, [*paths, "incoming/00/x.dcm"]) == dict.fromkeys(paths, LATER)
    assert intake.known_paths(engine) == set()
    assert retention.kept_results(engine) == set()
    assert retention.mark(engine, chosen, ALL, LATER) == []


def test_what_has_become_needed_again_is_not_marked(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job("pacs")
    deliver(engine)
    chosen = retention.removable(engine, ALL)
    with writing(engine) as connection:
        connection.execute(update(tables.deliveries).values(state=DeliveryState.QUEUED))
    assert retention.mark(engine, chosen, ALL, LATER) == []
    assert len(intake.known_paths(engine)) == 2


def test_a_file_of_two_rows_goes_with_the_last(engine: Engine) -> None:
    for at in (NOW, NOW + 50):
        intake.reject_instance(
            engine,
            sop_instance_uid=None,
            path="quarantine/g.dcm",
            reason="not DICOM",
            association_id=None,
            now=at,
        )
    early, late = Ages(None, None, NOW), Ages(None, None, NOW + 50)
    first = retention.removable(engine, early)
    assert len(first) == 1
    assert retention.mark(engine, first, early, LATER) == []
    assert retention.marked(engine, ["quarantine/g.dcm"]) == {}
    (second,) = retention.removable(engine, late)
    assert retention.mark(engine, [second], late, LATER) == [second]


def test_an_instance_that_came_again_is_kept_anew(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job("pacs")
    deliver(engine)
    retention.mark(engine, retention.removable(engine, ALL), ALL, LATER)
    retention.keep(engine, "incoming/00/1.dcm", LATER + 10)
    assert intake.known_paths(engine) == {"incoming/00/1.dcm"}
    assert kinds(engine) == {}  # its age began anew
    assert kinds(engine, Ages(LATER + 10, None, None)) == {Kind.ORIGINAL: ["incoming/00/1.dcm"]}


def test_no_more_is_asked_for_than_wanted(engine: Engine, finish_job: Callable[..., int]) -> None:
    finish_job("pacs")
    deliver(engine)
    assert [one.kind for one in retention.removable(engine, ALL, limit=1)] == [
        Kind.ORIGINAL,
        Kind.RESULT,
    ]
    assert retention.removable(engine, ALL, limit=1)[0] == Removable(
        Kind.ORIGINAL, 1, "incoming/00/1.dcm", 1000
    )


def test_the_same_bytes_again_bring_an_instance_back(
    engine: Engine, finish_job: Callable[..., int], receive: Callable[..., None]
) -> None:
    finish_job("pacs")
    deliver(engine)
    retention.mark(engine, retention.removable(engine, ALL), ALL, LATER)
    receive(1, now=LATER + 10)
    assert intake.known_paths(engine) == {"incoming/00/1.dcm"}
    assert [one.received_at for one in intake.series_instances(engine, SERIES)] == [LATER + 10]
    assert kinds(engine) == {}


def test_a_job_whose_originals_are_gone_is_not_tried_again_until_they_come(
    engine: Engine, make_jobs: Callable[..., list[int]], receive: Callable[..., None]
) -> None:
    (job_id,) = make_jobs()
    assert queue.claim(engine, "worker", lease_s=60, now=NOW)
    queue.refuse(engine, job_id, "worker", "lossy", NOW + 5)
    retention.mark(engine, retention.removable(engine, ALL), ALL, LATER)
    with pytest.raises(PermanentError, match="have left the spool; send them again"):
        queue.retry(engine, job_id, reason="policy changed", now=LATER)
    receive(1, 2, now=LATER + 10)
    assert queue.retry(engine, job_id, reason="policy changed", now=LATER + 20)
