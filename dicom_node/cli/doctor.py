"""``dicom-node doctor``: one line for each part of the node, with what to do about it."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dicom_node.cli import common
from dicom_node.errors import ConfigurationError, NodeError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dicom_node.settings import NodeSettings

State = Literal["good", "warning", "problem"]


@dataclass(frozen=True)
class Diagnosis:
    """What was found about one part of the node, and what to do when it is not good."""

    check: str
    state: State
    detail: str
    advice: str = ""


def examine(config: Path) -> list[Diagnosis]:
    """Every check in the order in which a person would make them.

    A failed one stops no other, but for those that ask a ledger which does not open.
    """
    try:
        settings = common.load_settings(config)
    except ConfigurationError as error:
        return [Diagnosis("settings", "problem", each, "edit it") for each in error.problems]
    found = [_settings_file(config)]
    for check in _CHECKS:
        if check not in _OF_THE_LEDGER or not _is_missing("ledger", found):
            found.extend(_guarded(check, settings))
    return found


def _is_missing(name: str, found: Sequence[Diagnosis]) -> bool:
    return any(each.check == name and each.state == "problem" for each in found)


def _settings_file(config: Path) -> Diagnosis:
    """Who may write node.toml says where patients' images go."""
    if config.stat().st_mode & 0o022:
        advice = f"chmod go-w {config}"
        return Diagnosis("settings", "problem", f"{config} can be changed by others", advice)
    return Diagnosis("settings", "good", str(config))


def _guarded(
    check: Callable[[NodeSettings], Iterator[Diagnosis]], settings: NodeSettings
) -> list[Diagnosis]:
    try:
        return list(check(settings))
    except (NodeError, OSError) as error:
        name = check.__name__.strip("_")
        return [Diagnosis(name, "problem", str(error), _ADVICE.get(name, ""))]


_ADVICE = {
    "routes": "edit the routing table; `dicom-node route explain` shows what it does",
    "spool": "give the node's account write permission to the folder",
    "ledger": "see that the database is there and the node's account may write to it",
    "refused": "give the node's account read permission to audit.journal",
    "model": "set engine.bundle to a bundle that is shipped, or to a folder with one",
    "disk": "free space, or move the spool to a larger disk; `dicom-node purge --dry-run`",
    "clock": "let chrony or systemd-timesyncd keep the clocks of all machines",
}


def _routes(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.routing import load_routes

    try:
        routes = load_routes(settings.routes, settings.destination_names)
    except ConfigurationError as error:
        for problem in error.problems:
            yield Diagnosis("routes", "problem", problem, _ADVICE["routes"])
        return
    yield Diagnosis("routes", "good", f"{len(routes.rules)} routes in {settings.routes}")


def _spool(settings: NodeSettings) -> Iterator[Diagnosis]:
    folder = settings.spool.path
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Diagnosis("spool", "problem", f"{existing} is not writable", _ADVICE["spool"])
        return
    if folder.exists() and folder.stat().st_mode & 0o007:
        advice = f"chmod o= {folder}: it holds patient data"
        yield Diagnosis("spool", "warning", f"{folder} is open to every account", advice)
        return
    yield Diagnosis("spool", "good", f"{folder} is writable")


def _disk(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.disk import Disk

    limits = settings.spool
    folder = limits.path
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    space = Disk(
        existing,
        min_free_bytes=limits.min_free_bytes,
        min_free_percent=limits.min_free_percent,
        resume_factor=limits.resume_factor,
    ).space()
    percent = 100.0 * space.free / shutil.disk_usage(existing).total
    detail = f"{space.free / 1e9:.1f} GB free ({percent:.0f} %)"
    if space.free < space.marks.low:
        yield Diagnosis("disk", "problem", f"{detail}: C-STORE answers 0xA700", _ADVICE["disk"])
    elif space.short:
        detail = f"{detail}, {space.short / 1e9:.1f} GB below the mark where the janitor makes room"
        yield Diagnosis("disk", "warning", detail, _ADVICE["disk"])
    else:
        yield Diagnosis("disk", "good", detail)


def _permissions(settings: NodeSettings) -> Iterator[Diagnosis]:
    """What names patients or their images is for the node's account alone."""
    from sqlalchemy import make_url

    database = make_url(settings.ledger.url)
    files = [settings.audit.journal]
    if database.get_backend_name() == "sqlite" and database.database:
        files.append(Path(database.database))
    open_files = [each for each in files if each.exists() and _is_open(each)]
    for each in open_files:
        yield Diagnosis("permissions", "warning", f"{each} is open to others", f"chmod o= {each}")
    if not open_files:
        yield Diagnosis("permissions", "good", "ledger and audit journal are closed to others")


def _is_open(file: Path) -> bool:
    """Whether accounts of no group of ours reach the file: it, and each folder on the way."""
    way = (file.parent.resolve(), *file.parent.resolve().parents)
    return bool(file.stat().st_mode & 0o006) and all(each.stat().st_mode & 0o001 for each in way)


def _clock(settings: NodeSettings) -> Iterator[Diagnosis]:
    """Leases, back-off and retention count by the clock, and so does who reads the history."""
    from dicom_node.ledger import reports

    engine = common.open_ledger(settings)
    try:
        here, there, newest = time.time(), *reports.clocks(engine)
    finally:
        engine.dispose()
    if newest is not None and newest > here + _CLOCK_S:
        detail = f"the ledger's newest entry lies {newest - here:.0f} s ahead: the clock went back"
        yield Diagnosis("clock", "problem", detail, _ADVICE["clock"])
    elif there is not None and abs(there - here) > _CLOCK_S:
        detail = f"the database's clock is {there - here:+.1f} s from this machine's"
        yield Diagnosis("clock", "warning", detail, _ADVICE["clock"])
    elif not _is_synchronised():
        detail = "no time service keeps this machine's clock"
        yield Diagnosis("clock", "warning", detail, _ADVICE["clock"])
    else:
        yield Diagnosis("clock", "good", time.strftime("%Y-%m-%d %H:%M:%S %z"))


def _is_synchronised() -> bool:
    """Whether the kernel says that a time service steers the clock: adjtimex(2)."""
    # struct timex is 208 bytes on Linux; with modes = 0 nothing is changed.
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    return 0 <= int(state) < _TIME_ERROR


_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_CLOCK_S = 2.0


def _backlog(settings: NodeSettings) -> Iterator[Diagnosis]:
    """What waits for a person, and what waits too long."""
    from dicom_node.ledger import reports

    engine = common.open_ledger(settings)
    try:
        found = reports.stats(engine)
    finally:
        engine.dispose()
    told = False
    for group, state, advice in _WAITING:
        if count := found[group][state]:
            told = True
            yield Diagnosis("backlog", "warning", f"{count} {group} are {state}", advice)
    oldest = found["oldest_queued_job"]
    if oldest is not None:
        waited = time.time() - datetime.fromisoformat(oldest).timestamp()
        if waited > _PATIENCE_S:
            told = True
            detail = f"a job has waited for {waited / 3600:.1f} h"
            yield Diagnosis("backlog", "problem", detail, "see that the restore role runs")
    if not told:
        yield Diagnosis("backlog", "good", "nothing waits for a person")


_PATIENCE_S = 3600.0
_WAITING = (
    ("jobs", "held", "`dicom-node jobs list --state held`, then release or reject them"),
    ("jobs", "failed", "`dicom-node jobs list --state failed`, then retry or cancel them"),
    ("deliveries", "dead", "`dicom-node deliveries list --state dead`, then retry them"),
    ("instances", "rejected", "`dicom-node instances list --state rejected` says why"),
)


def _ledger(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.ledger import reports

    engine = common.open_ledger(settings)
    try:
        reports.stats(engine)
    finally:
        engine.dispose()
    yield Diagnosis("ledger", "good", "opens, and its schema is up to date")


def _model(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.inference import LocalEngine

    given = settings.engine
    model = LocalEngine.open(given.bundle, device=given.device, threads=given.threads)
    yield Diagnosis(
        "model",
        "good",
        f"{model.model.name} {model.model.version}, {model.model.sha256[:12]}, "
        f"{', '.join(model.tasks)}",
    )


def _listening(settings: NodeSettings) -> Iterator[Diagnosis]:
    if not settings.tls.only:
        yield _open_port(settings, settings.node.port)
    if settings.tls.port is not None:
        yield _open_port(settings, settings.tls.port)


def _open_port(settings: NodeSettings, port: int) -> Diagnosis:
    host = _near(settings)
    where = f"{settings.node.ae_title}@{host}:{port}"
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        advice = "start it with `dicom-node serve`"
        return Diagnosis("listening", "warning", f"nothing listens at {where}", advice)
    return Diagnosis("listening", "good", f"something listens at {where}")


def _near(settings: NodeSettings) -> str:
    """The address by which this machine reaches its own listener."""
    any_address = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
    return any_address.get(settings.node.host, settings.node.host)


def _tls(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.tls import TLSFiles, expires, server_context

    given = settings.tls
    if given.certificate is None or given.key is None:
        return
    try:
        server_context(TLSFiles.of(given), verify_peers=given.verify_peers)
    except ConfigurationError as error:
        for problem in error.problems:
            yield Diagnosis("tls", "problem", problem, "mend the file; the node keeps the old one")
        return
    if given.key.stat().st_mode & 0o077:
        advice = f"chmod 600 {given.key}"
        yield Diagnosis("tls", "warning", f"{given.key} is open to other accounts", advice)
    yield _expiry(given.certificate, expires(TLSFiles.of(given)))


def _expiry(certificate: Path, moment: float) -> Diagnosis:
    days = int((moment - time.time()) // 86_400)
    until = time.strftime("%Y-%m-%d", time.gmtime(moment))
    if days < 0:
        return Diagnosis("tls", "problem", f"{certificate} expired on {until}", _RENEW)
    state: State = "warning" if days < _EXPIRES_SOON_D else "good"
    advice = _RENEW if state == "warning" else ""
    return Diagnosis("tls", state, f"{certificate} is valid until {until}", advice)


_RENEW = "put a new certificate in its place; the node reads it without a restart"
_EXPIRES_SOON_D = 30


def _access(settings: NodeSettings) -> Iterator[Diagnosis]:
    rules = len(settings.association.allow)
    if rules:
        yield Diagnosis("access", "good", f"{rules} rules say who may associate")
    elif settings.node.host in ("127.0.0.1", "::1", "localhost"):
        yield Diagnosis("access", "good", "everyone on this machine may associate")
    else:
        advice = "list the senders in association.allow"
        yield Diagnosis("access", "warning", "everyone who reaches the port may associate", advice)


def _refused(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.audit_trail import last_alerts

    journal = settings.audit.journal
    if not journal.exists():
        return
    for alert in last_alerts(journal, _REFUSALS_SHOWN):
        who = alert.address if alert.peer == alert.address else f"{alert.peer} at {alert.address}"
        yield Diagnosis("refused", "warning", f"{alert.at[:19]}Z {who}: {alert.why}", _IF_WANTED)


_REFUSALS_SHOWN = 5
_IF_WANTED = "if it should be let in, mend what is named; else nothing"


def _destinations(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.association import Peer
    from dicom_node.storage_scu import echo
    from dicom_node.stow import WebPeer, check

    if not settings.destination_names:
        advice = "add a [destinations.NAME] table to node.toml"
        yield Diagnosis("destinations", "warning", "none: results stay in the spool", advice)
    results = {
        **{name: echo(Peer.of(each, settings)) for name, each in settings.destinations.items()},
        **{name: check(WebPeer.of(each, settings)) for name, each in settings.stow.items()},
    }
    for name, result in results.items():
        state: State = "good" if result.ok else "problem"
        advice = "" if result.ok else "see that it runs, and that both sides know the AE titles"
        yield Diagnosis(f"destination {name}", state, result.words, advice)


def _gates(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.gates import silent_rules

    silent = silent_rules(settings)
    if silent:
        advice = "say hold or warn there, unless the site has decided and written down why not"
        words = f"what fails a gate is sent without a word by {', '.join(silent)}"
        yield Diagnosis("gates", "warning", words, advice)
    else:
        yield Diagnosis("gates", "good", "nothing that fails a gate is sent without a word")


def _breakers(settings: NodeSettings) -> Iterator[Diagnosis]:
    engine = common.open_ledger(settings)
    try:
        yield from examine_breakers(engine, settings.breaker.window)
    finally:
        engine.dispose()


def examine_breakers(engine: Engine, window: int) -> Iterator[Diagnosis]:
    """One line for each modality that was judged; an open breaker holds all of its results."""
    from dicom_node.ledger import reports

    for row in reports.breakers(engine, window=window):
        name = f"breaker {row['modality']}"
        if row["state"] == "open":
            advice = (
                "find out what has changed, then "
                f"`dicom-node breakers reset {row['modality']} --operator NAME --reason TEXT`"
            )
            yield Diagnosis(name, "problem", f"open: {row['reason']}", advice)
        else:
            rate = f"{row['failed']} of the last {row['judged']} jobs failed a gate"
            yield Diagnosis(name, "good", f"closed: {rate}")


_CHECKS = (
    _routes,
    _spool,
    _permissions,
    _disk,
    _ledger,
    _clock,
    _backlog,
    _model,
    _tls,
    _listening,
    _access,
    _destinations,
    _refused,
    _gates,
    _breakers,
)
_OF_THE_LEDGER = (_clock, _backlog, _breakers)


def show(findings: Sequence[Diagnosis], *, as_json: bool) -> None:
    """Print the findings as a table or as JSON."""
    rows = [asdict(finding) for finding in findings]
    columns = {"check": "check", "state": "state", "detail": "detail", "advice": "what to do"}
    common.print_rows(rows, columns, as_json=as_json, empty="")
