"""What a process owes its manager: an end on request, an end with it, and a reason."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from dicom_node.errors import ConfigurationError, LedgerError
from dicom_node.observability import describe_exception
from dicom_node.supervisor.parent import Supervisor, restart_delay
from dicom_node.supervisor.process import (
    EX_CONFIG,
    SUPERVISOR_PID,
    Notices,
    Notifier,
    Signals,
    handled_signals,
    logged_threads,
)
from dicom_node.supervisor.roles import WorkerSlot, serve_role

SAY_READY = """
import os, socket, sys, time
channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
channel.sendto(b"READY=1\\nX_ROLE=restore", os.environ["NOTIFY_SOCKET"])
"""


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def notices(tmp_path: Path) -> Generator[Notices]:
    made = Notices(tmp_path)
    yield made
    made.close()


@pytest.fixture
def supervise(notices: Notices) -> Generator[Callable[[str], Supervisor]]:
    """A supervisor of one child, "restore", that runs the given Python program."""
    signals = Signals()
    signals.stop.set()
    made: list[Supervisor] = []

    def build(program: str) -> Supervisor:
        command = [sys.executable, "-c", program]
        made.append(Supervisor(lambda _: command, notices, Notifier({}), roles=["restore"]))
        return made[-1]

    yield build
    for each in made:
        each.run(signals)


class Turns:
    """A service that counts its turns and does what the test says in each."""

    idle_s = 0.0

    def __init__(self, act: Callable[[int], bool]) -> None:
        self.turns = 0
        self.reloaded = 0
        self.closed = False
        self._act = act

    def turn(self, now: float) -> bool:
        self.turns += 1
        return self._act(self.turns)

    def rest(self, stop: threading.Event, seconds: float) -> None:
        stop.wait(seconds)

    def reload(self) -> None:
        self.reloaded += 1

    def close(self) -> None:
        self.closed = True


def test_waits_between_restarts_double_up_to_half_a_minute() -> None:
    assert [restart_delay(n) for n in (1, 2, 3, 5, 6, 60)] == [1, 2, 4, 16, 30, 30]


def test_what_is_notified_arrives_as_lines(notices: Notices) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(notices.address)})
    notifier.send(READY="1", STATUS="listening")
    notifier.send(STOPPING="1")
    assert notices.read() == [{"READY": "1", "STATUS": "listening"}, {"STOPPING": "1"}]
    assert notices.read() == []


def test_the_watchdog_hears_from_the_loop_twice_in_each_interval(notices: Notices) -> None:
    environment = {"NOTIFY_SOCKET": str(notices.address), "WATCHDOG_USEC": "10000000"}
    notifier = Notifier(environment)
    for second in range(11):
        notifier.pulse(100.0 + second)
    assert notices.read() == [{"WATCHDOG": "1"}] * 3  # at 0, 5 and 10 s


def test_a_manager_that_is_gone_does_not_stop_the_service(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).send(READY="1")
    Notifier({}).send(READY="1")


def test_signals_only_set_flags_and_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with handled_signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.reload.is_set()
        assert signals.stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_role_turns_until_it_is_told_to_stop_and_then_closes(notices: Notices) -> None:
    signals = Signals()

    def act(turn: int) -> bool:
        if turn == 3:
            signals.stop.set()
        return True

    service = Turns(act)
    serve_role("restore", service, signals, Notifier({"NOTIFY_SOCKET": str(notices.address)}))
    assert (service.turns, service.closed) == (3, True)
    said = [key for message in notices.read() for key in message]
    assert said == ["READY", "STATUS", "X_ROLE", "STOPPING", "X_ROLE"]


def test_trouble_that_passes_does_not_end_a_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_node.supervisor.roles.TROUBLE_S", 0.001)
    signals = Signals()

    def act(turn: int) -> bool:
        if turn < 3:
            raise LedgerError("locked")
        signals.stop.set()
        return False

    service = Turns(act)
    serve_role("deliver", service, signals, Notifier({}))
    assert service.turns == 3


def test_a_mistake_of_ours_ends_the_role_but_closes_it_first() -> None:
    def act(turn: int) -> bool:
        raise ZeroDivisionError

    service = Turns(act)
    with pytest.raises(ZeroDivisionError):
        serve_role("deliver", service, Signals(), Notifier({}))
    assert service.closed


def test_reload_happens_between_two_turns() -> None:
    signals = Signals()
    signals.reload.set()

    def act(turn: int) -> bool:
        signals.stop.set()
        return True

    service = Turns(act)
    serve_role("receive", service, signals, Notifier({}))
    assert (service.reloaded, signals.reload.is_set()) == (1, False)


def test_a_dead_child_is_started_again_after_its_wait(
    supervise: Callable[[str], Supervisor],
) -> None:
    parent = supervise("raise SystemExit(3)")
    parent.watch(0.0)
    child = parent._children["restore"]
    first = child.process
    assert first is not None
    first.wait()
    parent.watch(1.0)
    assert (child.failures, child.next_start) == (1, 2.0)
    parent.watch(1.5)
    assert child.process is None
    parent.watch(2.0)
    second = child.process
    assert second is not None
    assert second.pid != first.pid
    second.wait()
    parent.watch(3.0)
    assert (child.failures, child.next_start) == (2, 5.0)


def test_a_child_that_ran_for_long_starts_counting_anew(
    supervise: Callable[[str], Supervisor],
) -> None:
    parent = supervise("raise SystemExit(3)")
    child = parent._children["restore"]
    child.failures = 5
    parent.watch(0.0)
    assert child.process is not None
    child.process.wait()
    parent.watch(1000.0)
    assert child.failures == 1


def test_a_child_that_cannot_start_as_configured_ends_the_parent_with_its_reason(
    supervise: Callable[[str], Supervisor],
) -> None:
    program = SAY_READY.replace("READY=1", "STATUS=engine: no such bundle")
    parent = supervise(f"{program}\nraise SystemExit({EX_CONFIG})")
    with pytest.raises(ConfigurationError, match="engine: no such bundle"):
        parent.run(Signals())


def test_a_child_that_was_ready_once_is_only_restarted(
    supervise: Callable[[str], Supervisor],
) -> None:
    parent = supervise(f"{SAY_READY}\nraise SystemExit({EX_CONFIG})")
    parent.watch(0.0)
    child = parent._children["restore"]
    assert child.process is not None
    child.process.wait()
    parent.watch(1.0)
    assert child.ever_ready
    assert child.next_start == 2.0


def test_stopping_ends_the_children(supervise: Callable[[str], Supervisor]) -> None:
    parent = supervise(f"{SAY_READY}\ntime.sleep(600)")
    signals = Signals()
    thread = threading.Thread(target=parent.run, args=(signals,))
    thread.start()
    child = parent._children["restore"]
    until(lambda: child.ready, "the child said READY")
    signals.stop.set()
    thread.join(20)
    assert child.process is not None
    assert child.process.returncode == -signal.SIGTERM


def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    child = (
        "import os, time\n"
        "from dicom_node.supervisor.process import die_with_supervisor\n"
        "die_with_supervisor(os.environ)\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"os.environ['{SUPERVISOR_PID}'] = str(os.getpid())\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    until(lambda: not _alive(pid), "the child died with its parent")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_child_whose_supervisor_died_first_does_not_start() -> None:
    program = (
        "from dicom_node.supervisor.process import die_with_supervisor\n"
        f"die_with_supervisor({{'{SUPERVISOR_PID}': '1'}})\n"
        "print('started')"
    )
    assert _output(program) == ""


def test_two_workers_never_share_a_name_and_a_successor_takes_it_over(tmp_path: Path) -> None:
    first, second = WorkerSlot(tmp_path, "restore"), WorkerSlot(tmp_path, "restore")
    assert first.name != second.name
    first.close()
    third = WorkerSlot(tmp_path, "restore")
    assert third.name == first.name
    second.close()
    third.close()


def test_receiving_loads_neither_torch_nor_the_model() -> None:
    program = (
        "import sys, dicom_node.cli.main, dicom_node.supervisor.roles\n"
        "print({'torch', 'restoration'} & set(sys.modules))"
    )
    assert _output(program) == "set()"


def test_help_loads_no_library_of_the_node() -> None:
    program = (
        "import sys, dicom_node.cli.main\n"
        "slow = {'torch', 'pynetdicom', 'pydicom', 'sqlalchemy', 'pydantic', 'rich', 'numpy'}\n"
        "print(slow & set(sys.modules))"
    )
    assert _output(program) == "set()"


def _output(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_thread_that_fails_is_logged_and_python_prints_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise ValueError("DOE^JANE is no date")

    with capture_logs() as logged, logged_threads():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    (event,) = logged
    assert event["action"] == "thread_failed"
    described = str(describe_exception(None, "error", event)["exception"])
    assert described.startswith("ValueError\n")
    assert "DOE" not in described + capsys.readouterr().err


_BUFFERS_OF_THREADS = """
import threading
from dicom_node.supervisor.process import give_back_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

assert give_back_memory()
bytearray(2 << 20)  # glibc would take blocks of such a size from its heaps from now on
met, kept = threading.Barrier(33), []

def association():
    buffer = bytearray(1 << 20)
    kept.append(bytearray(3000))  # lies behind it
    met.wait()
    del buffer
    met.wait()
    met.wait()

threads = [threading.Thread(target=association) for _ in range(32)]
before = resident()
for thread in threads:
    thread.start()
met.wait()
met.wait()
print(resident() - before)
met.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_buffers_of_threads_go_back_to_the_kernel() -> None:
    """Otherwise all 32 stay, each in the heap of its thread: 34 MB."""
    command = [sys.executable, "-c", _BUFFERS_OF_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 4 << 20
