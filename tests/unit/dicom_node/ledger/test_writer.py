"""Commits that are not flushed: who sees them, and which are flushed all the same."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, text

from dicom_node.errors import LedgerError
from dicom_node.ledger import intake, reports
from dicom_node.ledger.tables import InstanceState, open_ledger, reading
from dicom_node.ledger.writer import CHECKPOINT_PAGES, Writer
from tests.unit.dicom_node.ledger.examples import NOW, instance


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are flushed from here on, by the end of their names."""
    flush, seen = os.fdatasync, list[str]()

    def noting(descriptor: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("-")[2])
        flush(descriptor)

    monkeypatch.setattr(os, "fdatasync", noting)
    return seen


def _associate(engine: Engine) -> int:
    return intake.open_association(
        engine, calling_ae="SCANNER", called_ae="DIFFCODE", address="10.0.0.5", now=NOW
    )


def _levels(writer: Writer) -> tuple[int, str]:
    with writer.writing() as connection:
        synchronous = connection.scalar(text("PRAGMA synchronous"))
        return int(synchronous), str(connection.scalar(text("PRAGMA journal_mode")))


# A PostgreSQL server flushes each commit.
on_sqlite = pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)


@on_sqlite
def test_only_the_writer_s_own_commits_are_not_flushed(engine: Engine) -> None:
    writer = Writer(engine)
    assert _levels(writer) == (1, "wal")
    writer.close()
    for _ in range(2):
        with reading(engine) as connection:
            assert connection.scalar(text("PRAGMA synchronous")) == 2
    assert _levels(writer) == (1, "wal")


@on_sqlite
def test_its_log_grows_to_the_limit_and_no_further(engine: Engine) -> None:
    writer, sizes = Writer(engine), list[int]()
    # The header, and one with each page (SQLite, "WAL File Format").
    limit = 32 + CHECKPOINT_PAGES * (4096 + 24)
    with writer.writing() as connection:
        connection.execute(text("CREATE TABLE filler (octets BLOB)"))
    for _ in range(30):
        with writer.writing() as connection:
            connection.execute(text("INSERT INTO filler VALUES (zeroblob(1000000))"))
        sizes.append(os.path.getsize(f"{engine.url.database}-wal"))
    assert limit - 2_000_000 < max(sizes) < limit + 2_000_000
    writer.close()


def test_everybody_sees_a_commit_at_once(engine: Engine, ledger_url: str) -> None:
    other, writer = open_ledger(ledger_url), Writer(engine)
    assert intake.record_instances(writer, [instance(1)], NOW) == [InstanceState.RECEIVED]
    assert len(reports.instances(other)) == 1
    other.dispose()


def test_rows_that_the_file_cannot_tell_are_flushed_and_others_are_not(
    engine: Engine, flushes: list[str]
) -> None:
    first, second = _associate(engine), _associate(engine)
    writer = Writer(engine)

    def flushed(number: int, association: int, **changes: Any) -> bool:
        before = len(flushes)
        one = replace(instance(number, association_id=association), **changes)
        intake.record_instances(writer, [one], NOW)
        return len(flushes) > before

    expected = engine.dialect.name == "sqlite"
    assert flushed(1, first) is expected  # a series, and how it came
    assert flushed(2, first) is False
    assert flushed(2, first) is False  # a duplicate
    assert flushed(3, second) is expected  # it comes by another association
    assert flushed(4, second) is False
    assert flushed(4, second, sha256="other", path="incoming/ot/other.dcm") is expected
    assert flushed(5, second, series_instance_uid="1.2.9") is expected
    assert set(flushes) == ({"wal"} if expected else set())


def test_a_group_is_flushed_once_where_one_of_it_must_be(
    engine: Engine, flushes: list[str]
) -> None:
    writer = Writer(engine)
    intake.record_instances(writer, [instance(number) for number in range(1, 9)], NOW)
    assert flushes == (["wal"] if engine.dialect.name == "sqlite" else [])


@on_sqlite
def test_a_flush_that_has_failed_is_owed_until_one_succeeds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, flushes: list[str]
) -> None:
    writer = Writer(engine)
    with monkeypatch.context() as failing:
        failing.setattr(os, "fdatasync", _broken)
        for number in (1, 2):
            with pytest.raises(LedgerError, match="Input/output error"):
                intake.record_instances(writer, [instance(number)], NOW)
    assert intake.record_instances(writer, [instance(1)], NOW) == [InstanceState.DUPLICATE]
    assert flushes == ["wal"]
    assert intake.record_instances(writer, [instance(2)], NOW) == [InstanceState.DUPLICATE]
    assert flushes == ["wal"]


def _broken(_: int) -> None:
    raise OSError(5, "Input/output error")


def test_a_transaction_that_fails_leaves_nothing_and_the_next_succeeds(engine: Engine) -> None:
    writer = Writer(engine)
    bad = replace(instance(2), series_instance_uid=None)  # type: ignore[arg-type]
    with pytest.raises(LedgerError):
        intake.record_instances(writer, [instance(1), bad], NOW)
    assert reports.instances(engine) == []
    intake.record_instances(writer, [instance(1)], NOW)
    assert len(reports.instances(engine)) == 1


def test_threads_take_turns_and_lose_nothing(engine: Engine) -> None:
    writer = Writer(engine)
    with ThreadPoolExecutor(8) as pool:
        states = pool.map(
            lambda number: intake.record_instances(writer, [instance(number)], NOW),
            range(1, 41),
        )
        assert list(states) == [[InstanceState.RECEIVED]] * 40
    assert len(reports.instances(engine)) == 40


def test_an_engine_that_is_disposed_of_closes_the_connection(engine: Engine) -> None:
    writer = Writer(engine)
    intake.record_instances(writer, [instance(1)], NOW)
    engine.dispose()
    assert writer._kept is None
    intake.record_instances(writer, [instance(2)], NOW)
    assert len(reports.instances(engine)) == 2
    engine.dispose()
