"""The composition root: builds the services of each role and keeps them running until told to stop.

``run_all`` starts one process for each role and restarts the dead; ``run_role`` is such a process,
or the whole of a systemd unit. They meet in the ledger and the spool only. Of a child the parent
knows what systemd would: it lives, it has said READY=1, or it ended and why.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dicom_node.errors import ConfigurationError, NodeError, TransientError
from dicom_node.observability import get_logger
from dicom_node.settings import NodeSettings

ROLES = ("receive", "restore", "deliver")

# The promise is ten seconds from SIGTERM to exit; what is left is for closing files.
DRAIN_S = 8.0
FORCED_EXIT_S = 7.0
WATCH_S = 0.1
TROUBLE_S = 2.0
FIRST_RESTART_S = 1.0
LAST_RESTART_S = 30.0
STEADY_S = 60.0

EX_CONFIG = 78  # sysexits.h: a child cannot start as it is configured
SUPERVISOR_PID = "DICOM_NODE_SUPERVISOR_PID"
_PR_SET_PDEATHSIG = 1  # prctl(2)

_log = get_logger(__name__)


class Service(Protocol):
    """What one role does between start and stop."""

    idle_s: float

    def turn(self, now: float) -> bool:
        """Do one piece of work; False when there was none."""

    def reload(self) -> None:
        """Read again what may change while running; bad input keeps the old."""

    def close(self) -> None:
        """Finish or give back what is in hand."""


@dataclass
class Signals:
    """What the process has been asked to do."""

    stop: threading.Event = field(default_factory=threading.Event)
    reload: threading.Event = field(default_factory=threading.Event)


@contextmanager
def handled_signals() -> Generator[Signals]:
    """SIGTERM and SIGINT set ``stop``, SIGHUP sets ``reload``; nothing else happens in a handler."""
    signals = Signals()
    wanted = {
        signal.SIGTERM: signals.stop,
        signal.SIGINT: signals.stop,
        signal.SIGHUP: signals.reload,
    }
    before = {
        number: signal.signal(number, lambda _n, _f, event=event: event.set())
        for number, event in wanted.items()
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Notifier:
    """sd_notify(3): state lines to the datagram socket that NOTIFY_SOCKET names, if any."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take the socket and the watchdog interval from *environment*, as systemd gives them."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._pulse_s = int(environment.get("WATCHDOG_USEC", "0")) / 2e6
        self._last_pulse = float("-inf")

    def send(self, **state: str) -> None:
        """Send ``KEY=value`` lines; a manager that is gone is no reason to fail."""
        if not self._address:
            return
        message = "\n".join(f"{key}={value}" for key, value in state.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            try:
                channel.sendto(message.encode(), self._address)
            except OSError as error:
                _log.warning("notify failed", action="notify", error=error.strerror)

    def pulse(self, now: float) -> None:
        """Tell the watchdog that the main loop still turns, at most every half interval."""
        if self._pulse_s and now - self._last_pulse >= self._pulse_s:
            self._last_pulse = now
            self.send(WATCHDOG="1")


def serve_role(role: str, service: Service, signals: Signals, notifier: Notifier) -> None:
    """Turn *service* until it is told to stop; trouble that passes is waited out."""
    notifier.send(READY="1", STATUS=f"{role} is running", X_ROLE=role)
    _log.info("role started", action="role_started", role=role)
    try:
        while not signals.stop.is_set():
            if signals.reload.is_set():
                signals.reload.clear()
                service.reload()
            pause = _turn(role, service)
            notifier.pulse(time.monotonic())
            if pause:
                signals.stop.wait(pause)
    finally:
        notifier.send(STOPPING="1", X_ROLE=role)
        service.close()
        _log.info("role stopped", action="role_stopped", role=role)


def _turn(role: str, service: Service) -> float:
    try:
        return 0.0 if service.turn(time.time()) else service.idle_s
    except TransientError as error:
        _log.warning("role waits", action="role_trouble", role=role, error=str(error))
        return TROUBLE_S


def die_with_supervisor(environment: Mapping[str, str]) -> None:
    """Have the kernel send SIGTERM when the parent process dies, however it dies."""
    parent = environment.get(SUPERVISOR_PID)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        raise SystemExit(0)  # it died before the request was made


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


class Notices:
    """The socket on which children say what they would say to systemd."""

    def __init__(self, folder: Path) -> None:
        """Bind a datagram socket in *folder*."""
        self.address = folder / "notify"
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        self._socket.bind(str(self.address))

    def read(self) -> list[dict[str, str]]:
        """Every message that has come since the last call."""
        messages = []
        while True:
            try:
                text = self._socket.recv(65536).decode(errors="replace")
            except BlockingIOError:
                return messages
            pairs = (line.partition("=") for line in text.splitlines())
            messages.append({key: value for key, _, value in pairs})

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


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
