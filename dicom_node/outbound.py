"""All that a deliver process does: deliveries on threads; requests, reports and notices in turn.

One slow destination holds one thread, and no other destination.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Engine

from dicom_node.commitment import CommitmentWorker
from dicom_node.commitment_scp import CustodyWorker
from dicom_node.delivery import DeliveryWorker
from dicom_node.errors import TransientError
from dicom_node.ledger.changes import Changes
from dicom_node.notify import Notifier
from dicom_node.observability import get_logger
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from dicom_node.transfers import Dispatches

Clock = Callable[[], float]

# Trouble that passes, as a ledger that does not answer, is waited out.
_TROUBLE_S = 2.0
_JOIN_S = 5.0

_log = get_logger(__name__)


class Outbound:
    """Delivery workers, each on a thread of its own, and what is asked, reported and told."""

    def __init__(
        self,
        settings: NodeSettings,
        spool: Spool,
        engine: Engine,
        *,
        names: Sequence[str],
        stop: threading.Event,
        dispatches: Dispatches | None = None,
        clock: Clock = time.time,
    ) -> None:
        """There is one worker for each of *names*, under which it holds its leases."""
        self._idle_s = settings.delivery.idle_poll_s
        self._engine = engine
        self._stop = stop
        self._workers = [
            DeliveryWorker(
                settings, spool, engine, clock, name=name, stop=stop, dispatches=dispatches
            )
            for name in names
        ]
        self._duties = (
            CommitmentWorker(settings, engine, clock),
            CustodyWorker(settings, spool, engine, clock),
            Notifier(settings, engine, clock),
        )
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Give back what an earlier process of these names left in hand, and begin to deliver."""
        for number, worker in enumerate(self._workers):
            worker.recover()
            thread = threading.Thread(
                target=self._run, args=(worker,), name=f"deliver-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def turn(self) -> bool:
        """Ask, report or tell what is due; False when nothing was.

        RuntimeError where a worker has ended by a fault of ours: the process must not go on
        without it.
        """
        if not self._stop.is_set() and not all(thread.is_alive() for thread in self._threads):
            raise RuntimeError("a delivery worker has ended")
        # Each of them has its turn, whatever the others have to do.
        busy = [duty.run_once() for duty in self._duties]
        return any(busy)

    def close(self) -> None:
        """Let each worker end after the instance in hand, and give back what it has left."""
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for worker in self._workers:
            worker.recover()

    def _run(self, worker: DeliveryWorker) -> None:
        changes = Changes(self._engine)
        try:
            while not self._stop.is_set():
                pause = self._turn(worker)
                if pause == self._idle_s:
                    changes.wait(self._stop, pause)
                elif pause:
                    self._stop.wait(pause)
        finally:
            changes.close()
            worker.close()

    def _turn(self, worker: DeliveryWorker) -> float:
        """One delivery; how long to wait before the next, in seconds."""
        try:
            return 0.0 if worker.run_once() else self._idle_s
        except TransientError as error:
            _log.warning("delivery waits", action="delivery_trouble", error=error.message)
            return _TROUBLE_S
