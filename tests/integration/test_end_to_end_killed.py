"""Any role is killed at every step of a run of three series; the end is that of a calm run.

The series end in Orthanc, which counts how often each instance is stored.

`make kill-test-pipeline KILLS=200` runs it longer; DICOM_NODE_TEST_PIPELINE_KILLS and
DICOM_NODE_TEST_SEED set both.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from sqlalchemy import Engine, select

from dicom_node.association import Peer
from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.ledger import intake, reports, tables
from dicom_node.ledger.tables import TRANSITIONS, Entity, open_ledger, reading
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_scu import send_files
from tests.factories import make_series, write_series
from tests.integration.conftest import node_settings
from tests.integration.peers import Orthanc, until
from tests.integration.role_processes import ROLES, Nursery, RunningNode, nursery, running_node
from tests.integration.served import write_tiny_bundle

KILLS = int(os.environ.get("DICOM_NODE_TEST_PIPELINE_KILLS", "8"))
SEED = int(os.environ.get("DICOM_NODE_TEST_SEED", "6"))
SLICES = 8
# A power cut takes all of them.
VICTIMS = (*((role,) for role in ROLES), ROLES)
# So many in one run, so that the series come on to the next step.
MOST_IN_A_RUN = 12
# From a step to the blow, in seconds: at once, and in the middle of it.
LONGEST_S = (0.0, 0.02, 0.1, 0.5)
# However slow the machine: a series is concluded when its sender has ended, and the test says so.
QUIET_S = 3600.0
LIMIT_S = 600.0


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# What the ledger shows while a step is under way.
STEPS: dict[str, Callable[[Engine], bool]] = {
    "receiving": lambda ledger: bool(reports.open_associations(ledger)),
    "assembling": lambda ledger: bool(reports.series(ledger, state="receiving")),
    "queued": lambda ledger: bool(reports.jobs(ledger, state="queued")),
    "restoring": lambda ledger: bool(reports.jobs(ledger, state="running")),
    "delivering": lambda ledger: bool(reports.deliveries(ledger, state="sending")),
    "delivered": lambda ledger: bool(reports.deliveries(ledger, state="delivered")),
}


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: in Orthanc, and in the ledger."""

    pixels: dict[str, str]  #: digest by derived SOP Instance UID
    instances: list[tuple[str, str]]
    series: list[tuple[str, int]]
    jobs: list[tuple[str, str, int, str | None]]
    deliveries: list[tuple[str, str, int, int]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    folder = tmp_path_factory.mktemp("sources")
    return [
        write_series(make_series(modality, slices=SLICES, study="killed"), folder / modality)
        for modality in ("CT", "MR", "PT")
    ]


def settings_in(folder: Path, bundle: Path, archive: Orthanc) -> NodeSettings:
    pacs = {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": archive.dicom_port}
    folder.mkdir()
    (folder / "routes.toml").write_text(DEFAULT_ROUTES)
    return node_settings(
        folder,
        routes=folder / "routes.toml",
        spool={"path": folder / "spool", "min_free_bytes": 0, "min_free_percent": 0},
        destinations={"pacs": pacs},
        assembly={"quiet_s": QUIET_S, "tick_s": 0.1},
        # A job that is killed each time it is tried must not count as a bad job here.
        engine={"bundle": str(bundle), "threads": 1, "max_attempts": 10_000, "idle_poll_s": 0.05},
        delivery={"first_s": 0.1, "max_s": 0.2, "idle_poll_s": 0.05},
        janitor={"stale_file_s": 0.001},
        # The network was never trained, and what it makes is not at issue.
        gates={"on_fail": "pass", "on_warn": "pass", "uncalibrated": "pass", "actions": {}},
        breaker={"highest": 0.99, "window": 1000},
        review={"write": "never"},
        log={"level": "ERROR"},
    )


def send_until_stored(paths: Sequence[Path], port: int, title: str) -> None:
    """Send each file until it is acknowledged, as a modality does; for a thread.

    An association each, as many do: there is time to be killed at one.
    """
    left = list(paths)
    peer = Peer("DIFFCODE", "127.0.0.1", port, title)
    while left:
        report = send_files(left[:1], peer)
        left = left[report.delivered :]
        if not report.ok:
            time.sleep(0.05)


@contextmanager
def senders(sources: list[list[Path]], port: int) -> Generator[list[threading.Thread]]:
    threads = [
        threading.Thread(target=send_until_stored, args=(paths, port, f"SENDER{number}"))
        for number, paths in enumerate(sources)
    ]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "a sender has not ended"


def conclude(ledger: Engine) -> None:
    """Do what an operator does who knows that no more will come."""
    for series in reports.series(ledger, state="receiving"):
        uid = series["series_instance_uid"]
        intake.force_series(ledger, uid, reason="all was sent", now=time.time())


def is_over(ledger: Engine, series: int) -> bool:
    if reports.series(ledger, state="receiving"):
        return False
    jobs = reports.jobs(ledger)
    return len(jobs) >= series and all(
        job["deliveries"] and all(each["state"] == "delivered" for each in job["deliveries"])
        for job in jobs
    )


@dataclass
class Axe:
    """Kills a role, or all, while a step is under way or after a random time."""

    chance: random.Random
    left: int
    killed: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)

    def swing(self, node: RunningNode, ledger: Engine, step: str, tend: Callable[[], bool]) -> None:
        """Wait for a step, *tend* meanwhile until that says it is over, then a little, and kill."""
        steps = [*STEPS]
        reached = [STEPS[each] for each in steps[steps.index(step) :]]
        deadline = time.monotonic() + LIMIT_S
        # It may have gone by: then a later one is on.
        while not any(is_on(ledger) for is_on in reached) and not tend():
            assert time.monotonic() < deadline, f"{step} never comes"
            threading.Event().wait(0.01)
        threading.Event().wait(self.chance.uniform(0, self.chance.choice(LONGEST_S)))
        self.steps.update(step for step, is_on in STEPS.items() if is_on(ledger))
        victims = self.chance.choice(VICTIMS)
        node.kill(victims)
        self.left -= 1
        self.killed[victims[0] if len(victims) == 1 else "all"] += 1

    def swings(self) -> Iterator[str]:
        """The steps to kill at in one run, in the order in which they come."""
        count = min(self.left, MOST_IN_A_RUN)
        for number in range(count):
            yield [*STEPS][number * len(STEPS) // count]


def run(
    breeder: Nursery,
    folder: Path,
    bundle: Path,
    sources: list[list[Path]],
    archive: Orthanc,
    axe: Axe | None,
) -> tuple[Outcome, int]:
    """One run of the three series to its end; what it left, and copies sent more than once."""
    archive.forget()
    settings = settings_in(folder, bundle, archive)
    ledger = open_ledger(settings.ledger.url)
    try:
        with running_node(breeder, settings) as node:
            with senders(sources, settings.node.port) as threads:

                def tend() -> bool:
                    if not any(thread.is_alive() for thread in threads):
                        conclude(ledger)
                    return is_over(ledger, len(sources))

                for step in axe.swings() if axe else ():
                    if not tend():
                        axe.swing(node, ledger, step, tend)
            conclude(ledger)
            until(lambda: is_over(ledger, len(sources)), "every series is delivered", LIMIT_S)
            assert_a_restart_finds_nothing_to_do(node, ledger, archive)
        assert_every_history_is_a_walk(ledger)
        assert_every_series_was_concluded(ledger, calm=axe is None)
        copies = archive.stores()
        return outcome(ledger, archive), copies.total() - len(copies)
    finally:
        ledger.dispose()


def assert_a_restart_finds_nothing_to_do(
    node: RunningNode, ledger: Engine, archive: Orthanc
) -> None:
    """After one more loss of power nothing is left over and nothing is sent again."""
    stores = archive.stores()
    node.kill(ROLES)
    spool = Spool(node.settings.spool.path)
    until(lambda: not reports.open_associations(ledger), "no association is open")
    assert list(spool.orphans(intake.known_paths(ledger))) == []
    assert list((spool.root / "temporary").iterdir()) == []
    assert archive.stores() == stores


def assert_every_series_was_concluded(ledger: Engine, *, calm: bool) -> None:
    """As complete, but where the kill took the last association before its release.

    Whether its sender had more to send, nobody can know then, and the ledger says so.
    """
    for series in reports.series(ledger):
        lost = series["state"] == "incomplete" and "association was lost" in series["reason"]
        assert series["state"] == "complete" or (lost and not calm), series


def assert_every_history_is_a_walk(ledger: Engine) -> None:
    """No step is missing, doubled or outside the table."""
    states: dict[tuple[str, str], str | None] = {}
    query = select(tables.events).order_by(tables.events.c.id)
    with reading(ledger) as connection:
        for event in connection.execute(query):
            # Another arrival of the same bytes is no step of the first, nor of its association.
            if event.entity in (Entity.INSTANCE, Entity.ASSOCIATION):
                continue
            key = (event.entity, event.entity_id)
            before = states.get(key)
            assert event.from_state == before, (key, before, event)
            allowed = TRANSITIONS[Entity(event.entity)].get(before or "")
            # An operator's word about a series that stays open is told as well.
            if before is not None and event.to_state == before:
                continue
            assert before is None or (allowed and event.to_state in allowed), (key, event)
            states[key] = event.to_state


def outcome(ledger: Engine, archive: Orthanc) -> Outcome:
    jobs = reports.jobs(ledger)
    return Outcome(
        pixels={
            uid: _digest(dcmread(BytesIO(data)).PixelData) for uid, data in archive.files().items()
        },
        instances=sorted((r["sop_instance_uid"], r["state"]) for r in reports.instances(ledger)),
        series=sorted((s["series_instance_uid"], s["instances"]) for s in reports.series(ledger)),
        jobs=sorted(
            (j["task"], j["state"], j["revision"], j["derived_series_instance_uid"]) for j in jobs
        ),
        deliveries=sorted(
            (job["task"], each["state"], each["sent"], each["total"])
            for job in jobs
            for each in job["deliveries"]
        ),
    )


@pytest.mark.slow
@pytest.mark.orthanc
# pynetdicom forgets the socket of a connection that is refused.
@pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(180 + 10 * KILLS)
def test_killed_at_every_step_it_ends_as_the_undisturbed_run_does(
    tmp_path: Path,
    bundle: Path,
    sources: list[list[Path]],
    orthanc: Orthanc,
    capsys: pytest.CaptureFixture[str],
) -> None:
    axe, runs, again = Axe(random.Random(SEED), KILLS), 0, 0
    with nursery(tmp_path) as breeder:
        calm, repeated = run(breeder, tmp_path / "calm", bundle, sources, orthanc, None)
        assert repeated == 0
        assert len(calm.pixels) == 3 * SLICES
        assert {state for _, state, *_ in calm.jobs} == {"done"}
        while axe.left:
            runs += 1
            folder = tmp_path / f"run{runs}"
            disturbed, repeated = run(breeder, folder, bundle, sources, orthanc, axe)
            assert disturbed == calm
            again += repeated
    with capsys.disabled():
        print(f"\n{KILLS} kills (seed {SEED}) in {runs} runs: {_words(axe.killed)}")
        print(f"while {_words(axe.steps)}; {again} copies sent twice")
    assert KILLS < 2 * MOST_IN_A_RUN or set(axe.steps) == set(STEPS), "a step was left out"


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in sorted(counts.items()))
