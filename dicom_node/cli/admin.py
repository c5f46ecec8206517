"""Commands that read the ledger and change it as a person may: jobs, series, deliveries, watch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicom_node.cli import common
from dicom_node.cli.common import config_option, json_option, list_options
from dicom_node.errors import NotFoundError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from sqlalchemy import Engine

_JOB_STATES = (
    "queued", "running", "held", "done", "refused", "rejected", "failed", "cancelled",
)  # fmt: skip
_SERIES_STATES = ("receiving", "complete", "incomplete", "ignored")
_DELIVERY_STATES = ("queued", "sending", "waiting", "delivered", "committed", "dead")

_JOB_COLUMNS = {
    "id": "job",
    "state": "state",
    "task": "task",
    "instances": "slices",
    "seconds": "seconds",
    "deliveries": "deliveries",
    "created": "created",
    "reason": "reason",
}
_SERIES_COLUMNS = {
    "series_instance_uid": "series",
    "state": "state",
    "modality": "modality",
    "instances": "instances",
    "calling_ae": "from",
    "reason": "reason",
}
_DELIVERY_COLUMNS = {
    "id": "delivery",
    "job": "job",
    "destination": "destination",
    "state": "state",
    "sent": "sent",
    "total": "of",
    "attempts": "attempts",
    "next_attempt": "next attempt",
    "reason": "reason",
}

_REASON = click.option("--reason", default="asked by the operator", help="Kept in the history.")


@click.group()
def jobs() -> None:
    """Restorations: list, show, retry, hold, release, reject, cancel."""


@jobs.command("list")
@list_options(_JOB_STATES)
@click.option("--task", help="Only this task.")
def list_jobs(
    config: Path,
    state: str | None,
    since: float | None,
    limit: int | None,
    task: str | None,
    as_json: bool,
) -> None:
    """List jobs, newest first."""
    from dicom_node.ledger import reports

    rows = reports.jobs(_ledger(config), state=state, since=since, task=task, limit=limit)
    common.print_rows(rows, _JOB_COLUMNS, as_json=as_json, empty="no jobs")


@jobs.command("show")
@click.argument("job_id", type=int)
@config_option
@json_option
def show_job(job_id: int, config: Path, as_json: bool) -> None:
    """Show one job with its instances, deliveries and history."""
    from dicom_node.ledger import reports

    common.print_story(reports.job(_ledger(config), job_id), as_json=as_json)


def _job_action(name: str, help_text: str, done: str) -> None:
    """Add ``jobs NAME JOB_ID…``; the states it applies to are the ledger's business."""

    @jobs.command(name, help=help_text)
    @click.argument("job_ids", type=int, nargs=-1, required=True)
    @_REASON
    @config_option
    def act(job_ids: tuple[int, ...], reason: str, config: Path) -> None:
        from dicom_node.ledger import queue, reports

        engine = _ledger(config)
        change: Callable[..., bool] = getattr(queue, name)

        def state_of(job_id: int) -> str:
            return str(reports.job(engine, job_id)["state"])

        def apply(job_id: int) -> bool:
            return change(engine, job_id, reason=reason, now=time.time())

        to_each("job", job_ids, apply, state_of, name=name, done=done)


_job_action("retry", "Queue failed, refused or cancelled jobs again.", "queued")
_job_action("hold", "Keep queued jobs from being worked on.", "held")
_job_action("cancel", "Take back jobs that are not done.", "cancelled")


def to_each(
    what: str,
    ids: tuple[int, ...],
    apply: Callable[[int], bool],
    state_of: Callable[[int], str],
    *,
    name: str,
    done: str,
) -> None:
    """Apply an action to each id; those whose state does not allow it are named at the end."""
    refused = []
    for each in ids:
        try:
            before = state_of(each)
            if apply(each):
                click.echo(f"{what} {each}: {before} → {done}")
            else:
                refused.append(f"{what} {each} is {before}; {name} does not apply")
        except NotFoundError as error:
            refused.append(error.message)
    if refused:
        raise click.ClickException("\n".join(refused))


@click.group()
def series() -> None:
    """Received series: list, show, force."""


@series.command("list")
@list_options(_SERIES_STATES)
def list_series(
    config: Path, state: str | None, since: float | None, limit: int | None, as_json: bool
) -> None:
    """List series, newest first."""
    from dicom_node.ledger import reports

    rows = reports.series(_ledger(config), state=state, since=since, limit=limit)
    common.print_rows(rows, _SERIES_COLUMNS, as_json=as_json, empty="no series")


@series.command("show")
@click.argument("series_uid")
@config_option
@json_option
def show_series(series_uid: str, config: Path, as_json: bool) -> None:
    """Show one series with its jobs and history."""
    from dicom_node.ledger import reports

    story = reports.one_series(_ledger(config), series_uid)
    common.print_story(story, as_json=as_json, columns={"jobs": _JOB_COLUMNS})


@series.command("force")
@click.argument("series_uid")
@_REASON
@config_option
def force_series(series_uid: str, reason: str, config: Path) -> None:
    """Take a series as complete now, or judge an ignored one again.

    The running node does it at its next look at the open series.
    """
    from dicom_node.ledger import intake, reports

    engine = _ledger(config)
    state = reports.one_series(engine, series_uid)["state"]
    if not intake.force_series(engine, series_uid, reason=reason, now=time.time()):
        raise click.ClickException(f"series {series_uid} is {state}; force does not apply")
    click.echo(f"series {series_uid}: {state}, is taken as complete at the next look")


@click.group()
def deliveries() -> None:
    """Restored series on their way to destinations: list, show, retry."""


@deliveries.command("list")
@list_options(_DELIVERY_STATES)
@click.option("--destination", help="Only to this destination.")
def list_deliveries(
    config: Path,
    state: str | None,
    since: float | None,
    limit: int | None,
    destination: str | None,
    as_json: bool,
) -> None:
    """List deliveries, newest first."""
    from dicom_node.ledger import reports

    rows = reports.deliveries(
        _ledger(config), state=state, since=since, destination=destination, limit=limit
    )
    common.print_rows(rows, _DELIVERY_COLUMNS, as_json=as_json, empty="no deliveries")


@deliveries.command("show")
@click.argument("delivery_id", type=int)
@config_option
@json_option
def show_delivery(delivery_id: int, config: Path, as_json: bool) -> None:
    """Show one delivery with its instances and history."""
    from dicom_node.ledger import reports

    common.print_story(reports.delivery(_ledger(config), delivery_id), as_json=as_json)


@deliveries.command("retry")
@click.argument("delivery_ids", type=int, nargs=-1, required=True)
@_REASON
@config_option
def retry_deliveries(delivery_ids: tuple[int, ...], reason: str, config: Path) -> None:
    """Send waiting or dead deliveries at once, refused instances included."""
    from dicom_node.ledger import queue, reports

    engine = _ledger(config)

    def apply(delivery_id: int) -> bool:
        return queue.retry_delivery(engine, delivery_id, reason=reason, now=time.time())

    def state_of(delivery_id: int) -> str:
        return str(reports.delivery(engine, delivery_id)["state"])

    to_each("delivery", delivery_ids, apply, state_of, name="retry", done="queued")


@click.command()
@config_option
@click.option("--once", is_flag=True, help="Print one view and end.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, help="Seconds.")
def watch(config: Path, once: bool, interval: float) -> None:
    """Watch counts, jobs and deliveries live; Ctrl-C ends it."""
    engine = _ledger(config)
    if once:
        common.console().print(_view(engine))
        return
    with contextlib.suppress(KeyboardInterrupt):
        _follow(engine, interval)


def _follow(engine: Engine, interval: float) -> None:
    from rich.live import Live

    with Live(_view(engine), console=common.console(), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(_view(engine), refresh=True)


def _view(engine: Engine) -> RenderableType:
    from rich.console import Group

    from dicom_node.ledger import reports

    counts = {what: _counts(value) for what, value in reports.stats(engine).items()}
    lines = [f"{what.replace('_', ' '):<22}{value}" for what, value in counts.items() if value]
    newest = common.table(reports.jobs(engine, limit=15), _JOB_COLUMNS)
    return Group(*lines, newest)


def _counts(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{state} {count}" for state, count in value.items() if count)
    return "" if value is None else common.plain(value)


def _ledger(config: Path) -> Engine:
    return common.open_ledger(common.load_settings(config))
