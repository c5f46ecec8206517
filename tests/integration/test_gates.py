"""Nothing reaches a destination from a failed gate: planted faults, random policies, every way."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from sqlalchemy import Engine, select

from dicom_node import recall
from dicom_node.assembler import Assembler
from dicom_node.delivery import DeliveryWorker
from dicom_node.dicom.header import InstanceSummary
from dicom_node.dicom.rejection import KEY_OBJECT_SELECTION
from dicom_node.early import EarlySlices
from dicom_node.early_results import EarlyResults
from dicom_node.inference import ModelIdentity
from dicom_node.ledger import intake, open_series, queue, reports, tables
from dicom_node.ledger.states import BreakerState
from dicom_node.ledger.tables import Entity, open_ledger, reading, writing
from dicom_node.restore_worker import RestoreWorker
from dicom_node.routing import Routes, parse_routes
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from tests.conftest import ManualClock
from tests.integration.peers import Archive, serving
from tests.integration.planted import (
    DESTINATIONS,
    FAULTS,
    TASKS,
    CrashError,
    Fault,
    Mortal,
    Planted,
    Said,
    Template,
    allowed,
    random_policy,
    series_uid,
)

RUNS = int(os.environ.get("DICOM_NODE_TEST_GATE_RUNS", "1000"))
SEED = 20261122
# The runs are dealt out, so that test processes side by side share them.
PARTS = 4
# One run in so many has the model's own gates look at the pixels; the others two quick ones.
REAL_GATES = 10
MOST_SLICES = 4
QUIET_S, CALM_S = 10.0, 2.0
# How often what is due is sent at once; else it goes with that of later runs.
DELIVERED = 0.12
# What happens between the slices and their job.
CHANGES = (
    "nothing", "restart", "another policy", "another bundle", "weights of the same bundle",
    "another route", "the breaker opens", "one more slice", "a file is gone",
    "another process of another policy",
)  # fmt: skip
#: Summary, file and SOP Instance UID of an instance.
Received = tuple[InstanceSummary, bytes, str]


@dataclass
class Outcome:
    """What the oracle expects of one job."""

    job_id: int
    said: Said
    actions: dict[str, set[str]]  #: by destination: what each gate that failed leads to
    is_marked: bool  #: the description says that not everything was as it should be
    outputs: list[dict[str, Any]]
    model: str
    released: bool = False

    def may(self) -> set[str]:
        """The destinations that may have its result."""
        closed = {"refuse"} if self.released else {"hold", "refuse"}
        return {name for name, found in self.actions.items() if not found & closed}

    def waits(self) -> set[str]:
        """The destinations that a person may open."""
        return {n for n, found in self.actions.items() if "hold" in found and "refuse" not in found}


@dataclass(frozen=True)
class Due:
    """One restored image that a destination is to get."""

    outcome: Outcome
    source: str
    modality: str

    def is_as_judged(self, got: Dataset) -> bool:
        """Whether what has come is what the gates saw, with the label that this calls for."""
        is_marked = str(got.SeriesDescription).endswith(" [QC]")
        if self.modality != "CT":
            return is_marked == self.outcome.is_marked
        stored = np.frombuffer(got.PixelData, "<i2" if got.PixelRepresentation else "<u2")
        values = stored * float(got.RescaleSlope) + float(got.RescaleIntercept)
        judged = self.outcome.said.planes[self.source]
        near = np.abs(values - judged.ravel()).max() <= 0.5 * float(got.RescaleSlope) + 1e-3
        return bool(near) and is_marked == self.outcome.is_marked


@dataclass
class Process:
    """A restore process: what it was started with, and what it holds in memory."""

    policy: dict[str, Any]
    engine: Planted
    worker: RestoreWorker
    early: EarlySlices
    name: str
    #: All that it restores, it restores with the one fault of its engine.
    is_plain: bool = True

    def begin_anew(self, house: House) -> None:
        """As the supervisor starts it again once it has died."""
        again = house.process(self.policy, self.engine, self.early.routes, self.name)
        self.worker, self.early = again.worker, again.early


@dataclass
class House:
    """A node without a listener, and three archives that it sends to."""

    ledger: Engine
    spool: Spool
    clock: ManualClock
    mortal: Mortal
    archives: dict[str, Archive]
    #: What each destination is to get with the next delivery.
    due: dict[str, dict[str, Due]] = field(
        default_factory=lambda: {name: {} for name in DESTINATIONS}
    )
    _templates: dict[tuple[str, int], Template] = field(default_factory=dict)

    def settings(self, policy: dict[str, Any], review: str = "never") -> NodeSettings:
        peers = {
            name: {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}
            for name, archive in self.archives.items()
        }
        return NodeSettings.model_validate(
            {
                "destinations": peers,
                "assembly": {"quiet_s": QUIET_S},
                "spool": {"min_free_bytes": 0, "min_free_percent": 0},
                "gates": policy,
                # What opens a breaker is tested by itself; here a test opens it.
                "breaker": {"highest": 0.99, "significance": 1e-9},
                "review": {"write": review, "slices": 0},
                "log": {"level": "ERROR"},
            }
        )

    def process(
        self, policy: dict[str, Any], engine: Planted, routes: Routes, name: str = "restore-0@here"
    ) -> Process:
        """A restore process that has just been started."""
        settings = self.settings(policy)
        early = EarlySlices(settings, self.spool, self.ledger, engine, routes)
        worker = RestoreWorker(
            settings, self.spool, self.ledger, engine, name=name, clock=self.clock, early=early
        )
        worker.recover(self.clock())
        return Process(policy, engine, worker, early, name)

    def files(self, modality: str, slices: int, uid: str) -> list[Received]:
        """The instances of a new series."""
        key = modality, slices
        if key not in self._templates:
            self._templates[key] = Template.make(*key)
        return self._templates[key].instances(uid)

    def receive(self, uid: str, file: Received) -> None:
        """As C-STORE does it."""
        summary, data, sop_instance_uid = file
        stored = self.spool.write(data)
        facts = {
            **vars(summary), "series_instance_uid": uid, "sop_instance_uid": sop_instance_uid,
        }  # fmt: skip
        place = {"path": stored.path, "sha256": stored.sha256, "size": stored.size}
        intake.record_instance(self.ledger, intake.ReceivedInstance(**facts, **place), self.clock())

    def conclude(self, routes: Routes) -> None:
        """The series is complete: its job is made."""
        settings = self.settings({})
        Assembler(settings, self.spool, self.ledger, routes).tick(self.clock.advance(QUIET_S))

    def jobs(self, uid: str) -> list[int]:
        table = tables.jobs.c
        with reading(self.ledger) as connection:
            query = select(table.id).where(table.series_instance_uid == uid).order_by(table.id)
            return list(connection.scalars(query))

    def job(self, job_id: int) -> dict[str, Any]:
        return reports.job(self.ledger, job_id)

    def outbox(self, job_id: int) -> set[str]:
        """The destinations that the outbox holds the job's result for."""
        table = tables.deliveries.c
        with reading(self.ledger) as connection:
            return set(connection.scalars(select(table.destination).where(table.job_id == job_id)))

    def written_ahead(self) -> list[Path]:
        return list((self.spool.root / "early").rglob("*.dcm"))

    def open_breaker(self, modality: str) -> None:
        with writing(self.ledger) as connection:
            new = {"modality": modality, "state": BreakerState.CLOSED, "counts_from": 0.0}
            tables.insert_or_nothing(connection, tables.breakers, new)
            assert tables.move(
                connection, Entity.BREAKER, modality, BreakerState.OPEN, reason="a test",
                now=self.clock(), opened_at=self.clock(),
            )  # fmt: skip

    def deliver(self) -> Counter[str]:
        """Send what is due: every image that may go arrives as it was judged, and no other."""
        before = {name: set(archive.stored) for name, archive in self.archives.items()}
        self.clock.advance(1.0)
        sender = DeliveryWorker(
            self.settings({}), self.spool, self.ledger, self.clock, rng=random.Random(1)
        )
        while sender.run_once():
            pass
        sender.close()
        seen = Counter({"deliveries": 1})
        for name, archive in self.archives.items():
            got = {
                uid: dcmread(BytesIO(archive.stored[uid]), force=True)
                for uid in archive.stored.keys() - before[name]
            }
            notes = {u for u, each in got.items() if each.SOPClassUID == KEY_OBJECT_SELECTION}
            due, self.due[name] = self.due[name], {}
            assert got.keys() - notes == due.keys(), name
            assert [uid for uid, each in due.items() if not each.is_as_judged(got[uid])] == []
            seen += Counter({"images delivered": len(due), "notes delivered": len(notes)})
        return seen


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    ledger, mortal = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}"), Mortal()
    # What is tested is the death of a process, not of the machine: the disk need not be waited for.
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(os, "fsync", lambda _: None)
        archives = {name: stack.enter_context(serving(Archive())) for name in DESTINATIONS}
        mortal.watch(ledger, patch)
        yield House(ledger, Spool(tmp_path / "spool"), ManualClock(), mortal, archives)
    ledger.dispose()


def routes_to(destinations: Iterable[str]) -> Routes:
    """Each modality to its task, and to these destinations."""
    rules = [
        {
            "name": task,
            "task": task,
            "match": {"Modality": modality},
            "destinations": list(destinations),
        }
        for modality, task in TASKS.items()
    ]
    return parse_routes({"route": rules}, DESTINATIONS)


@dataclass
class Run:
    """One series with its planted fault, from the first slice to what the archives have."""

    house: House
    dice: random.Random
    number: int
    seen: Counter[str]

    def __post_init__(self) -> None:
        self.modality = self.dice.choice(("CT", "CT", "CT", "CT", "MR", "PT"))
        self.uid = series_uid(self.dice)
        self.destinations = self._some_destinations()
        self.outcomes: list[Outcome] = []
        self.is_open = False  # the breaker
        self.bundles = 0

    def go(self) -> None:
        """All of it."""
        house, dice = self.house, self.dice
        routes = routes_to(self.destinations)
        slices = dice.randint(1, MOST_SLICES)
        files = house.files(self.modality, slices, self.uid)
        late = [files.pop()] if len(files) > 1 and dice.random() < 0.3 else []
        change = dice.choice(CHANGES)
        last = [files.pop()] if change == "one more slice" and len(files) > 1 else []
        here = house.process(random_policy(dice), self._engine(), routes)
        self._come(files, here)
        here, routes = self._change(change, here, routes)
        self._come(last, here)
        self._job(here, routes)
        if late:
            self.seen["late slice"] += 1
            if self.number // PARTS % 2:  # it passes where the rest may have failed
                here.engine.fault, here.is_plain = FAULTS[0], False
            self._come(late, here)
            self._job(here, routes)
        if dice.random() < 0.2:
            self._recall()
        self._retry()
        if dice.random() < DELIVERED:
            self.seen.update(house.deliver())
        self._leave()

    def _some_destinations(self) -> tuple[str, ...]:
        return tuple(sorted(self.dice.sample(DESTINATIONS, self.dice.choice((1, 2, 3)))))

    def _engine(self) -> Planted:
        """A model of its own: what it made in other runs is nothing to recall."""
        self.bundles += 1
        digest = f"{self.number:032x}{self.bundles:032x}"
        identity = ModelIdentity("planted", str(self.bundles), digest)
        return Planted(self._fault(), self.number // PARTS % REAL_GATES == 0, identity)

    def _fault(self) -> Fault:
        fault = self.dice.choice(FAULTS)
        self.seen[f"fault: {fault.name}"] += 1
        return fault

    def _come(self, files: Sequence[Received], here: Process) -> None:
        """Slices come, one by one or all at once, and may be restored and tried as they do."""
        if not files:
            return
        way = self.dice.choice(("at once", "early", "tried", "tried", "tried", "tried"))
        for file in files:
            self.house.receive(self.uid, file)
            if way != "at once":
                self._idle(here)
        if way == "tried":
            self.house.clock.advance(CALM_S)
            self._idle(here)
        if self.modality == "CT":
            self.seen[f"CT restored {way}"] += 1

    def _idle(self, here: Process) -> None:
        """What a process does while no job is due; it may die of it."""
        deadly = self.dice.randrange(60) if self.dice.random() < 0.1 else None
        try:
            with self.house.mortal.dying_at(deadly):
                while here.worker.run_once(self.house.clock()):
                    pass
        except CrashError:
            self.seen["died before the job"] += 1
            here.begin_anew(self.house)

    def _change(self, change: str, here: Process, routes: Routes) -> tuple[Process, Routes]:
        """What is not as it was when slices were restored ahead."""
        house, dice = self.house, self.dice
        self.seen[f"then {change}"] += 1
        if change == "restart":
            here = house.process(here.policy, here.engine, routes)
        elif change == "another policy":
            here = house.process(random_policy(dice), here.engine, routes)
        elif change == "another bundle":
            here = house.process(here.policy, self._engine(), routes)
        elif change == "weights of the same bundle":
            here.engine.fault, here.is_plain = self._fault(), False
        elif change == "another route":
            self.destinations = self._some_destinations()
            routes = here.early.routes = routes_to(self.destinations)
        elif change == "the breaker opens":
            house.open_breaker(self.modality)
            self.is_open = True
        elif change == "a file is gone":
            for path in house.written_ahead()[:1]:
                path.unlink()
        elif change == "another process of another policy":
            engine = Planted(here.engine.fault, here.engine.real, here.engine.model)
            other = house.process(random_policy(dice), engine, routes, "restore-1@here")
            house.clock.advance(CALM_S)
            self._idle(other)
            here = dice.choice((here, other))
        return here, routes

    def _job(self, here: Process, routes: Routes) -> None:
        """Its job is made and done, after some deaths; a person decides on it."""
        house, dice = self.house, self.dice
        ahead = {path.stat().st_ino for path in house.written_ahead()}
        self.seen["written ahead"] += bool(ahead)
        known = set(house.jobs(self.uid))
        house.conclude(routes)
        (job_id,) = set(house.jobs(self.uid)) - known
        for _ in range(dice.choice((0, 0, 0, 1, 2))):
            if self._dies(here):
                self.seen["died in the job"] += 1
                assert not house.outbox(job_id) or house.job(job_id)["state"] in ("done", "held")
            house.clock.advance(1.0)
            here.begin_anew(house)
        here.worker.run_once(house.clock())
        outcome = self._judged(job_id, here)
        given = {house.spool.resolve(each["path"]).stat().st_ino for each in outcome.outputs}
        self.seen["written ahead, and taken by the job"] += bool(given & ahead)
        self._becomes_due(outcome, outcome.may())
        if dice.random() < DELIVERED:
            self.seen.update(house.deliver())
        self._decide(outcome)

    def _dies(self, here: Process) -> bool:
        """Have a worker die before some statement; False when it was done before."""
        try:
            with self.house.mortal.dying_at(self.dice.randrange(40)):
                here.worker.run_once(self.house.clock())
            return False
        except CrashError:
            return True

    def _judged(self, job_id: int, here: Process) -> Outcome:
        """Compare what the node did with what the policy allows."""
        job, engine = self.house.job(job_id), here.engine
        assert job["state"] in ("done", "held", "refused"), job["reason"]
        said = engine.said(job["sources"])
        if not engine.real and engine.fault.fails is not None and here.is_plain:
            assert said.failed == engine.fault.fails, engine.fault.name
        actions = {
            name: {allowed(here.policy, gate, self.modality, name) for gate in said.failed}
            for name in self.destinations
        }
        is_marked = said.warned or any(found - {"pass"} for found in actions.values())
        passes = {name for name, found in actions.items() if not found & {"hold", "refuse"}}
        for name in self._closed():
            actions.get(name, set()).add("hold")
        is_kept_back = not self.is_open and bool(passes & self._closed())
        self.seen["late, and held since the rest was not sent"] += is_kept_back
        digest = engine.model.sha256
        outcome = Outcome(job_id, said, actions, is_marked, job["outputs"], digest)
        self.outcomes.append(outcome)
        where = self.number, job_id, here.policy, said.failed, actions
        assert self.house.outbox(job_id) == outcome.may(), where
        assert (job["state"] == "held") == bool(outcome.waits()), where
        self.seen["jobs"] += 1
        self.seen["jobs with a failed gate"] += bool(said.failed)
        self.seen[f"job {job['state']}"] += 1
        return outcome

    def _closed(self) -> set[str]:
        """The destinations that nothing goes to by its own verdict alone."""
        if self.is_open:
            return set(DESTINATIONS)
        if self.modality == "PT":
            return set()
        return {name for one in self.outcomes for name in one.actions.keys() - one.may()}

    def _becomes_due(self, outcome: Outcome, names: Set[str]) -> None:
        for name in names:
            for each in outcome.outputs:
                made = Due(outcome, each["source_sop_instance_uid"], self.modality)
                self.house.due[name][each["sop_instance_uid"]] = made

    def _decide(self, outcome: Outcome) -> None:
        """A person decides on what is held, or nobody does."""
        if not outcome.waits():
            return
        ledger, job_id, before = self.house.ledger, outcome.job_id, outcome.may()
        who: Any = {"operator": "Ann", "reason": "looked at it", "now": self.house.clock()}
        choice = self.dice.choice(("release", "reject", "wait"))
        self.seen[f"decision: {choice}"] += 1
        if choice == "release":
            assert queue.release(ledger, job_id, **who)
            outcome.released = True
            self._becomes_due(outcome, outcome.may() - before)
        elif choice == "reject":
            assert queue.reject(ledger, job_id, **who)
            assert not queue.release(ledger, job_id, **who)
            assert not queue.retry(ledger, job_id, reason="again", now=self.house.clock())
        assert self.house.outbox(job_id) == outcome.may()

    def _recall(self) -> None:
        """What one of its models made is rejected: what has not gone yet does not go."""
        house = self.house
        if self.dice.random() < 0.5:
            self.seen.update(house.deliver())
        digest = self.dice.choice(self.outcomes).model
        made = recall.made_by(house.ledger, digest)
        identity = house.settings({}).identity
        done = recall.reject(
            house.ledger, house.spool, made, model_sha256=digest, title="quality", reason="a test",
            identity=identity, now=house.clock(),
        )  # fmt: skip
        assert all(each.problem is None for each in done)
        self.seen["recalled"] += bool(made)
        for due in house.due.values():
            for uid in [uid for uid, each in due.items() if each.outcome.model == digest]:
                del due[uid]
                self.seen["recalled before it went"] += 1

    def _retry(self) -> None:
        """A person has everything sent again that is not where it was to go."""
        for outcome in self.outcomes:
            for row in self.house.job(outcome.job_id)["deliveries"]:
                if row["state"] == "dead":
                    queue.retry_delivery(
                        self.house.ledger, row["id"], reason="again", now=self.house.clock()
                    )
                    self.seen["retried"] += 1

    def _leave(self) -> None:
        """Nothing of it is left behind for another run."""
        house = self.house
        if self.is_open:
            who: Any = {"operator": "Ann", "reason": "a test", "now": house.clock()}
            assert queue.reset_breaker(house.ledger, self.modality, **who)
        results = EarlyResults(house.spool)
        results.sweep(partial(open_series.in_hand, house.ledger), house.clock())
        assert list((house.spool.root / "early").rglob("*")) == []


# In each part of the runs at least so often, or the draw did not reach what it is about.
REACHED = {
    **{f"fault: {fault.name}": 20 for fault in FAULTS},
    **{f"then {change}": 8 for change in CHANGES},
    "CT restored at once": 10, "CT restored early": 10, "CT restored tried": 60,
    "written ahead": 60, "written ahead, and taken by the job": 20,
    "died before the job": 10, "died in the job": 25, "jobs with a failed gate": 100,
    "job done": 50, "job held": 25, "job refused": 8,
    "decision: release": 8, "decision: reject": 8, "decision: wait": 8,
    "late slice": 20, "late, and held since the rest was not sent": 4,
    "recalled": 8, "recalled before it went": 4, "retried": 4,
    "deliveries": 25, "images delivered": 200, "notes delivered": 3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_leaves_from_a_failed_gate_whenever_the_worker_dies(
    house: House, part: int
) -> None:
    """Whatever was restored ahead, and whatever changes before, in and after the job."""
    dice, seen = random.Random(SEED + part), Counter[str]()
    for number in range(part, RUNS, PARTS):
        Run(house, dice, number, seen).go()
    seen.update(house.deliver())
    print("\n".join(f"{count:7d} {what}" for what, count in sorted(seen.items())))
    assert {what for what, least in REACHED.items() if seen[what] < least * RUNS / 1000} == set()
    assert _sendable_without_permission(house.ledger) == []


def _sendable_without_permission(ledger: Engine) -> list[Any]:
    """Every instance in the outbox whose verdict for that destination does not let it go."""
    delivery, verdict, item = tables.deliveries.c, tables.verdicts.c, tables.delivery_items.c
    permitted = verdict.verdict.in_(["pass", "warn"]) | (
        (verdict.verdict == "hold") & (verdict.decision == "released")
    )
    query = (
        select(delivery.job_id, delivery.destination)
        .join(tables.delivery_items, item.delivery_id == delivery.id)
        .outerjoin(
            tables.verdicts,
            (verdict.job_id == delivery.job_id) & (verdict.destination == delivery.destination),
        )
        .where(verdict.job_id.is_(None) | ~permitted)
    )
    with reading(ledger) as connection:
        return list(connection.execute(query))


KILLED = """
import os, random, sys
from pathlib import Path
from sqlalchemy import event
from dicom_node.inference import ModelIdentity
from dicom_node.ledger.tables import open_ledger
from dicom_node.spool import Spool
from tests.conftest import ManualClock
from tests.integration.planted import FAULTS, Mortal, Planted
from tests.integration.test_gates import QUIET_S, House, routes_to

folder, deadly = Path(sys.argv[1]), int(sys.argv[2])
ledger = open_ledger(f"sqlite:///{folder / 'ledger.sqlite'}")
seen = 0
@event.listens_for(ledger, "before_cursor_execute")
def die(*_):
    global seen
    seen += 1
    if seen > deadly:
        os._exit(137)
house = House(ledger, Spool(folder / "spool"), ManualClock(), Mortal(), {})
engine = Planted(FAULTS[1], False, ModelIdentity("planted", "1", "cd" * 32))
policy = {"on_fail": sys.argv[3]}
house.clock.advance(QUIET_S)
worker = house.process(policy, engine, routes_to(["pacs"])).worker
seen = 0
worker.run_once(house.clock())
os._exit(0)
"""


@pytest.mark.parametrize(("deadly", "action"), [(12, "warn"), (19, "hold"), (29, "warn")])
def test_a_process_that_is_killed_between_gate_and_outbox_leaves_neither_or_both(
    tmp_path: Path, repository: Path, deadly: int, action: str
) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    house = House(ledger, Spool(tmp_path / "spool"), ManualClock(), Mortal(), {})
    uid = series_uid(random.Random(deadly))
    for file in house.files("CT", 2, uid):
        house.receive(uid, file)
    house.conclude(routes_to(["pacs"]))
    (job_id,) = house.jobs(uid)

    def live(statement: int) -> int:
        words = [sys.executable, "-c", KILLED, str(tmp_path), str(statement), action]
        return subprocess.run(words, cwd=repository, check=False, capture_output=True).returncode

    assert live(deadly) == 137
    assert house.outbox(job_id) == set()
    assert queue.release_leases(ledger, "restore-0@here", house.clock()) == 1
    assert live(10_000) == 0
    assert house.outbox(job_id) == ({"pacs"} if action == "warn" else set())
    assert house.job(job_id)["state"] == ("done" if action == "warn" else "held")
    ledger.dispose()
