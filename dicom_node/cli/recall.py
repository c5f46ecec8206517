"""``dicom-node recall`` and ``dicom-node purge``: what leaves archives and spool again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dicom_node.cli import common
from dicom_node.cli.common import config_option, json_option

if TYPE_CHECKING:
    from dicom_node.ledger.recalls import MadeInstance
    from dicom_node.purge import Progress, Purged
    from dicom_node.recall import Rejection

_SERIES_COLUMNS = {
    "job": "made by job",
    "task": "task",
    "series_instance_uid": "series",
    "instances": "instances",
    "destinations": "at",
    "gone": "files gone",
}
_REJECTION_COLUMNS = {
    "job_id": "made by job",
    "series_instance_uid": "series",
    "instances": "instances",
    "destinations": "note goes to",
    "problem": "reason",
}


@click.command()
@click.option("--model", required=True, metavar="SHA256", help="Digest, or 8 digits and more.")
@click.option("--reject", is_flag=True, help="Reject them: a note for each series (IHE IOCM).")
@click.option(
    "--title",
    type=click.Choice(["quality", "safety"]),
    default="quality",
    help="What the note says: 113001 (quality) or 113037 (patient safety).",
)
@click.option("--reason", default="the model is recalled", help="In words; in note and history.")
@click.option("--yes", is_flag=True, help="Do not ask before rejecting.")
@config_option
@json_option
def recall(
    model: str,
    reject: bool,
    title: Literal["quality", "safety"],
    reason: str,
    yes: bool,
    config: Path,
    as_json: bool,
) -> None:
    """List every SOP Instance that a model made, and reject them on request.

    For people a line for each series, with --json each instance.

    A rejection note is a Key Object Selection titled "Rejected for Quality Reasons" (113001, DCM)
    that refers to all results of a job. It goes through the outbox to each destination that has
    any of them; archives that know IHE IOCM then hide them. What was not sent yet is not sent.

    A note names the patient, whom the ledger does not know: a series whose files have left the
    spool is listed, and has to be rejected in the archive. For each series without a note there is
    a line on standard error, and the exit code is 1.

    \b
    Examples:
      dicom-node recall --model 3f9a41c07be2
      dicom-node recall --model 3f9a41c07be2 --json > recalled.json
      dicom-node recall --model 3f9a41c07be2 --reject --title safety --reason "halo at edges"
    """
    from dicom_node import recall as recalls

    settings = common.load_settings(config)
    engine = common.open_ledger(settings)
    made = recalls.made_by(engine, model)
    if not reject:
        _show_made(made, as_json=as_json)
        return
    jobs = len({each.job_id for each in made})
    if gone := recalls.out_of_reach(made):
        click.echo(f"of {len(gone)} of {jobs} series the files have left the spool", err=True)
    if not yes:
        question = f"Reject {len(made)} instances of {jobs} jobs at every destination?"
        click.confirm(question, abort=True, err=True)
    digest = _digest(engine, model)
    with _progress("rejection notes") as progress:
        done = list(
            recalls.reject(
                engine,
                common.open_spool(settings),
                made,
                model_sha256=digest,
                title=title,
                reason=reason,
                identity=settings.identity,
                now=time.time(),
                progress=progress,
            )
        )
    _show_rejections(done, as_json=as_json)


def _show_made(made: Sequence[MadeInstance], *, as_json: bool) -> None:
    if as_json:
        common.print_json([each.row() for each in made])
        return
    jobs: dict[int, list[MadeInstance]] = {}
    for each in made:
        jobs.setdefault(each.job_id, []).append(each)
    rows = [
        {
            "job": job_id,
            "task": members[0].task,
            "series_instance_uid": members[0].series_instance_uid,
            "instances": len(members),
            "destinations": sorted({name for each in members for name in each.destinations}),
            "gone": sum(each.purged for each in members) or None,
        }
        for job_id, members in jobs.items()
    ]
    click.echo(f"{len(made)} instances of {len(jobs)} jobs; each of them with --json")
    common.print_rows(rows, _SERIES_COLUMNS, as_json=False, empty="no instances")


def _digest(engine: Any, model: str) -> str:
    from dicom_node.ledger import recalls

    return recalls.full_digest(engine, model)


def _show_rejections(done: list[Rejection], *, as_json: bool) -> None:
    rows = [asdict(each) | {"destinations": list(each.destinations)} for each in done]
    common.print_rows(rows, _REJECTION_COLUMNS, as_json=as_json, empty="nothing to reject")
    troubled = [each for each in done if each.problem]
    if troubled:
        words = (f"job {each.job_id}: {each.problem}" for each in troubled)
        raise click.ClickException("\n".join(words))


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")
@click.option("--now", "early", is_flag=True, help="What has been delivered goes whatever its age.")
@config_option
@json_option
def purge(dry_run: bool, early: bool, config: Path, as_json: bool) -> None:
    """Remove from the spool what [retention] lets go; the running node does so by itself.

    Nothing goes that has not arrived at every destination (and is committed there, where that is
    asked for), that a job may need, or that a peer has asked us to answer for.

    \b
    Examples:
      dicom-node purge --dry-run
      dicom-node purge --now --dry-run     # what could go if the disk were short
    """
    from dicom_node import purge as purges

    settings = common.load_settings(config)
    engine, now = common.open_ledger(settings), time.time()
    until = purges.ages(settings.retention, now, early=early)
    spool = common.open_spool(settings)
    if dry_run:
        found = purges.preview(engine, spool, until)
    else:
        with _progress("files") as progress:
            found = purges.purge(engine, spool, until, now, progress=progress)
    _show_purged(found, dry_run=dry_run, as_json=as_json)


def _show_purged(found: Purged, *, dry_run: bool, as_json: bool) -> None:
    kinds = {
        str(kind): {"files": count, "bytes": found.bytes[kind]}
        for kind, count in found.files.items()
    }
    if as_json:
        common.print_json({"dry_run": dry_run, "removed": kinds, "bytes": found.bytes.total()})
        return
    verb = "would go" if dry_run else "gone"
    for kind, row in kinds.items():
        click.echo(f"{row['files']:>8} {kind:<12} {row['bytes'] / 1e6:>10.1f} MB {verb}")
    if not kinds:
        click.echo("nothing may go")


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A bar on standard error."""
    from rich.progress import Progress as Bars

    with Bars(console=common.error_console(), transient=True) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
