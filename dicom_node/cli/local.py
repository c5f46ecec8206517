"""``dicom-node restore``: the worker's path on files alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicom_node.cli import common
from dicom_node.cli.common import json_option, optional_config_option
from dicom_node.cli.series_files import series_under
from dicom_node.errors import NodeError, RefusedError

if TYPE_CHECKING:
    from dicom_node.inference import Engine
    from dicom_node.ledger.queue import NewJob
    from dicom_node.routing import Routes
    from dicom_node.settings import NodeSettings

_TASKS = ("mri_sr", "ct_denoise", "pet_synthesis")


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--task", type=click.Choice(_TASKS), help="Instead of what the routes say.")
@optional_config_option
@click.option("--write-held", is_flag=True, help="Write what a gate holds for review, too.")
@json_option
def restore(
    folder: Path,
    out: Path,
    task: str | None,
    config: Path | None,
    write_held: bool,
    as_json: bool,
) -> None:
    """Restore the series in FOLDER and write them under OUT, without network or ledger.

    What a gate holds or refuses is not written.
    """
    from dicom_node.inference import LocalEngine
    from dicom_node.settings import load

    settings = load(config)
    jobs = list(_plan(folder, _routes(settings, config, task), settings))
    if not jobs:
        raise click.ClickException(f"{folder}: no DICOM series")
    engine = LocalEngine.open(
        settings.engine.bundle, device=settings.engine.device, threads=settings.engine.threads
    )
    results = [_restore_one(job, paths, out, engine, settings, write_held) for job, paths in jobs]
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
    from dicom_node.planning import plan
    from dicom_node.routing import Titles

    for series in series_under([folder]).values():
        headers = {uid: header for uid, (_, header) in series.items()}
        planned = plan(
            Titles(),
            headers,
            routes=routes,
            policy=settings.policy,
            trust=settings.assembly.trust_images_in_acquisition,
            now=time.time(),
        )
        if not planned.jobs:
            yield planned.reason or "left alone", [path for path, _ in series.values()]
        for job in planned.jobs:
            yield job, [series[uid][0] for uid in job.instance_uids]


def _restore_one(
    job: NewJob | str,
    paths: Sequence[Path],
    out: Path,
    engine: Engine,
    settings: NodeSettings,
    write_held: bool,
) -> dict[str, Any]:
    """Restore one volume; what became of it as a row."""
    row: dict[str, Any] = {"source": str(paths[0].parent), "instances": len(paths)}
    if isinstance(job, str):
        return row | {"state": "ignored", "reason": job}
    row |= {
        "task": job.task,
        "series_instance_uid": job.series_instance_uid,
        "volume": job.volume_key,
        "evidence": list(job.evidence),
    }
    if job.state.value != "queued":
        return row | {"state": job.state.value, "reason": job.reason}
    try:
        return row | _write(job, paths, out, engine, settings, write_held)
    except RefusedError as error:
        return row | {"state": "refused", "reason": error.message}
    except NodeError as error:
        return row | {"state": "failed", "reason": error.message}


def _write(
    job: NewJob,
    paths: Sequence[Path],
    out: Path,
    engine: Engine,
    settings: NodeSettings,
    write_held: bool,
) -> dict[str, Any]:
    from rich.progress import Progress

    from dicom_node.ledger.states import Verdict
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
            strength=job.strength,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
        verdict = made.judgement.worst
        if verdict is Verdict.REFUSE or (verdict is Verdict.HOLD and not write_held):
            state = "refused" if verdict is Verdict.REFUSE else "held"
            return {"state": state, "reason": made.judgement.reason}
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
