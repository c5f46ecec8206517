"""The node as a program of its own: made by `init`, run by `serve`, watched by `list --json`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.main_job.peers import Archive, free_ports, start, stop, wait_for_port

AE_TITLE = "DIFFCODE"
PROGRAM = Path(sys.executable).with_name("dicom-node")

# A series on this machine is complete when its association has closed; the default of ten quiet
# seconds is for scanners that open one association for each slice.
ENVIRONMENT = {"DICOM_NODE__ASSEMBLY__QUIET_S": "2"}


class NodeCommandError(Exception):
    """A node command ended with an error; the text is what it said."""


@dataclass(frozen=True)
class Node:
    """A node that is running."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of `dicom-node jobs|series|deliveries list --json`."""
        answer = command(kind, "list", "--json", "-c", str(self.folder / "node.toml"))
        rows: list[dict[str, Any]] = json.loads(answer)
        return rows

    def check(self) -> None:
        """Raise RuntimeError if the node has ended."""
        if self.process.poll() is not None:
            log = self.folder / "node.log"
            raise RuntimeError(f"the node ended with code {self.process.returncode}; see {log}")


def command(*arguments: str) -> str:
    """Run one node command and return its standard output; raise NodeCommandError."""
    done = subprocess.run(
        [PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ENVIRONMENT},
    )
    if done.returncode != 0:
        raise NodeCommandError(f"dicom-node {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def open_node(folder: Path, archive: Archive, bundle: str | None, *, gates: str) -> Iterator[Node]:
    """Make a node in *folder* that delivers to the archive, and run it until the block ends.

    *gates*: what a failed gate leads to, "hold" or "warn".
    """
    (port,) = free_ports(1)
    destination = f"archive={archive.ae_title}@127.0.0.1:{archive.port}"
    where = ["--host", "127.0.0.1", "--port", str(port)]
    model = ["--bundle", bundle] if bundle else []
    command("init", str(folder), "--ae-title", AE_TITLE, *where, "--to", destination, *model)
    if gates == "warn":
        _let_gates_warn(folder / "node.toml")
    with (folder / "node.log").open("wb") as log:
        serve: list[str | Path] = [PROGRAM, "serve", "-c", folder / "node.toml"]
        process = start(serve, log, ENVIRONMENT)
        try:
            wait_for_port(port, process)
            yield Node(folder, port, process)
        finally:
            stop(process)


def _let_gates_warn(config: Path) -> None:
    text = config.read_text()
    for key, value in (("on_fail", '"warn"'), ("actions", "{}")):
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    config.write_text(text)
