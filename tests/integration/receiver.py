"""The receive role in processes that start in milliseconds, to be killed at will.

    python -m tests.integration.receiver SETTINGS.json

A template imports once what the role needs. For each line on its standard input, a plan, it forks
a process that runs the role by `run_role`, as `dicom-node serve --role receive` does, writes the
process id, and writes the exit status once that process has ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from dicom_node.settings import NodeSettings
from tests.integration.faults import Fault, Step, inject
from tests.integration.peers import Peer, connected, listens, until
from tests.integration.senders import Auditor, Item

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Receiver:
    """A running receive process; *status* is that of waitpid once it has ended."""

    pid: int
    template: Template

    def kill(self) -> int:
        """SIGKILL, and its end; the status."""
        return self.end(signal.SIGKILL)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the status after its end."""
        if self.template.running is self:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
        return self.wait()

    def lives(self) -> bool:
        """Whether it has not ended; the template takes the dead away at once."""
        return Path(f"/proc/{self.pid}").exists()

    def wait(self) -> int:
        """The exit status, once it has ended: negative is a signal."""
        return self.template.reaped(self)

    def resident_bytes(self) -> int:
        """Memory in use, shared pages included."""
        return self._memory("VmRSS")

    def highest_bytes(self) -> int:
        """The most memory that it has used."""
        return self._memory("VmHWM")

    def descriptors(self) -> int:
        """The number of open file descriptors."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def threads(self) -> int:
        """The number of threads."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def _memory(self, field: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = next(line for line in text.splitlines() if line.startswith(field))
        return int(found.split()[1]) * 1024


@dataclass
class Template:
    """The process that forks receivers, one at a time."""

    settings: NodeSettings
    process: subprocess.Popen[str]
    log: Path
    trace: Path
    running: Receiver | None = None

    @property
    def port(self) -> int:
        """The port that each receiver listens on."""
        return self.settings.node.port

    def start(self, fault: Fault | None = None, *, traced: bool = False) -> Receiver:
        """A receiver with a planned fault, listening; *traced* writes the trace."""
        receiver = self.launch(fault, traced=traced)
        until(lambda: listens(self.port) or not receiver.lives(), "a receiver listens", limit_s=60)
        assert receiver.lives(), self.tail()
        return receiver

    def launch(
        self, fault: Fault | None = None, *, traced: bool = False, at_once: bool = False
    ) -> Receiver:
        """A receiver that may not live to listen; *at_once* counts its recovery too."""
        assert self.running is None, "one receiver at a time"
        plan = {
            "fault": fault.to_json() if fault else None,
            "trace": str(self.trace) if traced else None,
            "trouble": str(self._trouble),
            "at_once": at_once,
        }
        stream = _of(self.process.stdin)
        stream.write(json.dumps(plan) + "\n")
        stream.flush()
        self.running = Receiver(int(self._line()), self)
        return self.running

    @contextmanager
    def trouble(self, step: Step, action: str) -> Generator[None]:
        """While the block lasts, a step fails at each passing in every receiver."""
        # Renamed into place: a receiver must not read half of it.
        draft = self._trouble.with_suffix(".draft")
        draft.write_text(Fault(step, action).to_json())
        draft.rename(self._trouble)
        try:
            yield
        finally:
            self._trouble.unlink()

    @property
    def _trouble(self) -> Path:
        return self.trace.with_name("trouble")

    def reaped(self, receiver: Receiver) -> int:
        """The exit status of the running receiver; 0 for one that has been asked for before."""
        if self.running is not receiver:
            return 0
        status = int(self._line())
        self.running = None
        return status

    def tail(self) -> str:
        """The end of the log, for a message."""
        return self.log.read_text()[-2000:] if self.log.exists() else ""

    def _line(self) -> str:
        line = _of(self.process.stdout).readline()
        assert line, self.tail()
        return line


@contextmanager
def receiver_template(settings: NodeSettings, folder: Path) -> Generator[Template]:
    """A template for these settings; a receiver that still runs is killed at the end."""
    file, log = folder / "settings.json", folder / "receiver.log"
    file.write_text(settings.model_dump_json())
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.receiver", file],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
    template = Template(settings, process, log, folder / "trace")
    try:
        yield template
    finally:
        if template.running is not None:
            template.running.kill()
        _of(process.stdin).close()
        process.wait(20)
        _of(process.stdout).close()


def _of(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def main() -> None:
    """Fork a receiver for each plan, until standard input ends."""
    import dicom_node.storage_scu
    import dicom_node.supervisor.roles  # noqa: F401 (loaded before the first fork)

    settings = NodeSettings.model_validate_json(Path(sys.argv[1]).read_text())
    for line in sys.stdin:
        plan = json.loads(line)
        if (pid := os.fork()) == 0:
            _receive(settings, plan)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _receive(settings: NodeSettings, plan: dict[str, Any]) -> NoReturn:
    from dicom_node.observability import configure
    from dicom_node.supervisor.process import SUPERVISOR_PID
    from dicom_node.supervisor.roles import run_role

    os.environ[SUPERVISOR_PID] = str(os.getppid())
    try:
        configure(level=settings.log.level, format="json")
        fault = Fault.from_json(plan["fault"]) if plan["fault"] else None
        inject(
            settings.spool.path,
            Path(plan["trace"]) if plan["trace"] else None,
            fault,
            trouble=Path(plan["trouble"]),
            at_once=plan["at_once"],
        )
        run_role("receive", settings)
    except BaseException as error:
        print(f"receiver: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(70)


def peer(template: Template) -> Peer:
    """The receiver as a sender configures it."""
    return Peer("DIFFCODE", "127.0.0.1", template.port, "TESTER")


def send(template: Template, items: Iterable[Item]) -> list[Item]:
    """Send over one association until it ends; what was acknowledged."""
    paths, acknowledged = [item.path for item in items], []
    with connected(peer(template), paths) as association:
        for item in items:
            answer = association.send_c_store(item.path)
            if "Status" not in answer:
                break
            assert answer.Status == 0x0000
            acknowledged.append(item)
    return acknowledged


def entries(items: Iterable[Item]) -> list[tuple[str, str]]:
    """Instances as the auditor wants them."""
    return [(item.sop_instance_uid, item.sha256) for item in items]


def survives_a_kill(template: Template, fault: Fault, items: list[Item]) -> None:
    """Send until the receiver is killed at the second of three instances, then all, once more.

    AssertionError where the first was not acknowledged, more was than is stored, or anything that
    was acknowledged is not there exactly once.
    """
    auditor = Auditor(template.settings)
    receiver = template.start(fault)
    acknowledged = send(template, items)
    assert receiver.wait() == -signal.SIGKILL
    most = 2 if (fault.step, fault.when) == (Step.ANSWER, "after") else 1
    assert acknowledged == items[:most][: len(acknowledged)]
    assert acknowledged
    auditor.nothing_half_written()
    auditor.all_there_once(entries(acknowledged))
    template.start()
    assert send(template, items) == items
    auditor.all_there_once(entries(items))
    auditor.nothing_half_written()
    assert auditor.orphans() == set()
    assert auditor.temporary() == []


if __name__ == "__main__":
    main()
