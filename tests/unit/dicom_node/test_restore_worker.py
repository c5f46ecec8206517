"""One job from the queue to the outbox, however it ends and however often it is tried."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless
from sqlalchemy import Engine, update

from dicom_node.errors import EngineMemoryError, PermanentError, SpoolFullError
from dicom_node.inference import DomainVerdict, ModelIdentity
from dicom_node.ledger import queue, reports
from dicom_node.ledger.tables import JobState, instances, jobs, writing
from dicom_node.readings import Level
from tests.conftest import ManualClock
from tests.factories import make_series
from tests.multiframe import legacy_converted, make_enhanced
from tests.unit.dicom_node.bench import Bench, Gain, bench, outgoing, reading, uids


def queued(node: Bench, modality: Any = "CT", **options: Any) -> Bench:
    """A bench with one job in its queue."""
    node.receive(make_series(modality, **{"slices": 4, "rows": 16, **options}))
    node.tick()
    return node


def raising(error: BaseException) -> Callable[[int], None]:
    def act(number: int) -> None:
        raise error

    return act


def test_an_empty_queue_is_no_work(node: Bench) -> None:
    assert node.worker(Gain()).run_once(node.clock()) is False


def test_a_job_becomes_restored_files_and_a_delivery(node: Bench) -> None:
    sent = make_series("CT", slices=4, rows=16)
    node.receive(sent)
    node.tick()
    assert node.worker(Gain(gain=5.0)).run_once(node.clock()) is True
    job = node.job()
    assert (job["state"], job["instances"]) == ("done", 4)
    assert set(job["seconds"]) == {"load", "restore", "derive"}
    assert job["model_sha256"] == "ab" * 32
    assert [(d["destination"], d["state"], d["total"]) for d in job["deliveries"]] == [
        ("pacs", "queued", 4)
    ]
    by_uid = {dataset.SOPInstanceUID: dataset for dataset in sent}
    for output in job["outputs"]:
        made = dcmread(node.spool.resolve(output["path"]))
        source = by_uid[output["source_sop_instance_uid"]]
        assert made.SeriesInstanceUID == job["derived_series_instance_uid"]
        assert made.StudyInstanceUID == source.StudyInstanceUID
        np.testing.assert_array_equal(made.pixel_array, source.pixel_array + 5)  # HU, slope 1


def test_a_second_try_makes_the_same_files_and_no_more(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies between its files and its row, as by SIGKILL; a successor starts anew."""
    queued(node)

    def die(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(queue, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        node.worker(Gain()).run_once(node.clock())
    monkeypatch.undo()
    first = outgoing(node)
    assert (len(first), node.job()["state"]) == (4, "running")

    node.clock.advance(3600.0)
    successor = node.worker(Gain())
    assert successor.recover(node.clock()) == 1
    assert successor.run_once(node.clock()) is True
    assert outgoing(node) == first
    assert (node.job()["state"], node.job()["attempts"]) == ("done", 2)


def test_a_job_keeps_its_lease_as_long_as_slices_are_done(node: Bench) -> None:
    queued(node)
    lease = node.settings.engine.lease_s

    def slow(number: int) -> None:
        node.clock.advance(0.6 * lease)
        assert queue.expire_leases(node.ledger, node.clock()) == 0

    node.worker(Gain(before=slow)).run_once(node.clock())
    assert node.job()["state"] == "done"


def test_a_worker_that_lost_its_lease_leaves_the_job_to_the_next(node: Bench) -> None:
    queued(node)
    lease = node.settings.engine.lease_s
    other = node.worker(Gain(gain=7.0), name="restore-1@there")

    def stall(number: int) -> None:
        if number == 0:
            node.clock.advance(2 * lease)
            assert queue.expire_leases(node.ledger, node.clock()) == 1
            assert other.run_once(node.clock())

    node.worker(Gain(gain=5.0, before=stall)).run_once(node.clock())
    job = node.job()
    assert job["state"] == "done"
    assert len(job["deliveries"]) == 1


def test_a_worker_that_is_to_end_gives_its_job_back(node: Bench) -> None:
    queued(node)
    stop = threading.Event()

    def end(number: int) -> None:
        if number == 1:
            stop.set()

    engine = Gain(before=end)
    node.worker(engine, stop=stop).run_once(node.clock())
    assert node.job()["state"] == "queued"
    assert node.worker(Gain()).run_once(node.clock())
    assert node.job()["state"] == "done"


@pytest.mark.parametrize(("policy", "state"), [("refuse", "refused"), ("warn", "done")])
def test_outside_the_training_domain_follows_the_policy(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, policy: str, state: str
) -> None:
    node = queued(bench(tmp_path, bench_ledger, clock, policy={"domain": policy}))
    outside = DomainVerdict(outside=("slice thickness 3 mm is outside 0.5 ... 1 mm",))
    node.worker(Gain(verdict=outside)).run_once(node.clock())
    assert node.job()["state"] == state
    assert "slice thickness 3 mm" in node.job()["reason"]


@pytest.mark.parametrize(("policy", "state"), [("refuse", "refused"), ("warn", "done")])
def test_what_the_header_does_not_state_follows_the_policy(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, policy: str, state: str
) -> None:
    node = queued(bench(tmp_path, bench_ledger, clock, policy={"missing_metadata": policy}))
    node.worker(Gain(verdict=DomainVerdict(missing=("contrast",)))).run_once(node.clock())
    assert node.job()["state"] == state
    assert "does not state contrast" in node.job()["reason"]


def test_the_domain_is_judged_by_what_the_header_says(node: Bench) -> None:
    engine = Gain()
    queued(node, "MR", spacing=(0.5, 0.75), MagneticFieldStrength="3")
    node.worker(engine).run_once(node.clock())
    assert engine.facts[-1] == {
        "modality": "MR",
        "pixel_spacing_mm": (0.5, 0.75),
        "slice_thickness_mm": 3.0,
        "field_strength_t": 3.0,
        "kernel": None,
        "patient_weight_kg": 70.0,
    }


def test_a_task_that_the_model_cannot_do_is_refused(node: Bench) -> None:
    queued(node)
    node.worker(Gain(tasks=("mri_sr",))).run_once(node.clock())
    assert (node.job()["state"], node.job()["reason"]) == (
        "refused",
        "the model gain cannot do ct_denoise",
    )


def test_an_engine_without_memory_is_tried_again_later(node: Bench) -> None:
    queued(node)
    worker = node.worker(Gain(before=raising(EngineMemoryError("no memory for a slice"))))
    worker.run_once(node.clock())
    assert (node.job()["state"], node.job()["reason"]) == ("queued", "no memory for a slice")
    assert worker.run_once(node.clock()) is False
    node.clock.advance(node.settings.engine.retry_s)
    assert node.worker(Gain()).run_once(node.clock())
    assert node.job()["state"] == "done"


def test_what_no_other_try_can_mend_fails_at_once(node: Bench) -> None:
    queued(node)
    node.worker(Gain(before=raising(PermanentError("not finite")))).run_once(node.clock())
    assert (node.job()["state"], node.job()["reason"]) == ("failed", "not finite")


def test_an_error_that_nobody_foresaw_tells_where_and_no_value(node: Bench) -> None:
    queued(node)
    node.worker(Gain(before=raising(KeyError("Doe^John")))).run_once(node.clock())
    job = node.job()
    assert job["state"] == "failed"
    assert job["reason"].startswith("unexpected KeyError at test_restore_worker.py:")
    assert "Doe" not in str(job)


def test_pixels_that_do_not_decode_fail_the_job_and_leave_quarantine_a_copy(node: Bench) -> None:
    sent = make_series("CT", slices=3, rows=16, transfer_syntax=RLELossless)
    sent[1].PixelData = encapsulate([b"\xff" * 100])
    node.receive(sent)
    node.tick()
    node.worker(Gain()).run_once(node.clock())
    job = node.job()
    assert job["state"] == "failed"
    (rejected,) = reports.instances(node.ledger, state="rejected")
    assert rejected["sop_instance_uid"] == sent[1].SOPInstanceUID
    assert node.spool.resolve(rejected["path"]).is_file()
    assert outgoing(node) == {}

    queue.retry(node.ledger, job["id"], reason="hope", now=node.clock())
    node.worker(Gain()).run_once(node.clock())
    assert node.job()["state"] == "failed"
    assert node.spool.resolve(rejected["path"]).is_file()


def test_the_names_of_the_results_are_durable_before_the_ledger_tells_of_them(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued(node)
    flushed: list[set[str]] = []
    flush, finish = node.spool.flush, queue.finish

    def noted(paths: Iterable[str]) -> None:
        flushed.append(set(paths))
        flush(flushed[-1])

    def checked(*given: Any, outputs: Sequence[queue.Output], **rest: Any) -> bool:
        assert flushed == [{output.path for output in outputs}]
        return finish(*given, outputs=outputs, **rest)

    monkeypatch.setattr(node.spool, "flush", noted)
    monkeypatch.setattr(queue, "finish", checked)
    node.worker(Gain()).run_once(node.clock())
    assert node.job()["state"] == "done"


@pytest.mark.parametrize("level", [Level.PASS, Level.FAIL])
def test_a_report_is_there_before_a_person_decides_and_after_a_result_that_is_sent(
    node: Bench, monkeypatch: pytest.MonkeyPatch, level: Level
) -> None:
    queued(node)
    order: list[str] = []
    finish, write = queue.finish, node.spool.write_review
    monkeypatch.setattr(queue, "finish", lambda *a, **k: order.append("job") or finish(*a, **k))
    monkeypatch.setattr(node.spool, "write_review", lambda *a: order.append("report") or write(*a))
    node.worker(Gain(readings=(reading("range", level),))).run_once(node.clock())
    job = node.job()
    if level is Level.FAIL:
        assert (job["state"], order) == ("held", ["report", "job"])
    else:
        assert (job["state"], order) == ("done", ["job", "report"])
    assert node.spool.resolve(f"{job['review']}/report.html").is_file()


@pytest.mark.parametrize("error", [SpoolFullError("full"), KeyError("Doe^John")])
def test_a_result_that_is_sent_stays_so_where_its_report_cannot_be_written(
    node: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> str:
        raise error

    queued(node)
    monkeypatch.setattr(node.spool, "write_review", fail)
    assert node.worker(Gain()).run_once(node.clock())
    job = node.job()
    assert (job["state"], job["review"]) == ("done", None)
    assert len(job["outputs"]) > 0


def test_a_note_of_the_assembler_reaches_the_description(node: Bench) -> None:
    queued(node, slices=8, missing=[3])
    node.worker(Gain()).run_once(node.clock())
    made = dcmread(node.spool.resolve(node.job()["outputs"][0]["path"]))
    assert "slices are missing" in made.DerivationDescription


def test_reports_are_delivered_with_the_images_and_known_for_our_own(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    node = queued(bench(tmp_path, bench_ledger, clock, report={"sr": True, "gsps": True}))
    engine = Gain(diagnostics={"mean_drift": [0.0, 1.0, 2.0, 3.0], "intensity_scale": 1.0})
    node.worker(engine).run_once(node.clock())
    job = node.job()
    assert (job["instances"], [d["total"] for d in job["deliveries"]]) == (4, [6])
    made = [dcmread(node.spool.resolve(output["path"])) for output in job["outputs"]]
    assert [each.Modality for each in made] == ["CT"] * 4 + ["SR", "PR"]
    for each in made:
        assert queue.is_own_output(
            node.ledger,
            sop_instance_uid=each.SOPInstanceUID,
            series_instance_uid=each.SeriesInstanceUID,
        )
    node.receive(made)
    node.tick()
    assert len(node.jobs()) == 1


def test_a_late_mr_slice_is_brought_into_the_window_by_the_scale_of_its_volume(
    node: Bench,
) -> None:
    sent = make_series("MR", slices=5, rows=16)
    node.receive(sent[:4])
    node.tick()
    node.worker(Gain(diagnostics={"intensity_scale": 1.25})).run_once(node.clock())
    assert node.jobs()[0]["quantities"] == {"clamped": 0, "intensity_scale": 1.25}
    node.receive(sent[4:])
    node.tick()
    engine = Gain(diagnostics={"intensity_scale": 1.25})
    node.worker(engine).run_once(node.clock())
    assert [request.scale for request in engine.requests] == [1.25]
    other = Gain(model=ModelIdentity("gain", "2", "cd" * 32))
    node.receive(make_series("MR", slices=6, rows=16)[5:])
    node.tick()
    node.worker(other).run_once(node.clock())
    assert [request.scale for request in other.requests] == [None]  # another model's scale


def test_an_instance_is_restored_once_by_one_model(node: Bench) -> None:
    sent = make_series("CT", slices=4, rows=16)
    node.receive(sent[:2])
    node.tick()
    assert node.worker(Gain()).run_once(node.clock())
    first = {output["sop_instance_uid"] for output in node.job()["outputs"]}
    with writing(node.ledger) as connection:  # as a second route, or a re-made ledger row, would
        connection.execute(update(instances).values(assigned=False))
    node.receive(sent[2:])
    node.tick()
    assert node.worker(Gain()).run_once(node.clock())
    second = reports.job(node.ledger, node.jobs()[1]["id"])
    assert node.sources(second) == uids(sent[2:])  # the others have their results
    made = {output["sop_instance_uid"] for output in second["outputs"]}
    assert second["state"] == "done"
    assert len(made) == 2
    assert not made & first


def test_nothing_left_to_restore_is_a_refusal_with_the_reason(node: Bench) -> None:
    queued(node)
    assert node.worker(Gain()).run_once(node.clock())
    with writing(node.ledger) as connection:
        connection.execute(update(jobs).values(state=JobState.QUEUED))
    assert node.worker(Gain()).run_once(node.clock())
    assert (node.job()["state"], node.job()["reason"]) == (
        "refused",
        "restored before by this model, in an earlier job",
    )


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("make", [make_enhanced, legacy_converted])
def test_a_multi_frame_image_goes_the_same_way(node: Bench, make: Any, modality: Any) -> None:
    image = make(modality, slices=3, rows=16)
    node.receive([image])
    node.tick()
    engine = Gain(gain=0.0)
    assert node.worker(engine).run_once(node.clock())
    job = node.job()
    assert job["state"] == "done", job["reason"]
    (output,) = job["outputs"]
    made = dcmread(node.spool.resolve(output["path"]))
    assert (made.SOPClassUID, made.NumberOfFrames) == (image.SOPClassUID, 3)
    assert made.SeriesInstanceUID == job["derived_series_instance_uid"]
    np.testing.assert_array_equal(made.pixel_array, image.pixel_array)
    (request,) = engine.requests
    assert len(set(request.seeds)) == 3


def test_volumes_of_one_image_are_requests_of_their_own(node: Bench) -> None:
    node.receive([make_enhanced("MR", slices=3, rows=16, volumes=2)])
    node.tick()
    engine = Gain(gain=5.0)
    assert node.worker(engine).run_once(node.clock())
    assert [len(request.array) for request in engine.requests] == [3, 3]
    assert not set(engine.requests[0].seeds) & set(engine.requests[1].seeds)
    (output,) = node.job()["outputs"]
    assert dcmread(node.spool.resolve(output["path"])).NumberOfFrames == 6


def test_mr_at_its_acquired_matrix_comes_back_on_the_finer_grid(node: Bench) -> None:
    sent = make_series("MR", slices=3, rows=16, spacing=(2.0, 1.6))
    node.receive(sent)
    node.tick()
    engine = Gain(gain=0.0, verdict=DomainVerdict(upsample=4))
    assert node.worker(engine).run_once(node.clock())
    job = node.job()
    assert "4 x 4 finer grid by zero filling of k-space" in job["reason"]
    for output in job["outputs"]:
        made = dcmread(node.spool.resolve(output["path"]))
        assert (made.Rows, made.Columns, list(made.PixelSpacing)) == (64, 64, [0.5, 0.4])
        assert made.SeriesInstanceUID == job["derived_series_instance_uid"]


def test_a_low_matrix_is_refused_where_the_policy_says_so(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    node = bench(tmp_path, bench_ledger, clock, policy={"low_matrix": "refuse"})
    queued(node, "MR")
    node.worker(Gain(verdict=DomainVerdict(upsample=4))).run_once(node.clock())
    assert node.job()["state"] == "refused"
    assert "acquired matrix" in node.job()["reason"]


def test_clamped_pixels_are_counted_in_the_job(node: Bench) -> None:
    queued(node, "CT", bits_stored=12, signed=False, slices=2)
    node.worker(Gain(gain=5000.0)).run_once(node.clock())
    assert node.job()["quantities"] == {"clamped": 2 * 16 * 16}


def test_a_warning_is_in_the_description_and_in_the_report(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    made = queued(bench(tmp_path, bench_ledger, clock, report={"sr": True}), slices=2)
    warning = reading("gain", Level.WARN, 1.5)
    made.worker(Gain(readings=(warning,))).run_once(made.clock())
    job = made.job()
    assert (job["state"], len(job["deliveries"])) == ("done", 1)
    written = [dcmread(made.spool.resolve(each["path"])) for each in job["outputs"]]
    report, images = written[-1], written[:-1]
    words = "gate gain warns: is 1.5 (allowed at most 1)"
    for image in images:
        assert image.SeriesDescription.endswith(" [AI-DN] [QC]")
        assert words in image.DerivationDescription
    assert words in job["reason"]
    assert report.Modality == "SR"
    said = report.to_json()
    assert "GATEWARN" in said
    assert words in said


def test_a_result_that_is_held_leaves_files_a_report_and_no_delivery(node: Bench) -> None:
    queued(node)
    failed = reading("structure", Level.FAIL, 9.0)
    node.worker(Gain(readings=(failed,))).run_once(node.clock())
    job = node.job()
    assert (job["state"], job["deliveries"], len(outgoing(node))) == ("held", [], 4)
    assert node.spool.resolve(f"{job['review']}/report.html").is_file()


def test_a_result_that_is_refused_leaves_no_file(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    made = queued(bench(tmp_path, bench_ledger, clock, gates={"on_fail": "refuse"}))
    made.worker(Gain(readings=(reading("structure", Level.FAIL, 9.0),))).run_once(made.clock())
    assert (made.job()["state"], outgoing(made)) == ("refused", {})


def test_a_result_of_an_engine_without_gates_waits_for_a_person(node: Bench) -> None:
    queued(node)
    node.worker(Gain(readings=())).run_once(node.clock())
    assert (node.job()["state"], node.job()["reason"]) == ("held", "no gate could judge the result")
