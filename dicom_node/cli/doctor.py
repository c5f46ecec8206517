"""``dicom-node doctor``: one line for each part of the node, with what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dicom_node.cli import common
from dicom_node.errors import ConfigurationError, NodeError

if TYPE_CHECKING:
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
    """Every check in the order in which a person would make them; a failed one stops no other."""
    try:
        settings = common.load_settings(config)
    except ConfigurationError as error:
        return [Diagnosis("settings", "problem", each, "edit it") for each in error.problems]
    found = [Diagnosis("settings", "good", str(config))]
    for check in (_routes, _spool, _disk, _ledger, _model, _listening, _destinations):
        found.extend(_guarded(check, settings))
    return found


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
    "model": "set engine.bundle to a bundle that is shipped, or to a folder with one",
    "disk": "free space, or move the spool to a larger disk",
}


def _routes(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.routing import load_routes

    try:
        routes = load_routes(settings.routes, list(settings.destinations))
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
    folder = settings.spool.path
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    usage = shutil.disk_usage(existing)
    percent = 100.0 * usage.free / usage.total
    detail = f"{usage.free / 1e9:.1f} GB free ({percent:.0f} %)"
    limits = settings.spool
    short = usage.free < limits.min_free_bytes or percent < limits.min_free_percent
    if short:
        yield Diagnosis("disk", "problem", f"{detail}: C-STORE answers 0xA700", _ADVICE["disk"])
    else:
        yield Diagnosis("disk", "good", detail)


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
    node = settings.node
    host = "127.0.0.1" if node.host in ("0.0.0.0", "") else node.host
    where = f"{node.ae_title}@{host}:{node.port}"
    try:
        socket.create_connection((host, node.port), timeout=2.0).close()
    except OSError:
        advice = "start it with `dicom-node serve`"
        yield Diagnosis("listening", "warning", f"nothing listens at {where}", advice)
        return
    yield Diagnosis("listening", "good", f"something listens at {where}")


def _destinations(settings: NodeSettings) -> Iterator[Diagnosis]:
    from dicom_node.association import Peer
    from dicom_node.storage_scu import echo

    if not settings.destinations:
        advice = "add a [destinations.NAME] table to node.toml"
        yield Diagnosis("destinations", "warning", "none: results stay in the spool", advice)
    for name, destination in settings.destinations.items():
        result = echo(Peer.of(destination, settings))
        state: State = "good" if result.ok else "problem"
        advice = "" if result.ok else "see that it runs, and that both sides know the AE titles"
        yield Diagnosis(f"destination {name}", state, result.words, advice)


def show(findings: Sequence[Diagnosis], *, as_json: bool) -> None:
    """Print the findings as a table or as JSON."""
    rows = [asdict(finding) for finding in findings]
    columns = {"check": "check", "state": "state", "detail": "detail", "advice": "what to do"}
    common.print_rows(rows, columns, as_json=as_json, empty="")
