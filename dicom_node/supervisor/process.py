"""What a process owes its manager: signals as flags, sd_notify, and to end when it ends."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dicom_node.observability import get_logger

ROLES = ("receive", "restore", "deliver")

EX_CONFIG = 78  # sysexits.h: a child cannot start as it is configured
SUPERVISOR_PID = "DICOM_NODE_SUPERVISOR_PID"
_PR_SET_PDEATHSIG = 1  # prctl(2)
# mallopt(3)
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_MAPPED = 1 << 19

_log = get_logger(__name__)


@dataclass
class Signals:
    """What the process has been asked to do."""

    stop: threading.Event = field(default_factory=threading.Event)
    reload: threading.Event = field(default_factory=threading.Event)


@contextmanager
def handled_signals() -> Generator[Signals]:
    """SIGTERM and SIGINT set ``stop``, SIGHUP sets ``reload``; a handler does nothing else."""
    signals = Signals()
    wanted = {
        signal.SIGTERM: signals.stop,
        signal.SIGINT: signals.stop,
        signal.SIGHUP: signals.reload,
    }

    def note(number: int, _frame: FrameType | None) -> None:
        wanted[signal.Signals(number)].set()

    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def give_back_memory() -> bool:
    """Let what a thread frees be free for all, and large blocks go back to the kernel.

    glibc makes a heap for each of many threads, and takes blocks of a size that was freed before
    from these: the buffers of associations that have ended stay, one here and one there.  Whether
    the C library is one that can be asked.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_ARENA_MAX, 2), (_M_MMAP_THRESHOLD, _MAPPED))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)


@contextmanager
def logged_threads() -> Generator[None]:
    """A thread that ends by an exception is logged by its type and places alone.

    Python would print the words of the exception, which may quote a data set.
    """

    def log(ended: threading.ExceptHookArgs) -> None:
        _log.error("thread ended", action="thread_failed", exc_info=ended.exc_value)

    before, threading.excepthook = threading.excepthook, log
    try:
        yield
    finally:
        threading.excepthook = before


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
        messages: list[dict[str, str]] = []
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


def die_with_supervisor(environment: Mapping[str, str]) -> None:
    """Have the kernel send SIGTERM when the parent process dies, however it dies."""
    parent = environment.get(SUPERVISOR_PID)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        raise SystemExit(0)  # it died before the request was made
