"""Files leave the spool after their rows say so, and never before everything has arrived."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from dicom_node import purge
from dicom_node.ledger import answers, intake, queue, reports, retention
from dicom_node.ledger.retention import Ages, Kind
from dicom_node.ledger.tables import DeliveryState
from dicom_node.settings import RetentionSettings
from dicom_node.spool import Spool
from tests.unit.dicom_node.ledger.examples import (
    SERIES,
    claim_job,
    close_series,
    finish_job,
    instance,
)

#: Files are older than the ledger's marks by their own clock, so the tests look from tomorrow.
TODAY = time.time()
TOMORROW = TODAY + 86_400
ALL = Ages(TOMORROW, TOMORROW, TOMORROW)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def delivered(bench_ledger: Engine, spool: Spool) -> Callable[[], list[str]]:
    """Two originals and two results in the spool, delivered today; their paths."""

    def make() -> list[str]:
        originals = [spool.write(f"original {number}".encode()) for number in (1, 2)]
        for number, stored in enumerate(originals, start=1):
            changes = {"path": stored.path, "sha256": stored.sha256, "size": stored.size}
            intake.record_instance(bench_ledger, instance(number, **changes), TODAY)
        close_series(bench_ledger, now=TODAY)
        job = claim_job(bench_ledger, TODAY)
        results = [spool.write_outgoing("2.25", f"2.25.{n}", b"result") for n in (1, 2)]
        outputs = [
            queue.Output(f"2.25.{n}", "1.2", f"{SERIES}.{n}", one.path, one.sha256, one.size)
            for n, one in enumerate(results, start=1)
        ]
        finish_job(bench_ledger, job.id, outputs=outputs, now=TODAY)
        delivery = queue.claim_delivery(bench_ledger, "w", lease_s=60, now=TODAY)
        assert delivery is not None
        for item in delivery.items:
            uid = item.sop_instance_uid
            answers.record_sent(bench_ledger, delivery.id, (uid, 0, "delivered"), TODAY)
        assert queue.conclude_delivery(
            bench_ledger,
            delivery.id,
            "w",
            state=DeliveryState.DELIVERED,
            reason=None,
            next_attempt=None,
            now=TODAY,
        )
        return [one.path for one in (*originals, *results)]

    return make


def there(spool: Spool, paths: list[str]) -> list[bool]:
    return [spool.resolve(path).exists() for path in paths]


def test_what_has_arrived_and_is_old_enough_is_removed(
    bench_ledger: Engine, spool: Spool, delivered: Callable[[], list[str]]
) -> None:
    paths = delivered()
    told: list[tuple[int, int]] = []
    young = purge.ages(RetentionSettings(delivered_s=86_400 + 60), TOMORROW)
    assert not purge.purge(bench_ledger, spool, young, TOMORROW)
    old = purge.ages(RetentionSettings(delivered_s=86_400 - 60), TOMORROW)
    gone = purge.purge(bench_ledger, spool, old, TOMORROW, progress=lambda *step: told.append(step))
    assert gone.files == {Kind.ORIGINAL: 2, Kind.RESULT: 2}
    assert gone.bytes.total() == 2 * len(b"original 1") + 2 * len(b"result")
    assert there(spool, paths) == [False] * 4
    assert not (spool.root / "outgoing/2.25").exists()
    assert told == [(4, 4)]
    purged = [row["purged"] is not None for row in reports.instances(bench_ledger)]
    assert purged == [True, True]
    assert reports.stats(bench_ledger)["kept_bytes"] == 0


def test_no_more_is_removed_than_makes_room(
    bench_ledger: Engine, spool: Spool, delivered: Callable[[], list[str]]
) -> None:
    paths = delivered()
    purge.purge(bench_ledger, spool, ALL, TOMORROW, wanted_bytes=0)
    assert there(spool, paths) == [True] * 4


def test_a_removal_that_a_crash_cut_short_is_finished(
    bench_ledger: Engine, spool: Spool, delivered: Callable[[], list[str]]
) -> None:
    paths = delivered()
    retention.mark(bench_ledger, retention.removable(bench_ledger, ALL), ALL, TOMORROW)
    assert there(spool, paths) == [True] * 4
    assert purge.finish(bench_ledger, spool, TOMORROW) == 4
    assert there(spool, paths) == [False] * 4
    assert purge.finish(bench_ledger, spool, TOMORROW) == 0


def test_an_instance_that_comes_again_while_it_is_removed_stays(
    bench_ledger: Engine, spool: Spool, delivered: Callable[[], list[str]]
) -> None:
    paths = delivered()
    yesterday = Ages(TODAY, None, None)
    # Marked, in the ledger's time, before the file got its name.
    marked = retention.mark(
        bench_ledger, retention.removable(bench_ledger, yesterday), yesterday, TODAY - 60
    )
    assert len(marked) == 4
    assert not any(spool.remove(one.path, unless_named_after=TODAY - 60) for one in marked)
    assert purge.finish(bench_ledger, spool, TOMORROW) == 0
    assert there(spool, paths) == [True] * 4
    assert intake.known_paths(bench_ledger) == set(paths[:2])


def test_a_result_that_belongs_to_a_running_job_is_not_touched(
    bench_ledger: Engine, spool: Spool
) -> None:
    path = spool.write_outgoing("2.25", "2.25.9", b"half of a job").path
    assert purge.finish(bench_ledger, spool, TOMORROW) == 0
    assert spool.resolve(path).exists()


def test_the_quarantine_goes_with_its_note(bench_ledger: Engine, spool: Spool) -> None:
    kept = spool.quarantine(b"not DICOM", "no header")
    intake.reject_instance(
        bench_ledger,
        sop_instance_uid=None,
        path=kept.path,
        reason="no header",
        association_id=None,
        now=TODAY,
    )
    gone = purge.purge(bench_ledger, spool, ALL, TOMORROW)
    assert gone.files == {Kind.QUARANTINED: 1}
    assert list((spool.root / "quarantine").iterdir()) == []


def test_early_lets_go_of_what_was_delivered_alone() -> None:
    given = RetentionSettings(delivered_s=100, unrestored_s=200, quarantine_s=None, review_s=300)
    assert purge.ages(given, 1000) == Ages(900, 800, None, 700)
    assert purge.ages(given, 1000, early=True) == Ages(1000, 800, None, 700)
    never = RetentionSettings(delivered_s=None, unrestored_s=None, quarantine_s=None, review_s=None)
    assert purge.ages(never, 1000) == Ages(None, None, None)


def test_a_file_that_is_gone_already_is_no_error(
    bench_ledger: Engine, spool: Spool, delivered: Callable[[], list[str]]
) -> None:
    paths = delivered()
    os.unlink(spool.resolve(paths[0]))
    assert purge.purge(bench_ledger, spool, ALL, TOMORROW).files.total() == 3
