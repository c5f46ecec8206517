"""What a person decides about results that were held, and about circuit breakers that opened."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click

from dicom_node.cli import admin, common
from dicom_node.cli.common import Command, config_option, json_option

_BREAKER_COLUMNS = {
    "modality": "modality",
    "state": "state",
    "failed": "failed",
    "judged": "of",
    "since": "since",
    "reason": "reason",
}


def _said(_context: click.Context, _parameter: click.Parameter, words: str) -> str:
    """The words that somebody has to give; nothing but blanks is none."""
    if not words.strip():
        raise click.BadParameter("it is empty")
    return words.strip()


def _signed(command: Command) -> Command:
    """Add who decides and why; the ledger keeps both."""
    for option in (
        click.option("--reason", required=True, callback=_said, help="Why; kept in the ledger."),
        click.option(
            "--operator",
            required=True,
            envvar="DICOM_NODE_OPERATOR",
            callback=_said,
            help="Who decides; kept in the ledger.  [env: DICOM_NODE_OPERATOR]",
        ),
    ):
        command = option(command)
    return command


def _decision(name: str, help_text: str, done: str) -> None:
    """Add ``jobs NAME JOB_ID…``."""

    @admin.jobs.command(name, help=help_text)
    @click.argument("job_ids", type=int, nargs=-1, required=True)
    @_signed
    @config_option
    def decide(job_ids: tuple[int, ...], operator: str, reason: str, config: Path) -> None:
        from dicom_node.ledger import queue, reports

        engine = common.open_ledger(common.load_settings(config))
        change: Callable[..., bool] = getattr(queue, name)

        def state_of(job_id: int) -> str:
            return str(reports.job(engine, job_id)["state"])

        def apply(job_id: int) -> bool:
            return change(engine, job_id, operator=operator, reason=reason, now=time.time())

        admin.to_each("job", job_ids, apply, state_of, name=name, done=done)


_decision(
    "release",
    "Let held jobs go on: what a gate held is sent as it was reviewed, what was never restored is"
    " queued.",
    "released",
)
_decision("reject", "Decline held jobs for good: nothing of them is sent.", "rejected")


@click.group()
def breakers() -> None:
    """Circuit breakers, one for each modality: list, reset."""


@breakers.command("list")
@config_option
@json_option
def list_breakers(config: Path, as_json: bool) -> None:
    """List the breakers with the failed jobs among those that they look back at."""
    from dicom_node.ledger import reports

    settings = common.load_settings(config)
    engine = common.open_ledger(settings)
    rows = reports.breakers(engine, window=settings.breaker.window)
    common.print_rows(rows, _BREAKER_COLUMNS, as_json=as_json, empty="nothing was judged yet")


@breakers.command("reset")
@click.argument("modality", type=click.Choice(["CT", "MR", "PT"]))
@_signed
@config_option
def reset_breaker(modality: str, operator: str, reason: str, config: Path) -> None:
    """Close the breaker of MODALITY, once it is known why it opened.

    What it held stays held; release or reject it job by job.
    """
    from dicom_node.ledger import queue

    engine = common.open_ledger(common.load_settings(config))
    if not queue.reset_breaker(engine, modality, operator=operator, reason=reason, now=time.time()):
        raise click.ClickException(f"the breaker of {modality} is not open")
    click.echo(f"breaker {modality}: open → closed")
