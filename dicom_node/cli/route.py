"""``dicom-node route``: what the routing table makes of files, and whether that is as expected."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicom_node.cli import common
from dicom_node.cli.common import config_option, json_option
from dicom_node.cli.series_files import Series, series_under

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from dicom_node.routing import Decision, Routes, RuleTrace

_ROUTES = click.option(
    "--routes",
    "table",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another table than the node's, before it is put in force.",
)


@click.group()
def route() -> None:
    """The routing table: explain what it decides, test it against expectations."""


@route.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--calling-ae", default="", help="As if this AE title had sent it.")
@click.option("--called-ae", default="", help="As if it had been sent to this AE title.")
@click.option("--address", default="", help="As if it had come from this address.")
@click.option("--at", "moment", type=click.DateTime(), help="As if it were then (local time).")
@_ROUTES
@config_option
@json_option
def explain(
    paths: tuple[Path, ...],
    calling_ae: str,
    called_ae: str,
    address: str,
    moment: datetime | None,
    table: Path | None,
    config: Path,
    as_json: bool,
) -> None:
    """Show for each volume in PATHS every route, every value and why it matched or not.

    \b
      dicom-node route explain series/ -c node.toml
      dicom-node route explain one.dcm --calling-ae CT1 --at 2026-01-31T23:00:00 -c node.toml
    """
    from dicom_node.routing import Titles, decide

    routes = _table(config, table)
    titles = Titles(calling_ae=calling_ae, called_ae=called_ae, address=address)
    now = time.time() if moment is None else moment.timestamp()
    split_by = common.load_settings(config).policy.split_by
    stories = []
    for series_uid, series in series_under(paths).items():
        for volume in _volumes(series, split_by):
            decision = decide(titles, volume.header, routes, now)
            stories.append(_story(series_uid, volume, decision))
    if as_json:
        common.print_json(stories)
        return
    for story in stories:
        _show_story(story)
    if not stories:
        raise click.ClickException("no DICOM series")


@route.command("test")
@click.argument("fixture", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_ROUTES
@config_option
@json_option
def test(fixture: Path, table: Path | None, config: Path, as_json: bool) -> None:
    """Compare the routing table with the expectations in FIXTURE; exit code 1 where they differ.

    \b
      [[expect]]
      name = "chest at low dose"
      calling_ae = "CT1"
      header = { Modality = "CT", KVP = 100, Exposure = 20 }
      route = "ct-low-dose"
      destinations = ["pacs"]
    """
    from dicom_node.expectations import load_expectations, mismatches

    routes = _table(config, table)
    rows = []
    for expectation in load_expectations(fixture):
        decision = expectation.decision(routes)
        wrong = mismatches(expectation, decision)
        rows.append(
            {
                "name": expectation.name,
                "passed": not wrong,
                "mismatches": wrong,
                "decision": _decided(decision),
            }
        )
    failed = [row for row in rows if not row["passed"]]
    if as_json:
        common.print_json(rows)
    else:
        _show_results(rows)
        click.echo(f"{len(rows) - len(failed)} of {len(rows)} expectations hold")
    if failed:
        raise SystemExit(1)


def _table(config: Path, table: Path | None) -> Routes:
    """The node's routes, or those of another file with the node's destinations."""
    from dicom_node.routing import load_routes

    settings = common.load_settings(config)
    return load_routes(table or settings.routes, settings.destination_names)


@dataclass(frozen=True)
class _Volume:
    """What one decision is made for; *set_aside* says why no rule is ever asked."""

    key: str
    path: Path
    header: Dataset
    instances: int
    set_aside: str | None


def _volumes(series: Series, split_by: Sequence[Any]) -> Iterator[_Volume]:
    """The volumes of a series, each with the header that its rules are tested on."""
    from dicom_node.dicom.division import WHOLE, group_volumes, representative
    from dicom_node.dicom.header import why_ignored

    reasons = {uid: why_ignored(header) for uid, (_, header) in series.items()}
    wanted = [header for uid, (_, header) in series.items() if reasons[uid] is None]
    for group in group_volumes(wanted, split_by) if wanted else []:
        uids = group.sop_instance_uids
        path, _ = series[uids[len(uids) // 2]]
        header = representative([series[uid][1] for uid in uids])
        yield _Volume(group.key, path, header, len(uids), None)
    for reason in dict.fromkeys(each for each in reasons.values() if each):
        members = [series[uid] for uid, why in reasons.items() if why == reason]
        path, header = members[len(members) // 2]
        yield _Volume(WHOLE, path, representative([header]), len(members), reason)


def _decided(decision: Decision) -> dict[str, Any]:
    return {
        "route": decision.route,
        "task": decision.task,
        "destinations": list(decision.destinations),
        "priority": decision.priority,
        "strength": decision.strength,
        "not_before": _iso(decision.not_before),
        "reason": decision.reason,
    }


def _iso(at: float) -> str | None:
    return datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds") if at else None


def _story(series_uid: str, volume: _Volume, decision: Decision) -> dict[str, Any]:
    aside = volume.set_aside
    return {
        "series_instance_uid": series_uid,
        "volume": volume.key,
        "instances": volume.instances,
        "judged_by": str(volume.path),
        "set_aside": aside,
        **(_decided(decision) | ({"task": None, "route": None, "reason": aside} if aside else {})),
        "routes": [_traced(trace) for trace in decision.explanation],
    }


def _traced(trace: RuleTrace) -> dict[str, Any]:
    return {
        "name": trace.rule,
        "matched": trace.matched,
        "skipped": trace.skipped,
        "hours": trace.hours,
        "tests": [
            {
                "test": str(each.condition),
                "values": list(each.values),
                "unit": each.condition.key.unit,
                "holds": each.holds,
                "words": str(each),
            }
            for each in trace.conditions
        ],
    }


def _show_story(story: Mapping[str, Any]) -> None:
    screen = common.console()
    rest = (
        f", volume {story['volume']}, {_many(story['instances'])}, judged by {story['judged_by']}"
    )
    title = common.verbatim(f"series {story['series_instance_uid']}", "bold")
    screen.print(title + common.verbatim(rest), highlight=False)
    for trace in story["routes"]:
        mark = "→" if trace["matched"] else " "
        outcome = trace["skipped"] or _verdict(trace)
        screen.print(common.verbatim(f"{mark} {trace['name']}: {outcome}"))
        for test in trace["tests"]:
            screen.print(common.verbatim(f"    {test['words']}"))
        if trace["hours"]:
            screen.print(common.verbatim(f"    {trace['hours']}"))
    screen.print(common.verbatim(f"{_outcome(story)}\n", "bold"))


def _many(instances: int) -> str:
    return "1 instance" if instances == 1 else f"{instances} instances"


def _verdict(trace: Mapping[str, Any]) -> str:
    return "matches" if trace["matched"] else "does not match"


def _outcome(story: Mapping[str, Any]) -> str:
    if story["set_aside"]:
        return f"ignored before any route is asked: {story['set_aside']}"
    if story["task"] is None:
        return f"ignored: {story['reason']}"
    words = f"{story['task']} to {', '.join(story['destinations']) or 'no destination'}"
    if story["strength"] != 1.0:
        words += f", strength {story['strength']:g}"
    return words + (f", not before {story['not_before']}" if story["not_before"] else "")


def _show_results(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        click.echo(f"{'ok  ' if row['passed'] else 'FAIL'} {row['name']}")
        for line in row["mismatches"]:
            click.echo(f"       {line}")
