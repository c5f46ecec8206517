"""The receivers that are compared, each a process of its own with a folder of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DCMTK = Path("/usr/bin")
_ORTHANC = ("/usr/sbin/Orthanc", "/usr/local/sbin/Orthanc")
ORTHANC = next((path for name in _ORTHANC if (path := Path(name)).exists()), Path(_ORTHANC[0]))
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Receiver:
    """One row: how it is started in a folder on a port, and what it is called."""

    name: str
    command: Callable[[Path, int], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    title: str = "ANY"
    raw: bool = False


@dataclass
class Running:
    """A receiver's process; its figures include the processes that it forked."""

    receiver: Receiver
    process: subprocess.Popen[bytes]
    port: int
    folder: Path

    def cpu_seconds(self) -> float:
        """User and system time so far, of itself and of the children that have ended or live."""
        return sum(_cpu(pid) for pid in self._processes())

    def resident_bytes(self) -> int:
        """Resident memory now, shared pages counted for each process."""
        return sum(_resident(pid) for pid in self._processes())

    def peak_bytes(self) -> int:
        """The highest resident memory of its first process (VmHWM)."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024

    def _processes(self) -> list[int]:
        found = [self.process.pid]
        for pid in found:
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                continue
            found += map(int, children)
        return found


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(value) for value in fields[11:15]) / _TICKS


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0


@contextmanager
def running(receivers: list[Receiver], folder: Path) -> Generator[list[Running]]:
    """Start receivers, and end them and empty what they stored."""
    with ExitStack() as stack:
        yield [stack.enter_context(_running(receiver, folder)) for receiver in receivers]


@contextmanager
def _running(receiver: Receiver, parent: Path) -> Generator[Running]:
    folder, port = parent / f"receiver-{free_port()}", free_port()
    folder.mkdir(parents=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            receiver.command(folder, port),
            env={**os.environ, **receiver.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[1],
        )
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{receiver.name} does not listen: {_tail(folder / 'log')}")
            time.sleep(0.05)
        yield Running(receiver, process, port, folder)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _empty(folder)


def _empty(folder: Path) -> None:
    """Give back the room that files take, and remove them at the end of all.

    ext4 steps over inodes that were deleted a moment ago: who creates files next would pay for it.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-1000:]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _node(loop: bool) -> Callable[[Path, int], list[str]]:
    def command(folder: Path, port: int) -> list[str]:
        configuration = folder / "node.toml"
        configuration.write_text(
            f"""[node]
port = {port}
data_dir = "."
[association]
storage_loop = {str(loop).lower()}
[assembly]
quiet_s = 86400.0
[log]
level = "WARNING"
"""
        )
        (folder / "routes.toml").write_text(
            '[[route]]\nname = "none"\ntask = "ignore"\nreason = "benchmark"\nmatch = {}\n'
        )
        program = Path(sys.executable).with_name("dicom-node")
        return [str(program), "serve", "-c", str(configuration), "--role", "receive"]

    return command


def _storescp(*more: str) -> Callable[[Path, int], list[str]]:
    def command(folder: Path, port: int) -> list[str]:
        kept = folder / "kept"
        kept.mkdir()
        return [
            str(DCMTK / "storescp"),
            "+xa",
            "-pdu",
            "131072",
            "-od",
            str(kept),
            *more,
            str(port),
        ]

    return command


def _orthanc(no_delay: bool) -> Callable[[Path, int], list[str]]:
    def command(folder: Path, port: int) -> list[str]:
        configuration = {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "Plugins": [],
            "HttpServerEnabled": False,
            "DicomPort": port,
            "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowStore": True,
            "TcpNoDelay": no_delay,
        }
        (folder / "orthanc.json").write_text(json.dumps(configuration))
        return [str(ORTHANC), str(folder / "orthanc.json")]

    return command


def _pynetdicom(folder: Path, port: int) -> list[str]:
    kept = folder / "kept"
    kept.mkdir()
    return [sys.executable, "-m", "pynetdicom", "storescp", str(port), "-od", str(kept), "-q"]


def _limit(folder: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.limit", str(port), str(folder)]


def _bare_loop(*, keeps: bool) -> Callable[[Path, int], list[str]]:
    def command(folder: Path, port: int) -> list[str]:
        kept = [str(folder)] if keeps else []
        return [sys.executable, "-m", "benchmarks.bare_loop", str(port), *kept]

    return command


_ND = {"TCP_NODELAY": "1"}

NODE = Receiver("node", _node(loop=True), title="DIFFCODE")
NODE_STOCK = Receiver("node, storage_loop = false", _node(loop=False), title="DIFFCODE")
STORESCP = Receiver("storescp (no flush)", _storescp())
STORESCP_ND = Receiver("storescp, TCP_NODELAY=1 (no flush)", _storescp(), _ND)
STORESCP_FORK = Receiver("storescp --fork, TCP_NODELAY=1 (no flush)", _storescp("--fork"), _ND)
ORTHANC_PLAIN = Receiver("Orthanc", _orthanc(no_delay=False), title="ORTHANC")
ORTHANC_ND = Receiver("Orthanc, TCP_NODELAY=1", _orthanc(no_delay=True), _ND, title="ORTHANC")
PYNETDICOM = Receiver("pynetdicom storescp app (no flush)", _pynetdicom)
LIMIT = Receiver("limit: raw socket to disk with the same flushes", _limit, raw=True)
DISCARD = Receiver("the sender's limit: our loop, nothing checked or kept", _bare_loop(keeps=False))
DURABLE = Receiver(
    "the limit: the same loop and flushes, nothing checked or recorded", _bare_loop(keeps=True)
)
