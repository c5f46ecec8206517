"""What the commands of ``diffcode`` share: refusals, options, progress, output."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch

Command = TypeVar("Command", bound=Callable[..., Any])
FILE_WIDTH = 200  # columns of a table that goes to a file
# Those of restoration.diffcode and restoration.tasks, written again: help does not wait for torch.
VARIANTS = ("v1", "v2", "v3", "full")
TASKS = ("mri_sr", "ct_denoise", "pet_synthesis")
FOLDER = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True)

bundle_option = click.option(
    "--bundle", default="compact", show_default=True, help="built-in name or folder"
)
tasks_option = click.option(
    "--task", "tasks", multiple=True, type=click.Choice(TASKS), help="only this; repeat"
)
threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads")
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu or cuda"
)


class Refused(click.ClickException):
    """The command was understood and not carried out; exit code 1."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        click.echo(f"diffcode: {self.message}", err=True)


def refusing(command: Command) -> Command:
    """What the libraries refuse becomes one line on stderr and exit code 1."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        from restoration.bundle import RestorationError
        from training.checkpoint import TrainingError

        try:
            command(*arguments, **options)
        except (TrainingError, RestorationError, ValueError, TypeError, OSError) as error:
            raise Refused(str(error)) from error

    return guarded  # type: ignore[return-value]


def device_of(name: str, threads: int | None = None) -> torch.device:
    """The device of `--device`, after PyTorch was told the number of `--threads`."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(title, total=None)
        yield lambda done, total, name: bars.update(
            bar, completed=done, total=total, description=f"{title} {name}"
        )


def refuse_existing(*paths: Path | None) -> None:
    """FileExistsError before any work is done: nothing is overwritten."""
    for path in paths:
        if path is not None and path.exists():
            raise FileExistsError(f"{path} exists; nothing is overwritten")


def show(values: Any, table: Any, as_json: bool) -> None:
    """JSON or the table on stdout; a file gets a table as wide as it wants to be."""
    from rich.console import Console

    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        console = Console()
        Console(width=None if console.is_terminal else FILE_WIDTH).print(table)
