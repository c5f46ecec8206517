"""``dicom-node completion``: the script by which a shell completes commands, options and states."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_PROGRAM, _VARIABLE = "dicom-node", "_DICOM_NODE_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    Examples:
      dicom-node completion bash > /etc/bash_completion.d/dicom-node
      dicom-node completion zsh  > "${fpath[1]}/_dicom-node"
      dicom-node completion fish > ~/.config/fish/completions/dicom-node.fish
    """
    made = get_completion_class(shell)
    assert made is not None, shell
    click.echo(made(context.find_root().command, {}, _PROGRAM, _VARIABLE).source())
