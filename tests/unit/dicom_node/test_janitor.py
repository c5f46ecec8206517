from __future__ import annotations

import os
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedSRStorage, ExplicitVRLittleEndian
from sqlalchemy import Engine

from dicom_node.disk import Disk, Marks, Space
from dicom_node.janitor import Janitor, Recovered, recover, sweep
from dicom_node.ledger import intake, queue, reports, retention
from dicom_node.ledger.retention import Ages
from dicom_node.ledger.tables import SeriesState, open_ledger
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool

NOW = 1_700_000_000.0
SERIES = "1.2.3"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    yield engine
    engine.dispose()


def _instance(number: int, sop_class: str = CTImageStorage) -> bytes:
    dataset = Dataset()
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = f"{SERIES}.{number}"
    dataset.StudyInstanceUID = "1.2"
    dataset.SeriesInstanceUID = SERIES
    dataset.Modality = "CT"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _recover(engine: Engine, spool: Spool) -> Recovered:
    return recover(engine, spool, stale_file_s=3600, now=NOW)


def test_after_a_clean_stop_there_is_nothing_to_do(engine: Engine, spool: Spool) -> None:
    assert _recover(engine, spool) == Recovered(0, 0, 0)


def test_a_file_without_a_row_is_adopted(engine: Engine, spool: Spool) -> None:
    stored = spool.write(_instance(1))
    assert _recover(engine, spool).adopted == 1
    (row,) = reports.instances(engine)
    assert (row["state"], row["sop_instance_uid"]) == ("received", f"{SERIES}.1")
    assert (row["path"], row["sha256"], row["size"]) == (stored.path, stored.sha256, stored.size)
    assert intake.series_progress(engine)[0].last_received == NOW
    assert _recover(engine, spool) == Recovered(0, 0, 0)


def test_an_adopted_instance_belongs_to_the_association_that_was_left_open(
    engine: Engine, spool: Spool
) -> None:
    """So the audit trail tells of it, and a route by calling AE title still fits its series."""
    association = intake.open_association(
        engine, calling_ae="SCANNER", called_ae="B", address="x", now=NOW
    )
    spool.write(_instance(1))
    _recover(engine, spool)
    stored = spool.write(_instance(2))
    first = reports.instances(engine)[0]
    assert first["calling_ae"] is None, "no series says yet by which association it came"
    by = intake.ReceivedInstance(
        f"{SERIES}.3", CTImageStorage, "1.2", SERIES, "CT", "", "x", "3", 1, association
    )
    intake.record_instance(engine, by, NOW)
    _recover(engine, spool)
    rows = {row["path"]: row["calling_ae"] for row in reports.instances(engine)}
    assert rows[stored.path] == "SCANNER"
    intake.close_association(engine, association, "lost", NOW)
    late = spool.write(_instance(4))
    _recover(engine, spool)
    rows = {row["path"]: row["calling_ae"] for row in reports.instances(engine)}
    assert rows[late.path] is None


@pytest.mark.parametrize("left", [b"", b"half"], ids=["empty", "half"])
def test_a_received_file_that_a_loss_of_power_cut_short_is_quarantined(
    engine: Engine, spool: Spool, left: bytes
) -> None:
    whole = _instance(1)
    path = spool.resolve(spool.write(whole).path)
    path.write_bytes(whole[: len(whole) // 2] if left else b"")
    assert _recover(engine, spool) == Recovered(0, 1, 0)
    assert list(spool.orphans(set())) == []
    (row,) = reports.instances(engine)
    assert (row["state"], row["sop_instance_uid"]) == ("rejected", None)
    assert "not those that were received" in row["reason"]
    spool.write(whole)
    assert _recover(engine, spool) == Recovered(1, 0, 0)


def test_an_adopted_instance_that_comes_again_is_a_duplicate(engine: Engine, spool: Spool) -> None:
    stored = spool.write(_instance(1))
    _recover(engine, spool)
    again = intake.ReceivedInstance(
        f"{SERIES}.1", CTImageStorage, "1.2", SERIES, "CT", "", stored.path, stored.sha256, 1
    )
    assert intake.record_instance(engine, again, NOW) == "duplicate"


def test_an_adopted_object_that_is_no_image_is_ignored(engine: Engine, spool: Spool) -> None:
    spool.write(_instance(1, EnhancedSRStorage))
    _recover(engine, spool)
    (row,) = reports.instances(engine)
    assert row["state"] == "ignored"
    assert row["reason"]


def test_a_file_that_does_not_parse_is_quarantined(engine: Engine, spool: Spool) -> None:
    path = spool.write(b"not DICOM at all").path
    assert _recover(engine, spool).quarantined == 1
    (row,) = reports.instances(engine)
    assert row["state"] == "rejected"
    assert spool.resolve(row["path"]).read_bytes() == b"not DICOM at all"
    assert not spool.resolve(path).exists()
    assert _recover(engine, spool) == Recovered(0, 0, 0)


def test_old_temporary_files_are_removed(engine: Engine, spool: Spool) -> None:
    for name, age in (("old.part", 3601), ("new.part", 3599)):
        file = spool.root / "temporary" / name
        file.write_bytes(b"")
        os.utime(file, (NOW - age, NOW - age))
    assert _recover(engine, spool) == Recovered(0, 0, 1)


def test_a_sweep_gives_back_what_dead_workers_held(engine: Engine, spool: Spool) -> None:
    spool.write(_instance(1))
    _recover(engine, spool)
    job = queue.NewJob(SERIES, "", "ct_denoise", ("pacs",), (f"{SERIES}.1",), "ct")
    queue.enqueue(
        engine,
        SERIES,
        series_state=SeriesState.COMPLETE,
        reason=None,
        jobs=[job],
        instances_seen=1,
        now=NOW,
    )
    assert queue.claim(engine, "worker", lease_s=60, now=NOW)
    assert sweep(engine, max_attempts=10, now=NOW + 59) == 0
    assert sweep(engine, max_attempts=10, now=NOW + 61) == 1
    assert reports.jobs(engine)[0]["state"] == "queued"


class ShortDisk(Disk):
    """A disk of which a test says how many bytes are missing."""

    missing = 0

    def space(self) -> Space:
        return Space(1000 - self.missing, Marks(800, 1000))


def _janitor(engine: Engine, spool: Spool, **retention: object) -> Janitor:
    spool.disk = ShortDisk(spool.root)
    tables = {"janitor": {"interval_s": 10, "purge_interval_s": 600}, "retention": retention}
    return Janitor(NodeSettings.model_validate(tables), engine, spool)


def _set_aside(engine: Engine, spool: Spool, at: float) -> Path:
    kept = spool.quarantine(f"{at}".encode(), "no header")
    intake.reject_instance(
        engine, sop_instance_uid=None, path=kept.path, reason="", association_id=None, now=at
    )
    return spool.resolve(kept.path)


def test_a_janitor_tidies_up_when_it_is_time_and_not_before(engine: Engine, spool: Spool) -> None:
    now = time.time() + 86_400
    janitor = _janitor(engine, spool, quarantine_s=3600)
    old = _set_aside(engine, spool, now - 3601)
    assert janitor.turn(now)
    assert not old.exists()
    older = _set_aside(engine, spool, now - 3602)
    assert not janitor.turn(now + 9)
    assert janitor.turn(now + 10)
    assert older.exists()
    assert janitor.turn(now + 600)
    assert not older.exists()


def test_a_short_disk_is_measured_and_nothing_that_is_needed_goes(
    engine: Engine, spool: Spool
) -> None:
    janitor = _janitor(engine, spool, quarantine_s=None)
    kept = _set_aside(engine, spool, NOW)
    stored = spool.write(_instance(1))
    _recover(engine, spool)
    ShortDisk.missing = 300
    try:
        assert janitor.turn(time.time() + 86_400)
        assert not spool.has_room()
        ShortDisk.missing = 100
        assert not spool.has_room()
    finally:
        ShortDisk.missing = 0
    assert spool.has_room()
    assert kept.exists()
    assert spool.resolve(stored.path).exists()


def test_a_removal_that_was_begun_is_finished_at_start(engine: Engine, spool: Spool) -> None:
    now = time.time() + 86_400
    begun, kept = _set_aside(engine, spool, NOW), _set_aside(engine, spool, now)
    until = Ages(None, None, NOW)
    assert len(retention.mark(engine, retention.removable(engine, until), until, now)) == 1
    assert recover(engine, spool, stale_file_s=3600, now=now).purged == 1
    assert (begun.exists(), kept.exists()) == (False, True)
