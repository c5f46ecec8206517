"""``dicom-node watch``: what the node is doing, drawn again and again."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicom_node.cli import common
from dicom_node.cli.common import config_option

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from sqlalchemy import Engine

_NEWEST = 12
# What needs a person, or will soon.
_ALARMING = frozenset(
    {"failed", "held", "dead", "refused", "rejected", "conflict", "waiting", "incomplete"}
)


@click.command()
@config_option
@click.option("--once", is_flag=True, help="Print one view and end.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, help="Seconds.")
def watch(config: Path, once: bool, interval: float) -> None:
    """Watch associations, series, jobs and deliveries live; Ctrl-C ends it.

    \b
    Examples:
      dicom-node watch
      dicom-node watch --interval 5
      dicom-node watch --once        # for a report or a cron mail
    """
    engine = common.open_ledger(common.load_settings(config))
    if once:
        common.console().print(view(engine, now=time.time()))
        return
    with contextlib.suppress(KeyboardInterrupt):
        _follow(engine, interval)


def _follow(engine: Engine, interval: float) -> None:
    from rich.live import Live

    from dicom_node.errors import TransientError

    with Live(view(engine, now=time.time()), console=common.console(), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            # A database that is away for a moment is no reason to end.
            with contextlib.suppress(TransientError):
                live.update(view(engine, now=time.time()), refresh=True)


def view(engine: Engine, *, now: float) -> RenderableType:
    """One picture of the ledger at *now*, in seconds since 1970 UTC."""
    from rich.console import Group

    from dicom_node.ledger import reports

    found = reports.stats(engine)
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    newest = common.table(reports.jobs(engine, limit=_NEWEST), common.JOB_COLUMNS)
    return Group(f"[bold]{at}[/bold]", _counters(found), newest)


def _counters(found: dict[str, Any]) -> Table:
    from rich.table import Table

    made = Table(box=None, show_header=False, pad_edge=False)
    for what, value in found.items():
        if words := _words(value):
            made.add_row(f"[bold]{what.replace('_', ' ')}[/bold]", words)
    return made


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(_count(state, count) for state, count in value.items() if count)
    return "" if value is None else common.plain(value)


def _count(state: str, count: int) -> str:
    words = f"{state} {count}"
    return f"[yellow]{words}[/yellow]" if state in _ALARMING else words
