from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from dicom_node.errors import NotFoundError
from dicom_node.ledger import answers, intake, queue, reports
from tests.unit.dicom_node.ledger.examples import NOW, SERIES, STUDY, instance, new_job

FinishJob = Callable[..., int]


def test_a_job_has_the_promised_shape(engine: Engine, finish_job: FinishJob) -> None:
    job_id = finish_job()
    (job,) = reports.jobs(engine)
    promised = {
        "id": job_id,
        "state": "done",
        "task": "ct_denoise",
        "reason": None,
        "study_instance_uid": STUDY,
        "series_instance_uid": SERIES,
        "derived_series_instance_uid": "2.25",
        "instances": 2,
        "model_sha256": "a" * 64,
        "created": "2023-11-14T22:13:20.000+00:00",
        "finished": "2023-11-14T22:13:23.000+00:00",
        "seconds": {"load": 0.5, "restore": 2.0, "derive": 0.25},
    }
    assert {key: job[key] for key in promised} == promised
    (delivery,) = job["deliveries"]
    assert delivery | {"id": 0, "reason": None} == {
        "id": 0,
        "destination": "pacs",
        "state": "queued",
        "reason": None,
        "sent": 0,
        "total": 2,
    }


def test_a_job_that_has_not_run_has_no_seconds(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    make_jobs()
    (job,) = reports.jobs(engine)
    assert job["seconds"] == {"load": None, "restore": None, "derive": None}
    assert job["finished"] is None


def test_a_series_has_the_promised_shape(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    make_jobs()
    (series,) = reports.series(engine)
    promised = ("series_instance_uid", "state", "reason", "instances")
    assert [series[key] for key in promised] == [SERIES, "complete", None, 2]


def test_a_series_of_which_nothing_is_restored_tells_how_many_instances_are_stored(
    engine: Engine,
) -> None:
    for number in (1, 2):
        localizer = instance(number, ignored_reason="a localizer")
        intake.record_instance(engine, localizer, NOW)
    (series,) = reports.series(engine)
    assert (series["state"], series["instances"]) == ("ignored", 2)


def test_one_job_tells_its_whole_story(engine: Engine, finish_job: FinishJob) -> None:
    found = reports.job(engine, finish_job())
    assert found["sources"] == [f"{SERIES}.1", f"{SERIES}.2"]
    assert [each["source_sop_instance_uid"] for each in found["outputs"]] == found["sources"]
    assert [each["to"] for each in found["history"]] == ["queued", "running", "done"]


def test_one_instance_tells_its_story_from_association_to_destination(
    engine: Engine, receive: Callable[..., None], finish_job: FinishJob
) -> None:
    association = intake.open_association(
        engine, calling_ae="SCANNER", called_ae="DIFFCODE", address="10.0.0.5", now=NOW
    )
    receive(1, 2, association_id=association)
    receive(1)
    job_id = finish_job()
    delivery = queue.claim_delivery(engine, "sender", lease_s=60, now=NOW + 9)
    assert delivery is not None
    answers.record_sent(engine, delivery.id, ("2.25.1", 0xB007, "delivered"), NOW + 10)
    story = reports.instance(engine, f"{SERIES}.1")
    assert [row["calling_ae"] for row in story["received"]] == ["SCANNER"]
    assert [each["to"] for each in story["history"]] == ["duplicate"]
    assert [job["id"] for job in story["jobs"]] == [job_id]
    assert [output["sop_instance_uid"] for output in story["outputs"]] == ["2.25.1"]
    (sent,) = story["deliveries"]
    assert (sent["destination"], sent["state"], sent["status"]) == ("pacs", "delivered", "0xB007")


def test_everything_is_ready_for_json(engine: Engine, finish_job: FinishJob) -> None:
    job_id = finish_job()
    everything = [
        reports.jobs(engine),
        reports.job(engine, job_id),
        reports.series(engine),
        reports.one_series(engine, SERIES),
        reports.deliveries(engine),
        reports.delivery(engine, 1),
        reports.instances(engine),
        reports.instance(engine, f"{SERIES}.1"),
        reports.stats(engine),
    ]
    assert json.loads(json.dumps(everything)) == everything


def test_lists_are_filtered_and_newest_first(
    engine: Engine, make_jobs: Callable[..., list[int]]
) -> None:
    first, second = make_jobs(new_job((1,)), new_job((2,), task="mri_sr"))
    assert queue.hold(engine, second, reason="by hand", now=NOW)

    def ids(**wanted: object) -> list[int]:
        return [job["id"] for job in reports.jobs(engine, **wanted)]  # type: ignore[arg-type]

    assert ids() == [second, first]
    assert ids(limit=1) == [second]
    assert ids(state="queued") == [first]
    assert ids(task="mri_sr") == [second]
    assert ids(since=NOW) == [second, first]
    assert ids(since=NOW + 1) == []
    assert ids(series_uid="9") == []
    assert reports.series(engine, state="receiving") == []
    assert reports.deliveries(engine, destination="pacs") == []
    assert len(reports.instances(engine, series_uid=SERIES, state="received")) == 2


def test_what_is_not_there_is_said_so(engine: Engine) -> None:
    for ask in (
        lambda: reports.job(engine, 7),
        lambda: reports.one_series(engine, "9"),
        lambda: reports.delivery(engine, 7),
        lambda: reports.instance(engine, "9"),
    ):
        with pytest.raises(NotFoundError, match="there is no"):
            ask()


def test_stats_count_every_state(engine: Engine, finish_job: FinishJob) -> None:
    finish_job()
    intake.record_instance(engine, instance(9, ignored_reason="localizer"), NOW)
    found = reports.stats(engine)
    assert found["instances"] == {
        "received": 2,
        "ignored": 1,
        "duplicate": 0,
        "conflict": 0,
        "rejected": 0,
    }
    assert (
        found["jobs"]["done"] == found["deliveries"]["queued"] == found["series"]["complete"] == 1
    )
    assert found["kept_bytes"] == 5000
    assert found["oldest_queued_job"] is None
    assert found["oldest_open_delivery"] == "2023-11-14T22:13:23.000+00:00"


def test_an_empty_ledger_has_empty_reports(engine: Engine) -> None:
    assert reports.jobs(engine) == reports.series(engine) == reports.deliveries(engine) == []
    assert reports.stats(engine)["kept_bytes"] == 0
