from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, insert, inspect, select, text, update

from dicom_node.errors import ConfigurationError, LedgerError
from dicom_node.ledger import database, tables
from dicom_node.ledger.states import STATES
from dicom_node.ledger.tables import (
    TRANSITIONS,
    Entity,
    JobState,
    move,
    open_ledger,
    reading,
    writing,
)


def _schema(engine: Engine) -> dict[str, Any]:
    found = inspect(engine)
    return {
        name: {
            "columns": {
                column["name"]: (str(column["type"]), column["nullable"])
                for column in found.get_columns(name)
            },
            "primary key": found.get_pk_constraint(name)["constrained_columns"],
            "foreign keys": sorted(
                (key["constrained_columns"], key["referred_table"])
                for key in found.get_foreign_keys(name)
            ),
            "unique": sorted(
                (each["name"], each["column_names"]) for each in found.get_unique_constraints(name)
            ),
            "indexes": sorted(
                (each["name"], each["column_names"], bool(each["unique"]))
                for each in found.get_indexes(name)
            ),
        }
        for name in found.get_table_names()
        if name != "alembic_version"
    }


def test_the_migrated_schema_is_the_schema_of_the_code(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []


def test_a_fresh_schema_equals_the_migrated_one(tmp_path: Path) -> None:
    migrated = open_ledger(f"sqlite:///{tmp_path / 'migrated.sqlite'}")
    fresh = create_engine(f"sqlite:///{tmp_path / 'fresh.sqlite'}")
    tables.metadata.create_all(fresh)
    assert _schema(migrated) == _schema(fresh)
    partial = text(
        "SELECT sql FROM sqlite_master WHERE name = 'uq_instances_valid_sop_instance_uid'"
    )
    with migrated.connect() as one, fresh.connect() as other:
        assert one.scalar(partial) == other.scalar(partial)
    migrated.dispose()
    fresh.dispose()


def test_the_first_revision_can_be_taken_back(empty_database: str) -> None:
    engine = open_ledger(empty_database)
    config = _migrations()
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()
    open_ledger(empty_database).dispose()


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(tables.__file__).with_name("migrations")))
    return config


def test_the_code_knows_the_newest_revision() -> None:
    head = ScriptDirectory.from_config(_migrations()).get_current_head()
    assert head == database.SCHEMA_REVISION


def test_a_ledger_of_a_newer_version_is_refused(empty_database: str) -> None:
    engine = open_ledger(empty_database)
    with writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ConfigurationError, match="9999"):
        open_ledger(empty_database)


def _open(url: str) -> None:
    open_ledger(url).dispose()


def test_several_processes_may_open_a_new_ledger_at_once(empty_database: str) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_open, [empty_database] * 2)
    engine = open_ledger(empty_database)
    assert {"series", "jobs", "deliveries"} <= set(inspect(engine).get_table_names())
    engine.dispose()


def test_sqlite_is_set_to_lose_nothing(tmp_path: Path) -> None:
    engine = open_ledger(f"sqlite:///{tmp_path / 'folder' / 'ledger.sqlite'}")
    with engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 10_000,
    }


def test_a_database_that_does_not_answer_is_a_transient_error(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database, but long enough to be read as one")
    with pytest.raises(LedgerError, match="not a database"):
        open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")


def test_a_folder_that_cannot_be_made_is_a_transient_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError):
        open_ledger(f"sqlite:///{tmp_path / 'file' / 'ledger.sqlite'}")


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match="driver"):
        open_ledger("postgresql+psycopg://nobody@127.0.0.1/none")


def test_an_error_of_the_database_names_no_values(engine: Engine) -> None:
    with pytest.raises(LedgerError) as caught, writing(engine) as connection:
        connection.execute(insert(tables.jobs).values(volume_key="SECRET"))
    assert "SECRET" not in str(caught.value)


def test_a_failed_transaction_leaves_nothing(engine: Engine) -> None:
    def fail_after_a_write() -> None:
        with writing(engine) as connection:
            tables.record_event(connection, Entity.JOB, 1, None, "queued", None, 0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_a_write()
    with reading(engine) as connection:
        assert connection.execute(select(tables.events)).all() == []


@pytest.mark.parametrize("entity", STATES)
def test_every_state_has_a_row_in_the_table_of_transitions(entity: Entity) -> None:
    states = set(STATES[entity])
    assert set(TRANSITIONS[entity]) == states
    assert all(following <= states for following in TRANSITIONS[entity].values())
    assert all(state not in following for state, following in TRANSITIONS[entity].items())
    assert all(state.meaning for state in states)


# What may follow what, written down a second time: a change of the table is a decision.
ALLOWED = {
    "instance": "received>rejected",
    "series": "receiving>complete receiving>incomplete receiving>ignored"
    " complete>receiving incomplete>receiving ignored>receiving",
    "job": "queued>running queued>held queued>cancelled"
    " running>queued running>held running>done running>refused running>failed running>cancelled"
    " held>queued held>done held>rejected held>cancelled"
    " refused>queued failed>queued failed>cancelled cancelled>queued",
    "delivery": "queued>sending queued>dead"
    " sending>queued sending>waiting sending>delivered sending>dead"
    " waiting>queued waiting>sending waiting>dead"
    " delivered>committed delivered>queued delivered>dead committed>queued dead>queued"
    " dead>committed",
    "breaker": "closed>open open>closed",
}
_PAIRS = [
    pytest.param(entity, before, after, id=f"{entity}-{before}-{after}")
    for entity, states in STATES.items()
    for before in states
    for after in states
]


@pytest.fixture(scope="module")
def one_of_each(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A ledger with one instance, series, job and delivery, for `move` alone."""
    folder = tmp_path_factory.mktemp("transitions")
    engine = open_ledger(f"sqlite:///{folder / 'ledger.sqlite'}")
    uid = {"series_instance_uid": "1"}
    job = {"volume_key": "", "task": "", "revision": 1, "route": "", "destinations": []}
    job |= {"priority": 0, "not_before": 0, "attempts": 0, "created_at": 0, "seconds": {}}
    series = {"study_instance_uid": "1", "modality": "CT", "instances": 1, "forced": False}
    series |= {"first_received_at": 0, "last_received_at": 0}
    delivery = {"job_id": 1, "destination": "", "not_before": 0, "attempts": 0, "created_at": 0}
    with writing(engine) as connection:
        connection.execute(insert(tables.series).values(**uid, **series, state=""))
        connection.execute(insert(tables.instances).values(state="", assigned=False, received_at=0))
        connection.execute(insert(tables.jobs).values(**uid, **job, state=""))
        connection.execute(insert(tables.deliveries).values(**delivery, state=""))
        connection.execute(insert(tables.breakers).values(modality="1", state="", counts_from=0))
    return engine


@pytest.mark.parametrize(("entity", "before", "after"), _PAIRS)
def test_a_state_follows_another_only_as_the_table_says(
    one_of_each: Engine, entity: Entity, before: str, after: str
) -> None:
    table = tables._TABLES[entity]
    key: int | str = "1" if entity in (Entity.SERIES, Entity.BREAKER) else 1
    with writing(one_of_each) as connection:
        connection.execute(update(table).values(state=before))
        moved = move(connection, entity, key, after, reason="test", now=5)
        state = connection.scalar(select(table.c.state))
    assert moved == (f"{before}>{after}" in ALLOWED[entity].split())
    assert state == (after if moved else before)


def test_a_move_writes_the_history(one_of_each: Engine) -> None:
    with writing(one_of_each) as connection:
        connection.execute(update(tables.jobs).values(state=JobState.QUEUED))
        connection.execute(text("DELETE FROM events"))
        assert move(connection, Entity.JOB, 1, JobState.HELD, reason="by hand", now=7.5)
        (event,) = connection.execute(select(tables.events)).all()
    assert event[1:] == ("job", "1", 7.5, "queued", "held", "by hand")


def test_a_move_of_nothing_is_no_error(one_of_each: Engine) -> None:
    with writing(one_of_each) as connection:
        assert not move(connection, Entity.JOB, 99, JobState.HELD, reason=None, now=0)
