"""C-ECHO beside peers that hold connections and say nothing, on the port with TLS and without.

Half of the silent peers hold the port without TLS and send no A-ASSOCIATE-RQ, half the other and
send no ClientHello.  What is timed is a C-ECHO of DCMTK's echoscu from the start of the program to
its end, and one of our own from connecting to the answer.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pynetdicom import AE

from benchmarks import receivers
from benchmarks.receivers import DCMTK, NODE, Running

_VERIFICATION = "1.2.840.10008.1.1"


@dataclass(frozen=True)
class Echo:
    """Seconds that C-ECHOs took beside so many silent peers of each kind."""

    silent: int
    own: list[float]
    echoscu: list[float]


def measure(folder: Path, *, silent: int = 30, times: int = 20) -> Echo:
    """Time C-ECHOs while *silent* peers hold each of the two ports."""
    with ExitStack() as stack:
        (running,) = stack.enter_context(receivers.running([_with_tls()], folder))
        secure = int((running.folder / "tls.port").read_text())
        for port in (running.port, secure):
            for _ in range(silent):
                held = socket.create_connection(("127.0.0.1", port), timeout=10)
                stack.callback(held.close)
        return Echo(
            silent,
            [_timed_own(running) for _ in range(times)],
            [_timed_echoscu(running) for _ in range(times)],
        )


def _timed_own(running: Running) -> float:
    entity = AE(ae_title="BENCHMARK")
    entity.add_requested_context(_VERIFICATION)
    begun = time.perf_counter()
    association = entity.associate("127.0.0.1", running.port, ae_title=running.receiver.title)
    if not association.is_established or association.send_c_echo().Status != 0:
        raise SystemExit("C-ECHO failed")
    seconds = time.perf_counter() - begun
    association.release()
    return seconds


def _timed_echoscu(running: Running) -> float:
    command = [str(DCMTK / "echoscu"), "-aec", running.receiver.title]
    begun = time.perf_counter()
    subprocess.run([*command, "127.0.0.1", str(running.port)], check=True)
    return time.perf_counter() - begun


def _with_tls() -> receivers.Receiver:
    def command(folder: Path, port: int) -> list[str]:
        words = NODE.command(folder, port)
        secure = receivers.free_port()
        (folder / "tls.port").write_text(str(secure))
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "node.pem"),
            ],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        (folder / "key.pem").chmod(0o600)
        with (folder / "node.toml").open("a") as configuration:
            configuration.write(
                f'[tls]\nport = {secure}\ncertificate = "node.pem"\nkey = "key.pem"\n'
                "verify_peers = false\n"
            )
        return words

    return replace(NODE, command=command)


def table(echo: Echo) -> str:
    """The times in Markdown."""
    lines = [
        f"### C-ECHO beside {echo.silent} silent peers on each port, without TLS and with it",
        "",
        "| sender | median ms | longest ms |",
        "|---|---|---|",
    ]
    for name, seconds in (
        ("own, from connecting to the answer", echo.own),
        ("echoscu, from its start to its end", echo.echoscu),
    ):
        middle = statistics.median(seconds)
        lines.append(f"| {name} | {1e3 * middle:.0f} | {1e3 * max(seconds):.0f} |")
    return "\n".join([*lines, ""])
