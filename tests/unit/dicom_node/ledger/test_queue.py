from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from sqlalchemy import Engine, insert, select

from dicom_node.errors import LedgerError, NotFoundError
from dicom_node.ledger import intake, queue, reports, tables
from dicom_node.ledger.tables import JobState, SeriesState, reading, writing
from tests.unit.dicom_node.ledger.examples import NOW, SERIES, STUDY, judged, new_job, output

MakeJobs = Callable[..., list[int]]


def _claim(engine: Engine, worker: str = "worker", now: float = NOW) -> queue.Job | None:
    return queue.claim(engine, worker, lease_s=60, now=now)


def _state(engine: Engine, job_id: int) -> tuple[str, str | None]:
    found = reports.job(engine, job_id)
    return found["state"], found["reason"]


def _finish(engine: Engine, job_id: int, worker: str = "worker", **changes: object) -> bool:
    values: dict[str, object] = {
        "judged": judged("pacs"),
        "outputs": [output(1), output(2)],
        "derived_series_instance_uid": "2.25",
        "model_sha256": "a" * 64,
        "seconds": {"load": 1.0},
        "note": None,
        "now": NOW + 5,
        **changes,
    }
    finished = queue.finish(engine, job_id, worker, **values)  # type: ignore[arg-type]
    return finished is not None


def test_a_closed_series_has_its_jobs_and_assigned_instances(
    engine: Engine, make_jobs: MakeJobs
) -> None:
    (job_id,) = make_jobs(new_job(priority=3))
    assert reports.one_series(engine, SERIES)["state"] == "complete"
    assert all(row.assigned for row in intake.series_instances(engine, SERIES))
    assert _claim(engine) == queue.Job(
        id=job_id,
        series_instance_uid=SERIES,
        study_instance_uid=STUDY,
        volume_key="",
        revision=1,
        task="ct_denoise",
        route="ct",
        destinations=("pacs",),
        attempts=1,
        created=NOW,
        note=None,
        paths=tuple((f"{SERIES}.{number}", f"incoming/00/{number}.dcm") for number in (1, 2)),
        received=NOW,
    )


def test_an_instance_that_comes_while_the_series_is_judged_undoes_the_judgement(
    engine: Engine, receive: Callable[..., None]
) -> None:
    receive(1, 2)
    (progress,) = intake.series_progress(engine)
    receive(3)
    made = queue.enqueue(
        engine,
        SERIES,
        series_state=SeriesState.COMPLETE,
        reason=None,
        jobs=[new_job()],
        instances_seen=progress.instances,
        now=NOW,
    )
    assert made is None
    assert reports.jobs(engine) == []
    assert intake.series_progress(engine)[0].instances == 3


def test_paths_keep_the_order_of_the_job(engine: Engine, make_jobs: MakeJobs) -> None:
    make_jobs(new_job((2, 1)))
    job = _claim(engine)
    assert job is not None
    assert [uid for uid, _ in job.paths] == [f"{SERIES}.2", f"{SERIES}.1"]


def test_two_tasks_and_two_volumes_are_four_jobs(engine: Engine, make_jobs: MakeJobs) -> None:
    jobs = [
        new_job((number,), volume_key=f"echo {number}", task=task)
        for number in (1, 2)
        for task in ("ct_denoise", "mri_sr")
    ]
    assert len(make_jobs(*jobs)) == 4


def test_the_same_volume_again_makes_no_job(engine: Engine, make_jobs: MakeJobs) -> None:
    make_jobs()
    assert intake.force_series(engine, SERIES, reason="by hand", now=NOW)
    assert make_jobs() == []


def test_a_volume_that_grew_is_the_next_revision(
    engine: Engine, make_jobs: MakeJobs, receive: Callable[..., None]
) -> None:
    make_jobs()
    receive(3)
    (second,) = make_jobs(new_job((1, 2, 3)))
    assert reports.job(engine, second)["revision"] == 2
    assert reports.job(engine, second)["instances"] == 3


def test_a_job_of_unknown_instances_is_not_made(engine: Engine, make_jobs: MakeJobs) -> None:
    with pytest.raises(NotFoundError):
        make_jobs(new_job((1, 9)))
    with pytest.raises(NotFoundError):
        make_jobs(new_job(()))
    assert reports.one_series(engine, SERIES)["state"] == "receiving"


def test_a_refused_or_held_job_is_made_as_such(engine: Engine, make_jobs: MakeJobs) -> None:
    refused, held = make_jobs(
        new_job((1,), state=JobState.REFUSED, reason="lossy"),
        new_job((2,), volume_key="2", state=JobState.HELD, reason="a gap"),
    )
    assert _state(engine, refused) == ("refused", "lossy")
    assert _state(engine, held) == ("held", "a gap")
    assert reports.job(engine, refused)["finished"] is not None
    assert _claim(engine) is None


def test_claims_go_by_priority_then_age(engine: Engine, make_jobs: MakeJobs) -> None:
    first, urgent, second = make_jobs(
        new_job((1,), volume_key="a"),
        new_job((2,), volume_key="b", priority=5),
        new_job((1, 2), volume_key="c"),
    )
    claimed = [_claim(engine) for _ in range(4)]
    assert [job.id if job else None for job in claimed] == [urgent, first, second, None]


def test_four_workers_claim_a_hundred_jobs_once_each(engine: Engine, make_jobs: MakeJobs) -> None:
    made = make_jobs(*(new_job(volume_key=str(number)) for number in range(100)))

    def work(name: str) -> list[int]:
        found = []
        while (job := _claim(engine, name)) is not None:
            found.append(job.id)
        return found

    with ThreadPoolExecutor(4) as pool:
        claimed = [job for ids in pool.map(work, "abcd") for job in ids]
    # On PostgreSQL a worker may see "none" while others hold the last rows, never one twice.
    assert len(claimed) == len(set(claimed))
    assert sorted([*claimed, *work("e")]) == made


def test_a_lease_that_ends_gives_the_job_to_another(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs()
    assert _claim(engine, "first")
    assert queue.expire_leases(engine, NOW + 59) == 0
    assert _claim(engine, "second", NOW + 59) is None
    assert queue.expire_leases(engine, NOW + 61) == 1
    job = _claim(engine, "second", NOW + 61)
    assert job is not None
    assert job.attempts == 2
    assert not queue.heartbeat(engine, job_id, "first", lease_s=60, now=NOW + 62)
    assert not _finish(engine, job_id, "first")
    assert not queue.fail(engine, job_id, "first", "late", NOW + 62)
    assert reports.job(engine, job_id)["worker"] == "second"


def test_a_heartbeat_keeps_the_job(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs()
    _claim(engine)
    assert queue.heartbeat(engine, job_id, "worker", lease_s=60, now=NOW + 50)
    assert queue.expire_leases(engine, NOW + 100) == 0


def test_a_job_that_ends_its_worker_every_time_is_failed(
    engine: Engine, make_jobs: MakeJobs
) -> None:
    (job_id,) = make_jobs()
    for attempt in range(3):
        assert _claim(engine, now=NOW + attempt * 100)
        queue.expire_leases(engine, NOW + attempt * 100 + 61, max_attempts=3)
    state, reason = _state(engine, job_id)
    assert state == "failed"
    assert reason is not None
    assert "too often" in reason


def test_a_restarted_worker_gives_its_own_jobs_back_at_once(
    engine: Engine, make_jobs: MakeJobs
) -> None:
    make_jobs(new_job((1,)), new_job((2,), volume_key="2"))
    assert _claim(engine, "mine")
    assert _claim(engine, "other")
    assert queue.release_leases(engine, "mine", NOW + 1) == 1
    assert [row["worker"] for row in reports.jobs(engine)] == ["other", None]


def test_a_finished_job_has_its_outputs_and_one_delivery_per_destination(
    engine: Engine, make_jobs: MakeJobs
) -> None:
    (job_id,) = make_jobs(new_job(destinations=("pacs", "archive", "pacs")))
    _claim(engine)
    assert _finish(engine, job_id, note="one gap", judged=judged("pacs", "archive"))
    assert not _finish(engine, job_id)
    found = reports.job(engine, job_id)
    assert (found["state"], found["reason"]) == ("done", "one gap")
    assert [output["sop_instance_uid"] for output in found["outputs"]] == ["2.25.1", "2.25.2"]
    assert [
        (each["destination"], each["state"], each["total"]) for each in found["deliveries"]
    ] == [
        ("pacs", "queued", 2),
        ("archive", "queued", 2),
    ]


def test_a_failure_inside_finish_leaves_neither_outputs_nor_deliveries(
    engine: Engine, make_jobs: MakeJobs
) -> None:
    (job_id,) = make_jobs()
    _claim(engine)
    with pytest.raises(LedgerError):
        _finish(engine, job_id, outputs=[output(1), output(1)])
    found = reports.job(engine, job_id)
    assert (found["state"], found["outputs"], found["deliveries"]) == ("running", [], [])
    assert found["derived_series_instance_uid"] is None


def test_a_job_without_destination_is_done_all_the_same(
    engine: Engine, make_jobs: MakeJobs
) -> None:
    (job_id,) = make_jobs(new_job(destinations=()))
    _claim(engine)
    assert _finish(engine, job_id, judged=judged())
    assert reports.job(engine, job_id)["deliveries"] == []


def test_a_refusal_and_a_failure_keep_their_reasons(engine: Engine, make_jobs: MakeJobs) -> None:
    first, second = make_jobs(new_job((1,)), new_job((2,), volume_key="2"))
    _claim(engine)
    _claim(engine)
    assert queue.refuse(engine, first, "worker", "reformatted", NOW)
    assert queue.fail(engine, second, "worker", "pixel data do not decode", NOW)
    assert _state(engine, first) == ("refused", "reformatted")
    assert _state(engine, second) == ("failed", "pixel data do not decode")


def test_a_transient_error_queues_the_job_after_a_delay(
    engine: Engine, make_jobs: MakeJobs
) -> None:
    (job_id,) = make_jobs()
    _claim(engine)
    assert queue.retry_later(engine, job_id, "worker", "out of memory", 30.0, NOW)
    assert _claim(engine, now=NOW + 29) is None
    job = _claim(engine, now=NOW + 30)
    assert job is not None
    assert queue.retry_later(engine, job_id, "worker", "again", 30.0, NOW, max_attempts=2)
    assert _state(engine, job_id) == ("failed", "again")
    assert not queue.retry_later(engine, job_id, "worker", "again", 30.0, NOW)


ACTIONS = {
    "hold": queue.hold,
    "release": partial(queue.release, operator="Ann"),
    "reject": partial(queue.reject, operator="Ann"),
    "cancel": queue.cancel,
    "retry": queue.retry,
}


@pytest.mark.parametrize(
    ("action", "before", "after"),
    [
        ("hold", "queued", "held"),
        ("hold", "running", "held"),
        ("hold", "done", None),
        ("release", "held", "queued"),
        ("release", "failed", None),
        ("release", "running", None),
        ("reject", "held", "rejected"),
        ("reject", "queued", None),
        ("cancel", "queued", "cancelled"),
        ("cancel", "running", "cancelled"),
        ("cancel", "held", "cancelled"),
        ("cancel", "done", None),
        ("retry", "failed", "queued"),
        ("retry", "refused", "queued"),
        ("retry", "cancelled", "queued"),
        ("retry", "running", None),
        ("retry", "held", None),
        ("retry", "rejected", None),
    ],
)
def test_a_person_may_do_what_the_state_allows(
    engine: Engine, make_jobs: MakeJobs, action: str, before: str, after: str | None
) -> None:
    (job_id,) = make_jobs()
    with writing(engine) as connection:
        connection.execute(tables.jobs.update().values(state=before, attempts=4))
    assert ACTIONS[action](engine, job_id, reason="by hand", now=NOW) == (after is not None)
    found = reports.job(engine, job_id)
    assert found["state"] == (after or before)
    assert found["attempts"] == (0 if after == "queued" else 4)


def test_a_worker_loses_a_job_that_a_person_takes_back(engine: Engine, make_jobs: MakeJobs) -> None:
    (job_id,) = make_jobs()
    _claim(engine)
    assert queue.cancel(engine, job_id, reason="by hand", now=NOW)
    assert not _finish(engine, job_id)
    assert reports.job(engine, job_id)["outputs"] == []


def test_own_output_is_known_by_instance_and_by_series(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    finish_job()

    def own(sop: str, series: str) -> bool:
        return queue.is_own_output(engine, sop_instance_uid=sop, series_instance_uid=series)

    assert own("2.25.1", "9")
    assert own("9", "2.25")
    assert not own("9", "9")


def test_every_step_of_a_job_is_in_its_history(
    engine: Engine, finish_job: Callable[..., int]
) -> None:
    history = reports.job(engine, finish_job())["history"]
    assert [(each["from"], each["to"]) for each in history] == [
        (None, "queued"),
        ("queued", "running"),
        ("running", "done"),
    ]


def test_an_idle_claim_waits_for_no_writer(engine: Engine) -> None:
    with writing(engine) as connection:
        connection.execute(
            insert(tables.associations).values(
                calling_ae="A", called_ae="B", address="", opened_at=0
            )
        )
        assert _claim(engine) is None
        assert queue.claim_delivery(engine, "worker", lease_s=1, now=NOW) is None
        assert queue.expire_leases(engine, NOW) == queue.expire_delivery_leases(engine, NOW) == 0


def test_a_second_engine_sees_what_the_first_committed(
    engine: Engine, ledger_url: str, make_jobs: MakeJobs
) -> None:
    (job_id,) = make_jobs()
    other = tables.open_ledger(ledger_url)
    with reading(other) as connection:
        assert connection.scalar(select(tables.jobs.c.id)) == job_id
    other.dispose()
