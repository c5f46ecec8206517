"""One role in one process: its service, its loop, and its end within ten seconds."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import socket
import threading
import time
from pathlib import Path
from typing import NoReturn, Protocol

from sqlalchemy import Engine

from dicom_node import audit, commitment, commitment_scp, janitor
from dicom_node.assembler import Assembler
from dicom_node.audit_trail import AuditTrail
from dicom_node.errors import ConfigurationError, TransientError
from dicom_node.inference import LocalEngine
from dicom_node.ledger.changes import Changes
from dicom_node.ledger.tables import open_ledger
from dicom_node.observability import get_logger
from dicom_node.outbound import Outbound
from dicom_node.routing import Routes, load_routes
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_scp import StorageSCP
from dicom_node.supervisor.process import (
    Notifier,
    Signals,
    die_with_supervisor,
    give_back_memory,
    handled_signals,
    logged_threads,
)
from dicom_node.transfers import Dispatches, Receipts

# The promise is ten seconds from SIGTERM to exit; what is left is for closing files.
FORCED_EXIT_S = 7.0
TROUBLE_S = 2.0
# A clock that is read again may not yet show the moment that was waited for.
_NO_EARLIER_S = 0.005

_log = get_logger(__name__)


class Service(Protocol):
    """What one role does between start and stop."""

    idle_s: float

    def turn(self, now: float) -> bool:
        """Do one piece of work; False when there was none."""

    def rest(self, stop: threading.Event, seconds: float) -> None:
        """Wait for work: so long at most, and no longer than until *stop* is set."""

    def reload(self) -> None:
        """Read again what may change while running; bad input keeps the old."""

    def close(self) -> None:
        """Finish or give back what is in hand."""


class ReceiveService:
    """Listens for instances and assembles what has come."""

    def __init__(self, settings: NodeSettings, trail: AuditTrail) -> None:
        self._settings = settings
        self.idle_s = settings.assembly.tick_s
        routes = load_routes(settings.routes, settings.destination_names)
        self._ledger, spool = open_stores(settings)
        recovered = janitor.recover(
            self._ledger, spool, stale_file_s=settings.janitor.stale_file_s, now=time.time()
        )
        _log.info("recovered", action="recovered", **dataclasses.asdict(recovered))
        self._assembler = Assembler(settings, spool, self._ledger, routes)
        self._janitor = janitor.Janitor(settings, self._ledger, spool)
        commitments = [
            *commitment.handlers(self._ledger, time.time),
            *commitment_scp.handlers(settings.commitment_scp, self._ledger, time.time),
        ]
        self._scp = StorageSCP(
            settings,
            spool,
            self._ledger,
            time.time,
            handlers=commitments,
            receipts=Receipts(trail, self._ledger, spool, settings.node.ae_title, time.time),
        )
        self._scp.start()

    def turn(self, now: float) -> bool:
        """Tick the assembler; now and then tidy up."""
        if self._janitor.turn(now):
            self._scp.renew_certificates()
        self._assembler.tick(now)
        return False

    def rest(self, stop: threading.Event, seconds: float) -> None:
        """Wait for the next tick, or until the quiet time of a series is over."""
        stop.wait(min(seconds, self._assembler.next_look(time.time()) + _NO_EARLIER_S))

    def reload(self) -> None:
        """Read routes.toml and the TLS files again; what has a mistake keeps the old in force."""
        self._scp.renew_certificates(force=True)
        self._assembler.routes = reloaded(self._settings) or self._assembler.routes

    def close(self) -> None:
        """Stop listening, and wait a little for open associations."""
        self._scp.stop()
        self._ledger.dispose()


class RestoreService:
    """Restores queued jobs with the model in this process."""

    def __init__(self, settings: NodeSettings, stop: threading.Event) -> None:
        # What derives and writes images takes 20 MB, which the other roles need not have.
        from dicom_node.early import EarlySlices
        from dicom_node.restore_worker import RestoreWorker

        self._settings = settings
        engine = settings.engine
        self.idle_s = engine.idle_poll_s
        model = LocalEngine.open(engine.bundle, device=engine.device, threads=engine.threads)
        self._ledger, spool = open_stores(settings)
        self._changes = Changes(self._ledger)
        self._slot = WorkerSlot(settings.node.data_dir, "restore")
        self._early = None
        if engine.early:
            routes = load_routes(settings.routes, settings.destination_names)
            self._early = EarlySlices(settings, spool, self._ledger, model, routes)
        self._worker = RestoreWorker(
            settings,
            spool,
            self._ledger,
            model,
            name=self._slot.name,
            clock=time.time,
            stop=stop,
            early=self._early,
        )
        self._worker.recover(time.time())

    def turn(self, now: float) -> bool:
        """Do one job, or one slice ahead of its job."""
        return self._worker.run_once(now)

    def rest(self, stop: threading.Event, seconds: float) -> None:
        """Wait until somebody writes to the ledger."""
        self._changes.wait(stop, seconds)

    def reload(self) -> None:
        """Read routes.toml again, by which slices are chosen; another bundle is another process."""
        if self._early is not None:
            self._early.routes = reloaded(self._settings) or self._early.routes

    def close(self) -> None:
        """Give back what is in hand."""
        self._worker.recover(time.time())
        self._slot.close()
        self._ledger.dispose()


class DeliverService:
    """Sends restored series to their destinations."""

    def __init__(self, settings: NodeSettings, stop: threading.Event, trail: AuditTrail) -> None:
        self.idle_s = settings.delivery.idle_poll_s
        self._ledger, spool = open_stores(settings)
        count = range(settings.delivery.workers)
        self._slots = [WorkerSlot(settings.node.data_dir, "deliver") for _ in count]
        self._outbound = Outbound(
            settings,
            spool,
            self._ledger,
            names=[slot.name for slot in self._slots],
            stop=stop,
            dispatches=Dispatches(trail, spool, settings.node.ae_title, time.time),
        )
        self._outbound.start()

    def turn(self, now: float) -> bool:
        """Ask for commitments, answer for originals and tell people; series go on threads."""
        return self._outbound.turn()

    def rest(self, stop: threading.Event, seconds: float) -> None:
        """Wait; what is sent goes on threads, which wait for the ledger."""
        stop.wait(seconds)

    def reload(self) -> None:
        """Nothing to read again."""

    def close(self) -> None:
        """Give back what is in hand."""
        self._outbound.close()
        for slot in self._slots:
            slot.close()
        self._ledger.dispose()


def reloaded(settings: NodeSettings) -> Routes | None:
    """The routing table as it is now; None where it has a mistake."""
    try:
        routes = load_routes(settings.routes, settings.destination_names)
    except ConfigurationError as error:
        _log.error("routes kept", action="reload_failed", problems=error.problems)
        return None
    _log.info("routes reloaded", action="reloaded", routes=len(routes.rules))
    return routes


def open_stores(settings: NodeSettings) -> tuple[Engine, Spool]:
    """The two stores that all processes share."""
    room = settings.spool
    spool = Spool(
        room.path,
        min_free_bytes=room.min_free_bytes,
        min_free_percent=room.min_free_percent,
        resume_factor=room.resume_factor,
    )
    return open_ledger(settings.ledger.url), spool


class WorkerSlot:
    """A worker name that a successor can take over, never a neighbour on the same machine.

    The kernel drops the lock when the process dies, however it dies; who gets the lock may give
    back at once what the name still holds in the ledger.
    """

    def __init__(self, folder: Path, role: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            self._file = (folder / f"{role}-{number}.lock").open("a")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                continue
            self.name = f"{role}-{number}@{socket.gethostname()}"
            return

    def close(self) -> None:
        """Let the name go."""
        self._file.close()


def build_service(
    role: str, settings: NodeSettings, signals: Signals, trail: AuditTrail
) -> Service:
    """The service of a role, started; ConfigurationError when it cannot be."""
    if role == "receive":
        give_back_memory()
        return ReceiveService(settings, trail)
    if role == "restore":
        return RestoreService(settings, signals.stop)
    return DeliverService(settings, signals.stop, trail)


def serve_role(role: str, service: Service, signals: Signals, notifier: Notifier) -> None:
    """Turn *service* until it is told to stop; trouble that passes is waited out."""
    notifier.send(READY="1", STATUS=f"{role} is running", X_ROLE=role)
    _log.info("role started", action="role_started", role=role)
    try:
        while not signals.stop.is_set():
            if signals.reload.is_set():
                signals.reload.clear()
                service.reload()
            pause = _turn(role, service)
            notifier.pulse(time.monotonic())
            if pause == service.idle_s:
                service.rest(signals.stop, pause)
            elif pause:
                signals.stop.wait(pause)
    finally:
        notifier.send(STOPPING="1", X_ROLE=role)
        service.close()
        _log.info("role stopped", action="role_stopped", role=role)


def _turn(role: str, service: Service) -> float:
    try:
        return 0.0 if service.turn(time.time()) else service.idle_s
    except TransientError as error:
        _log.warning("role waits", action="role_trouble", role=role, error=str(error))
        return TROUBLE_S


def run_role(role: str, settings: NodeSettings) -> NoReturn:
    """Run one role until SIGTERM and end the process; ConfigurationError when it cannot start."""
    die_with_supervisor(os.environ)
    notifier = Notifier(os.environ)
    with handled_signals() as signals, logged_threads():
        trail = AuditTrail(settings)
        try:
            service = build_service(role, settings, signals, trail)
        except ConfigurationError as error:
            notifier.send(STATUS="; ".join(error.problems), X_ROLE=role)
            raise
        deadline = threading.Thread(target=_exit_by_deadline, args=(service, signals), daemon=True)
        deadline.start()
        ae_title = settings.node.ae_title
        trail.write(audit.application_activity(ae_title, time.time(), started=True))
        serve_role(role, service, signals, notifier)
        trail.write(audit.application_activity(ae_title, time.time(), started=False))
        trail.close()
    # All is closed. Taking torch's modules apart keeps a busy CPU for seconds, and there are ten.
    os._exit(0)


def _exit_by_deadline(service: Service, signals: Signals) -> None:
    """A slice on a slow CPU or a peer that hangs must not outlast the promise of ten seconds."""
    signals.stop.wait()
    time.sleep(FORCED_EXIT_S)
    _log.warning("drain took too long", action="drain_forced")
    service.close()
    os._exit(0)
