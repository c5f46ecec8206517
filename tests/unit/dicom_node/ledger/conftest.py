"""An empty ledger on each engine, and the rows that most tests begin with."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from dicom_node.ledger import intake, queue, tables
from dicom_node.ledger.tables import open_ledger
from tests.unit.dicom_node.ledger import examples
from tests.unit.dicom_node.ledger.examples import NOW, SERIES, instance, judged, new_job

_ENGINES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@contextmanager
def _schema() -> Iterator[str]:
    """Make an empty schema on the PostgreSQL server of the environment; yield its address."""
    server = make_url(os.environ["DICOM_NODE_TEST_POSTGRES"])
    schema = f"test_{uuid.uuid4().hex}"
    admin = create_engine(server)
    with admin.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    url = server.update_query_dict({"options": f"-csearch_path={schema}"})
    yield url.render_as_string(hide_password=False)
    with admin.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    admin.dispose()


@pytest.fixture(params=_ENGINES)
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a database without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.sqlite'}"
        return
    with _schema() as url:
        yield url


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite ledger, migrated once for all tests."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    open_ledger(f"sqlite:///{path}").dispose()
    return path


@pytest.fixture(scope="session")
def migrated_schema() -> Iterator[str]:
    """An empty PostgreSQL ledger, migrated once for all tests."""
    with _schema() as url:
        open_ledger(url).dispose()
        yield url


@pytest.fixture(params=_ENGINES)
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty ledger."""
    if request.param == "sqlite":
        path = tmp_path / "ledger.sqlite"
        shutil.copy(request.getfixturevalue("migrated_file"), path)
        return f"sqlite:///{path}"
    url: str = request.getfixturevalue("migrated_schema")
    admin = create_engine(url)
    with admin.begin() as connection:
        names = ", ".join(table.name for table in tables.metadata.sorted_tables)
        connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY"))
    admin.dispose()
    return url


@pytest.fixture
def engine(ledger_url: str) -> Iterator[Engine]:
    """An empty ledger."""
    engine = open_ledger(ledger_url)
    yield engine
    engine.dispose()


@pytest.fixture
def receive(engine: Engine) -> Callable[..., None]:
    """Record slices of the given numbers."""

    def record(*numbers: int, now: float = NOW, **changes: object) -> None:
        for number in numbers:
            intake.record_instance(engine, instance(number, **changes), now)

    return record


@pytest.fixture
def make_jobs(engine: Engine, receive: Callable[..., None]) -> Callable[..., list[int]]:
    """Receive two slices (unless there are some) and close their series with the given jobs."""

    def make(*jobs: queue.NewJob, now: float = NOW) -> list[int]:
        if not intake.series_instances(engine, SERIES):
            receive(1, 2, now=now)
        return examples.close_series(engine, *jobs, now=now)

    return make


@pytest.fixture
def finish_job(engine: Engine, make_jobs: Callable[..., list[int]]) -> Callable[..., int]:
    """Make one job, claim it and finish it with two outputs."""

    def finish(*destinations: str) -> int:
        (job_id,) = make_jobs(new_job(destinations=destinations or ("pacs",)))
        examples.claim_job(engine)
        examples.finish_job(engine, job_id, judged(*(destinations or ("pacs",))), now=NOW + 3)
        return job_id

    return finish
