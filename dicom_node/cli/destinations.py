"""``dicom-node destinations``: where results go, whether they may, and what waits there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicom_node.cli import common
from dicom_node.cli.common import config_option, json_option

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dicom_node.ledger.destinations import DestinationState
    from dicom_node.settings import NodeSettings
    from dicom_node.storage_scu import EchoResult

_COLUMNS = {
    "destination": "destination",
    "kind": "kind",
    "address": "address",
    "state": "state",
    "until": "until",
    "failures": "failures",
    "open": "open",
    "dead": "dead",
    "reason": "reason",
}
_ECHO_COLUMNS = {"destination": "destination", "ok": "ok", "words": "words"}
_OPEN = ("queued", "sending", "waiting")


@click.group()
def destinations() -> None:
    """Where restored series go: list, echo, pause, resume.

    \b
      dicom-node destinations list -c node.toml
      dicom-node destinations pause pacs --reason "moves to new hardware" -c node.toml
    """


@destinations.command("list")
@config_option
@json_option
def list_destinations(config: Path, as_json: bool) -> None:
    """List destinations: open, held or paused, and how many series wait for each."""
    settings = common.load_settings(config)
    rows = _rows(settings, common.open_ledger(settings), time.time())
    common.print_rows(rows, _COLUMNS, as_json=as_json, empty="no destinations")


@destinations.command("echo")
@click.argument("names", nargs=-1)
@config_option
@json_option
def echo_destinations(names: tuple[str, ...], config: Path, as_json: bool) -> None:
    """Ask destinations (all, unless some are NAMED) whether they are there and know us.

    By C-ECHO, or by a search that finds nothing where it is a DICOMweb server. Ends with 1 where
    one does not answer.
    """
    settings = common.load_settings(config)
    asked = _known(settings, names) or settings.destination_names
    results = {name: _ask(settings, name) for name in asked}
    rows = [
        {"destination": name, "ok": one.ok, "seconds": round(one.seconds, 2), "words": one.words}
        for name, one in results.items()
    ]
    common.print_rows(rows, _ECHO_COLUMNS, as_json=as_json, empty="no destinations")
    silent = [name for name, one in results.items() if not one.ok]
    if silent:
        raise click.ClickException(f"no answer: {', '.join(silent)}")


@destinations.command("pause")
@click.argument("names", nargs=-1, required=True)
@click.option("--reason", default="asked by the operator", help="Shown with the destination.")
@config_option
def pause_destinations(names: tuple[str, ...], reason: str, config: Path) -> None:
    """Send nothing more to these until they are resumed; what is under way ends."""
    from dicom_node.ledger.destinations import pause

    settings = common.load_settings(config)
    engine = common.open_ledger(settings)
    for name in _known(settings, names):
        paused = pause(engine, name, reason=reason, now=time.time())
        click.echo(f"{name}: paused" if paused else f"{name}: is paused already")


@destinations.command("resume")
@click.argument("names", nargs=-1, required=True)
@config_option
def resume_destinations(names: tuple[str, ...], config: Path) -> None:
    """Send again, at once: ends a pause and a hold, and what waits is due."""
    from dicom_node.ledger.destinations import resume

    settings = common.load_settings(config)
    engine = common.open_ledger(settings)
    for name in _known(settings, names):
        resumed = resume(engine, name, now=time.time())
        click.echo(f"{name}: resumed" if resumed else f"{name}: was neither paused nor held")


def _known(settings: NodeSettings, names: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in settings.destination_names]
    if unknown:
        known = ", ".join(settings.destination_names) or "none"
        raise click.BadParameter(f"{unknown[0]!r} is not in node.toml (known: {known})")
    return tuple(names)


def _ask(settings: NodeSettings, name: str) -> EchoResult:
    from dicom_node.association import Peer
    from dicom_node.storage_scu import echo
    from dicom_node.stow import WebPeer, check

    if name in settings.stow:
        return check(WebPeer.of(settings.stow[name], settings))
    return echo(Peer.of(settings.destinations[name], settings))


def _rows(settings: NodeSettings, engine: Engine, now: float) -> list[dict[str, Any]]:
    from dicom_node.ledger import reports
    from dicom_node.ledger.destinations import DestinationState, states

    found, counts = states(engine), Counter[tuple[str, str]]()
    for state in (*_OPEN, "dead"):
        rows = reports.deliveries(engine, state=state)
        counts.update((row["destination"], row["state"]) for row in rows)
    return [
        {
            "destination": name,
            "kind": "stow" if name in settings.stow else "dicom",
            "address": _address(settings, name),
            **_situation(found.get(name, DestinationState(name)), now),
            "open": sum(counts[name, state] for state in _OPEN),
            "dead": counts[name, "dead"],
        }
        for name in settings.destination_names
    ]


def _situation(state: DestinationState, now: float) -> dict[str, Any]:
    if state.paused_at is not None:
        named, reason, until = "paused", state.paused_reason, None
    elif state.why_closed(now):
        named, reason, until = "held", state.held_reason, state.held_until
    else:
        named, reason, until = "open", None, None
    iso = datetime.fromtimestamp(until, UTC).isoformat(timespec="seconds") if until else None
    return {"state": named, "until": iso, "failures": state.failures, "reason": reason}


def _address(settings: NodeSettings, name: str) -> str:
    if name in settings.stow:
        return settings.stow[name].url
    peer = settings.destinations[name]
    return f"{peer.ae_title}@{peer.host}:{peer.port}"
