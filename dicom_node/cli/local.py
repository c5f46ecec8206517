"""Commands on files alone: ``restore`` runs the worker's path, ``route`` explains the table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicom_node.cli import common
from dicom_node.cli.common import config_option, json_option
from dicom_node.errors import NodeError, RefusedError, UnreadableInstanceError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from dicom_node.inference import Engine
    from dicom_node.ledger.queue import NewJob
    from dicom_node.routing import Decision, Routes
    from dicom_node.settings import NodeSettings

_TASKS = ("mri_sr", "ct_denoise", "pet_synthesis")

Series = dict[str, tuple[Path, "Dataset"]]


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--task", type=click.Choice(_TASKS), help="Instead of what the routes say.")
@click.option(
    "-c",
    "--config",
    envvar="DICOM_NODE_CONFIG",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The node.toml of a node; without it the defaults.  [env: DICOM_NODE_CONFIG]",
)
@json_option
def restore(folder: Path, out: Path, task: str | None, config: Path | None, as_json: bool) -> None:
    """Restore the series in FOLDER and write them under OUT, without network or ledger."""
    from dicom_node.inference import LocalEngine
    from dicom_node.settings import load

    settings = load(config)
    jobs = list(_plan(folder, _routes(settings, config, task), settings))
    if not jobs:
        raise click.ClickException(f"{folder}: no DICOM series")
    engine = LocalEngine.open(
        settings.engine.bundle, device=settings.engine.device, threads=settings.engine.threads
    )
    results = [_restore_one(job, paths, out, engine, settings) for job, paths in jobs]
    _show_results(results, as_json=as_json)
    if any(result["state"] != "done" for result in results):
        raise SystemExit(1)


def _routes(settings: NodeSettings, config: Path | None, task: str | None) -> Routes:
    """The node's own routes, the defaults, or one route that gives *task* to all."""
    import tomllib

    from dicom_node.cli.starter import DEFAULT_ROUTES
    from dicom_node.routing import Routes, Rule, load_routes, parse_routes

    if task is not None:
        return Routes((Rule("--task", task, (), ()),), "--task")
    if config is not None:
        return load_routes(settings.routes, settings.destination_names)
    return parse_routes(tomllib.loads(DEFAULT_ROUTES), [], source="default routes")


def _plan(
    folder: Path, routes: Routes, settings: NodeSettings
) -> Iterator[tuple[NewJob | str, list[Path]]]:
    """Each volume's job with its files, or the reason why a series is left alone."""
    from dicom_node.assembler import plan
    from dicom_node.routing import Titles

    for series in _series_under([folder]).values():
        headers = {uid: header for uid, (_, header) in series.items()}
        planned = plan(Titles(), headers, routes=routes, policy=settings.policy)
        if not planned.jobs:
            yield planned.reason or "left alone", [path for path, _ in series.values()]
        for job in planned.jobs:
            yield job, [series[uid][0] for uid in job.instance_uids]


def _restore_one(
    job: NewJob | str, paths: Sequence[Path], out: Path, engine: Engine, settings: NodeSettings
) -> dict[str, Any]:
    """Restore one volume; what became of it as a row."""
    row: dict[str, Any] = {"source": str(paths[0].parent), "instances": len(paths)}
    if isinstance(job, str):
        return row | {"state": "ignored", "reason": job}
    row |= {"task": job.task, "series_instance_uid": job.series_instance_uid}
    if job.state.value != "queued":
        return row | {"state": job.state.value, "reason": job.reason}
    try:
        return row | _write(job, paths, out, engine, settings)
    except RefusedError as error:
        return row | {"state": "refused", "reason": error.message}
    except NodeError as error:
        return row | {"state": "failed", "reason": error.message}


def _write(
    job: NewJob, paths: Sequence[Path], out: Path, engine: Engine, settings: NodeSettings
) -> dict[str, Any]:
    from rich.progress import Progress

    from dicom_node.restoring import restore_series

    with Progress(console=common.error_console(), transient=True) as progress:
        bar = progress.add_task(f"{job.task}: {len(paths)} slices", total=len(paths))
        made = restore_series(
            paths,
            job.task,
            engine,
            settings,
            created=datetime.now(UTC),
            note=job.reason,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
        started = time.perf_counter()
        target = out / made.series_instance_uid
        target.mkdir(parents=True, exist_ok=True)
        for instance in made.instances:
            (target / f"{instance.sop_instance_uid}.dcm").write_bytes(instance.data)
    seconds = made.seconds | {"derive": time.perf_counter() - started}
    return {
        "state": "done",
        "reason": "; ".join(made.warnings) or None,
        "derived_series_instance_uid": made.series_instance_uid,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "quantities": made.quantities,
        "out": str(target),
    }


def _show_results(results: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    columns = {
        "source": "source",
        "task": "task",
        "instances": "slices",
        "state": "state",
        "seconds": "seconds",
        "out": "written to",
        "reason": "reason",
    }
    common.print_rows(results, columns, as_json=as_json, empty="nothing to restore")


@click.group()
def route() -> None:
    """The routing table."""


@route.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--calling-ae", default="", help="As if this AE title had sent it.")
@click.option("--called-ae", default="", help="As if it had been sent to this AE title.")
@click.option("--address", default="", help="As if it had come from this address.")
@config_option
@json_option
def explain(
    paths: tuple[Path, ...],
    calling_ae: str,
    called_ae: str,
    address: str,
    config: Path,
    as_json: bool,
) -> None:
    """Show for each series in PATHS every route, every value and why it matched or not."""
    from dicom_node.dicom.division import representative
    from dicom_node.routing import Titles, decide, load_routes

    settings = common.load_settings(config)
    routes = load_routes(settings.routes, settings.destination_names)
    titles = Titles(calling_ae=calling_ae, called_ae=called_ae, address=address)
    stories = []
    for series_uid, series in _series_under(paths).items():
        path, header = sorted(series.values(), key=lambda each: each[0])[len(series) // 2]
        decision = decide(titles, representative([header]), routes)
        stories.append(_story(series_uid, path, len(series), decision))
    if as_json:
        common.print_json(stories)
        return
    for story in stories:
        _show_story(story)


def _story(series_uid: str, path: Path, count: int, decision: Decision) -> dict[str, Any]:
    return {
        "series_instance_uid": series_uid,
        "instances": count,
        "judged_by": str(path),
        "route": decision.route,
        "task": decision.task,
        "destinations": list(decision.destinations),
        "reason": decision.reason,
        "routes": [
            {
                "name": trace.rule,
                "matched": trace.matched,
                "skipped": trace.skipped,
                "tests": [
                    {"test": str(each.condition), "values": list(each.values), "holds": each.holds}
                    for each in trace.conditions
                ],
            }
            for trace in decision.explanation
        ],
    }


def _show_story(story: dict[str, Any]) -> None:
    screen = common.console()
    screen.print(
        f"[bold]series {story['series_instance_uid']}[/bold], {story['instances']} instances, "
        f"judged by {story['judged_by']}",
        highlight=False,
    )
    for trace in story["routes"]:
        mark = "→" if trace["matched"] else " "
        screen.print(f"{mark} {trace['name']}: {trace['skipped'] or _verdict(trace)}", markup=False)
        for test in trace["tests"]:
            shown = "\\".join(str(value) for value in test["values"]) or "(absent)"
            holds = "yes" if test["holds"] else "no"
            screen.print(f"    {test['test']}: {shown} → {holds}", markup=False)
    destinations = ", ".join(story["destinations"]) or "no destination"
    outcome = f"{story['task']} to {destinations}" if story["task"] else story["reason"]
    screen.print(f"[bold]{outcome}[/bold]\n")


def _verdict(trace: dict[str, Any]) -> str:
    return "matches" if trace["matched"] else "does not match"


def _series_under(paths: Sequence[Path]) -> dict[str, Series]:
    """DICOM files by series and SOP Instance UID; a file that is none is named on stderr."""
    from dicom_node.dicom.header import instance_summary, read_header

    found: dict[str, Series] = {}
    for path in _files(paths):
        try:
            header = read_header(path)
            summary = instance_summary(header)
        except UnreadableInstanceError as error:
            click.echo(f"{path}: {error.message}", err=True)
            continue
        series = found.setdefault(summary.series_instance_uid, {})
        series[summary.sop_instance_uid] = (path, header)
    return found


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.is_file())
        else:
            yield path
