"""``dicom-node``: the commands of a node's administrator.

Exit codes: 0 done, 1 refused or failed with the reason on stderr, 2 usage. What a command needs is
imported when it runs, so ``--help`` does not wait for libraries.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dicom_node import __version__
from dicom_node.cli import (
    admin,
    common,
    completion,
    decisions,
    destinations,
    local,
    recall,
    route,
    watch,
)
from dicom_node.cli.common import config_option, json_option, optional_config_option
from dicom_node.errors import ConfigurationError

if TYPE_CHECKING:
    from dicom_node.association import Peer
    from dicom_node.settings import NodeSettings

_ROLES = ("receive", "restore", "deliver", "all")


@click.group(cls=common.NodeGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dicom-node")
def cli() -> None:
    """A DICOM node that restores CT, PET and MR series on their way to the archive.

    \b
      dicom-node init ./node --to pacs=ORTHANC@127.0.0.1:4242
      dicom-node serve -c ./node/node.toml
    """


@cli.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--ae-title", help="AE title of the node.  [default: DIFFCODE]")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port.  [default: 11112]")
@click.option("--to", multiple=True, metavar="NAME=AET@HOST:PORT", help="A destination; repeat.")
@click.option("--bundle", help="Model bundle: a name that is shipped, or a folder.")
def init(
    folder: Path,
    ae_title: str | None,
    host: str | None,
    port: int | None,
    to: tuple[str, ...],
    bundle: str | None,
) -> None:
    """Make FOLDER a node: node.toml, routes.toml, spool and ledger."""
    from dicom_node.cli.starter import parse_destination, write_node

    try:
        destinations = dict(map(parse_destination, to))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--to") from error
    given = {"ae_title": ae_title, "host": host, "port": port}
    node = {key: value for key, value in given.items() if value is not None}
    write_node(folder, node=node, destinations=destinations, bundle=bundle)
    click.echo(f"{folder / 'node.toml'} is ready: dicom-node serve -c {folder / 'node.toml'}")


@cli.command()
@config_option
@click.option("--role", type=click.Choice(_ROLES), default="all", help="One role, or all of them.")
def serve(config: Path, role: str) -> None:
    """Run the node in the foreground until SIGTERM or Ctrl-C.

    SIGTERM drains and ends within 10 seconds; SIGHUP reads routes.toml and the TLS files again.
    """
    from dicom_node.observability import configure
    from dicom_node.supervisor.process import EX_CONFIG, SUPERVISOR_PID

    settings = checked_settings(config)
    configure(level=settings.log.level, format=settings.log.format)
    try:
        if role == "all":
            from dicom_node.supervisor.parent import run_all

            run_all(config.resolve())
        else:
            from dicom_node.supervisor.roles import run_role

            run_role(role, settings)
    except ConfigurationError:
        if SUPERVISOR_PID in os.environ:  # the parent was told, and says it once
            raise SystemExit(EX_CONFIG) from None
        raise


@cli.command("check-config")
@config_option
def check_config(config: Path) -> None:
    """Read node.toml and routes.toml and name every mistake with its place."""
    settings = checked_settings(config)
    names = ", ".join(settings.destination_names) or "none"
    click.echo(f"{config}: good (destinations: {names})")
    click.echo(f"{settings.routes}: good")


@cli.command()
@config_option
@json_option
def doctor(config: Path, as_json: bool) -> None:
    """Test the node from configuration to destinations, and say what to do.

    Settings, routes, spool, permissions, disk, ledger, clock, backlog, model, TLS, listener,
    access, destinations (by C-ECHO) and refusals. Exit code 1 where one of them is a problem.

    \b
    Examples:
      dicom-node doctor
      dicom-node doctor --json | jq '.[] | select(.state != "good")'
    """
    from dicom_node.cli.doctor import examine, show

    findings = examine(config)
    show(findings, as_json=as_json)
    if any(finding.state == "problem" for finding in findings):
        raise SystemExit(1)


@cli.command()
@click.argument("name")
@config_option
@json_option
def echo(name: str, config: Path, as_json: bool) -> None:
    """Ask destination NAME with C-ECHO whether it is there and knows us."""
    from dicom_node.storage_scu import echo as ask

    result = ask(_peer(common.load_settings(config), name))
    if as_json:
        common.print_json(
            {"destination": name, "ok": result.ok, "words": result.words, "seconds": result.seconds}
        )
    if not result.ok:
        raise click.ClickException(result.words)
    if not as_json:
        click.echo(f"{result.words} in {result.seconds:.2f} s")


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--to", "name", required=True, metavar="NAME", help="Destination of node.toml.")
@config_option
def send(paths: tuple[Path, ...], name: str, config: Path) -> None:
    """Send DICOM files, folders searched, to a destination.

    \b
    Examples:
      dicom-node send ./series --to pacs
    """
    from rich.progress import Progress

    from dicom_node.storage_scu import send_files

    peer = _peer(common.load_settings(config), name)
    with Progress(console=common.error_console(), transient=True) as progress:
        bar = progress.add_task(f"to {name}", total=None)
        report = send_files(
            paths,
            peer,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    for path, why in report.unreadable:
        click.echo(f"{path}: {why}", err=True)
    for sent in report.sent:
        if sent.outcome != "delivered":
            click.echo(f"{sent.sop_instance_uid}: {sent.words}", err=True)
    click.echo(f"{report.delivered} of {report.total} stored in {report.seconds:.1f} s")
    if not report.ok:
        raise click.ClickException(report.trouble or "not every instance was stored")


@cli.command()
@optional_config_option
def conformance(config: Path | None) -> None:
    """Print the DICOM Conformance Statement (PS3.2) of a node, as Markdown."""
    from dicom_node.conformance import statement
    from dicom_node.settings import load

    click.echo(statement(load(config)), nl=False)


def checked_settings(config: Path) -> NodeSettings:
    """Settings whose routing table is good too; ConfigurationError with every problem."""
    from dicom_node.routing import load_routes

    settings = common.load_settings(config)
    load_routes(settings.routes, settings.destination_names)
    return settings


def _peer(settings: NodeSettings, name: str) -> Peer:
    from dicom_node.association import Peer

    destination = settings.destinations.get(name)
    if destination is None:
        known = ", ".join(settings.destinations) or "none"
        raise click.BadParameter(f"{name!r} is not in node.toml (known: {known})")
    return Peer.of(destination, settings)


cli.add_command(local.restore)
cli.add_command(route.route)
cli.add_command(admin.jobs)
cli.add_command(admin.series)
cli.add_command(admin.deliveries)
cli.add_command(destinations.destinations)
cli.add_command(decisions.breakers)
cli.add_command(admin.instances)
cli.add_command(admin.stats)
cli.add_command(watch.watch)
cli.add_command(recall.recall)
cli.add_command(recall.purge)
cli.add_command(completion.completion)


def main() -> None:
    """The entry point of the ``dicom-node`` program."""
    cli(prog_name="dicom-node")


if __name__ == "__main__":
    main()
