"""A whole node as an administrator runs it: ``dicom-node init`` and ``serve`` in processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dicom_node.ledger import reports
from dicom_node.ledger.tables import open_ledger
from restoration.bundle import write_bundle
from restoration.diffcode import DiffCode, DiffCodeConfig
from tests.integration.peers import reserve_port, until

PROGRAM = (sys.executable, "-m", "dicom_node.cli.main")
TASKS = ("mri_sr", "ct_denoise", "pet_synthesis")

# Short waits, and one thread: what is tested is the way through, not the model.
QUICK = {
    "quiet_s": "1.0",
    "tick_s": "0.2",
    "idle_poll_s": "0.2",
    "first_s": "0.5",
    "threads": "1",
    "min_free_bytes": "0",
    "min_free_percent": "0",
    # A network that was never trained is rightly held by the gates; here it is to be delivered.
    "on_fail": '"pass"',
    "on_warn": '"pass"',
    "uncalibrated": '"pass"',
    "actions": "{}",
    "highest": "0.99",
}


def write_tiny_bundle(folder: Path) -> Path:
    """A bundle of the smallest network, never trained: it changes pixels and is quick."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiffCode(DiffCodeConfig.preset("tiny"))
    fields = {"name": "tiny", "version": "0", "licence": "Apache-2.0", "tasks": list(TASKS)}
    write_bundle(folder, model, fields)
    return folder


def command(*arguments: str | Path, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``dicom-node`` to its end."""
    given = ["-c", str(config)] if config is not None else []
    return subprocess.run(
        [*PROGRAM, *map(str, arguments), *given], capture_output=True, text=True, timeout=300
    )


def initialise(
    folder: Path, bundle: Path | str, destinations: Mapping[str, str], **changes: str
) -> Path:
    """Make a node with ``dicom-node init`` and set keys of its node.toml; returns that file."""
    to = [word for name, peer in destinations.items() for word in ("--to", f"{name}={peer}")]
    port = str(reserve_port())
    done = command("init", folder, "--port", port, "--bundle", str(bundle), *to)
    assert done.returncode == 0, done.stderr
    config = folder / "node.toml"
    text = config.read_text()
    for key, value in {**QUICK, **changes}.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        if not count:  # unset: the first such key is that of its section, not of an example
            text, count = re.subn(rf"(?m)^#{key} = .*$", f"{key} = {value}", text, count=1)
        assert count, key
    config.write_text(text)
    return config


def listening_port(config: Path) -> int:
    """The port that a node.toml names."""
    return int(tomllib.loads(config.read_text())["node"]["port"])


@dataclass
class ServedNode:
    """A node that runs; what it is asked goes through its command line."""

    config: Path
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return listening_port(self.config)

    def ask(self, *arguments: str | Path) -> Any:
        """The JSON that a command prints."""
        done = command(*arguments, "--json", config=self.config)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def events(self, action: str) -> list[dict[str, Any]]:
        """The log lines of one action, oldest first."""
        lines = (line for line in self.log.read_text().splitlines() if line.startswith("{"))
        records = [json.loads(line) for line in lines]
        return [record for record in records if record.get("action") == action]

    def child(self, role: str) -> int:
        """The process id of a role's present process."""
        return int([e["pid"] for e in self.events("child_started") if e["role"] == role][-1])

    def jobs(self) -> list[dict[str, Any]]:
        """The ledger's jobs, read beside the running node."""
        engine = open_ledger(f"sqlite:///{self.config.parent / 'ledger.sqlite'}")
        try:
            return reports.jobs(engine)
        finally:
            engine.dispose()

    def wait_for_delivery(self, *series_uids: str, limit_s: float = 240.0) -> None:
        """Wait until the jobs of these series are done and delivered everywhere."""

        def delivered() -> bool:
            ended = {
                job["series_instance_uid"]
                for job in self.jobs()
                if job["state"] == "done"
                and all(each["state"] == "delivered" for each in job["deliveries"])
            }
            return set(series_uids) <= ended

        until(delivered, "every series is restored and delivered", limit_s=limit_s)

    def stop(self) -> tuple[int, float]:
        """SIGTERM; exit code and seconds until the end."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        return code, time.monotonic() - started


@contextmanager
def served(config: Path) -> Generator[ServedNode]:
    """Run ``dicom-node serve`` until the block ends; ready when every role has said so."""
    log = config.parent / "serve.log"
    environment = {**os.environ, "DICOM_NODE__LOG__FORMAT": "json"}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*PROGRAM, "serve", "-c", config], stdout=stream, stderr=stream, env=environment
        )
    node = ServedNode(config, process, log)
    known = len(node.events("node_ready"))
    try:
        until(
            lambda: len(node.events("node_ready")) > known or process.poll() is not None,
            "the node is ready",
            limit_s=120,
        )
        assert process.poll() is None, log.read_text()
        yield node
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(30)
