"""Verdicts, decisions and circuit breakers in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from dicom_node.breaker import Rule
from dicom_node.errors import PermanentError
from dicom_node.ledger import queue, reports, verdicts
from dicom_node.ledger.states import Verdict
from dicom_node.ledger.tables import writing
from dicom_node.readings import GateReading, Level
from tests.unit.dicom_node.ledger.examples import NOW, SERIES, judged, new_job, output

MakeJobs = Callable[..., list[int]]
ANN: dict[str, Any] = {"operator": "Ann", "reason": "looked at it", "now": NOW + 60}
STRICT = Rule(window=5, lowest=0.0, highest=0.05, significance=0.01)


def finish(engine: Engine, job_id: int, made: queue.Judged, now: float = NOW + 5) -> None:
    assert queue.claim(engine, "worker", lease_s=60, now=now) is not None
    refused = set(made.verdicts.values()) == {Verdict.REFUSE}
    outputs = [] if refused else [output(2 * job_id), output(2 * job_id + 1)]
    assert queue.finish(
        engine,
        job_id,
        "worker",
        judged=made,
        outputs=outputs,
        derived_series_instance_uid="2.25",
        model_sha256="a" * 64,
        seconds={},
        note=None,
        now=now,
    )


def sent_to(engine: Engine, job_id: int) -> list[str]:
    return [each["destination"] for each in reports.job(engine, job_id)["deliveries"]]


@pytest.fixture
def several(receive: Callable[..., None], make_jobs: MakeJobs) -> Callable[[int], list[int]]:
    """Make so many jobs, each of an instance of its own."""

    def make(count: int) -> list[int]:
        receive(*range(1, count + 1))
        return make_jobs(*(new_job((n,), volume_key=f"v{n}") for n in range(1, count + 1)))

    return make


def test_a_held_result_has_its_files_and_no_delivery(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs()
    finish(engine, job_id, judged("pacs", verdict=Verdict.HOLD))
    job = reports.job(engine, job_id)
    assert (job["state"], job["reason"], job["finished"]) == ("held", "a gate says hold", None)
    assert len(job["outputs"]) == 2
    assert job["deliveries"] == []
    assert queue.claim_delivery(engine, "d", lease_s=60, now=NOW + 99) is None


def test_what_is_released_is_sent_as_it_was_reviewed(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs()
    finish(engine, job_id, judged("pacs", verdict=Verdict.HOLD))
    before = reports.job(engine, job_id)["outputs"]
    assert queue.release(engine, job_id, **ANN)
    job = reports.job(engine, job_id)
    assert (job["state"], job["outputs"]) == ("done", before)
    assert sent_to(engine, job_id) == ["pacs"]
    (verdict,) = job["verdicts"]
    assert (verdict["decision"], verdict["operator"]) == ("released", "Ann")
    assert verdict["decision_reason"] == "looked at it"
    assert job["history"][-1]["reason"] == "released by Ann: looked at it"
    assert not queue.release(engine, job_id, **ANN), "once is enough"


def test_what_is_rejected_is_never_sent(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs()
    finish(engine, job_id, judged("pacs", verdict=Verdict.HOLD))
    assert queue.reject(engine, job_id, **ANN)
    job = reports.job(engine, job_id)
    assert (job["state"], job["deliveries"]) == ("rejected", [])
    assert job["verdicts"][0]["decision"] == "rejected"
    for undo in (queue.release, queue.reject):
        assert not undo(engine, job_id, **ANN)
    assert not queue.retry(engine, job_id, reason="again", now=NOW)


def test_a_held_result_is_no_job_to_cancel(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs()
    finish(engine, job_id, judged("pacs", verdict=Verdict.HOLD))
    assert not queue.cancel(engine, job_id, reason="away with it", now=NOW)
    assert reports.job(engine, job_id)["state"] == "held"


def test_each_destination_has_its_own_verdict(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs(new_job(destinations=("pacs", "research", "web")))
    mixed = {"pacs": Verdict.HOLD, "research": Verdict.WARN, "web": Verdict.REFUSE}
    finish(engine, job_id, judged(verdicts=mixed))
    assert (reports.job(engine, job_id)["state"], sent_to(engine, job_id)) == ("held", ["research"])
    assert queue.release(engine, job_id, **ANN)
    assert sent_to(engine, job_id) == ["research", "pacs"], "what is refused stays refused"


def test_what_no_destination_may_have_is_refused(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs()
    finish(engine, job_id, judged("pacs", verdict=Verdict.REFUSE))
    job = reports.job(engine, job_id)
    assert (job["state"], job["outputs"], job["deliveries"]) == ("refused", [], [])
    assert not queue.release(engine, job_id, **ANN)


def test_the_outbox_takes_nothing_without_a_verdict(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs()
    recorded = verdicts.Recorded({"pacs": Verdict.PASS}, None)
    with pytest.raises(PermanentError, match="no verdict lets"), writing(engine) as connection:
        verdicts.settle(connection, job_id, recorded, NOW)
    assert sent_to(engine, job_id) == []


def test_the_story_of_a_job_tells_every_value_of_every_gate(
    engine: Engine, make_jobs: MakeJobs
) -> None:
    (job_id,) = make_jobs()
    levels = (Level.PASS, Level.FAIL, Level.NOT_APPLICABLE)
    nan = GateReading("range", "HU", (1.0, float("inf"), None), (0, 1, 2), levels, (None, 5.0),
                      (None, 9.0), 1, "far out")  # fmt: skip
    finish(
        engine,
        job_id,
        judged("pacs", verdict=Verdict.HOLD, readings=(nan,), review=f"review/{job_id}"),
    )
    job = reports.job(engine, job_id)
    assert job["review"] == f"review/{job_id}"
    (gate,) = job["gates"]
    assert gate["values"] == [1.0, "inf", None]
    assert gate["levels"] == ["pass", "fail", "not_applicable"]
    assert (gate["gate"], gate["level"], gate["worst_slice"]) == ("range", "fail", 1)


def test_a_breaker_opens_holds_what_passes_and_waits_for_an_operator(
    engine: Engine, several: Callable[[int], list[int]]
) -> None:
    ids = several(6)
    failing = judged("pacs", verdict=Verdict.WARN, failed=True, breaker=STRICT)
    passing = judged("pacs", breaker=STRICT)
    finish(engine, ids[0], failing)
    assert reports.job(engine, ids[0])["state"] == "done"
    finish(engine, ids[1], failing)  # 2 of 2: p = 0.0025
    opened = reports.job(engine, ids[1])
    assert opened["state"] == "held"
    assert "circuit breaker CT opened: 2 of the last 2 jobs failed a gate" in opened["reason"]
    finish(engine, ids[2], passing)
    assert "circuit breaker CT is open" in reports.job(engine, ids[2])["reason"]
    assert reports.stats(engine)["breakers"] == {"CT": "open"}
    assert not queue.reset_breaker(engine, "MR", **ANN)
    assert queue.reset_breaker(engine, "CT", **ANN)
    (row,) = reports.breakers(engine, window=5)
    assert (row["state"], row["failed"], row["judged"]) == ("closed", 0, 0)
    assert [each["to"] for each in row["history"]] == ["open", "closed"]
    assert row["history"][-1]["reason"] == "reset by Ann: looked at it"
    finish(engine, ids[3], passing, now=NOW + 70)
    assert reports.job(engine, ids[3])["state"] == "done"
    assert reports.job(engine, ids[2])["state"] == "held", "what was held waits on"


@pytest.mark.parametrize(
    "other", [{"modality": "MR"}, {"model_sha256": "b" * 64}], ids=["modality", "model"]
)
def test_a_breaker_counts_its_own_modality_and_model(
    engine: Engine, several: Callable[[int], list[int]], other: dict[str, str]
) -> None:
    first, second = several(2)
    failing = {"verdict": Verdict.WARN, "failed": True, "breaker": STRICT}
    finish(engine, first, judged("pacs", **failing))  # type: ignore[arg-type]
    finish(engine, second, judged("pacs", **failing, **other))  # type: ignore[arg-type]
    assert reports.job(engine, second)["state"] == "done"


def test_a_breaker_forgets_what_lies_before_its_window(
    engine: Engine, several: Callable[[int], list[int]]
) -> None:
    ids = several(7)
    finish(engine, ids[0], judged("pacs", verdict=Verdict.WARN, failed=True, breaker=STRICT))
    for number, job_id in enumerate(ids[1:6]):
        finish(engine, job_id, judged("pacs", breaker=STRICT), now=NOW + 10 + number)
    last = judged("pacs", verdict=Verdict.WARN, failed=True, breaker=STRICT)
    finish(engine, ids[6], last, now=NOW + 30)
    assert reports.job(engine, ids[6])["state"] == "done"
    (row,) = reports.breakers(engine, window=STRICT.window)
    assert (row["failed"], row["judged"]) == (1, 5)


def test_an_own_result_that_is_held_is_known_as_our_own(
    engine: Engine, make_jobs: MakeJobs
) -> None:
    (job_id,) = make_jobs()
    finish(engine, job_id, judged("pacs", verdict=Verdict.HOLD))
    assert queue.is_own_output(engine, sop_instance_uid="1", series_instance_uid="2.25")
    assert SERIES != "2.25"


@pytest.fixture
def late_part(
    engine: Engine, receive: Callable[..., None], make_jobs: MakeJobs
) -> Callable[..., dict[str, Any]]:
    """Finish a job with a verdict, have a person decide or not, then one of a slice that is late.

    The story of the second, which all gates pass.
    """

    def make(
        verdict: Verdict, decide: Callable[..., bool] | None, modality: str = "CT", **late: Any
    ) -> dict[str, Any]:
        (first,) = make_jobs(new_job(volume_key="v", destinations=("pacs", "web")))
        mixed = {"pacs": verdict, "web": Verdict.PASS}
        finish(engine, first, judged(verdicts=mixed, modality=modality))
        if decide is not None:
            assert decide(engine, first, **ANN)
        receive(3, now=NOW + 70)
        changes: dict[str, Any] = {"volume_key": "v", "destinations": ("pacs", "web"), **late}
        (second,) = make_jobs(new_job((3,), **changes), now=NOW + 80)
        finish(engine, second, judged("pacs", "web", modality=modality), now=NOW + 90)
        return reports.job(engine, second)

    return make


@pytest.mark.parametrize(
    ("verdict", "decide"),
    [(Verdict.HOLD, None), (Verdict.HOLD, queue.reject), (Verdict.REFUSE, None)],
    ids=["held", "rejected", "refused"],
)
def test_what_comes_late_does_not_go_where_the_rest_did_not(
    engine: Engine, late_part: Callable[..., Any], verdict: Verdict, decide: Any
) -> None:
    job = late_part(verdict, decide)
    assert (job["state"], sent_to(engine, job["id"])) == ("held", ["web"])
    assert job["reason"] == "the rest of the volume was not sent: job 1"
    assert queue.release(engine, job["id"], **ANN)
    assert sent_to(engine, job["id"]) == ["web", "pacs"], "a person may send it all the same"


@pytest.mark.parametrize(
    ("verdict", "decide", "changes"),
    [
        (Verdict.WARN, None, {}),
        (Verdict.HOLD, queue.release, {}),
        (Verdict.HOLD, queue.reject, {"volume_key": "another"}),
        (Verdict.HOLD, queue.reject, {"modality": "PT"}),
    ],
    ids=["sent", "released", "another volume", "a set of its own"],
)
def test_what_comes_late_goes_by_its_own_verdict_otherwise(
    engine: Engine,
    late_part: Callable[..., Any],
    verdict: Verdict,
    decide: Any,
    changes: dict[str, Any],
) -> None:
    job = late_part(verdict, decide, **changes)
    assert (job["state"], sent_to(engine, job["id"])) == ("done", ["pacs", "web"])


def test_what_comes_late_to_an_undivided_series_is_of_its_volume(
    late_part: Callable[..., Any],
) -> None:
    assert late_part(Verdict.HOLD, queue.reject, volume_key="whole")["state"] == "held"
