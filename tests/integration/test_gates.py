"""Nothing leaves from a failed gate: planted faults, random policies, and a death at any moment."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import generate_uid
from sqlalchemy import Engine, event, select

from dicom_node.dicom.header import InstanceSummary, instance_summary
from dicom_node.inference import (
    DomainVerdict,
    ModelIdentity,
    Progress,
    RestorationRequest,
    RestorationResult,
    _readings,
)
from dicom_node.ledger import intake, queue, tables
from dicom_node.ledger.tables import SeriesState, open_ledger, reading
from dicom_node.readings import GateReading, Level
from dicom_node.restore_worker import RestoreWorker
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from restoration.fidelity import assess
from tests.conftest import ManualClock
from tests.factories import make_series

RUNS = 1000
SEED = 20261122
# The runs are dealt out, so that test processes side by side share them.
PARTS = 4
TASKS = {"CT": "ct_denoise", "MR": "mri_sr", "PT": "pet_synthesis"}
DESTINATIONS = ("pacs", "research", "backup")
ACTIONS = ("pass", "warn", "hold", "refuse")
MODEL = ModelIdentity("planted", "1", "cd" * 32)
# One run in so many has the model's own gates look at the pixels; the others the two below.
REAL_GATES = 10


class CrashError(BaseException):
    """The process is gone: nothing of ours may handle it."""


@dataclass(frozen=True)
class Fault:
    """What a broken engine makes of a volume, and which of the two quick gates must see it."""

    name: str
    plant: Callable[[Any], Any]
    fails: frozenset[str] | None  # None: as much as neighbouring slices differ


def _lesion(x: Any) -> Any:
    made = x.copy()
    made[:, 6:10, 6:10] += 200.0
    return made


def _noise(x: Any) -> Any:
    return x + 80 * np.sign(np.indices(x.shape).sum(0) % 2 - 0.5)


FAULTS = (
    Fault("none", lambda x: x + 0.01, frozenset()),
    Fault("offset", lambda x: x + 60.0, frozenset({"gain", "range"})),
    Fault("contrast", lambda x: x * 1.5 + 50.0, frozenset({"gain", "range"})),
    Fault("lesion", _lesion, frozenset({"range"})),
    Fault("noise", _noise, frozenset({"range"})),
    Fault("slices swapped", lambda x: x[::-1] + 0.01, None),
)


def quick_gates(x: Any, y: Any) -> tuple[GateReading, ...]:
    """Two gates over the pixels: the change of the mean, and the largest change of a pixel."""
    drift, largest = float(abs((y - x).mean())), float(abs(y - x).max())
    return tuple(
        GateReading(name, "1", (value,), (), (level,), (None, limit / 2), (None, limit))
        for name, value, limit in (("gain", drift, 20.0), ("range", largest, 40.0))
        for level in (Level.FAIL if value > limit else Level.PASS,)
    )


@dataclass
class Planted:
    """The engine's seam with the pixels of a fault; what its gates said is kept for the oracle."""

    fault: Fault
    real: bool
    said: dict[str, tuple[GateReading, ...]] = field(default_factory=dict)
    model: ModelIdentity = MODEL
    tasks: tuple[str, ...] = tuple(TASKS.values())

    def judge(self, task: str, facts: Any) -> DomainVerdict:
        return DomainVerdict()

    def parameters(self, task: str) -> dict[str, Any]:
        return {}

    def restore(
        self, request: RestorationRequest, progress: Progress | None = None
    ) -> RestorationResult:
        made = np.ascontiguousarray(self.fault.plant(request.array), dtype=np.float32)
        if self.real:
            readings = tuple(_readings(assess(request.array, made, request.task)))
        else:
            readings = quick_gates(request.array, made)
        self.said["last"] = readings
        return RestorationResult(made, self.model, (), 0.0, {}, readings=readings, calibrated=True)


@dataclass(frozen=True)
class Template:
    """The files of a series, whose UIDs are put in as bytes: encoding a thousand takes long."""

    files: tuple[tuple[InstanceSummary, bytes], ...]

    @classmethod
    def make(cls, modality: Any) -> Template:
        files = []
        for number, dataset in enumerate(make_series(modality, slices=2, rows=16)):
            dataset.SeriesInstanceUID = _SERIES
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = _INSTANCES[
                number
            ]
            buffer = BytesIO()
            dataset.save_as(buffer, enforce_file_format=True)
            files.append((instance_summary(dataset), buffer.getvalue()))
        return cls(tuple(files))

    def instances(
        self, series_uid: str, count: int
    ) -> Iterator[tuple[InstanceSummary, bytes, str]]:
        """Summary, file and SOP Instance UID of each instance of a new series."""
        for number, (summary, data) in enumerate(self.files[:count]):
            uid = f"{series_uid[:-1]}{number + 2}"
            new = data.replace(_INSTANCES[number].encode(), uid.encode())
            yield summary, new.replace(_SERIES.encode(), series_uid.encode()), uid


_UID = 44
_SERIES = "2.25." + "7" * (_UID - 5)
_INSTANCES = ("2.25." + "8" * (_UID - 5), "2.25." + "9" * (_UID - 5))


@dataclass
class House:
    """A ledger and a spool that see every run; the outbox is looked at as delivery does it."""

    ledger: Engine
    spool: Spool
    clock: ManualClock
    templates: dict[str, Template]
    statements: int = 0
    deadly: int | None = None  # the statement at which the process dies

    def enqueue(self, modality: str, destinations: tuple[str, ...], slices: int = 1) -> int:
        """A new series of one or two slices with its job, as the assembler leaves it."""
        series_uid, now = str(generate_uid(prefix=None)).ljust(_UID, "1"), self.clock()
        received = []
        for summary, data, uid in self.templates[modality].instances(series_uid, slices):
            stored = self.spool.write(data)
            facts = {**vars(summary), "series_instance_uid": series_uid, "sop_instance_uid": uid}
            place = {"path": stored.path, "sha256": stored.sha256, "size": stored.size}
            received.append(intake.ReceivedInstance(**facts, **place))
        for each in received:
            intake.record_instance(self.ledger, each, now)
        uids = tuple(str(each.sop_instance_uid) for each in received)
        job = queue.NewJob(series_uid, "all", TASKS[modality], destinations, uids, "test")
        made = queue.enqueue(
            self.ledger,
            series_uid,
            series_state=SeriesState.COMPLETE,
            reason=None,
            jobs=[job],
            instances_seen=len(uids),
            now=now,
        )
        assert made is not None
        return made[0]

    def worker(self, settings: NodeSettings, engine: Planted) -> RestoreWorker:
        return RestoreWorker(
            settings, self.spool, self.ledger, engine, name="restore-0@here", clock=self.clock
        )

    def outbox(self, job_id: int) -> set[str]:
        """The destinations that the outbox holds the job's result for."""
        table = tables.deliveries.c
        with reading(self.ledger) as connection:
            return set(connection.scalars(select(table.destination).where(table.job_id == job_id)))

    def state(self, job_id: int) -> str:
        table = tables.jobs.c
        with reading(self.ledger) as connection:
            return str(connection.scalar(select(table.state).where(table.id == job_id)))

    @contextmanager
    def dying_at(self, statement: int | None) -> Iterator[None]:
        """The process dies before so many more statements have reached the database."""
        self.statements, self.deadly = 0, statement
        try:
            yield
        finally:
            self.deadly = None


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("gates")
    ledger = open_ledger(f"sqlite:///{folder / 'ledger.sqlite'}")
    templates = {modality: Template.make(modality) for modality in TASKS}
    made = House(ledger, Spool(folder / "spool"), ManualClock(), templates)

    def live_or_die(database: Any) -> None:
        made.statements += 1
        if made.deadly is not None and made.statements > made.deadly:
            database.rollback()  # as SQLite does with what a dead process leaves
            raise CrashError

    @event.listens_for(ledger, "before_cursor_execute")
    def before_statement(connection: Any, *_: Any) -> None:
        live_or_die(connection.connection.dbapi_connection)

    do_commit = ledger.dialect.do_commit

    def commit(connection: Any) -> None:
        live_or_die(connection)
        do_commit(connection)

    # What is tested is the death of a process, not of the machine: the disk need not be waited for.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(ledger.dialect, "do_commit", commit)
        yield made
    ledger.dispose()


def random_policy(dice: random.Random) -> dict[str, Any]:
    """Some policy that the settings allow."""

    def actions() -> dict[str, str]:
        return {
            gate: dice.choice(ACTIONS)
            for gate in ("gain", "range", "structure", "whiteness")
            if dice.random() < 0.4
        }

    return {
        "on_fail": dice.choice(ACTIONS),
        "actions": actions(),
        "by_modality": {m: actions() for m in TASKS if dice.random() < 0.5},
        "by_destination": {d: actions() for d in DESTINATIONS if dice.random() < 0.5},
    }


def allowed(policy: dict[str, Any], gate: str, modality: str, destination: str) -> str:
    """The oracle's reading of the policy: the nearest table that names the gate."""
    found: str = policy["on_fail"]
    for table in (
        policy["actions"],
        policy["by_modality"].get(modality, {}),
        policy["by_destination"].get(destination, {}),
    ):
        found = table.get(gate, found)
    return found


def settings_of(policy: dict[str, Any], dice: random.Random) -> NodeSettings:
    peers = {d: {"ae_title": d.upper(), "host": "127.0.0.1", "port": 104} for d in DESTINATIONS}
    return NodeSettings.model_validate(
        {
            "destinations": peers,
            "gates": policy,
            # A breaker of its own is tested below; here it must not hide what a policy lets go.
            "breaker": {"highest": 0.99, "significance": 1e-9},
            "review": {"write": "always" if dice.random() < 0.02 else "never", "slices": 0},
        }
    )


def died(house: House, settings: NodeSettings, engine: Planted, statement: int) -> bool:
    """Have a worker die before that statement; False when it was done before."""
    try:
        with house.dying_at(statement):
            house.worker(settings, engine).run_once(house.clock())
        return False
    except CrashError:
        return True


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_leaves_from_a_failed_gate_whenever_the_worker_dies(
    house: House, part: int
) -> None:
    dice = random.Random(SEED + part)
    crashes = held = refused = sent = faults = 0
    for run in range(RUNS // PARTS):
        modality, fault = dice.choice(list(TASKS)), dice.choice(FAULTS)
        policy = random_policy(dice)
        destinations = tuple(d for d in DESTINATIONS if dice.random() < 0.6)
        engine = Planted(fault, real=run % REAL_GATES == 0)
        settings = settings_of(policy, dice)
        slices = 2 if fault.fails is None else 1
        job_id = house.enqueue(modality, destinations, slices)
        for _ in range(dice.choice((0, 0, 1, 1, 2))):
            if died(house, settings, engine, dice.randrange(0, 40)):
                crashes += 1
                assert house.outbox(job_id) == set() or house.state(job_id) in ("done", "held")
            house.clock.advance(1.0)
            house.worker(settings, engine).recover(house.clock())
        house.worker(settings, engine).run_once(house.clock())

        failed = {each.gate for each in engine.said["last"] if each.level is Level.FAIL}
        if not engine.real and fault.fails is not None:
            assert failed == fault.fails, fault.name
        faults += bool(failed)
        verdicts = {
            d: {allowed(policy, gate, modality, d) for gate in failed} for d in destinations
        }
        expected = {d for d, found in verdicts.items() if not found & {"hold", "refuse"}}
        assert house.outbox(job_id) == expected, (run, fault.name, policy, failed)
        state = house.state(job_id)
        waits = any("hold" in each and "refuse" not in each for each in verdicts.values())
        if destinations:
            assert (state == "held") == waits, (run, state, verdicts)
        held, refused, sent = (
            held + (state == "held"), refused + (state == "refused"), sent + len(expected)
        )  # fmt: skip
        if state == "held":
            expected |= _decided(house, job_id, verdicts, dice)
            assert house.outbox(job_id) == expected
    # The random draw reached what it is about; without that the loop says nothing.
    assert min(crashes, held, sent) > 25, (crashes, held, sent)
    assert faults > 100
    assert refused > 8
    assert _sendable_without_permission(house.ledger) == []


def _decided(
    house: House, job_id: int, verdicts: dict[str, set[str]], dice: random.Random
) -> set[str]:
    """A person decides, or nobody does; the destinations that the decision opens."""
    who = {"operator": "Ann", "reason": "looked at it", "now": house.clock()}
    choice = dice.choice(("release", "reject", "wait"))
    if choice == "release":
        assert queue.release(house.ledger, job_id, **who)  # type: ignore[arg-type]
        return {d for d, found in verdicts.items() if "refuse" not in found}
    if choice == "reject":
        assert queue.reject(house.ledger, job_id, **who)  # type: ignore[arg-type]
        assert not queue.release(house.ledger, job_id, **who)  # type: ignore[arg-type]
    return set()


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
import os, sys
from pathlib import Path
from sqlalchemy import event
from dicom_node.ledger.tables import open_ledger
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from tests.conftest import ManualClock
from tests.integration.test_gates import FAULTS, House, Planted

folder, deadly = Path(sys.argv[1]), int(sys.argv[2])
ledger = open_ledger(f"sqlite:///{folder / 'ledger.sqlite'}")
seen = 0
@event.listens_for(ledger, "before_cursor_execute")
def die(*_):
    global seen
    seen += 1
    if seen > deadly:
        os._exit(137)
house = House(ledger, Spool(folder / "spool"), ManualClock(), {})
peers = {"pacs": {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}}
settings = NodeSettings.model_validate({"destinations": peers, "gates": {"on_fail": sys.argv[3]}})
house.worker(settings, Planted(FAULTS[1], real=False)).run_once(house.clock())
os._exit(0)
"""


@pytest.mark.parametrize(("deadly", "action"), [(11, "warn"), (14, "hold"), (18, "warn")])
def test_a_process_that_is_killed_between_gate_and_outbox_leaves_neither_or_both(
    tmp_path: Path, repository: Path, deadly: int, action: str
) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    templates = {"CT": Template.make("CT")}
    house = House(ledger, Spool(tmp_path / "spool"), ManualClock(), templates)
    job_id = house.enqueue("CT", ("pacs",), 2)

    def live(statement: int) -> int:
        words = [sys.executable, "-c", KILLED, str(tmp_path), str(statement), action]
        return subprocess.run(words, cwd=repository, check=False, capture_output=True).returncode

    assert live(deadly) == 137
    assert house.outbox(job_id) == set()
    assert queue.release_leases(ledger, "restore-0@here", house.clock()) == 1
    assert live(10_000) == 0
    assert house.outbox(job_id) == ({"pacs"} if action == "warn" else set())
    assert house.state(job_id) == ("done" if action == "warn" else "held")
    ledger.dispose()
