"""``diffcode bundle``: a finished run as the node loads it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from training.cli.common import EXISTING, FOLDER, VARIANTS, refusing


@click.command()
@click.argument("run", type=EXISTING)
@click.argument("out", type=FOLDER)
@click.option("--data", required=True, type=EXISTING, help="prepared folder of the training")
@click.option("--variant", type=click.Choice(VARIANTS), help="when the run holds several")
@click.option("--name", default="compact", show_default=True)
@click.option("--version", default="1", show_default=True)
@click.option("--licence", default="Apache-2.0", show_default=True, help="of the weights")
@click.option(
    "--card", type=EXISTING, help="model card in Markdown; {{figures}} and the like are filled"
)
@click.option("--metrics", type=EXISTING, help="what evaluate --json printed")
@click.option("--domain", type=EXISTING, help="TOML with a table per task, over what the data say")
@click.option("--overwrite", is_flag=True, help="replace the bundle in OUT")
@refusing
def bundle(
    run: Path,
    out: Path,
    data: Path,
    variant: str | None,
    name: str,
    version: str,
    licence: str,
    card: Path | None,
    metrics: Path | None,
    domain: Path | None,
    overwrite: bool,
) -> None:
    """Write the averaged weights of a run as a bundle for the node.

    \b
    diffcode bundle run my-bundle --data prepared --variant v2 --name mine --card card.md
    """
    from training import export

    manifest = export.export_bundle(
        run,
        out,
        data,
        variant=variant,
        fields={"name": name, "version": version, "licence": licence},
        card=card.read_text(encoding="utf-8") if card else None,
        metrics=json.loads(metrics.read_text(encoding="utf-8")) if metrics else {},
        domain=domain,
        overwrite=overwrite,
    )
    click.echo(f"{out}: {manifest.name} {manifest.version}, {manifest.variant}, {manifest.sha256}")


@click.command()
@click.argument("bundle")
@click.argument("out", type=FOLDER)
@click.option("--card", required=True, type=EXISTING, help="model card with places for figures")
@click.option("--metrics", required=True, type=EXISTING, help="what evaluate --json printed")
@click.option("--overwrite", is_flag=True, help="replace the bundle in OUT")
@refusing
def card(bundle: str, out: Path, card: Path, metrics: Path, overwrite: bool) -> None:
    """Write BUNDLE (a built-in name or a folder) again with the figures of an evaluation.

    The weights stay as they are. The card's text has places for tables: {{figures}},
    {{protocols}}, {{quantities}}, {{protocol}}, {{sha256}}.

    \b
    diffcode evaluate --data prepared --bundle my-bundle --json > evaluation.json
    diffcode card my-bundle my-bundle-2 --card card.md --metrics evaluation.json
    """
    from training import export

    manifest = export.reissue_bundle(
        bundle,
        out,
        card=card.read_text(encoding="utf-8"),
        metrics=json.loads(metrics.read_text(encoding="utf-8")),
        overwrite=overwrite,
    )
    click.echo(f"{out}: {manifest.name} {manifest.version}, {manifest.variant}, {manifest.sha256}")
