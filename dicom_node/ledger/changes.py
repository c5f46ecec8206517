"""Waiting for work without asking for it: another process's commit ends the wait (SQLite)."""

from __future__ import annotations

import threading
import time

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError

# A ledger that is written all the time must not make its readers ask all the time.
_LOOK_S = 0.05


class Changes:
    """Tells of commits by other connections to one ledger; for the loop of one thread.

    SQLite counts them in memory that its processes share, so that a look costs no query. On
    PostgreSQL, and where a look fails, a wait is as long as it was asked to be.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: Connection | None = None
        self._seen: int | None = None
        event.listen(engine, "engine_disposed", lambda _: self.close())

    def wait(self, stop: threading.Event, seconds: float) -> None:
        """Wait so long at most: until *stop* is set, or somebody has committed since the last wait.

        What is committed while the caller works ends its next wait at once.
        """
        deadline = time.monotonic() + seconds
        if self._engine.dialect.name != "sqlite":
            stop.wait(seconds)
            return
        while (left := deadline - time.monotonic()) > 0:
            if stop.wait(min(left, _LOOK_S)):
                return
            version = self._version()
            if version is not None and version != self._seen:
                self._seen = version
                return

    def close(self) -> None:
        """Give the connection back; also done when the engine is disposed of."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()

    def _version(self) -> int | None:
        try:
            if self._kept is None:
                self._kept = self._engine.connect()
                # Never in the pool, whose connections come and go: the count is a connection's own.
                self._kept.detach()
            cursor = self._kept.connection.cursor()
            (version,) = cursor.execute("PRAGMA data_version").fetchone()
            cursor.close()
        except (SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error):
            self._kept = None
            return None
        return int(version)
