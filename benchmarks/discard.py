"""The sender's own limit: our storage loop with a receiver that answers and keeps nothing.

    python -m benchmarks.discard PORT

What a sender reaches here no receiver in Python can make it exceed: the loop reads every octet,
parses PDUs and commands, and answers 0x0000.  No check, no digest, no file, no row.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu import A_ASSOCIATE_AC

from dicom_node.association import EventHandler, configure_protocol
from dicom_node.storage_loop import Context, Handover, StorageLoop, Timeouts, contexts_of
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


def main() -> None:
    """Serve until killed."""
    configure_protocol()
    handovers: dict[Association, Handover] = {}
    lock = threading.Lock()

    def handover(event: Event) -> Handover:
        with lock:
            return handovers.setdefault(event.assoc, Handover())

    def on_sent(event: Event) -> None:
        if isinstance(event.pdu, A_ASSOCIATE_AC):
            handover(event).lend()

    def begin(_: Context, __: CommandSet) -> _Discarded:
        return _Discarded()

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

    entity = AE(ae_title="DISCARD")
    entity.maximum_pdu_size = 131_072
    entity.supported_contexts = AllStoragePresentationContexts
    handlers: list[EventHandler] = [
        (evt.EVT_PDU_SENT, on_sent),
        (evt.EVT_ESTABLISHED, on_established),
    ]
    entity.start_server(("127.0.0.1", int(sys.argv[1])), block=True, evt_handlers=handlers)


if __name__ == "__main__":
    main()
