"""The parent of ``serve``: one child process for each role, restarted with back-off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dicom_node.errors import ConfigurationError
from dicom_node.observability import get_logger
from dicom_node.supervisor.process import (
    EX_CONFIG,
    ROLES,
    SUPERVISOR_PID,
    Notices,
    Notifier,
    Signals,
    handled_signals,
)

# A child forces its own end after seven seconds; the promise is ten.
DRAIN_S = 8.0
WATCH_S = 0.1
FIRST_RESTART_S = 1.0
LAST_RESTART_S = 30.0
STEADY_S = 60.0

_log = get_logger(__name__)


@dataclass
class Child:
    """One role's process and its history as the parent sees it."""

    role: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    ready: bool = False
    ever_ready: bool = False
    failures: int = 0
    next_start: float = 0.0
    last_words: str = ""


def restart_delay(failures: int) -> float:
    """Seconds before the next start: 1, 2, 4, … 30."""
    return min(FIRST_RESTART_S * 2.0 ** (failures - 1), LAST_RESTART_S)


class Supervisor:
    """The parent process: one child for each role, restarted with back-off when it dies."""

    def __init__(
        self,
        command: Callable[[str], Sequence[str]],
        notices: Notices,
        notifier: Notifier,
        roles: Sequence[str] = ROLES,
    ) -> None:
        """*command* gives the argument list that runs a role in the foreground."""
        self._command = command
        self._notices = notices
        self._notifier = notifier
        self._children = {role: Child(role) for role in roles}
        self._announced = False

    def run(self, signals: Signals) -> None:
        """Run until told to stop.

        Raises:
            ConfigurationError: a child could not start as it is configured.
        """
        try:
            while not signals.stop.is_set():
                now = time.monotonic()
                self.watch(now)
                if signals.reload.is_set():
                    signals.reload.clear()
                    self._signal(signal.SIGHUP)
                self._notifier.pulse(now)
                signals.stop.wait(WATCH_S)
        finally:
            self._notifier.send(STOPPING="1")
            self._stop_children()

    def watch(self, now: float) -> None:
        """One look at the children: start those due, hear notices, bury the dead."""
        for child in self._children.values():
            if child.process is None and now >= child.next_start:
                self._start(child, now)
        ended = [c for c in self._children.values() if c.process and c.process.poll() is not None]
        self._hear()
        for child in ended:
            self._bury(child, now)

    def _start(self, child: Child, now: float) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "WATCHDOG_USEC"}
        environment |= {"NOTIFY_SOCKET": str(self._notices.address)}
        environment |= {SUPERVISOR_PID: str(os.getpid())}
        child.process = subprocess.Popen(self._command(child.role), env=environment)
        child.started, child.ready = now, False
        _log.info("child started", action="child_started", role=child.role, pid=child.process.pid)

    def _hear(self) -> None:
        for message in self._notices.read():
            child = self._children.get(message.get("X_ROLE", ""))
            if child is None:
                continue
            child.last_words = message.get("STATUS", child.last_words)
            if message.get("READY") == "1":
                child.ready = child.ever_ready = True
        if not self._announced and all(child.ready for child in self._children.values()):
            self._announced = True
            self._notifier.send(READY="1", STATUS="all roles are running")
            _log.info("node ready", action="node_ready")

    def _bury(self, child: Child, now: float) -> None:
        assert child.process is not None
        code = child.process.returncode
        child.process = None
        if code == EX_CONFIG and not child.ever_ready:
            raise ConfigurationError([child.last_words or f"{child.role} could not start"])
        child.failures = 1 if now - child.started > STEADY_S else child.failures + 1
        delay = restart_delay(child.failures)
        child.next_start = now + delay
        _log.error(
            "child died", action="child_died", role=child.role, code=code, restart_in_s=delay
        )

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children.values():
            if child.process is not None:
                child.process.send_signal(number)

    def _stop_children(self) -> None:
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + DRAIN_S
        for child in self._children.values():
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.error("child killed", action="child_killed", role=child.role)
                child.process.kill()
                child.process.wait()


def run_all(config: Path) -> None:
    """Run every role as a child process until SIGTERM; see :class:`Supervisor`."""

    def command(role: str) -> list[str]:
        program = [sys.executable, "-m", "dicom_node.cli.main"]
        return [*program, "serve", "--config", str(config), "--role", role]

    with handled_signals() as signals, tempfile.TemporaryDirectory(prefix="dicom-node-") as folder:
        notices = Notices(Path(folder))
        try:
            Supervisor(command, notices, Notifier(os.environ)).run(signals)
        finally:
            notices.close()
