"""The log of a stage: JSON lines, a progress bar, TensorBoard events where it is installed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from training.checkpoint import TrainingError
from training.recipe import Optimisation

LOG = "log.jsonl"


class Journal:
    """Collects the terms of the loss and writes their means; open it as a context.

    Lines past ``step``, where the run resumes, are forgotten: the run writes them again.
    """

    def __init__(
        self, folder: Path, step: int, settings: Optimisation, console: Console | None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.settings, self.console = settings, console
        _drop_later_lines(folder / LOG, step)
        self.file = (folder / LOG).open("a", encoding="utf-8")
        self.board = _tensorboard(folder)
        self.sums: dict[str, Tensor] = {}
        self.since, self.count = time.monotonic(), 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console or Console(quiet=True),
        )
        self.bar = self.progress.add_task(folder.name, total=settings.steps, completed=step)

    def __enter__(self) -> Journal:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.file.close()
        if self.board is not None:
            self.board.close()

    def add(self, step: int, terms: Mapping[str, Tensor]) -> bool:
        """Count a step; True when a line is due."""
        self.count += 1
        for name, term in terms.items():
            if term.ndim == 0:
                # Kept as tensors: reading each would wait for the device at every step.
                self.sums[name] = self.sums.get(name, 0.0) + term.detach()
        return step % self.settings.log_every == 0 or step == self.settings.steps

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the means since the last line; TrainingError when the loss is not finite."""
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        if not math.isfinite(means["loss"]):
            raise TrainingError(f"the loss is not finite near step {step}; checkpoint kept")
        now = time.monotonic()
        rate = self.count / max(1e-9, now - self.since)
        self._line(step, {**means, "steps_per_second": rate, **figures})
        text = f"loss {means['loss']:.5f} {rate:.2f} it/s"
        self.progress.update(self.bar, completed=step, description=text)
        self.sums, self.since, self.count = {}, now, 0

    def validation(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures of the averaged model on validation slices."""
        self._line(step, {f"validation/{name}": value for name, value in figures.items()})
        if self.console is not None:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            self.console.print(f"step {step}: {shown}")

    def _line(self, step: int, figures: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def _drop_later_lines(path: Path, step: int) -> None:
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")
