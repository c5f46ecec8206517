"""``diffcode bench``: how fast the network is here, and how fast it could be."""

from __future__ import annotations

import json
from pathlib import Path

import click

from training.cli.common import FOLDER, VARIANTS, device_option, refusing, threads_option

_PRESETS = ("paper", "compact", "tiny")
_PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@click.command()
@click.option("--preset", "presets", multiple=True, type=click.Choice(_PRESETS), help="all")
@click.option("--variant", default="full", show_default=True, type=click.Choice(VARIANTS))
@click.option("--size", "sizes", multiple=True, type=click.IntRange(64, 4096), help="512")
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(_PRECISIONS), help="auto"
)
@device_option
@click.option("--batch", type=click.IntRange(1), help="slices at once; default: as the node takes")
@threads_option
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option("--peers", is_flag=True, help="networks of Restormer's and AMIR's size beside them")
@click.option("--json", "as_json", is_flag=True, help="one object on stdout")
@click.option("--write", "page", type=FOLDER, help="put the tables into a page of results")
@refusing
def bench(
    presets: tuple[str, ...],
    variant: str,
    sizes: tuple[int, ...],
    precisions: tuple[str, ...],
    device: str,
    batch: int | None,
    threads: int | None,
    repeats: int,
    peers: bool,
    as_json: bool,
    page: Path | None,
) -> None:
    """Slices a second and memory of each preset, and the share of the machine's limit.

    The weights are random: times do not depend on them. The limit is measured in the same run by
    one large matrix product and one large copy.

    \b
    diffcode bench --preset compact --threads 2
    diffcode bench --preset paper --peers --json          # a GPU, where there is one
    diffcode bench --write benchmarks/RESULTS.md
    """
    import torch

    from training import bench as benchmark

    if threads is not None:
        torch.set_num_threads(threads)
    plan = benchmark.Plan(
        presets or _PRESETS, variant, sizes or (512,), precisions or ("auto",), device, batch,
        peers, repeats=repeats,
    )  # fmt: skip
    outcome = benchmark.run(plan, lambda row: click.echo(row, err=True))
    if page is not None:
        context = click.get_current_context()
        benchmark.write(page, benchmark.section(outcome, command_line(context)))
    if as_json:
        click.echo(json.dumps(outcome.to_dict(), indent=1))
    else:
        click.echo(benchmark.table(outcome), nl=False)


def command_line(context: click.Context) -> str:
    """The command with what was given to it, as one would type it."""
    words = [context.command_path]
    for parameter in context.command.get_params(context):
        if not isinstance(parameter, click.Option) or parameter.name is None:
            continue
        value = context.params.get(parameter.name)
        if context.get_parameter_source(parameter.name) is click.core.ParameterSource.DEFAULT:
            continue
        values = value if isinstance(value, tuple) else (value,)
        name = parameter.opts[0]
        words += [name] if parameter.is_flag else [f"{name} {each}" for each in values]
    return " ".join(words)
