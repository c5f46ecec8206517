"""Any role is killed at any moment of a run of three series; the end is that of a calm run.

`make kill-test-pipeline KILLS=200` runs it longer; DICOM_NODE_TEST_PIPELINE_KILLS and
DICOM_NODE_TEST_SEED set both.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pynetdicom.events import Event
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
from tests.integration.peers import Archive, serving, until
from tests.integration.role_processes import ROLES, Nursery, RunningNode, nursery, running_node
from tests.integration.served import write_tiny_bundle

KILLS = int(os.environ.get("DICOM_NODE_TEST_PIPELINE_KILLS", "12"))
SEED = int(os.environ.get("DICOM_NODE_TEST_SEED", "6"))
SLICES = 8
# A power cut takes all of them.
VICTIMS = (*((role,) for role in ROLES), ROLES)
# The longest times between two kills, in seconds: blows in a row, and pauses in which a role comes
# far enough to be killed in the middle of its work.
LONGEST_S = (0.2, 1.0, 5.0)
# However slow the machine: a series is concluded when its sender has ended, and the test says so.
QUIET_S = 3600.0


@dataclass
class StrictArchive(Archive):
    """An archive that keeps a digest of the pixels of each copy that it is sent."""

    copies: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def on_store(self, event: Event) -> int:
        status = super().on_store(event)
        made = dcmread(BytesIO(event.encoded_dataset(include_meta=False)), force=True)
        with self.lock:
            self.copies[str(made.SOPInstanceUID)].append(_digest(made.PixelData))
        return status


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: at the archive, and in the ledger."""

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


def settings_in(folder: Path, bundle: Path, archive: Archive) -> NodeSettings:
    folder.mkdir()
    (folder / "routes.toml").write_text(DEFAULT_ROUTES)
    return node_settings(
        folder,
        routes=folder / "routes.toml",
        spool={"path": folder / "spool", "min_free_bytes": 0, "min_free_percent": 0},
        destinations={"pacs": {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}},
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
    """Send each file until it is acknowledged, as a modality does; for a thread."""
    left = list(paths)
    peer = Peer("DIFFCODE", "127.0.0.1", port, title)
    while left:
        report = send_files(left, peer)
        left = left[report.delivered :]
        if left:
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
        thread.join(120)
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
    """Kills a role, or all, after random times."""

    chance: random.Random
    left: int
    killed: Counter[str] = field(default_factory=Counter)

    def swing(self, node: RunningNode) -> None:
        """Wait, and kill."""
        threading.Event().wait(self.chance.uniform(0, self.chance.choice(LONGEST_S)))
        victims = self.chance.choice(VICTIMS)
        node.kill(victims)
        self.left -= 1
        self.killed[victims[0] if len(victims) == 1 else "all"] += 1


def run(
    breeder: Nursery, folder: Path, bundle: Path, sources: list[list[Path]], axe: Axe | None
) -> tuple[Outcome, int]:
    """One run of the three series to its end; what it left, and copies sent more than once."""
    with serving(StrictArchive()) as archive:
        assert isinstance(archive, StrictArchive)
        settings = settings_in(folder, bundle, archive)
        ledger = open_ledger(settings.ledger.url)
        try:
            with running_node(breeder, settings) as node:
                with senders(sources, settings.node.port) as threads:
                    while axe and axe.left and not is_over(ledger, len(sources)):
                        axe.swing(node)
                        if not any(thread.is_alive() for thread in threads):
                            conclude(ledger)
                conclude(ledger)
                until(lambda: is_over(ledger, len(sources)), "every series is delivered", 120)
                assert_a_restart_finds_nothing_to_do(node, ledger, archive)
            assert_every_history_is_a_walk(ledger)
            assert_every_series_was_concluded(ledger, calm=axe is None)
            return outcome(ledger, archive), archive.asked - len(archive.copies)
        finally:
            ledger.dispose()


def assert_a_restart_finds_nothing_to_do(
    node: RunningNode, ledger: Engine, archive: Archive
) -> None:
    """After one more loss of power nothing is left over and nothing is sent again."""
    asked = archive.asked
    node.kill(ROLES)
    spool = Spool(node.settings.spool.path)
    until(lambda: not reports.open_associations(ledger), "no association is open")
    assert list(spool.orphans(intake.known_paths(ledger))) == []
    assert list((spool.root / "temporary").iterdir()) == []
    assert archive.asked == asked


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


def outcome(ledger: Engine, archive: StrictArchive) -> Outcome:
    for uid, copies in archive.copies.items():
        assert len(set(copies)) == 1, f"{uid} came with different pixels"
    assert set(archive.stored) == set(archive.copies)
    jobs = reports.jobs(ledger)
    return Outcome(
        pixels={uid: copies[0] for uid, copies in archive.copies.items()},
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
# pynetdicom forgets the socket of a connection that is refused.
@pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(180 + 10 * KILLS)
def test_killed_at_random_moments_it_ends_as_the_undisturbed_run_does(
    tmp_path: Path, bundle: Path, sources: list[list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    axe, runs, again = Axe(random.Random(SEED), KILLS), 0, 0
    with nursery(tmp_path) as breeder:
        calm, repeated = run(breeder, tmp_path / "calm", bundle, sources, None)
        assert repeated == 0
        assert len(calm.pixels) == 3 * SLICES
        assert {state for _, state, *_ in calm.jobs} == {"done"}
        while axe.left:
            runs += 1
            disturbed, repeated = run(breeder, tmp_path / f"run{runs}", bundle, sources, axe)
            assert disturbed == calm
            again += repeated
    words = ", ".join(f"{count} × {role}" for role, count in sorted(axe.killed.items()))
    with capsys.disabled():
        print(f"\n{KILLS} kills (seed {SEED}) in {runs} runs: {words}; {again} copies sent twice")
