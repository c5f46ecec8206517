"""Faults at the steps of receiving, injected into a process of its own.

A step is a call by which an instance comes nearer to its acknowledgement: a write, a flush, a
rename, a commit, a response.  `inject` wraps those calls of the whole process, so that the code
under test is the code that ships.  Each passing is appended to a trace, which outlives a kill.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sqlite3
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.engine.default import DefaultDialect

from dicom_node import flushing

_P_DATA = 0x04  # PS3.8 9.3: a PDU type
_LOG = "-wal"  # the write-ahead log of a SQLite database


class Step(StrEnum):
    """A step of receiving one instance, in the order of a first arrival."""

    CREATE = "create"  #: a temporary file is made
    WRITE = "write"  #: bytes go into it
    RENAME = "rename"  #: it gets its name, by link or rename
    FLUSH_FILE = "flush file"  #: fsync or fdatasync of it
    FLUSH_FOLDER = "flush folder"  #: fsync of the folder of that name
    COMMIT = "commit"  #: a transaction that has changed the ledger (SQLite)
    FLUSH_LEDGER = "flush ledger"  #: fdatasync of SQLite's log, where files do not tell as much
    ANSWER = "answer"  #: a P-DATA-TF goes out, the response


@dataclass(frozen=True)
class Fault:
    """What goes wrong at the *nth* passing of a step, counted from the first instance on.

    The first instance begins where its temporary file is made; when an association is recorded
    before or after its acceptance has gone out is left to two threads.

    action: "kill" is SIGKILL, "tear" half of a write and SIGKILL, "locked" SQLite's error of a
    database that somebody else has locked for too long; else the name of an errno.
    """

    step: Step
    action: str = "kill"
    when: Literal["before", "after"] = "before"
    nth: int = 1

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Fault:
        """The fault of a line."""
        fields = json.loads(line)
        return cls(**{**fields, "step": Step(fields["step"])})


@dataclass(frozen=True)
class Passing:
    """One line of a trace: a step, what it concerned, and where that went (or its size then)."""

    step: Step
    path: str
    to: str = ""


def read_trace(trace: Path) -> list[Passing]:
    """Every passing so far, in order; a last line that a kill cut off is left out."""
    lines = trace.read_text().split("\n")[:-1] if trace.exists() else []
    return [Passing(Step(step), path, to) for step, path, to in map(json.loads, lines)]


class _Injector:
    """Counts the passings of steps under *root*, writes the trace, and fails as planned."""

    def __init__(
        self, root: Path, trace: Path | None, fault: Fault | None, trouble: Path | None
    ) -> None:
        self._root = str(root)
        self._fault = fault
        self._trouble = trouble
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._trace = -1 if trace is None else os.open(trace, flags, 0o600)
        self._count = 0
        self._lock = threading.Lock()
        self._write = os.write
        self.counting = False

    def path_of(self, descriptor: int) -> str | None:
        """The path of an open file of the spool, or of SQLite's log; None for everything else."""
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return None
        return path if path.startswith(self._root) or path.endswith(_LOG) else None

    def inside(self, path: object) -> bool:
        """Whether a path lies in the spool."""
        return isinstance(path, str | os.PathLike) and str(path).startswith(self._root)

    def before(self, step: Step, tear: Callable[[], None] | None = None) -> None:
        """Fail before the call, where that is the plan; *tear* makes half of it."""
        fault = self._due(step, "before")
        if fault is not None:
            if fault.action == "tear" and tear is not None:
                tear()
            self._fail(fault.action)

    def after(self, step: Step, path: str, to: str = "") -> None:
        """Note the call, then fail, where that is the plan."""
        if self._trace >= 0:
            words = (step.value, path.removeprefix(self._root), to.removeprefix(self._root))
            self._write(self._trace, f"{json.dumps(words)}\n".encode())
        fault = self._due(step, "after")
        if fault is not None:
            self._fail(fault.action)

    def _due(self, step: Step, when: str) -> Fault | None:
        for fault in (self._lasting(), self._fault if self.counting else None):
            if fault is not None and (fault.step, fault.when) == (step, when):
                return fault if fault is not self._fault or self._has_come() else None
        return None

    def _lasting(self) -> Fault | None:
        """The trouble there is now."""
        if self._trouble is None or not os.path.exists(self._trouble):
            return None
        try:
            return Fault.from_json(self._trouble.read_text())
        except FileNotFoundError:  # it has just passed
            return None

    def _has_come(self) -> bool:
        with self._lock:
            self._count += 1
            return self._fault is not None and self._count == self._fault.nth

    def _fail(self, action: str) -> None:
        if action in ("kill", "tear"):
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "locked":
            raise sqlite3.OperationalError("database is locked")
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number))


def inject(
    root: Path,
    trace: Path | None,
    fault: Fault | None,
    *,
    trouble: Path | None = None,
    at_once: bool = False,
) -> None:
    """Wrap the calls of this process for good.

    *trouble* is a file: while it exists, the fault that it holds happens at each passing.
    *at_once* counts from now on, not from the first instance.
    """
    injector = _Injector(root.resolve(), trace, fault, trouble)
    injector.counting = at_once
    _wrap_files(injector)
    _wrap_flushes(injector)
    _wrap_commit(injector)
    _wrap_socket(injector)


def _wrap_files(injector: _Injector) -> None:
    plain_open, plain_write, plain_writev = os.open, os.write, os.writev
    module: Any = os

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        makes = bool(flags & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY))
        if not (makes and injector.inside(path)):
            return plain_open(path, flags, *rest, **more)
        injector.counting = True
        injector.before(Step.CREATE)
        descriptor = plain_open(path, flags, *rest, **more)
        injector.after(Step.CREATE, str(path))
        return descriptor

    def written(descriptor: int, data: Any) -> int:
        path = injector.path_of(descriptor)
        if path is None:
            return plain_write(descriptor, data)
        half = memoryview(data)[: len(data) // 2]
        injector.before(Step.WRITE, lambda: _ignored(plain_write(descriptor, half)))
        count = plain_write(descriptor, data)
        injector.after(Step.WRITE, path)
        return count

    def gathered(descriptor: int, buffers: Any) -> int:
        path = injector.path_of(descriptor)
        if path is None:
            return plain_writev(descriptor, buffers)
        half = b"".join(map(bytes, buffers))
        half = half[: len(half) // 2]
        injector.before(Step.WRITE, lambda: _ignored(plain_write(descriptor, half)))
        count = plain_writev(descriptor, buffers)
        injector.after(Step.WRITE, path)
        return count

    module.open, module.write, module.writev = opened, written, gathered
    for name in ("rename", "replace", "link"):
        setattr(module, name, _renaming(injector, getattr(os, name)))


def _ignored(_: object) -> None:
    """Take a value and do nothing with it."""


def _renaming(injector: _Injector, plain: Callable[..., None]) -> Callable[..., None]:
    def renamed(source: Any, target: Any, **more: Any) -> None:
        if not injector.inside(target):
            return plain(source, target, **more)
        injector.before(Step.RENAME)
        plain(source, target, **more)
        return injector.after(Step.RENAME, str(source), str(target))

    return renamed


def _wrap_flushes(injector: _Injector) -> None:
    within = threading.local()
    for name in ("fsync", "fdatasync"):
        setattr(os, name, _flushing(injector, getattr(os, name), within))
    module: Any = flushing
    module.flush_together = _flushing_together(injector, flushing.flush_together, within)


def _flushing(
    injector: _Injector, plain: Callable[[int], None], within: threading.local
) -> Callable[[int], None]:
    def flushed(descriptor: int) -> None:
        path = injector.path_of(descriptor)
        if path is None or getattr(within, "together", False):
            return plain(descriptor)
        size = os.fstat(descriptor).st_size
        step = _flush_of(descriptor, path)
        injector.before(step)
        plain(descriptor)
        return injector.after(step, path, str(size))

    return flushed


def _flushing_together(
    injector: _Injector, plain: Callable[[Sequence[int]], list[int]], within: threading.local
) -> Callable[[Sequence[int]], list[int]]:
    def flushed(descriptors: Sequence[int]) -> list[int]:
        paths = [injector.path_of(descriptor) or "" for descriptor in descriptors]
        steps = [_flush_of(*each) for each in zip(descriptors, paths, strict=True)]
        try:
            for step in steps:
                injector.before(step)
        except OSError as error:
            # That one alone fails, as on a disk of which a part is broken.
            return [(error.errno or 0) if each is step else 0 for each in steps]
        within.together = True
        results = plain(descriptors)
        within.together = False
        for step, path, descriptor in zip(steps, paths, descriptors, strict=True):
            injector.after(step, path, str(os.fstat(descriptor).st_size))
        return results

    return flushed


def _flush_of(descriptor: int, path: str) -> Step:
    if path.endswith(_LOG):
        return Step.FLUSH_LEDGER
    is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    return Step.FLUSH_FOLDER if is_folder else Step.FLUSH_FILE


def _wrap_commit(injector: _Injector) -> None:
    plain = DefaultDialect.do_commit
    dialect: Any = DefaultDialect
    changes: dict[int, int] = {}

    def committed(self: DefaultDialect, connection: Any) -> None:
        database = connection.dbapi_connection
        before, now = changes.get(id(database), 0), database.total_changes
        changes[id(database)] = now
        if now == before:
            return plain(self, connection)
        injector.before(Step.COMMIT)
        plain(self, connection)
        return injector.after(Step.COMMIT, "")

    dialect.do_commit = committed


def _wrap_socket(injector: _Injector) -> None:
    kind: Any = socket.socket
    for name in ("send", "sendall", "sendmsg"):
        setattr(kind, name, _sending(injector, getattr(socket.socket, name)))


def _sending(injector: _Injector, plain: Callable[..., Any]) -> Callable[..., Any]:
    def sent(self: socket.socket, data: Any, *rest: Any) -> Any:
        body = data if isinstance(data, bytes | bytearray | memoryview) else b"".join(data)
        if bytes(body[:1]) != bytes([_P_DATA]) or self.family == socket.AF_UNIX:
            return plain(self, data, *rest)
        injector.before(Step.ANSWER)
        result = plain(self, data, *rest)
        injector.after(Step.ANSWER, bytes(body).hex())
        return result

    return sent
