"""Slices are restored while their series comes, and change nothing but the time that it takes."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from sqlalchemy import Engine

from dicom_node import early
from dicom_node.dicom import volume
from dicom_node.dicom.planes import OnDemand
from dicom_node.disk import Disk, Marks, Space
from dicom_node.errors import EngineMemoryError, PermanentError
from dicom_node.inference import (
    DomainVerdict,
    ModelIdentity,
    RestorationRequest,
    RestorationResult,
)
from dicom_node.janitor import Janitor
from dicom_node.kept_slices import BESIDE, key_of
from dicom_node.ledger import intake, queue
from dicom_node.restored_volumes import seeds
from dicom_node.routing import parse_routes
from tests.conftest import ManualClock
from tests.factories import make_series
from tests.multiframe import make_enhanced
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


def test_slices_are_restored_as_they_come_and_the_job_asks_for_none(node: Bench) -> None:
    engine = Gain()
    restore = worker(node, engine)
    for number, dataset in enumerate(ct(), 1):
        node.receive([dataset])
        assert turn_until_idle(restore, node) == 1
        assert len(engine.ahead) == number
    assert len(early_files(node)) == SLICES
    node.tick()
    assert turn_until_idle(restore, node) == 1
    assert node.job()["state"] == "done"
    assert engine.passes == 0
    assert early_files(node) == []


@pytest.mark.parametrize("seed", range(6))
def test_the_files_are_those_of_a_job_without_early_slices(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, seed: int
) -> None:
    """Whatever the order in which they come, and however many come before their job."""
    node = bench(tmp_path, bench_ledger, clock)
    chance = random.Random(seed)
    sent, engine = ct(seed=seed), Gain(gain=chance.uniform(-9, 9))
    chance.shuffle(sent)
    restore = worker(node, engine)
    made_early = chance.randint(1, SLICES)
    node.receive(sent[:made_early])
    turn_until_idle(restore, node)
    node.receive(sent[made_early:])
    node.tick()
    turn_until_idle(restore, node)
    assert (len(engine.ahead), engine.passes) == (made_early, SLICES - made_early)
    early, job = outgoing(node), node.job()
    assert len(early) == SLICES

    alone = Gain(gain=engine.gain)
    # The same job once more, by a worker that knows of nothing early.
    run_again(node, job["id"])
    node.worker(alone).run_once(node.clock())
    assert alone.passes == SLICES
    assert outgoing(node) == early


def test_a_job_that_is_due_goes_before_early_slices(node: Bench) -> None:
    engine = Gain()
    restore = worker(node, engine)
    node.receive(ct(study="a", series="due"))
    node.tick()
    node.receive(ct(study="b", series="coming"))
    assert restore.run_once(node.clock())
    assert (engine.passes, len(engine.ahead)) == (SLICES, 0)
    assert restore.run_once(node.clock())
    assert len(engine.ahead) == 1


def test_series_take_turns(node: Bench) -> None:
    engine = Gain()
    restore = worker(node, engine)
    long, short = ct(series="long", slices=6, seed=1), ct(series="short", slices=3, seed=2)
    node.receive(long)
    node.receive(short)
    turn_until_idle(restore, node)
    of_short = _positions(engine, short)
    assert max(of_short) <= 2 * len(short) - 1


def _positions(engine: Gain, datasets: Sequence[Dataset]) -> list[int]:
    """When the slices of a series were restored, by their seeds."""
    own = set(seeds(datasets, engine.model))
    return [n for n, request in enumerate(engine.ahead) if request.seed in own]


URGENT = """
[[route]]
name = "urgent"
task = "ct_denoise"
destinations = ["pacs"]
priority = 10
[route.match]
StudyDescription = "URGENT"

[[route]]
name = "rest"
task = "ct_denoise"
destinations = ["pacs"]
[route.match]
Modality = "CT"
"""


def test_the_more_urgent_route_goes_first(node: Bench) -> None:
    engine = Gain()
    routes = parse_routes(tomllib.loads(URGENT), ["pacs"])
    restore = worker(node, engine, routes)
    later = ct(series="urgent", StudyDescription="URGENT", seed=3)
    node.receive(ct(series="rest", seed=4))
    assert restore.run_once(node.clock())
    node.receive(later)
    turn_until_idle(restore, node)
    assert _positions(engine, later) == list(range(1, 1 + SLICES))


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(lambda: make_series("MR", slices=3, rows=16), id="MR needs its volume"),
        pytest.param(lambda: make_series("PT", slices=3, rows=16), id="PET needs its volume"),
        pytest.param(lambda: ct(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), id="ignored"),
        pytest.param(lambda: ct(plane="sagittal"), id="refused"),
        pytest.param(lambda: ct(BurnedInAnnotation="YES"), id="burned in"),
        pytest.param(lambda: [make_enhanced("CT", frames=3, rows=16)], id="multi-frame"),
    ],
)
def test_what_would_not_be_restored_by_itself_is_not_restored_early(
    node: Bench, sent: Callable[[], list[Dataset]]
) -> None:
    engine = Gain()
    node.receive(sent())
    turn_until_idle(worker(node, engine), node)
    assert engine.ahead == []
    assert early_files(node) == []


def test_neither_is_what_no_route_wants_or_the_domain_refuses(node: Bench) -> None:
    node.receive(ct())
    nothing = parse_routes(tomllib.loads(NOTHING), ["pacs"])
    outside = Gain(verdict=DomainVerdict(outside=("slice thickness",)))
    other = Gain(tasks=("mri_sr",))
    for engine, routes in ((Gain(), nothing), (outside, ROUTES), (other, ROUTES)):
        turn_until_idle(worker(node, engine, routes), node)
        assert engine.ahead == []


NIGHT = """
[[route]]
name = "night"
task = "ct_denoise"
destinations = ["pacs"]
hours = { open = "02:00-03:00", zone = "UTC", closed = "wait" }
match = { modality = "CT" }
"""


def test_a_route_that_is_closed_is_not_begun_before_its_hours(node: Bench) -> None:
    engine = Gain()
    restore = worker(node, engine, parse_routes(tomllib.loads(NIGHT), ["pacs"]))
    node.receive(ct())
    turn_until_idle(restore, node)
    assert engine.ahead == []


def test_a_source_of_which_more_is_announced_is_begun(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    """However policy takes a series that stays incomplete: more is on its way."""
    node = bench(tmp_path, bench_ledger, clock, policy={"incomplete": "refuse"})
    engine = Gain()
    node.receive(ct(missing=[4]))
    turn_until_idle(worker(node, engine), node)
    assert len(engine.ahead) == SLICES - 1


def test_another_model_or_parameter_does_not_use_what_was_made(node: Bench) -> None:
    """The model is changed while the series comes: the job is that of the new one alone."""
    first = Gain()
    sent = ct()
    node.receive(sent[:4])
    turn_until_idle(worker(node, first), node)
    second = Gain(gain=7.0, model=ModelIdentity("gain", "2", "cd" * 32))
    restore = worker(node, second)
    node.receive(sent[4:])
    assert turn_until_idle(restore, node) == SLICES  # those of the old one are no use
    node.tick()
    turn_until_idle(restore, node)
    assert (second.passes, node.job()["model_sha256"]) == (0, "cd" * 32)
    by_uid = {dataset.SOPInstanceUID: dataset for dataset in sent}
    for output in node.job()["outputs"]:
        made = dcmread(node.spool.resolve(output["path"]))
        source = by_uid[output["source_sop_instance_uid"]]
        assert (made.pixel_array == source.pixel_array + 7).all()
    assert len(early_files(node)) == 4
    Janitor(node.settings, node.ledger, node.spool).turn(node.clock())
    assert early_files(node) == []


def test_the_key_names_all_that_a_result_rests_on() -> None:
    base = Gain()
    other = replace(base, model=ModelIdentity("gain", "1", "cd" * 32))
    keys = [
        key(sha256, seed)
        for engine, strength in ((base, 1.0), (base, 0.5), (other, 1.0), (Gain(gain=6.0), 1.0))
        if (key := key_of(engine, "ct_denoise", strength)) is not None
        for sha256 in ("a", "b")
        for seed in (1, 2)
    ]
    assert len(set(keys)) == len(keys) == 16
    assert key_of(base, "mri_sr", 1.0) is None


def test_a_damaged_result_is_made_again_by_the_job(node: Bench) -> None:
    engine = Gain()
    restore = worker(node, engine)
    node.receive(ct())
    turn_until_idle(restore, node)
    for path in early_files(node)[:2]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    node.tick()
    turn_until_idle(restore, node)
    assert (node.job()["state"], engine.passes) == ("done", 2)


@pytest.mark.parametrize("end", BESIDE)
@pytest.mark.parametrize("is_there", [True, False])
def test_what_is_damaged_or_gone_beside_a_result_changes_no_file(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, end: str, is_there: bool
) -> None:
    node = bench(tmp_path, bench_ledger, clock)
    restore = worker(node, Gain())
    node.receive(ct())
    turn_until_idle(restore, node)
    found = [path for path in (node.spool.root / "early").rglob("*") if path.name.endswith(end)]
    assert len(found) == SLICES
    for path in found[1:]:
        if is_there:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        else:
            path.unlink()
    node.tick()
    turn_until_idle(restore, node)
    made, job = outgoing(node), node.job()
    assert (job["state"], len(made)) == ("done", SLICES)
    run_again(node, job["id"])
    node.worker(Gain()).run_once(node.clock())
    assert outgoing(node) == made
    assert early_files(node) == []


def test_pixels_are_read_again_of_no_slice_that_was_restored_early(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those that the reviewer is shown."""
    node = bench(tmp_path, bench_ledger, clock, review={"slices": 1})
    restore = worker(node, Gain())
    node.receive(ct())
    turn_until_idle(restore, node)
    node.tick()
    read: list[Path] = []
    decoded = volume.read_pixels
    monkeypatch.setattr(volume, "read_pixels", lambda path: read.append(path) or decoded(path))
    engine = Gain()
    monkeypatch.setattr(Gain, "restore", lambda self, request, progress=None: _taken(request))
    restore = worker(node, engine)
    turn_until_idle(restore, node)
    assert node.job()["state"] == "done"
    assert len(set(read)) == 2


def _taken(request: RestorationRequest) -> RestorationResult:
    """What an engine gives that reads a plane where it is asked for one."""
    kept = request.kept
    assert kept is not None
    assert all(kept.facts(i) for i in range(len(request.array)))
    shape = request.array.shape

    def plane(index: int) -> Any:
        octets = kept.plane(index)
        assert octets is not None
        return np.frombuffer(octets, np.float32).reshape(shape[1:])

    model = ModelIdentity("gain", "1", "ab" * 32)
    return RestorationResult(
        OnDemand(shape, np.float32, plane),
        model,
        (),
        0.1,
        readings=(reading("finite"),),
        calibrated=True,
    )


def test_a_late_slice_is_restored_early_and_used(node: Bench) -> None:
    engine = Gain()
    restore = worker(node, engine)
    sent = ct()
    node.receive(sent[:-1])
    turn_until_idle(restore, node)
    node.tick()
    turn_until_idle(restore, node)
    node.receive(sent[-1:])
    turn_until_idle(restore, node)
    assert len(early_files(node)) == 1
    node.tick()
    turn_until_idle(restore, node)
    assert [job["state"] for job in node.jobs()] == ["done", "done"]
    assert (len(engine.ahead), engine.passes) == (SLICES, 0)
    assert early_files(node) == []


def test_a_late_slice_in_the_middle_of_early_restoration_is_there_in_its_turn(node: Bench) -> None:
    sent = ct()
    engine = Gain(before_ahead=lambda n: node.receive(sent[-1:]) if n == 2 else None)
    restore = worker(node, engine)
    node.receive(sent[:-1])
    turn_until_idle(restore, node)
    assert len(engine.ahead) == SLICES


def test_a_series_that_is_concluded_meanwhile_is_left_to_its_job(node: Bench) -> None:
    def conclude(number: int) -> None:
        if number == 2:
            node.tick()

    engine = Gain(before_ahead=conclude)
    restore = worker(node, engine)
    node.receive(ct())
    assert restore.run_once(node.clock())
    assert restore.run_once(node.clock())
    assert restore.run_once(node.clock())  # the job
    assert (len(engine.ahead), engine.passes) == (2, SLICES - 2)
    assert turn_until_idle(restore, node) == 0


def test_what_a_cancelled_job_would_have_used_is_removed(node: Bench) -> None:
    engine = Gain()
    restore = worker(node, engine)
    janitor = Janitor(node.settings, node.ledger, node.spool)
    node.receive(ct())
    turn_until_idle(restore, node)
    node.tick()
    janitor.turn(node.clock())
    assert len(early_files(node)) == SLICES  # its job waits
    assert queue.cancel(node.ledger, node.job()["id"], reason="not wanted", now=node.clock())
    janitor.turn(node.clock.advance(node.settings.janitor.interval_s))
    assert early_files(node) == []
    assert queue.retry(node.ledger, node.job()["id"], reason="wanted", now=node.clock())
    turn_until_idle(restore, node)
    assert (node.job()["state"], engine.passes) == ("done", SLICES)


def test_what_an_ignored_series_has_left_is_removed(node: Bench) -> None:
    """The rules are changed between the first slice and the last."""
    restore = worker(node, Gain())
    node.receive(ct())
    turn_until_idle(restore, node)
    assert len(early_files(node)) == SLICES
    node.assembler.routes = parse_routes(tomllib.loads(NOTHING), ["pacs"])
    node.tick()
    assert node.series()["state"] == "ignored"
    Janitor(node.settings, node.ledger, node.spool).turn(node.clock())
    assert early_files(node) == []


def test_a_short_disk_takes_early_results_first(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Gain()
    restore = worker(node, engine)
    sent = ct()
    node.receive(sent[:3])
    turn_until_idle(restore, node)
    monkeypatch.setattr(Disk, "space", lambda self: Space(500, Marks(low=300, high=600)))
    node.receive(sent[3:])
    turn_until_idle(restore, node)
    assert len(engine.ahead) == 3
    Janitor(node.settings, node.ledger, node.spool).turn(node.clock())
    assert early_files(node) == []


def test_an_engine_without_memory_waits_and_jobs_go_on(node: Bench) -> None:
    def short(number: int) -> None:
        raise EngineMemoryError("no memory for a slice")

    engine = Gain(before_ahead=short)
    restore = worker(node, engine)
    node.receive(ct())
    turn_until_idle(restore, node)
    assert len(engine.ahead) == 1
    node.tick()
    assert restore.run_once(node.clock())
    assert node.job()["state"] == "done"
    assert early_files(node) == []


@pytest.mark.parametrize("error", [PermanentError("not finite"), KeyError("Doe^John")])
def test_what_goes_wrong_early_is_left_for_the_job_to_tell(node: Bench, error: Exception) -> None:
    def fail(number: int) -> None:
        if number == 2:
            raise error

    engine = Gain(before_ahead=fail)
    restore = worker(node, engine)
    node.receive(ct())
    turn_until_idle(restore, node)
    assert len(early_files(node)) == SLICES - 1
    node.tick()
    restore.run_once(node.clock())
    assert (node.job()["state"], engine.passes) == ("done", 1)


def test_a_worker_that_was_killed_in_a_slice_goes_on_where_it_was(node: Bench) -> None:
    def die(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    node.receive(ct())
    with pytest.raises(KeyboardInterrupt):
        turn_until_idle(worker(node, Gain(before_ahead=die)), node)
    assert len(early_files(node)) == 2
    successor = Gain()
    restore = worker(node, successor)
    turn_until_idle(restore, node)
    assert len(successor.ahead) == SLICES - 2
    node.tick()
    turn_until_idle(restore, node)
    assert (node.job()["state"], successor.passes) == ("done", 0)


def test_what_is_not_wanted_by_now_is_looked_at_once(node: Bench) -> None:
    engine = Gain(tasks=("mri_sr",))
    restore = worker(node, engine)
    node.receive(ct())
    turn_until_idle(restore, node)
    judged = len(engine.facts)
    assert restore.run_once(node.clock()) is False
    assert len(engine.facts) == judged
    assert intake.series_progress(node.ledger)[0].instances == SLICES


def test_the_gates_look_twice_at_slices_whose_place_is_settled(node: Bench) -> None:
    """In the order of space a place is settled once another slice has come behind it."""
    engine = Gain(looks_at=lambda slices: range(1, slices, 2))
    restore = worker(node, engine)
    sent = sorted(ct(), key=lambda each: float(each.ImagePositionPatient[2]))
    place = {seed: n for n, seed in enumerate(seeds(sent, engine.model))}
    looked: list[list[int]] = []
    for dataset in sent:
        node.receive([dataset])
        turn_until_idle(restore, node)
        looked.append([place[request.seed] for request in engine.probes])
    assert looked == [[], [], [1], [1], [1, 3]]
    node.tick()
    turn_until_idle(restore, node)
    assert (node.job()["state"], early_files(node)) == ("done", [])


def test_what_cannot_be_tried_as_a_whole_is_looked_at_when_it_is_calm(node: Bench) -> None:
    """Against the order of space no place is settled before the last slice."""

    def refuse(number: int) -> None:
        if number == 2:
            raise PermanentError("not this one")

    engine = Gain(looks_at=lambda slices: (0,), before_ahead=refuse)
    restore = worker(node, engine)
    sent = sorted(ct(), key=lambda each: -float(each.ImagePositionPatient[2]))
    for dataset in sent:
        node.receive([dataset])
        turn_until_idle(restore, node)
    assert engine.probes == []
    node.clock.advance(2.0)
    turn_until_idle(restore, node)
    assert [request.seed for request in engine.probes] == list(seeds(sent[-1:], engine.model))


def test_slices_of_what_was_tried_are_not_looked_at_one_by_one(node: Bench) -> None:
    engine = Gain(looks_at=lambda slices: (0,))
    restore = worker(node, engine)
    sent = sorted(ct(), key=lambda each: -float(each.ImagePositionPatient[2]))
    node.receive(sent[:-1])
    turn_until_idle(restore, node)
    assert tried(node, engine, restore) == SLICES - 1
    assert engine.probes == []
    node.receive(sent[-1:])
    turn_until_idle(restore, node)
    node.clock.advance(2.0)  # slices come more slowly than they did
    assert tried(node, engine, restore) == SLICES
    assert engine.probes == []


def test_what_was_judged_is_let_go_with_its_series(node: Bench) -> None:
    engine = Gain()
    restore = worker(node, engine)
    sent = ct()
    node.receive(sent)
    turn_until_idle(restore, node)
    assert tried(node, engine, restore) == SLICES
    assert restore._early is not None
    assert restore._early._rehearsal is not None
    uid = str(sent[0].SeriesInstanceUID)
    intake.ignore_series(node.ledger, uid, "not wanted", node.clock(), instances_seen=SLICES)
    turn_until_idle(restore, node)
    assert restore._early._rehearsal is None


def test_a_series_of_which_a_slice_is_not_restored_is_not_judged_ahead(node: Bench) -> None:
    def refuse(number: int) -> None:
        if number == 2:
            raise PermanentError("not this one")

    engine = Gain(before_ahead=refuse)
    restore = worker(node, engine)
    node.receive(ct())
    turn_until_idle(restore, node)
    assert tried(node, engine, restore) == 0


def test_a_job_of_another_series_is_not_kept_waiting(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Gain):
        """Tells of its progress with kept slices too, and is disturbed after the second."""

        def restore(self, request: Any, progress: Any = None) -> RestorationResult:
            for number in range(len(request.array) if not due else 0):
                progress(number + 1, len(request.array))
                if number == 1:
                    due.append(number)
                    node.receive(ct(study="b", series="due", seed=7))
                    node.tick()
            return super().restore(request, progress)

    monkeypatch.setattr(early, "_DISTURBED_S", 0.0)
    due: list[int] = []
    engine = Slow()
    restore = worker(node, engine)
    node.receive(ct(study="a", series="calm"))
    turn_until_idle(restore, node)
    node.clock.advance(3.0)
    assert restore.run_once(node.clock())
    assert (due, engine.requests) == ([1], [])
    assert restore.run_once(node.clock())
    assert len(engine.requests) == 1
