"""Pictures of an evaluation: each method's image, and below it its error, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from restoration.tasks import RestorationTask, spec
from training.evaluation import Evaluation, Sample
from training.metrics import WINDOWS

Slice = npt.NDArray[np.float32]
# Reading windows: soft tissue for CT, inverted grey up to SUV 5 for PET.
DISPLAY: dict[RestorationTask, tuple[float, float, str]] = {
    RestorationTask.MRI_SR: (0.0, 1200.0, "gray"),
    RestorationTask.CT_DENOISE: (-160.0, 240.0, "gray"),
    RestorationTask.PET_SYNTHESIS: (0.0, 5.0, "gray_r"),
}
ERROR_SPAN = 0.25  # of the reading window


def picture_paths(tasks: Sequence[RestorationTask], folder: Path) -> list[Path]:
    """What ``write_pictures`` may write."""
    return [folder / f"{t.value}{kind}.png" for t in tasks for kind in ("", "-real", "-simulated")]


def write_pictures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """One PNG per task, or per kind of reference where a task has both; refuses to overwrite."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [sample.task for sample in evaluation.samples]
    written = []
    for sample in evaluation.samples:
        kind = "-simulated" if sample.simulated else "-real"
        name = sample.task.value + (kind if tasks.count(sample.task) > 1 else "")
        path = folder / f"{name}.png"
        figure = _figure(sample)
        with path.open("xb") as file:
            figure.savefig(file, dpi=100)
        written.append(path)
    return written


def _figure(sample: Sample) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low, high, palette = DISPLAY[sample.task]
    span = ERROR_SPAN * (high - low)
    columns = [*sample.images.items(), ("reference", sample.truth)]
    figure = Figure(figsize=(3.2 * len(columns), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, image) in enumerate(columns):
        above = figure.add_subplot(2, len(columns), i + 1, title=name)
        above.imshow(image, cmap=palette, vmin=low, vmax=high)
        below = figure.add_subplot(2, len(columns), len(columns) + i + 1)
        below.imshow(_error(image, sample), cmap="seismic", vmin=-span, vmax=span)
        for axes in (above, below):
            axes.set_axis_off()
    task = spec(sample.task)
    figure.suptitle(f"{task.label}; below: error, ±{span:g} {task.units}")
    return figure


def _error(image: Slice, sample: Sample) -> Slice:
    low, high = WINDOWS[sample.task]
    difference: Slice = image.clip(low, high) - sample.truth.clip(low, high)
    return difference
