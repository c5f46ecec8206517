"""A whole association as a target: a listening node, a real socket, and a peer that sends anything.

What must hold for every input: the node answers with whole PDUs and closes; no thread dies; nothing
is opened for writing outside its folder; threads and descriptors do not grow.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dicom_node.ledger import reports
from dicom_node.ledger.tables import open_ledger
from dicom_node.spool import Spool
from dicom_node.storage_scp import StorageSCP
from tests.fuzz.targets import INSTANCE, SYNTAXES
from tests.integration.conftest import RECEIVE_PATHS, node_settings
from tests.integration.peers import CT, until
from tests.integration.senders import Auditor
from tests.integration.wire import (
    ABORT,
    ASSOCIATE_AC,
    ASSOCIATE_RJ,
    P_DATA,
    RELEASE_RP,
    VERIFICATION,
    Answer,
    Wire,
    store_request,
)

_CONTEXTS = [*((CT, str(syntax)) for syntax in SYNTAXES), (VERIFICATION, str(SYNTAXES[0]))]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"}
# PS3.4 B.2.3 and PS3.7 C.5: what a C-STORE or C-ECHO of ours may be answered.
_STATUSES = {0x0000, 0x0110, 0x0122, 0x0211, 0xA700, 0xA900, 0xC000}
_LOOK_AFTER = 200


@dataclass
class _Watch:
    """What the process does that it must not, seen by an audit hook and the threads' hook."""

    root: Path
    findings: list[str] = field(default_factory=list)
    #: Between inputs, whoever runs the target may write where it likes.
    active: bool = False

    def install(self) -> None:
        """Watch from now on; an audit hook stays for good."""
        sys.addaudithook(self._audit)
        threading.excepthook = self._thread_died

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and flags & _WRITES:
                self._judge(event, path)
        elif event in _CHANGES:
            for path in arguments[: 2 if event == "os.rename" else 1]:
                self._judge(event, path)

    def _judge(self, event: str, path: object) -> None:
        if self.active and isinstance(path, str | bytes | os.PathLike):
            absolute = os.path.abspath(os.fsdecode(path))
            if not absolute.startswith(f"{self.root}/") and absolute != os.devnull:
                self.findings.append(f"{event} of {absolute}")

    def _thread_died(self, arguments: threading.ExceptHookArgs) -> None:
        # A peer that leaves at an odd moment: pynetdicom's state machine raises, and the thread of
        # that connection ends by it, as it was about to. That nothing stays behind is looked at.
        # So does a command set that it cannot decode.
        frames = [frame.filename for frame in traceback.extract_tb(arguments.exc_traceback)]
        if not any("/pynetdicom/dul.py" in name for name in frames):
            self.findings.append(f"a thread died: {arguments.exc_type.__name__} in {frames[-1:]}")


class AssociationTarget:
    """One node that listens, and one association with it for each input."""

    def __init__(self, receive_path: str) -> None:
        """*receive_path* is a key of RECEIVE_PATHS."""
        memory = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None)).resolve()
        settings = node_settings(
            self._folder,
            association={
                **RECEIVE_PATHS[receive_path],
                "network_timeout_s": 5.0,
                # So long pynetdicom waits for a request that it could not decode.
                "acse_timeout_s": 1.0,
            },
            spool={"path": self._folder / "spool", "min_free_bytes": 0, "min_free_percent": 0},
        )
        self._ledger = open_ledger(settings.ledger.url)
        self._scp = StorageSCP(settings, Spool(settings.spool.path), self._ledger)
        self._scp.start()
        self._auditor = Auditor(settings)
        self._watch = _Watch(self._folder)
        self._watch.install()
        self._usual: tuple[int, int] | None = None
        self._count = 0

    def __call__(self, data: bytes) -> None:
        """Send one input."""
        if len(data) < 4:
            return
        self._watch.active = True
        with Wire(self._scp.address[1], limit_s=15) as wire:
            if data[0] % 3:
                wire.associate(_CONTEXTS)
            with suppress(OSError):  # it has heard enough
                wire.send(_octets(data))
                wire.socket.shutdown(socket.SHUT_WR)
            for answer in wire.answers():
                _check(answer)
        self._count += 1
        if self._count % _LOOK_AFTER == 0:
            self._look()
        self._watch.active = False
        assert not self._watch.findings, self._watch.findings

    def _open_associations(self) -> int:
        return int(reports.stats(self._ledger)["associations"]["open"])

    def close(self) -> None:
        """Stop listening, and remove the folder."""
        self._look()
        self._scp.stop(0.5)
        self._ledger.dispose()
        shutil.rmtree(self._folder)

    def _look(self) -> None:
        """Nothing half-written, nothing that grows."""
        self._auditor.nothing_half_written()
        for area in ("incoming/??/*", "quarantine/*"):
            for path in (self._folder / "spool").glob(area):
                path.unlink()
        self._auditor.visible.clear()
        until(lambda: not self._open_associations(), "every association is closed in the ledger")
        self._usual = self._usual or _present()
        until(lambda: not self._has_grown(), "threads and descriptors are as before")

    def _has_grown(self) -> bool:
        usual = self._usual or (0, 0)
        return any(now > before + 8 for now, before in zip(_present(), usual, strict=True))


def _present() -> tuple[int, int]:
    """Threads and descriptors of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def _octets(data: bytes) -> bytes:
    """What goes over the wire: anything, anything once associated, or a C-STORE of anything."""
    kind, size, syntax, rest = data[0] % 3, data[1], data[2] % len(SYNTAXES), data[3:]
    if kind < 2:
        return rest
    context_id = 2 * syntax + 1
    pdus = store_request(rest, INSTANCE, context_id=context_id, maximum_length=16 + 32 * size)
    return b"".join(pdus)


def _check(answer: Answer) -> None:
    assert answer.kind in (ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RP, ABORT), answer
    if answer.kind == P_DATA:
        response = answer.response
        assert response.Status in _STATUSES or 0xC000 <= response.Status < 0xD000, response.Status
        assert "internal error" not in str(response.get("ErrorComment", ""))
