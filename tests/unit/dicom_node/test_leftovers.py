"""Review reports and unnamed files of the quarantine leave the spool by ages of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from dicom_node import leftovers, purge
from dicom_node.ledger import intake, leases, queue, reports, retention
from dicom_node.ledger.retention import Ages, Kind
from dicom_node.ledger.states import Verdict
from dicom_node.spool import Spool
from tests.unit.dicom_node.ledger.examples import (
    claim_job,
    close_series,
    finish_job,
    instance,
    judged,
)

TODAY = time.time()
TOMORROW = TODAY + 86_400
REVIEWS = Ages(None, None, None, TOMORROW)
QUARANTINE = Ages(None, None, TOMORROW)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def reviewed(bench_ledger: Engine, spool: Spool) -> Callable[..., int]:
    """A job that ended today with a verdict, and a review report of ten bytes; its number."""

    def make(verdict: Verdict = Verdict.PASS) -> int:
        for number in (1, 2):
            intake.record_instance(bench_ledger, instance(number), TODAY)
        close_series(bench_ledger, now=TODAY)
        job = claim_job(bench_ledger, TODAY)
        folder = spool.write_review(job.id, {"report.html": b"<html>", "montage.png": b"4321"})
        finish_job(bench_ledger, job.id, judged("pacs", verdict=verdict, review=folder), now=TODAY)
        return job.id

    return make


def report_of(spool: Spool, job_id: int) -> Path:
    return spool.root / f"review/{job_id}"


def test_a_review_report_goes_after_its_age_and_the_ledger_says_so(
    bench_ledger: Engine, spool: Spool, reviewed: Callable[..., int]
) -> None:
    job_id = reviewed()
    young = Ages(None, None, None, TODAY - 1)
    assert not purge.purge(bench_ledger, spool, young, TOMORROW)
    assert reports.job(bench_ledger, job_id)["review"] == f"review/{job_id}"
    assert purge.preview(bench_ledger, spool, REVIEWS).bytes == {Kind.REVIEW: 10}
    gone = purge.purge(bench_ledger, spool, REVIEWS, TOMORROW)
    assert (gone.files, gone.bytes) == ({Kind.REVIEW: 1}, {Kind.REVIEW: 10})
    assert not report_of(spool, job_id).exists()
    assert reports.job(bench_ledger, job_id)["review"] is None


def test_the_report_of_a_held_job_stays_until_somebody_has_decided(
    bench_ledger: Engine, spool: Spool, reviewed: Callable[..., int]
) -> None:
    job_id = reviewed(Verdict.HOLD)
    assert not purge.purge(bench_ledger, spool, REVIEWS, TOMORROW)
    assert report_of(spool, job_id).exists()
    assert queue.reject(bench_ledger, job_id, operator="Dr X", reason="halo", now=TODAY)
    assert purge.purge(bench_ledger, spool, REVIEWS, TOMORROW).files == {Kind.REVIEW: 1}


def test_a_report_that_is_of_no_job_or_was_written_anew_goes_by_the_age_of_its_files(
    bench_ledger: Engine, spool: Spool, reviewed: Callable[..., int]
) -> None:
    job_id = reviewed()
    spool.write_review(99, {"report.html": b"<html>"})
    for name in ("notes", "9" * 30):
        (spool.root / "review" / name).mkdir()
    for folder in (report_of(spool, job_id), report_of(spool, 99)):
        os.utime(folder, (TOMORROW + 1, TOMORROW + 1))
    assert leftovers.removable(bench_ledger, spool, REVIEWS) == []
    os.utime(report_of(spool, 99), (TODAY, TODAY))
    (one,) = leftovers.removable(bench_ledger, spool, REVIEWS)
    assert (one.kind, one.path) == (Kind.REVIEW, "review/99")
    assert leftovers.remove(bench_ledger, spool, one, TOMORROW)
    assert not leftovers.remove(bench_ledger, spool, one, TOMORROW), "it is gone"
    assert (spool.root / "review/notes").exists(), "it is not ours"
    assert (spool.root / "review" / ("9" * 30)).exists()


def test_what_lies_in_the_quarantine_without_a_row_goes_by_the_age_of_its_file(
    bench_ledger: Engine, spool: Spool
) -> None:
    named = spool.quarantine(b"with a row", "no header")
    spool.quarantine(b"a copy for support", "pixels do not decode")
    intake.reject_instance(
        bench_ledger,
        sop_instance_uid=None,
        path=named.path,
        reason="no header",
        association_id=None,
        now=TOMORROW + 1,
    )
    young = Ages(None, None, TODAY - 60)
    assert not purge.purge(bench_ledger, spool, young, TOMORROW)
    assert purge.preview(bench_ledger, spool, QUARANTINE).files == {Kind.UNNAMED: 1}
    gone = purge.purge(bench_ledger, spool, QUARANTINE, TOMORROW)
    assert gone.files == {Kind.UNNAMED: 1}
    left = sorted(file.name for file in (spool.root / "quarantine").iterdir())
    stem = Path(named.path).stem
    assert left == [f"{stem}.dcm", f"{stem}.txt"]


def test_results_that_a_killed_job_did_not_name_go_by_their_age_once_it_has_ended(
    bench_ledger: Engine, spool: Spool
) -> None:
    for number in (1, 2):
        intake.record_instance(bench_ledger, instance(number), TODAY - 60)
    close_series(bench_ledger, now=TODAY - 60)
    job = claim_job(bench_ledger, TODAY)
    left = spool.write_outgoing("1.2.3", "1.2.3.4", b"written, and killed before its row was")
    assert not purge.purge(bench_ledger, spool, QUARANTINE, TOMORROW), "the job may end yet"
    assert leases.fail(bench_ledger, job.id, "worker", "for good", TODAY)
    assert not purge.purge(bench_ledger, spool, Ages(None, None, TODAY - 60), TOMORROW)
    gone = purge.purge(bench_ledger, spool, QUARANTINE, TOMORROW)
    assert (gone.files, gone.bytes) == ({Kind.UNNAMED: 1}, {Kind.UNNAMED: left.size})
    assert not (spool.root / "outgoing/1.2.3").exists()


def test_results_that_a_row_names_do_not_go_as_unnamed(
    bench_ledger: Engine, spool: Spool, reviewed: Callable[..., int]
) -> None:
    reviewed()
    for path in retention.kept_results(bench_ledger):
        _, series, name = path.split("/")
        spool.write_outgoing(series, name.removesuffix(".dcm"), b"a result")
    assert list(spool.files("outgoing")), "the job has results"
    assert not purge.purge(bench_ledger, spool, QUARANTINE, TOMORROW)


def test_a_short_disk_takes_neither(
    bench_ledger: Engine, spool: Spool, reviewed: Callable[..., int]
) -> None:
    job_id = reviewed()
    both = Ages(None, None, TOMORROW, TOMORROW)
    assert not purge.purge(bench_ledger, spool, both, TOMORROW, wanted_bytes=1e9)
    assert report_of(spool, job_id).exists()
