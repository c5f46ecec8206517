"""Two limits for senders that speak DICOM: our storage loop with little or nothing behind it.

    python -m benchmarks.bare_loop PORT            answers and keeps nothing
    python -m benchmarks.bare_loop PORT FOLDER     makes each instance durable, and nothing more

What a sender reaches at the first no receiver in Python can make it exceed: the loop reads every
octet, parses PDUs and commands, and answers 0x0000.  The second writes the data set to a temporary
file, gives it its name, and flushes file and folder at once, as the node does.  Neither checks,
hashes or records, so what the node reaches lies below.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu import A_ASSOCIATE_AC

from dicom_node.association import EventHandler, configure_protocol
from dicom_node.flushing import flush_together
from dicom_node.storage_loop import Begin, Context, Handover, StorageLoop, Timeouts, contexts_of
from dicom_node.upper_layer import CommandSet, Limits


@dataclass(frozen=True)
class _Success:
    status: int = 0x0000
    comment: str = ""


class _Discarded:
    """An instance of which nothing is kept."""

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Take octets and forget them."""

    def finish(self) -> _Success:
        """Success, whatever it was."""
        return _Success()

    def close(self) -> None:
        """There is nothing to remove."""


class _Kept:
    """An instance that is durable once it is answered, whatever its bytes are."""

    def __init__(self, temporary: str, name: str, entries: int) -> None:
        self._temporary, self._name, self._entries = temporary, name, entries
        self._file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Append octets."""
        if os.writev(self._file, pieces) != sum(map(len, pieces)):
            raise SystemExit("the disk is full")

    def finish(self) -> _Success:
        """Success once the file and its entry are on the disk."""
        os.rename(self._temporary, self._name)
        if any(flush_together((self._file, self._entries))):
            raise SystemExit("the disk does not flush")
        return _Success()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def _keeping(folder: Path) -> Begin:
    """What begins an instance that is kept in a folder."""
    for name in ("temporary", "kept"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    entries, numbers = os.open(folder / "kept", os.O_RDONLY), itertools.count()

    def begin(_: Context, __: CommandSet) -> _Kept:
        number = next(numbers)
        return _Kept(f"{folder}/temporary/{number}", f"{folder}/kept/{number}", entries)

    return begin


def _discarding(_: Context, __: CommandSet) -> _Discarded:
    return _Discarded()


def main() -> None:
    """Serve until killed."""
    begin: Begin = _keeping(Path(sys.argv[2])) if len(sys.argv) > 2 else _discarding
    configure_protocol()
    handovers: dict[Association, Handover] = {}
    lock = threading.Lock()

    def handover(event: Event) -> Handover:
        with lock:
            return handovers.setdefault(event.assoc, Handover())

    def on_sent(event: Event) -> None:
        if isinstance(event.pdu, A_ASSOCIATE_AC):
            handover(event).lend()

    def on_established(event: Event) -> None:
        association = event.assoc
        handover(event).use(
            association,
            lambda connection: StorageLoop(
                connection,
                contexts_of(association),
                begin,
                limits=Limits(),
                timeouts=Timeouts(60, 60),
            ).run(),
        )

    entity = AE(ae_title="LIMIT")
    entity.maximum_pdu_size = 131_072
    entity.supported_contexts = AllStoragePresentationContexts
    handlers: list[EventHandler] = [
        (evt.EVT_PDU_SENT, on_sent),
        (evt.EVT_ESTABLISHED, on_established),
    ]
    entity.start_server(("127.0.0.1", int(sys.argv[1])), block=True, evt_handlers=handlers)


if __name__ == "__main__":
    main()
