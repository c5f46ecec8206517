"""Opening the ledger: SQLite or PostgreSQL, transactions, and the upgrade of its schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    Executable,
    Table,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from dicom_node.errors import ConfigurationError, LedgerError, NodeError

#: The Alembic revision this code reads and writes.
SCHEMA_REVISION = "0008"
#: The execution option of a connection whose transactions write.
WRITES = "dicom_node_writes"
# Any constant: the PostgreSQL lock under which one process at a time migrates.
_MIGRATION_LOCK = 0x0D1C0


def open_ledger(url: str) -> Engine:
    """Open the ledger and bring its schema up to date; safe from several processes at once.

    Args:
        url: `sqlite:///FILE` or `postgresql+psycopg://…`.

    Raises:
        ConfigurationError: When a newer version of the node has written the ledger.
        LedgerError: When the database does not answer.
    """
    engine = _sqlite(url) if make_url(url).get_backend_name() == "sqlite" else _postgresql(url)
    try:
        with reading(engine) as connection:
            is_current = _revision(connection) == SCHEMA_REVISION
        if not is_current:
            with writing(engine) as connection:
                _upgrade(connection)
    except NodeError:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that sees one state of the ledger; raises LedgerError."""
    with ledger_errors(), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that commits as a whole or not at all; raises LedgerError."""
    with ledger_errors(), engine.connect() as plain:
        connection = plain.execution_options(**{WRITES: True})
        with connection.begin():
            yield connection


@contextmanager
def ledger_errors() -> Iterator[None]:
    """Raise LedgerError for an error of the database."""
    try:
        yield
    except SQLAlchemyError as error:
        raise LedgerError(f"ledger: {_cause(error)}") from error


def driver_error(error: Exception) -> LedgerError:
    """What to raise for an error of the driver."""
    return LedgerError(f"ledger: {_cause(error)}")


def _cause(error: Exception) -> str:
    """Name the error of the database without the row that PostgreSQL quotes in its detail."""
    cause = getattr(error, "orig", None) or error
    diagnosis = getattr(getattr(cause, "diag", None), "message_primary", None) or str(cause)
    return f"{type(cause).__name__}: {diagnosis.partition(chr(10))[0]}"


def _sqlite(url: str) -> Engine:
    database = make_url(url).database or ""
    with _folder_errors():
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, hide_parameters=True, pool_size=8, max_overflow=64)

    @event.listens_for(engine, "connect")
    def configure(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        # The driver's own BEGIN is deferred: two writers that read first would then deadlock.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            "busy_timeout = 10000",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            # KiB for each connection, of which a busy receiver has as many as associations end at
            # once: with 2,000, the default, it grew by that. The system keeps the pages anyhow.
            "cache_size = -512",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        driver: Any = connection.connection.dbapi_connection
        if driver.in_transaction:
            return  # `Writer` has begun it
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def _folder_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(f"ledger: {error.strerror}") from error


def _postgresql(url: str) -> Engine:
    try:
        return create_engine(
            url, hide_parameters=True, pool_pre_ping=True, pool_size=8, max_overflow=64
        )
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            ["ledger.url: PostgreSQL needs its driver; install diffcode-node[postgres]"]
        ) from error


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _upgrade(connection: Connection) -> None:
    # Alembic is slow to import and needed once per release.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    config = Config()
    scripts = str(Path(__file__).with_name("migrations"))
    config.set_main_option("script_location", scripts.replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigurationError(
            [f"ledger: this version cannot use its schema: {error}"]
        ) from error


def insert_or_nothing(connection: Connection, table: Table, row: Mapping[str, object]) -> bool:
    """Insert a row unless a unique one is there already; tell whether it was inserted."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(row).on_conflict_do_nothing()
    inserted = connection.execute(statement.returning(*table.primary_key))
    return inserted.first() is not None


class Prepared:
    """A statement that returns rows, compiled once for each dialect and handed to the driver.

    SQLAlchemy takes longer over a small statement than the database does.  Values are given by
    the names of the statement's bind parameters, of types that drivers know.
    """

    def __init__(self, statement: Executable | Callable[[Any], Executable]) -> None:
        """A callable makes the statement from the dialect's module, as for ON CONFLICT."""
        self._statement = statement
        self._compiled: dict[str, tuple[str, Sequence[str] | None]] = {}

    def rows(self, connection: Connection, values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        """Execute it in the open transaction; raises LedgerError."""
        dialect = connection.dialect
        if dialect.name not in self._compiled:
            self._compiled[dialect.name] = self._compile(connection)
        text, places = self._compiled[dialect.name]
        given: Any = values if places is None else [values[place] for place in places]
        driver: Any = connection.connection.dbapi_connection
        try:
            # Both drivers make the cursor themselves; it goes with its rows.
            found: list[tuple[Any, ...]] = driver.execute(text, given).fetchall()
        except dialect.loaded_dbapi.Error as error:
            raise driver_error(error) from error
        return found

    def _compile(self, connection: Connection) -> tuple[str, Sequence[str] | None]:
        made = self._statement
        if not isinstance(made, Executable):
            made = made(postgresql if connection.dialect.name == "postgresql" else sqlite)
        compiled: Any = made.compile(dialect=connection.dialect)  # type: ignore[attr-defined]
        return str(compiled), compiled.positiontup if compiled.positional else None
