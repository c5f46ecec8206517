"""``diffcode``: prepare data, train the stages, inspect, evaluate, bundle, card, restore.

What a command needs is imported when it runs, so ``--help`` does not wait for torch.
"""

from __future__ import annotations

import click

from training.cli.bench import bench
from training.cli.bundle import bundle, card
from training.cli.codebook import codebook
from training.cli.evaluate import evaluate
from training.cli.gates import calibrate, gates, harm
from training.cli.ladder import ladder
from training.cli.phantom import phantom
from training.cli.prepare import prepare
from training.cli.restore import restore
from training.cli.train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Train, evaluate and use DiffCode restoration models."""


for command in (
    train,
    prepare,
    codebook,
    ladder,
    evaluate,
    bundle,
    card,
    restore,
    calibrate,
    gates,
    harm,
    phantom,
    bench,
):
    main.add_command(command)
