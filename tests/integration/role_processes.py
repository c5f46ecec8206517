"""Every role of a node in processes that start in milliseconds, to be killed at will.

    python -m tests.integration.role_processes

The nursery imports once what the roles need. For each line on its standard input, a role and the
file of its settings, it forks a process that runs the role by `run_role`, as `dicom-node serve
--role` does. It writes `started ROLE PID`, and `ended PID STATUS` once that process has ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from dicom_node.settings import NodeSettings
from tests.integration.peers import listens, until

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("receive", "restore", "deliver")


@dataclass
class Nursery:
    """The process that forks the roles, and what it has said of them."""

    process: subprocess.Popen[str]
    log: Path
    started: dict[str, int] = field(default_factory=dict)  #: the latest process of each role
    ended: dict[int, int] = field(default_factory=dict)  #: exit status by process id
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, role: str, settings: Path) -> int:
        """Start a role; its process id."""
        with self.lock:
            before = self.started.pop(role, None)
        assert before is None or before in self.ended, f"{role} runs already"
        stream = _of(self.process.stdin)
        stream.write(json.dumps([role, str(settings)]) + "\n")
        stream.flush()
        until(
            lambda: role in self.started or self.process.poll() is not None,
            f"{role} is started",
            limit_s=600,
        )
        assert self.process.poll() is None, self.tail()
        return self.started[role]

    def end(self, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a role's process and wait for its end; the status."""
        pid = self.started[role]
        assert pid not in self.ended, f"{role} ended by itself: {self.tail()}"
        os.kill(pid, number)
        until(lambda: pid in self.ended, f"{role} ends", limit_s=600)
        return self.ended[pid]

    def listen(self) -> None:
        """Take note of what the nursery says until it ends; for a thread."""
        for line in _of(self.process.stdout):
            word, first, second = line.split()
            with self.lock:
                if word == "started":
                    self.started[first] = int(second)
                else:
                    self.ended[int(first)] = int(second)

    def tail(self) -> str:
        """The end of the log, for a message."""
        return self.log.read_text()[-3000:]


@dataclass
class RunningNode:
    """The roles of one node, each in a process of its own."""

    nursery: Nursery
    settings: NodeSettings
    file: Path

    def start(self, role: str) -> None:
        """Start a role; the receiving one listens when this returns."""
        self.nursery.start(role, self.file)
        if role == "receive":
            until(lambda: listens(self.settings.node.port), "the node listens", limit_s=600)

    def kill(self, roles: Sequence[str]) -> None:
        """SIGKILL, and a new process in place of each."""
        for role in roles:
            assert self.nursery.end(role) == -signal.SIGKILL
        for role in roles:
            self.start(role)


@contextmanager
def nursery(folder: Path) -> Generator[Nursery]:
    """A nursery; what still runs at the end is killed."""
    log = folder / "roles.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.role_processes"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
    made = Nursery(process, log)
    listener = threading.Thread(target=made.listen, daemon=True)
    listener.start()
    try:
        yield made
    finally:
        for role, pid in list(made.started.items()):
            if pid not in made.ended:
                made.end(role)
        _of(process.stdin).close()
        process.wait(20)
        listener.join(20)
        _of(process.stdout).close()


@contextmanager
def running_node(nursery: Nursery, settings: NodeSettings) -> Generator[RunningNode]:
    """All roles of a node; they drain at the end of the block."""
    file = settings.node.data_dir / "settings.json"
    file.write_text(settings.model_dump_json())
    node = RunningNode(nursery, settings, file)
    for role in ROLES:
        node.start(role)
    yield node
    for role in ROLES:
        assert nursery.end(role, signal.SIGTERM) == 0, nursery.tail()


def _of(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def main() -> None:
    """Fork a role for each line, until standard input ends."""
    import dicom_node.restore_worker
    import dicom_node.storage_scu
    import dicom_node.supervisor.roles  # noqa: F401 (loaded before the first fork)

    living = 0
    while True:
        ready, _, _ = select.select([sys.stdin.fileno()], [], [], 0.01)
        if ready:
            # Unbuffered: a line that a buffer holds would not wake select.
            line = _read_line(sys.stdin.fileno())
            if not line:
                return
            role, settings = json.loads(line)
            if (pid := os.fork()) == 0:
                _run(role, Path(settings))
            living += 1
            print("started", role, pid, flush=True)
        while living:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            living -= 1
            print("ended", pid, os.waitstatus_to_exitcode(status), flush=True)


def _read_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        octet = os.read(descriptor, 1)
        if not octet:
            break
        line += octet
    return line


def _run(role: str, file: Path) -> NoReturn:
    from dicom_node.observability import configure
    from dicom_node.supervisor.process import SUPERVISOR_PID
    from dicom_node.supervisor.roles import run_role

    os.environ[SUPERVISOR_PID] = str(os.getppid())
    settings = NodeSettings.model_validate_json(file.read_text())
    try:
        configure(level=settings.log.level, format="json")
        run_role(role, settings)
    except BaseException as error:
        print(f"{role}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(70)


if __name__ == "__main__":
    main()
