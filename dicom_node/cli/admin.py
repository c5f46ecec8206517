"""Commands that read the ledger and change it as a person may, one group for each entity."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicom_node.cli import common
from dicom_node.cli.common import config_option, json_option, list_options
from dicom_node.errors import NotFoundError
from dicom_node.ledger.states import DeliveryState, InstanceState, JobState, SeriesState

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dicom_node.readings import GateReading

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

_INSTANCE_COLUMNS = {
    "sop_instance_uid": "instance",
    "state": "state",
    "modality": "modality",
    "calling_ae": "from",
    "received": "received",
    "purged": "purged",
    "reason": "reason",
}
# There are hundreds to a series.
_INSTANCES = 100

_REASON = click.option("--reason", default="asked by the operator", help="Kept in the history.")


@click.group()
def jobs() -> None:
    """Restorations: list, show, retry, hold, release, reject, cancel."""


@jobs.command("list")
@list_options([*JobState])
@click.option("--task", help="Only this task.")
@click.option("--series", "series_uid", metavar="UID", help="Only of this received series.")
@click.option("--model", metavar="SHA256", help="Only by this model.")
@click.option("--destination", metavar="NAME", help="Only what goes to this destination.")
def list_jobs(config: Path, as_json: bool, **filters: Any) -> None:
    """List jobs, newest first.

    \b
    Examples:
      dicom-node jobs list --state held --state failed
      dicom-node jobs list --since 24h --task ct_denoise --json
    """
    from dicom_node.ledger import reports

    rows = reports.jobs(_ledger(config), **filters)
    common.print_rows(rows, common.JOB_COLUMNS, as_json=as_json, empty="no jobs")


@jobs.command("show")
@click.argument("job_id", type=int)
@click.option("--instance", "uid", metavar="UID", help="The story of one of its instances alone.")
@config_option
@json_option
def show_job(job_id: int, uid: str | None, config: Path, as_json: bool) -> None:
    """Show one job with its instances, deliveries, and story from association to commitment.

    \b
    Examples:
      dicom-node jobs show 17
      dicom-node jobs show 17 --instance 1.2.840.113619.2.5.17   # source or result
    """
    from dicom_node.ledger import reports

    engine = _ledger(config)
    story = reports.job(engine, job_id)
    if uid is not None:
        results = {each["sop_instance_uid"] for each in story["outputs"]}
        if uid not in results and uid not in story["sources"]:
            raise click.ClickException(f"job {job_id} has no instance {uid}")
        story = reports.instance(engine, uid)
    elif not as_json:
        story = story | {"gates": _gates(story["gates"])}
    common.print_story(story, as_json=as_json)


def _gates(told: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each gate in a line, gravest first; the JSON has every slice."""
    from dicom_node.readings import GateReading

    readings = [GateReading.from_report(each) for each in told]
    return [_gate(each) for each in sorted(readings, key=lambda each: -each.level.severity)]


def _gate(reading: GateReading) -> dict[str, str]:
    """The worst of what a gate measured, and its limits."""
    from dicom_node.gates import interval

    value, worst = reading.worst_value, reading.worst_slice
    unit = "" if reading.unit == "1" else f" {reading.unit}"
    return {
        "gate": reading.gate,
        "level": reading.level,
        "worst": "" if value is None else f"{value:.4g}{unit}",
        "slice": "" if worst is None else str(worst + 1),
        "warns unless": "" if reading.warn == (None, None) else interval(reading.warn),
        "fails unless": "" if reading.fail == (None, None) else interval(reading.fail),
        "reason": reading.reason,
    }


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


_job_action(
    "retry",
    "Queue failed, refused or cancelled jobs again.\n\n\b\nExamples:\n"
    '  dicom-node jobs retry 17 18 --reason "more memory"',
    "queued",
)
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
@list_options([*SeriesState])
@click.option("--modality", help="Only this modality.")
@click.option("--study", "study_uid", metavar="UID", help="Only of this study.")
@click.option("--calling-ae", metavar="TITLE", help="Only what this sender brought last.")
def list_series(config: Path, as_json: bool, **filters: Any) -> None:
    """List series, newest first.

    \b
    Examples:
      dicom-node series list --state ignored --since 1h
      dicom-node series list --modality PT --calling-ae PETCT1
    """
    from dicom_node.ledger import reports

    rows = reports.series(_ledger(config), **filters)
    common.print_rows(rows, _SERIES_COLUMNS, as_json=as_json, empty="no series")


@series.command("show")
@click.argument("series_uid")
@config_option
@json_option
def show_series(series_uid: str, config: Path, as_json: bool) -> None:
    """Show one series with its jobs and history."""
    from dicom_node.ledger import reports

    story = reports.one_series(_ledger(config), series_uid)
    common.print_story(story, as_json=as_json, columns={"jobs": common.JOB_COLUMNS})


@series.command("force")
@click.argument("series_uid")
@_REASON
@config_option
def force_series(series_uid: str, reason: str, config: Path) -> None:
    """Take a series as complete now, or judge an ignored one again.

    The running node does it at its next look at the open series.

    \b
    Examples:
      dicom-node series force 1.2.840.113619.2.5 --reason "the scanner was switched off"
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
@list_options([*DeliveryState])
@click.option("--destination", metavar="NAME", help="Only to this destination.")
@click.option("--job", "job_id", type=int, help="Only of this job.")
def list_deliveries(config: Path, as_json: bool, **filters: Any) -> None:
    """List deliveries, newest first.

    \b
    Examples:
      dicom-node deliveries list --state dead --state waiting
      dicom-node deliveries list --destination pacs --since 2h
    """
    from dicom_node.ledger import reports

    rows = reports.deliveries(_ledger(config), **filters)
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
    """Send waiting or dead deliveries at once, refused instances included.

    \b
    Examples:
      dicom-node deliveries retry 12 13 --reason "the archive is back"
      dicom-node deliveries list --state dead --json | jq .[].id | xargs dicom-node deliveries retry
    """
    from dicom_node.ledger import queue, reports

    engine = _ledger(config)

    def apply(delivery_id: int) -> bool:
        return queue.retry_delivery(engine, delivery_id, reason=reason, now=time.time())

    def state_of(delivery_id: int) -> str:
        return str(reports.delivery(engine, delivery_id)["state"])

    to_each("delivery", delivery_ids, apply, state_of, name="retry", done="queued")


@click.group()
def instances() -> None:
    """SOP Instances, as received and as restored: list, show."""


@instances.command("list")
@list_options([*InstanceState])
@click.option("--series", "series_uid", metavar="UID", help="Only of this series.")
@click.option("--study", "study_uid", metavar="UID", help="Only of this study.")
@click.option("--calling-ae", metavar="TITLE", help="Only what this sender brought.")
def list_instances(config: Path, as_json: bool, **filters: Any) -> None:
    """List received instances, newest first, 100 of them unless told.

    \b
    Examples:
      dicom-node instances list --state rejected --state conflict --since 7d
      dicom-node instances list --series 1.2.840.113619.2.5 --limit 2000
    """
    from dicom_node.ledger import reports

    filters["limit"] = filters["limit"] or _INSTANCES
    rows = reports.instances(_ledger(config), **filters)
    if not as_json:
        rows = [row | {"reason": _reason(row)} for row in rows]
    common.print_rows(rows, _INSTANCE_COLUMNS, as_json=as_json, empty="no instances")


def _reason(row: Mapping[str, Any]) -> str:
    """Why, and the file to look at where the instance was set aside: it may have no UID."""
    reason, path = row["reason"] or "", row["path"] or ""
    is_there = path.startswith("quarantine/") and not row["purged"]
    return f"{reason}; see {path}" if is_there else reason


@instances.command("show")
@click.argument("uid")
@config_option
@json_option
def show_instance(uid: str, config: Path, as_json: bool) -> None:
    """Tell the whole story of one instance, by the UID of the received or of the restored one.

    From the association that brought it to the commitment of each destination, and to the day when
    its file left the spool.

    \b
    Examples:
      dicom-node instances show 1.2.840.113619.2.5.17
    """
    from dicom_node.ledger import reports

    story = reports.instance(_ledger(config), uid)
    common.print_story(story, as_json=as_json, columns={"jobs": common.JOB_COLUMNS})


@click.command()
@config_option
@json_option
def stats(config: Path, as_json: bool) -> None:
    """Count instances, series, jobs and deliveries by state, and say what is oldest.

    \b
    Examples:
      dicom-node stats --json | jq .deliveries.dead
    """
    from dicom_node.ledger import reports

    found = reports.stats(_ledger(config))
    if as_json:
        common.print_json(found)
        return
    for what, value in found.items():
        words = common.counts(value)
        if words:
            click.echo(f"{what.replace('_', ' '):<24}{words}")


def _ledger(config: Path) -> Engine:
    return common.open_ledger(common.load_settings(config))
