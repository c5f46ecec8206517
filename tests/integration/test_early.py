"""Early restoration with the real network and real processes: the same files, killed or not."""

from __future__ import annotations

import random
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from sqlalchemy import Engine

from dicom_node.association import Peer
from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.early import EarlySlices
from dicom_node.inference import LocalEngine
from dicom_node.ledger import intake, reports
from dicom_node.ledger.tables import open_ledger
from dicom_node.settings import NodeSettings
from dicom_node.storage_scu import send_files
from tests.conftest import ManualClock
from tests.factories import make_series, write_series
from tests.integration.conftest import node_settings
from tests.integration.peers import Archive, series_files, serving, until
from tests.integration.role_processes import ROLES, Nursery, RunningNode, nursery, running_node
from tests.integration.served import write_tiny_bundle
from tests.unit.dicom_node.bench import ROUTES, Bench, bench, outgoing

ALL_PASS = {"on_fail": "pass", "on_warn": "pass", "uncalibrated": "pass", "actions": {}}
REAL = ("ct_siemens_tilt", "ct_ge_missing_slice", "phantom")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(bundle: Path) -> LocalEngine:
    return LocalEngine.open(str(bundle), device="cpu", threads=1)


def bench_in(folder: Path, clock: ManualClock) -> tuple[Bench, Engine]:
    folder.mkdir()
    ledger = open_ledger(f"sqlite:///{folder / 'ledger.sqlite'}")
    policy = {"domain": "warn", "accept_lossy": True}
    return bench(folder, ledger, clock, gates=ALL_PASS, report={"sr": True}, policy=policy), ledger


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", REAL)
def test_the_files_are_those_of_a_node_that_waits_for_the_whole_series(
    tmp_path: Path, shared_data: Path, engine: LocalEngine, name: str
) -> None:
    """Pixels, headers, and what the gates and guards have said in the report, byte by byte."""
    if name == "phantom":
        sent = make_series("CT", slices=4, rows=64)
    else:
        sent = [dcmread(path) for path in series_files(shared_data / "dicom" / name)]
    made: list[dict[str, bytes]] = []
    for number, is_early in enumerate((False, True)):
        clock = ManualClock()
        node, ledger = bench_in(tmp_path / str(number), clock)
        try:
            early = EarlySlices(node.settings, node.spool, ledger, engine, ROUTES)
            worker = node.worker(engine, early=early if is_early else None)
            order = list(sent)
            random.Random(number).shuffle(order)
            for dataset in order:
                node.receive([dataset])
                while worker.run_once(clock.now):
                    pass
            made_early = [p.name for p in (node.spool.root / "early").rglob("*/*")]
            assert len([n for n in made_early if len(n) == 64]) == is_early * len(sent)
            node.assembler.tick(clock.now + 60.0)
            # The time of the job is written into the result: it is the same in all runs.
            while worker.run_once(clock.now + 60.0):
                pass
            assert {job["state"] for job in node.jobs()} == {"done"}, node.jobs()
            made.append(outgoing(node))
            jobs = len(node.jobs())  # each has its report
        finally:
            ledger.dispose()
    assert len(made[0]) == len(sent) + jobs
    assert made[0] == made[1]


# ---- killed ----

SLICES = 24


def settings_in(folder: Path, bundle: Path, archive: Archive, *, early: bool) -> NodeSettings:
    folder.mkdir()
    (folder / "routes.toml").write_text(DEFAULT_ROUTES)
    return node_settings(
        folder,
        routes=folder / "routes.toml",
        spool={"path": folder / "spool", "min_free_bytes": 0, "min_free_percent": 0},
        destinations={"pacs": {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": archive.port}},
        assembly={"quiet_s": 3600.0, "tick_s": 0.1},
        engine={
            "bundle": str(bundle),
            "threads": 1,
            "max_attempts": 10_000,
            "idle_poll_s": 0.02,
            "early": early,
        },
        delivery={"first_s": 0.1, "max_s": 0.2, "idle_poll_s": 0.05},
        janitor={"interval_s": 0.2, "stale_file_s": 600.0},
        gates=ALL_PASS,
        breaker={"highest": 0.99, "window": 1000},
        review={"write": "never"},
        log={"level": "ERROR"},
    )


def send_until_stored(paths: list[Path], port: int) -> None:
    left = list(paths)
    while left:
        left = left[
            send_files(left[:3], Peer("DIFFCODE", "127.0.0.1", port, "SCANNER")).delivered :
        ]
        if left:
            time.sleep(0.05)


def early_files(settings: NodeSettings) -> list[Path]:
    return [p for p in (settings.spool.path / "early").rglob("*") if p.is_file()]


def slices_made(settings: NodeSettings) -> list[Path]:
    """Early results, but for those that a second look has joined."""
    return [path for path in early_files(settings) if len(path.name) == 64]


def run(
    breeder: Nursery, settings: NodeSettings, archive: Archive, paths: list[Path], kills: int
) -> dict[str, bytes]:
    """Send a series, kill roles while slices are restored early; what the archive has at the end.

    Every kill comes once there is one early result more, so that it meets the work under way.
    """
    chance = random.Random(kills)
    ledger = open_ledger(settings.ledger.url)
    sender = threading.Thread(target=send_until_stored, args=(paths, settings.node.port))
    try:
        with running_node(breeder, settings) as node:
            sender.start()
            for _ in range(kills):
                _kill_at_work(node, chance)
            sender.join(120)
            assert not sender.is_alive()
            if settings.engine.early:
                until(lambda: len(slices_made(settings)) == SLICES, "all are made early", 120)
            (series,) = reports.series(ledger)
            intake.force_series(
                ledger, series["series_instance_uid"], reason="all was sent", now=time.time()
            )
            until(lambda: _is_delivered(ledger), "the series is delivered", 120)
            until(lambda: not early_files(settings), "early results are gone", 60)
            assert list((settings.spool.path / "temporary").iterdir()) == []
        (job,) = reports.jobs(ledger)
        assert (job["state"], job["instances"], job["attempts"]) == ("done", SLICES, 1)
        assert [s["state"] for s in reports.series(ledger)] == ["complete"]
        assert {i["state"] for i in reports.instances(ledger)} == {"received"}
        return dict(archive.stored)
    finally:
        ledger.dispose()


def _kill_at_work(node: RunningNode, chance: random.Random) -> None:
    before = len(early_files(node.settings))
    until(lambda: len(early_files(node.settings)) > before, "one more is made early", 60)
    threading.Event().wait(chance.uniform(0.0, 0.2))
    node.kill(chance.choice((("restore",), ("restore",), ROLES)))


def _is_delivered(ledger: Engine) -> bool:
    return any(
        each["state"] == "delivered" for job in reports.jobs(ledger) for each in job["deliveries"]
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_killed_while_slices_are_restored_early_it_ends_as_without_both(
    tmp_path: Path, bundle: Path
) -> None:
    paths = write_series(make_series("CT", slices=SLICES, rows=64), tmp_path / "sent")
    pixels: list[dict[str, bytes]] = []
    with nursery(tmp_path) as breeder:
        for name, early, kills in (("waits", False, 0), ("early", True, 0), ("killed", True, 5)):
            with serving(Archive()) as archive:
                settings = settings_in(tmp_path / name, bundle, archive, early=early)
                stored = run(breeder, settings, archive, paths, kills)
            assert len(stored) == SLICES
            pixels.append({uid: _pixels(data) for uid, data in stored.items()})
    assert pixels[0] == pixels[1] == pixels[2]


def _pixels(data: bytes) -> bytes:
    return bytes(dcmread(BytesIO(data), force=True).PixelData)
