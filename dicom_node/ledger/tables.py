"""Schema and transactions of the ledger.

States change in one function, `move`, which enforces the tables of transitions by
compare-and-set and writes the history. SQLite and PostgreSQL run the same statements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Double,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from dicom_node import observability
from dicom_node.errors import ConfigurationError, LedgerError
from dicom_node.ledger.states import (
    TRANSITIONS,
    DeliveryState,
    Entity,
    InstanceState,
    ItemState,
    JobState,
    SeriesState,
)

__all__ = [
    "SCHEMA_REVISION",
    "TRANSITIONS",
    "DeliveryState",
    "Entity",
    "InstanceState",
    "ItemState",
    "JobState",
    "SeriesState",
    "move",
    "open_ledger",
    "reading",
    "record_event",
    "writing",
]

#: The Alembic revision this code reads and writes.
SCHEMA_REVISION = "0001"
_WRITES = "dicom_node_writes"
# Any constant: the PostgreSQL lock under which one process at a time migrates.
_MIGRATION_LOCK = 0x0D1C0

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Times are seconds since 1970 UTC.
associations = Table(
    "associations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("calling_ae", String(64), nullable=False),
    Column("called_ae", String(64), nullable=False),
    Column("address", String(64), nullable=False),
    Column("opened_at", Double, nullable=False),
    Column("closed_at", Double),
    Column("outcome", String(16)),
    Index(None, "closed_at"),
)

series = Table(
    "series",
    metadata,
    Column("series_instance_uid", String(64), primary_key=True),
    Column("study_instance_uid", String(64), nullable=False),
    Column("modality", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String),
    Column("instances", Integer, nullable=False),  # in state received
    Column("forced", Boolean, nullable=False),
    Column("association_id", Integer, ForeignKey("associations.id")),  # the latest
    Column("first_received_at", Double, nullable=False),
    Column("last_received_at", Double, nullable=False),
    Index(None, "state", "last_received_at"),
)

instances = Table(
    "instances",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sop_instance_uid", String(64)),  # NULL where the header did not parse
    Column("sop_class_uid", String(64)),
    Column("study_instance_uid", String(64)),
    Column("series_instance_uid", String(64), ForeignKey("series.series_instance_uid")),
    Column("modality", String(16)),
    Column("transfer_syntax_uid", String(64)),
    Column("path", String),
    Column("sha256", String(64)),
    Column("size", BigInteger),
    Column("association_id", Integer, ForeignKey("associations.id")),
    Column("state", String(16), nullable=False),
    Column("reason", String),
    Column("assigned", Boolean, nullable=False),
    Column("received_at", Double, nullable=False),
    # One valid row per SOP Instance; what was set aside may be there any number of times.
    Index(
        "uq_instances_valid_sop_instance_uid",
        "sop_instance_uid",
        unique=True,
        sqlite_where=text("state IN ('received', 'ignored')"),
        postgresql_where=text("state IN ('received', 'ignored')"),
    ),
    Index(None, "series_instance_uid", "state"),
    Index(None, "association_id"),
    Index(None, "received_at"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column(
        "series_instance_uid", String(64), ForeignKey("series.series_instance_uid"), nullable=False
    ),
    Column("volume_key", String, nullable=False),
    Column("task", String(32), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("route", String, nullable=False),
    Column("destinations", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String),
    Column("note", String),
    Column("worker", String),
    Column("lease_until", Double),
    Column("not_before", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("derived_series_instance_uid", String(64)),
    Column("model_sha256", String(64)),
    Column("seconds", JSON, nullable=False),
    UniqueConstraint("series_instance_uid", "volume_key", "task", "revision"),
    Index(None, "state", "priority", "id"),
    Index(None, "derived_series_instance_uid"),
)

job_instances = Table(
    "job_instances",
    metadata,
    Column("job_id", Integer, ForeignKey("jobs.id"), primary_key=True),
    Column("instance_id", Integer, ForeignKey("instances.id"), primary_key=True),
    Column("position", Integer, nullable=False),
    Index(None, "instance_id"),
)

outputs = Table(
    "outputs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", Integer, ForeignKey("jobs.id"), nullable=False),
    Column("sop_instance_uid", String(64), nullable=False, unique=True),
    Column("sop_class_uid", String(64), nullable=False),
    Column("source_sop_instance_uid", String(64), nullable=False),
    Column("transfer_syntax_uid", String(64), nullable=False),
    Column("path", String, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Index(None, "job_id"),
    Index(None, "source_sop_instance_uid"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", Integer, ForeignKey("jobs.id"), nullable=False),
    Column("destination", String, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String),
    Column("worker", String),
    Column("lease_until", Double),
    Column("not_before", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("first_attempt_at", Double),
    Column("finished_at", Double),
    UniqueConstraint("job_id", "destination"),
    Index(None, "state", "not_before"),
)

delivery_items = Table(
    "delivery_items",
    metadata,
    Column("delivery_id", Integer, ForeignKey("deliveries.id"), primary_key=True),
    Column("output_id", Integer, ForeignKey("outputs.id"), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("status", Integer),  # of the last C-STORE response
    Column("at", Double),
    Index(None, "output_id"),
)

commitments = Table(
    "commitments",
    metadata,
    Column("transaction_uid", String(64), primary_key=True),
    Column("delivery_id", Integer, ForeignKey("deliveries.id"), nullable=False),
    Column("requested_at", Double, nullable=False),
    Column("reported_at", Double),
    Column("failed", Integer),
    Index(None, "delivery_id"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("entity", String(16), nullable=False),
    Column("entity_id", String(64), nullable=False),
    Column("at", Double, nullable=False),
    Column("from_state", String(16)),
    Column("to_state", String(16), nullable=False),
    Column("reason", String),
    Index(None, "entity", "entity_id"),
)

_TABLES: Mapping[Entity, Table] = {
    Entity.INSTANCE: instances,
    Entity.SERIES: series,
    Entity.JOB: jobs,
    Entity.DELIVERY: deliveries,
}


def move(
    connection: Connection,
    entity: Entity,
    key: int | str,
    to: str,
    *,
    reason: str | None,
    now: float,
    only: ColumnElement[bool] | None = None,
    **values: object,
) -> bool:
    """Change the state of one row by compare-and-set and write the history.

    Args:
        connection: A writing transaction.
        entity: What kind of row.
        key: Its primary key.
        to: The new state.
        reason: Why, for people; replaces the row's reason.
        now: Seconds since 1970 UTC.
        only: A further condition on the row, as "the lease is mine".
        values: Further columns to set.

    Returns:
        False when there is no such row, the state may not follow, or another was faster.
    """
    table = _TABLES[entity]
    (primary_key,) = table.primary_key
    condition = primary_key == key if only is None else (primary_key == key) & only
    state = connection.scalar(select(table.c.state).where(condition))
    if state is None or to not in TRANSITIONS[entity][state]:
        return False
    moved = connection.execute(
        update(table)
        .where(condition, table.c.state == state)
        .values(state=to, reason=reason, **values)
    )
    if moved.rowcount != 1:
        return False
    record_event(connection, entity, key, state, to, reason, now)
    return True


def record_event(
    connection: Connection,
    entity: Entity,
    key: int | str,
    previous: str | None,
    to: str,
    reason: str | None,
    now: float,
) -> None:
    """Write one line of the history and count it."""
    connection.execute(
        insert(events).values(
            entity=entity,
            entity_id=str(key),
            at=now,
            from_state=previous,
            to_state=to,
            reason=reason,
        )
    )
    observability.STATES.labels(entity=entity, state=to).inc()


def insert_or_nothing(connection: Connection, table: Table, row: Mapping[str, object]) -> bool:
    """Insert a row unless a unique one is there already; tell whether it was inserted."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(row).on_conflict_do_nothing()
    return connection.execute(statement).rowcount == 1


def open_ledger(url: str) -> Engine:
    """Open the ledger and bring its schema up to date; safe from several processes at once.

    Args:
        url: `sqlite:///FILE` or `postgresql+psycopg://…`.

    Raises:
        ConfigurationError: When a newer version of the node has written the ledger.
        LedgerError: When the database does not answer.
    """
    engine = _sqlite(url) if make_url(url).get_backend_name() == "sqlite" else _postgresql(url)
    with reading(engine) as connection:
        if _revision(connection) == SCHEMA_REVISION:
            return engine
    with writing(engine) as connection:
        _upgrade(connection)
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that sees one state of the ledger; raises LedgerError."""
    with _ledger_errors(), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that commits as a whole or not at all; raises LedgerError."""
    with _ledger_errors(), engine.connect() as plain:
        connection = plain.execution_options(**{_WRITES: True})
        with connection.begin():
            yield connection


@contextmanager
def _ledger_errors() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise LedgerError(f"ledger: {type(cause).__name__}: {cause}") from error


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
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def _folder_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(f"ledger: {error.strerror}") from error


def _postgresql(url: str) -> Engine:
    return create_engine(
        url, hide_parameters=True, pool_pre_ping=True, pool_size=8, max_overflow=64
    )


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
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigurationError(
            [f"ledger: this version cannot use its schema: {error}"]
        ) from error
