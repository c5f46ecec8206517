"""What the commands share: the configuration option, errors, output as table or JSON, times.

Only click and the standard library are imported with this module, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dicom_node.errors import NodeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from sqlalchemy import Engine

    from dicom_node.settings import NodeSettings
    from dicom_node.spool import Spool

Command = TypeVar("Command", bound=Callable[..., Any])
Row = Mapping[str, Any]

_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
# Columns that are folded, and those that only the JSON shows.
_LONG = re.compile(r"uid|reason|detail|advice|deliveries|source|out|path")
# What is longer is a sentence or a list, whatever its column is called: the others would lose room.
_SHORT = 40
_NOT_IN_TABLES = frozenset({"path", "sha256", "size", "job"})

# What a listing of jobs shows, and how a column is called.
JOB_COLUMNS = {
    "id": "job",
    "state": "state",
    "task": "task",
    "instances": "slices",
    "seconds": "seconds",
    "deliveries": "deliveries",
    "created": "created",
    "reason": "reason",
}

_SPAN_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class NodeGroup(click.Group):
    """A group whose commands end with exit code 1 and the reason when the node says no."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; NodeError becomes a line on stderr."""
        try:
            return super().invoke(ctx)
        except NodeError as error:
            raise click.ClickException(error.message) from error


class Since(click.ParamType[float]):
    """A moment: ``30m``, ``2h``, ``7d`` ago, or an ISO 8601 date or time (local unless it says)."""

    name = "when"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return seconds since the epoch."""
        span = _SPAN.fullmatch(str(value).strip())
        if span:
            return time.time() - float(span[1]) * _SPAN_S[span[2]]
        try:
            return datetime.fromisoformat(str(value)).astimezone(UTC).timestamp()
        except ValueError:
            self.fail(f"{value!r} is neither a span (30m, 2h, 7d) nor a date (2026-01-31)")


def config_option(command: Command) -> Command:
    """Add ``-c/--config``, which DICOM_NODE_CONFIG can give too."""
    return click.option(
        "-c",
        "--config",
        required=True,
        envvar="DICOM_NODE_CONFIG",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The node.toml of the node.  [env: DICOM_NODE_CONFIG]",
    )(command)


def optional_config_option(command: Command) -> Command:
    """Add ``-c/--config`` where a node may be meant or none."""
    return click.option(
        "-c",
        "--config",
        envvar="DICOM_NODE_CONFIG",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The node.toml of a node; without it the defaults.  [env: DICOM_NODE_CONFIG]",
    )(command)


def json_option(command: Command) -> Command:
    """Add ``--json``: the result as JSON on stdout and nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def list_options(states: Sequence[str]) -> Callable[[Command], Command]:
    """Add the filters that every listing has, and its output format."""

    def add(command: Command) -> Command:
        for option in (
            json_option,
            click.option("--limit", type=click.IntRange(min=1), help="At most so many, newest."),
            click.option("--until", type=Since(), help="Older than 30m, 2h, 7d or a date."),
            click.option("--since", type=Since(), help="Newer than 30m, 2h, 7d or a date."),
            click.option(
                "--state",
                # Plain strings: click would show the names of an enumeration's members.
                type=click.Choice([str(state) for state in states]),
                multiple=True,
                help="Only those in this state; repeat for several.",
            ),
            config_option,
        ):
            command = option(command)
        return command

    return add


def load_settings(config: Path) -> NodeSettings:
    """The settings of *config*; ConfigurationError with every problem."""
    from dicom_node.settings import load

    return load(config)


def open_ledger(settings: NodeSettings) -> Engine:
    """The ledger that the settings name."""
    from dicom_node.ledger.tables import open_ledger as open_at

    return open_at(settings.ledger.url)


def open_spool(settings: NodeSettings) -> Spool:
    """The spool that the settings name."""
    from dicom_node.spool import Spool

    return Spool(settings.spool.path)


def console() -> Console:
    """Where tables go: stdout; a file or a pipe gets lines that are not cut for a screen."""
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def error_console() -> Console:
    """Where progress goes: stderr, so that stdout is the result alone."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(
    rows: Sequence[Row], columns: Mapping[str, str], *, as_json: bool, empty: str
) -> None:
    """A listing as JSON or as a table; *columns* maps keys of a row to headings."""
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        click.echo(empty)
        return
    console().print(table(rows, columns))


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> Table:
    """Rows as a table; UIDs and sentences are folded where the screen is narrow, nothing else."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [[cell(row, key) for key in columns] for row in rows]
    for place, (key, heading) in enumerate(columns.items()):
        is_long = _LONG.search(key) or any(len(row[place]) > _SHORT for row in cells)
        made.add_column(heading, overflow="fold", no_wrap=not is_long)
    for row in cells:
        made.add_row(*map(verbatim, row))
    return made


def verbatim(words: str, style: str = "") -> Text:
    """*words* as they are: what a peer has written is neither markup nor a control sequence."""
    from rich.text import Text

    visible = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape") for c in words)
    return Text("".join(c if isinstance(c, str) else c.decode() for c in visible), style)


def cell(row: Row, key: str) -> str:
    """One value of a row as a person reads it; times in local time."""
    value = row.get(key)
    if value is None:
        return ""
    if key == "deliveries":
        return ", ".join(f"{d['destination']} {d['state']} {d['sent']}/{d['total']}" for d in value)
    if key == "seconds":
        return f"{sum(value.values()):.1f}" if value and None not in value.values() else ""
    return plain(value)


def plain(value: Any) -> str:
    """A value in words: lists with commas, mappings as ``key value``, times as local time."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(v)}" for key, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, str) and _TIME.fullmatch(value):
        return datetime.fromisoformat(value).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return str(value)


def counts(value: Any) -> str:
    """Numbers by name in one line, those of nothing left out; any other value in words."""
    if isinstance(value, dict):
        return "  ".join(f"{name} {plain(count)}" for name, count in value.items() if count)
    return "" if value is None else plain(value)


def print_story(
    story: Row, *, as_json: bool, columns: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """One row's whole story: its values, then its history and what belongs to it as tables.

    *columns* names those of a table that are shown, where not all are.
    """
    if as_json:
        print_json(story)
        return
    screen = console()
    tables = {key: value for key, value in story.items() if _is_table(value)}
    for key, value in story.items():
        if key not in tables and value not in (None, [], {}):
            screen.print(verbatim(f"{key:<28}", "bold") + verbatim(_short(value)), highlight=False)
    for key, rows in tables.items():
        names = [name for name in rows[0] if name not in _NOT_IN_TABLES]
        shown = (columns or {}).get(key) or {name: name.replace("_", " ") for name in names}
        screen.print(f"\n[bold]{key}[/bold]")
        screen.print(table(rows, shown))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _short(value: Any) -> str:
    """A long list of UIDs by its length; the whole of it is in the JSON."""
    return f"{len(value)} instances" if isinstance(value, list) and len(value) > 3 else plain(value)
