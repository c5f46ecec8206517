"""Commits that follow one another: on a connection that is kept, and not each of them flushed.

A received instance lies durable in the spool before its row is committed, and at the next start
`janitor.recover` gives a row to each that has none.  So the row itself need not wait for the disk:
a commit is seen by everybody and survives a killed process, and a loss of power may take only rows
that are made again from the files.  Rows that no file tells of are flushed: see `Writer.flush`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError

from dicom_node.errors import LedgerError
from dicom_node.ledger.database import WRITES, driver_error, ledger_errors, writing

# Pages of the log before they are taken over into the database, which whoever waits for an answer
# then waits for, as long as for four instances. With 1,000, SQLite's default, that is every 150th;
# up to 4,062 a reader still finds a page by one look (walformat: the first hash table).
CHECKPOINT_PAGES = 4000


class Writer:
    """Writing transactions of one engine, one at a time.

    On SQLite they are not flushed; its log is written in order, so every flushed commit, of
    whichever process, makes those before it durable too.  A PostgreSQL server may restart without
    us, and we would not look for lost rows: there each commit is flushed as elsewhere.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._kept: Connection | None = None
        self._owes = False
        event.listen(engine, "engine_disposed", lambda _: self.close())

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction that commits as a whole or not at all; raises LedgerError."""
        if self._engine.dialect.name != "sqlite":
            with writing(self._engine) as connection:
                yield connection
            return
        with self._lock:
            try:
                if self._kept is None:
                    self._kept = _unflushed(self._engine)
                kept = self._kept
                _begin(kept)
                yield kept
                _commit(kept)
            except BaseException:
                # Whatever has happened to it, the next transaction begins with another.
                self._drop()
                with ledger_errors():
                    raise

    def flush(self, *, needed: bool = True) -> None:
        """Make all commits so far durable, if *needed* now or since a flush that has failed.

        Raises LedgerError where the disk fails.
        """
        self._owes |= needed
        if not self._owes or self._engine.dialect.name != "sqlite":
            return
        try:
            # What SQLite itself does at the end of a commit with synchronous = FULL.
            descriptor = os.open(f"{self._engine.url.database}-wal", os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise LedgerError(f"ledger: {error.strerror}") from error
        self._owes = False

    def close(self) -> None:
        """Give the connection back; also done when the engine is disposed of."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            with suppress(SQLAlchemyError):
                kept.close()


def _begin(connection: Connection) -> None:
    """Begin by the driver: SQLAlchemy takes longer over that than SQLite.

    A statement that is given to SQLAlchemy later begins nothing anew: `database.begin`.
    """
    driver: Any = connection.connection.dbapi_connection
    try:
        driver.execute("BEGIN IMMEDIATE")
    except connection.dialect.loaded_dbapi.Error as error:
        raise driver_error(error) from error


def _commit(connection: Connection) -> None:
    dialect = connection.dialect
    try:
        dialect.do_commit(connection.connection)
    except dialect.loaded_dbapi.Error as error:
        raise driver_error(error) from error
    if connection.in_transaction():
        connection.commit()


def _unflushed(engine: Engine) -> Connection:
    """A connection whose commits are not flushed: never in the pool, where they are."""
    connection = engine.connect()
    connection.detach()
    try:
        cursor = connection.connection.cursor()
        (mode,) = cursor.execute("PRAGMA journal_mode").fetchone()
        # Only a write-ahead log keeps the database whole without a flush for each commit.
        if mode == "wal":
            cursor.execute("PRAGMA synchronous = NORMAL")
            cursor.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        cursor.close()
    except engine.dialect.loaded_dbapi.Error as error:
        connection.close()
        raise LedgerError(f"ledger: {type(error).__name__}") from error
    return connection.execution_options(**{WRITES: True})
