"""What is restored, judged and written in the quiet time is what its job would make, or is gone."""

from __future__ import annotations

import hashlib
import os
import resource
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from sqlalchemy import Engine, update

from dicom_node.disk import Disk, Marks, Space
from dicom_node.early import EarlySlices
from dicom_node.early_results import EarlyResults
from dicom_node.errors import SpoolFullError
from dicom_node.inference import ModelIdentity
from dicom_node.janitor import Janitor
from dicom_node.kept_slices import KeptSlices, key_of
from dicom_node.ledger import intake, open_series, queue, reports
from dicom_node.ledger.queue import Job
from dicom_node.ledger.tables import jobs, writing
from dicom_node.readings import Level
from dicom_node.rehearsal import Expected, Rehearsal, Subject, rehearsed, time_of
from dicom_node.restore_worker import RestoreWorker
from dicom_node.restoring import restore_series
from dicom_node.routing import parse_routes
from dicom_node.spool import Spool
from tests.conftest import ManualClock
from tests.unit.dicom_node.ahead import (
    NOTHING,
    SLICES,
    ct,
    early_files,
    run_again,
    tried,
    turn_until_idle,
    worker,
)
from tests.unit.dicom_node.bench import ROUTES, Bench, Gain, bench, outgoing, reading

TASK = "ct_denoise"
EXPECTED = Expected(datetime(2026, 11, 23, 12, 0, tzinfo=UTC), ("pacs",), None)


def rehearse(
    node: Bench,
    expected: Expected = EXPECTED,
    *,
    engine: Gain | None = None,
    is_disturbed: Callable[[], bool] = lambda: False,
) -> Rehearsal[KeptSlices] | None:
    """Try the series that lies there, of which each slice is restored before."""
    engine = engine or Gain()
    turn_until_idle(worker(node, engine), node)
    came = open_series.arrivals(node.ledger, after=0)
    uid, results = came[0].series_instance_uid, EarlyResults(node.spool)
    key = key_of(engine, TASK, 1.0)
    assert key is not None
    return rehearsed(
        Subject(uid, frozenset(node.spool.resolve(each.path) for each in came), TASK, 1.0),
        expected,
        KeptSlices(results, uid, key, {each.sop_instance_uid: each.sha256 for each in came}),
        {},
        engine,
        node.settings,
        results,
        node.spool.root / "temporary",
        is_disturbed,
    )


def strict_for_research(folder: Path, ledger: Engine, clock: ManualClock) -> Bench:
    """Two destinations: to one of them a failed gate is a warning, to the other nothing."""
    server = {"ae_title": "A", "host": "127.0.0.1", "port": 104}
    gates = {"on_fail": "pass", "by_destination": {"research": {"finite": "warn"}}}
    servers = {"pacs": server, "research": server}
    return bench(folder, ledger, clock, gates=gates, destinations=servers)


def written_ahead(node: Bench) -> list[Path]:
    """The restored instances that were written before their job."""
    return sorted((node.spool.root / "early").rglob("*.dcm"))


def inodes(files: Sequence[Path]) -> set[int]:
    return {path.stat().st_ino for path in files}


def given_out(node: Bench) -> list[Path]:
    return sorted((node.spool.root / "outgoing").rglob("*.dcm"))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full for whatever is larger, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- the rehearsal by itself ----


def test_it_writes_the_bytes_that_a_job_would(node: Bench) -> None:
    node.receive(ct())
    tried_ahead = rehearse(node)
    assert tried_ahead is not None
    assert tried_ahead.written is not None
    made = restore_series(
        sorted(tried_ahead.subject.files),
        TASK,
        Gain(),
        node.settings,
        created=EXPECTED.created,
        destinations=EXPECTED.destinations,
    )
    by_uid = {each.sop_instance_uid: b"".join(each.pieces()) for each in made.instances}
    rows = tried_ahead.written.outputs
    assert len(rows) == len(by_uid) == SLICES
    for row in rows:
        octets = (node.spool.root / row.path).read_bytes()
        assert octets == by_uid[row.sop_instance_uid]
        assert (row.sha256, row.size) == (hashlib.sha256(octets).hexdigest(), len(octets))
    assert sorted(tried_ahead.written.names) == [path.name for path in written_ahead(node)]
    assert outgoing(node) == {}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(EXPECTED, note="a slice is missing"), id="note"),
        pytest.param(replace(EXPECTED, created=datetime(2026, 11, 24, tzinfo=UTC)), id="time"),
        pytest.param(replace(EXPECTED, destinations=("research",)), id="destinations"),
    ],
)
def test_all_that_is_expected_is_in_the_files(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, other: Expected
) -> None:
    """So none of it may differ in a job that is given them."""
    node = strict_for_research(tmp_path, bench_ledger, clock)
    node.receive(ct())
    engine = Gain(readings=(reading("finite", Level.FAIL, 2.0),))
    first, second = rehearse(node, engine=engine), rehearse(node, other, engine=engine)
    assert first is not None
    assert second is not None
    assert first.written is not None
    assert second.written is not None
    assert not set(first.written.names) & set(second.written.names)


@pytest.mark.parametrize("files", range(SLICES))
def test_one_that_is_disturbed_leaves_no_file(node: Bench, files: int) -> None:
    node.receive(ct())
    written: list[int] = []

    def is_disturbed() -> bool:
        written.append(len(written_ahead(node)))
        return len(written) > files

    assert rehearse(node, is_disturbed=is_disturbed) is None
    assert len(written) == files + 1
    assert written_ahead(node) == []
    assert list((node.spool.root / "temporary").iterdir()) == []
    assert len(early_files(node)) == SLICES, "its slices are kept for the job"


def test_one_that_finds_the_disk_full_half_way_leaves_no_file(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    """The report, which is written last, is larger than an image here."""
    node = bench(tmp_path, bench_ledger, clock, report={"sr": True})
    node.receive(ct())
    whole = rehearse(node)
    assert whole is not None
    assert whole.written is not None
    *images, report = whole.written.outputs
    largest = max(image.size for image in images)
    assert largest < report.size
    EarlyResults(node.spool).remove(whole.subject.series_instance_uid, whole.written.names)
    with files_of_at_most(largest), pytest.raises(SpoolFullError):
        rehearse(node)
    assert written_ahead(node) == []
    assert len(early_files(node)) == SLICES


@pytest.mark.parametrize(("action", "is_written"), [("hold", True), ("refuse", False)])
def test_what_a_destination_may_have_once_it_is_released_is_written(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, action: str, is_written: bool
) -> None:
    node = bench(tmp_path, bench_ledger, clock, gates={"on_fail": action})
    node.receive(ct())
    engine = Gain(readings=(reading("finite", Level.FAIL, 2.0),))
    made = rehearse(node, engine=engine)
    assert made is not None
    assert made.volumes.slices == SLICES
    assert (made.written is not None) is is_written
    assert len(written_ahead(node)) == SLICES * is_written


def claimed(node: Bench) -> Job:
    """The job of what has come, once the quiet time is over."""
    node.tick()
    job = queue.claim(node.ledger, "w", lease_s=60, now=node.clock())
    assert job is not None
    return job


def test_results_bear_the_time_at_which_the_last_of_their_source_came(node: Bench) -> None:
    node.receive(ct())
    came = node.clock()
    job = claimed(node)
    assert time_of(job) == datetime.fromtimestamp(came, UTC)
    assert Expected.of(replace(job, note="n")) == Expected(time_of(job), ("pacs",), "n")


@pytest.mark.parametrize(("after_s", "is_of_job"), [(0.0, False), (3599.0, False), (3600.0, True)])
def test_one_that_is_restored_again_bears_the_time_of_its_job(
    node: Bench, after_s: float, is_of_job: bool
) -> None:
    node.receive(ct())
    job = claimed(node)
    later = replace(job, created=job.received + after_s)
    expected = later.created if is_of_job else job.received
    assert time_of(later) == datetime.fromtimestamp(expected, UTC)


# ---- what its job is given of it ----

FILES, VOLUMES, NEITHER = "files", "volumes", "neither"


@pytest.mark.parametrize(
    ("change", "given"),
    [
        pytest.param(lambda job: {}, FILES, id="as expected"),
        pytest.param(lambda job: {"attempts": 2, "revision": 3}, FILES, id="tried again"),
        pytest.param(lambda job: {"destinations": ("other",)}, VOLUMES, id="destinations"),
        pytest.param(lambda job: {"note": "incomplete"}, VOLUMES, id="note"),
        pytest.param(lambda job: {"created": job.received + 3600.0}, VOLUMES, id="time"),
        pytest.param(lambda job: {"received": job.received + 1.0}, VOLUMES, id="last instance"),
        pytest.param(lambda job: {"strength": 0.5}, NEITHER, id="strength"),
        pytest.param(lambda job: {"task": "pet_synthesis"}, NEITHER, id="task"),
        pytest.param(lambda job: {"paths": job.paths[1:]}, NEITHER, id="fewer files"),
        pytest.param(
            lambda job: {"paths": (*job.paths, ("1.2", f"incoming/ab/{'ab' * 32}.dcm"))},
            NEITHER,
            id="more files",
        ),
        pytest.param(lambda job: {"series_instance_uid": "1.2.3"}, NEITHER, id="series"),
    ],
)
def test_a_job_is_given_as_much_as_it_asks_for(
    node: Bench, change: Callable[[Job], Mapping[str, Any]], given: str
) -> None:
    engine = Gain()
    ahead = EarlySlices(node.settings, node.spool, node.ledger, engine, ROUTES)
    node.receive(ct())
    turn_until_idle(node.worker(engine, early=ahead), node)
    node.clock.advance(3.0)
    turn_until_idle(node.worker(engine, early=ahead), node)
    assert len(written_ahead(node)) == SLICES
    job = claimed(node)
    asked = replace(job, **change(job))
    made = ahead.made(asked)
    assert (made.written is not None) is (given == FILES)
    assert (made.volumes is not None) is (given != NEITHER)
    assert len(written_ahead(node)) == SLICES * (given == FILES), "what is not given is removed"
    again = ahead.made(asked)
    assert (again.volumes, again.written) == (None, None), "it is taken along"


# ---- the job ----


def tried_once(node: Bench, engine: Gain | None = None) -> RestoreWorker:
    """A worker that has tried the CT that came, as a whole."""
    engine = engine or Gain()
    restore = worker(node, engine)
    turn_until_idle(restore, node)
    assert tried(node, engine, restore) == len(open_series.arrivals(node.ledger, after=0))
    return restore


def assert_rows_tell_the_files(node: Bench) -> None:
    rows = reports.job(node.ledger, node.job()["id"])["outputs"]
    assert len(rows) == SLICES
    for row in rows:
        stored = (node.spool.root / row["path"]).read_bytes()
        assert hashlib.sha256(stored).hexdigest() == row["sha256"]


def test_a_series_that_is_calm_is_restored_and_judged_before_its_job(node: Bench) -> None:
    engine = Gain()
    node.receive(ct())
    restore = tried_once(node, engine)
    node.tick()
    assert turn_until_idle(restore, node) == 1
    assert (len(engine.requests), engine.passes) == (1, 0)
    judged, files = node.job(), outgoing(node)
    assert judged["state"] == "done"
    assert len(files) == SLICES
    assert early_files(node) == []

    run_again(node, judged["id"])
    node.worker(Gain()).run_once(node.clock())
    assert outgoing(node) == files
    told = ("state", "note", "quantities", "derived_series_instance_uid")
    assert [node.job()[name] for name in told] == [judged[name] for name in told]


def test_its_job_has_the_files_that_were_written_then(node: Bench) -> None:
    node.receive(ct())
    restore = tried_once(node)
    files = inodes(written_ahead(node))
    assert len(files) == SLICES
    assert given_out(node) == []
    node.tick()
    turn_until_idle(restore, node)
    assert inodes(given_out(node)) == files
    assert_rows_tell_the_files(node)


@pytest.mark.parametrize("gone", [1, SLICES])
def test_where_a_file_is_gone_the_job_writes_them_all(node: Bench, gone: int) -> None:
    engine = Gain()
    node.receive(ct())
    restore = tried_once(node, engine)
    for path in written_ahead(node)[-gone:]:
        path.unlink()
    node.tick()
    turn_until_idle(restore, node)
    assert (len(given_out(node)), engine.passes, node.job()["state"]) == (SLICES, 0, "done")
    assert_rows_tell_the_files(node)
    assert early_files(node) == []


def test_a_job_with_a_note_writes_files_that_bear_it(node: Bench) -> None:
    node.receive(ct())
    restore = tried_once(node)
    node.tick()
    with writing(node.ledger) as connection:
        connection.execute(update(jobs).values(note="a slice is missing"))
    turn_until_idle(restore, node)
    assert len(given_out(node)) == SLICES
    assert all("a slice is missing" in str(dcmread(path)) for path in given_out(node))
    assert_rows_tell_the_files(node)
    assert early_files(node) == []


def test_files_that_no_job_will_have_are_removed(node: Bench) -> None:
    sent = ct()
    node.receive(sent)
    restore = tried_once(node)
    assert written_ahead(node)
    uid = str(sent[0].SeriesInstanceUID)
    intake.ignore_series(node.ledger, uid, "not wanted", node.clock(), instances_seen=SLICES)
    turn_until_idle(restore, node)
    assert written_ahead(node) == []


def test_what_was_judged_of_fewer_slices_is_not_used(node: Bench) -> None:
    engine, sent = Gain(), ct()
    node.receive(sent[:3])
    restore = tried_once(node, engine)
    node.receive(sent[3:])
    node.tick()
    turn_until_idle(restore, node)
    assert [len(request.array) for request in engine.requests] == [3, SLICES]
    assert len(outgoing(node)) == SLICES
    assert early_files(node) == []


def test_a_slice_that_comes_after_the_rehearsal_has_it_done_again(node: Bench) -> None:
    engine, sent = Gain(), ct()
    node.receive(sent[:-1])
    restore = tried_once(node, engine)
    before = written_ahead(node)
    node.receive(sent[-1:])
    turn_until_idle(restore, node)
    node.clock.advance(2.0)  # slices come more slowly than they did
    assert tried(node, engine, restore) == SLICES
    assert len(written_ahead(node)) == SLICES
    assert not {path.name for path in before} & {path.name for path in written_ahead(node)}
    files = inodes(written_ahead(node))
    node.tick()
    turn_until_idle(restore, node)
    assert inodes(given_out(node)) == files


RESEARCH = """
[[route]]
name = "research"
task = "ct_denoise"
destinations = ["research"]
match = { modality = "CT" }
"""


def test_routes_that_have_changed_since_have_the_last_word(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    """The other destination has gates of its own, and what they say is written in the images."""
    node = strict_for_research(tmp_path, bench_ledger, clock)
    node.receive(ct())
    restore = tried_once(node, Gain(readings=(reading("finite", Level.FAIL, 2.0),)))
    assert not any(is_marked(path) for path in written_ahead(node))
    node.assembler.routes = parse_routes(tomllib.loads(RESEARCH), ["pacs", "research"])
    node.tick()
    turn_until_idle(restore, node)
    (delivery,) = node.job()["deliveries"]
    assert delivery["destination"] == "research"
    assert all(is_marked(path) for path in given_out(node))
    assert_rows_tell_the_files(node)
    assert early_files(node) == []


def is_marked(path: Path) -> bool:
    return str(dcmread(path).SeriesDescription).endswith("[QC]")


# ---- a process that ends, and others beside it ----


class EndedError(BaseException):
    """The process is gone: nothing of ours may handle it."""


def ended(*arguments: object, **named: object) -> None:
    raise EndedError


@pytest.mark.parametrize("renamed", [0, 2, SLICES])
def test_one_that_ends_between_the_names_and_the_rows_leaves_nothing_to_be_sent(
    node: Bench, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    """The next one finds the files of before under the same names, and writes the same bytes."""
    node.receive(ct())
    restore = tried_once(node)
    ahead = {path.read_bytes() for path in written_ahead(node)}
    node.tick()
    give_out = Spool.give_out

    def given(spool: Spool, *arguments: str) -> str:
        if len(given_out(node)) == renamed:
            raise EndedError
        return give_out(spool, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "give_out", given)
        patch.setattr(Spool, "flush", ended)
        with pytest.raises(EndedError):
            restore.run_once(node.clock())
    assert len(given_out(node)) == renamed
    job = node.job()
    assert (job["state"], job["outputs"], job["deliveries"]) == ("running", [], [])
    next_one = worker(node, Gain())
    assert next_one.recover(node.clock()) == 1
    turn_until_idle(next_one, node)
    assert (node.job()["state"], len(node.job()["deliveries"])) == ("done", 1)
    assert {path.read_bytes() for path in given_out(node)} == ahead
    assert_rows_tell_the_files(node)
    Janitor(node.settings, node.ledger, node.spool).turn(node.clock())
    assert list((node.spool.root / "early").iterdir()) == []


@pytest.mark.parametrize("sha256", ["ab" * 32, "cd" * 32], ids=["same model", "another model"])
def test_files_of_a_process_that_ended_are_left_to_the_janitor(node: Bench, sha256: str) -> None:
    """The next one knows of none; what it makes is of its own model."""
    node.receive(ct())
    tried_once(node)
    successor = Gain(gain=7.0, model=ModelIdentity("gain", "2", sha256))
    restore = node.worker(successor)
    janitor = Janitor(node.settings, node.ledger, node.spool)
    node.tick()
    janitor.turn(node.clock())
    assert len(written_ahead(node)) == SLICES, "the job has not ended"
    turn_until_idle(restore, node)
    assert (node.job()["state"], node.job()["model_sha256"]) == ("done", sha256)
    assert successor.passes == SLICES
    assert_rows_tell_the_files(node)
    janitor.turn(node.clock.advance(node.settings.janitor.interval_s))
    assert list((node.spool.root / "early").iterdir()) == []


def cancelled(node: Bench) -> None:
    node.tick()
    assert queue.cancel(node.ledger, node.job()["id"], reason="not wanted", now=node.clock())


def ignored(node: Bench) -> None:
    node.assembler.routes = parse_routes(tomllib.loads(NOTHING), ["pacs"])
    node.tick()
    assert node.series()["state"] == "ignored"


def forgotten(node: Bench) -> None:
    """Its association is open for ever, and so is the series."""
    node.clock.advance(node.settings.janitor.stale_file_s + 60.0)
    for path in (node.spool.root / "early").rglob("*"):
        os.utime(path, (0.0, 0.0))


@pytest.mark.parametrize("end", [cancelled, ignored, forgotten])
def test_files_whose_job_never_comes_do_not_stay(node: Bench, end: Callable[[Bench], None]) -> None:
    """Whether the process that wrote them lives or not."""
    node.receive(ct())
    tried_once(node)
    assert len(written_ahead(node)) == SLICES
    end(node)
    Janitor(node.settings, node.ledger, node.spool).turn(node.clock())
    assert list((node.spool.root / "early").iterdir()) == []


def test_files_that_a_short_disk_has_taken_are_written_by_the_job(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.receive(ct())
    restore = tried_once(node)
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "space", lambda self: Space(500, Marks(low=300, high=600)))
        Janitor(node.settings, node.ledger, node.spool).turn(node.clock())
    assert written_ahead(node) == []
    node.tick()
    turn_until_idle(restore, node)
    assert node.job()["state"] == "done"
    assert_rows_tell_the_files(node)


def test_a_disk_that_is_full_meanwhile_is_left_for_the_job_to_find(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    node = bench(tmp_path, bench_ledger, clock, report={"sr": True})
    node.receive(ct())
    engine = Gain()
    restore = worker(node, engine)
    turn_until_idle(restore, node)
    with files_of_at_most(4096):
        assert tried(node, engine, restore) == SLICES
    assert written_ahead(node) == []
    node.tick()
    turn_until_idle(restore, node)
    assert node.job()["state"] == "done"
    assert len(given_out(node)) == SLICES + 1


def test_two_workers_that_have_tried_the_same_series_share_its_files(node: Bench) -> None:
    node.receive(ct())
    first, second = tried_once(node), tried_once(node)
    files = inodes(written_ahead(node))
    assert len(files) == SLICES
    node.tick()
    assert turn_until_idle(first, node) == 1
    assert turn_until_idle(second, node) == 0
    assert inodes(given_out(node)) == files, "the other forgets what it had, and touches no result"
    assert node.job()["state"] == "done"
    assert_rows_tell_the_files(node)


@pytest.mark.parametrize("is_first", [True, False])
def test_each_of_two_workers_gives_out_what_it_has_judged_itself(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, is_first: bool
) -> None:
    """One was started before the settings were changed, the other after it."""
    old = bench(tmp_path, bench_ledger, clock)
    new = bench(tmp_path, bench_ledger, clock, identity={"description_suffixes": {TASK: " NEW"}})
    old.receive(ct())
    workers = [tried_once(old), tried_once(new)]
    assert len(written_ahead(old)) == 2 * SLICES
    old.tick()
    turn_until_idle(workers[not is_first], old)
    assert old.job()["state"] == "done"
    assert_rows_tell_the_files(old)
    told = {str(dcmread(path).SeriesDescription).endswith(" NEW") for path in given_out(old)}
    assert told == {not is_first}
