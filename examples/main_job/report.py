"""What arrived: read back from the archive, measured where the truth is known, drawn as PNG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from rich.table import Table

from examples.main_job.series import Source
from training import metrics

Volume = NDArray[np.float32]

# What a reader would set: soft tissue in HU, SUV; an MR series by its own brightest tissue.
_WINDOWS = {"ct_denoise": (-160.0, 240.0), "pet_synthesis": (0.0, 6.0)}
_GREY = {"pet_synthesis": "gray_r"}


@dataclass(frozen=True)
class Restored:
    """One restored volume beside its input, slices in order, in the units of the task."""

    source: Source
    job: Mapping[str, Any]
    before: Volume
    after: Volume
    truth: Volume | None
    slice_mm: float
    pixel_mm: float

    @property
    def task(self) -> str:
        """The task that the node chose."""
        return str(self.job["task"])


def collect(source: Source, job: Mapping[str, Any], files: Iterable[Path]) -> Restored:
    """Pair each restored instance with the instance that it names as its source."""
    restored = sorted((dcmread(path) for path in files), key=_position, reverse=True)
    if not restored:
        raise ValueError(f"the archive has no instance of job {job['id']}")
    sent = {_uid(path): path for path in source.files}
    origins = [sent[_origin(dataset)] for dataset in restored]
    truth = source.truth
    return Restored(
        source,
        job,
        _physical([dcmread(path) for path in origins], source.unit),
        _physical(restored, source.unit),
        None if truth is None else truth[[source.files.index(path) for path in origins]],
        _slice_mm(restored),
        float(restored[0].PixelSpacing[1]),
    )


def _uid(path: Path) -> str:
    return str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)


def _origin(dataset: Dataset) -> str:
    # PS3.3 C.7.6.1.1.4
    return str(dataset.SourceImageSequence[0].ReferencedSOPInstanceUID)


def _position(dataset: Dataset) -> float:
    """Distance along the slice normal in mm."""
    row, column = np.reshape(dataset.ImageOrientationPatient, (2, 3)).astype(float)
    along = np.cross(row, column) @ np.asarray(dataset.ImagePositionPatient, dtype=float)
    return float(along)


def _slice_mm(datasets: Sequence[Dataset]) -> float:
    places = [_position(dataset) for dataset in datasets]
    gaps = np.abs(np.diff(places))
    return float(np.median(gaps)) if len(gaps) else float(datasets[0].get("SliceThickness", 1))


def _physical(datasets: Sequence[Dataset], unit: float) -> Volume:
    planes = [
        dataset.pixel_array * float(dataset.get("RescaleSlope", 1))
        + float(dataset.get("RescaleIntercept", 0))
        for dataset in datasets
    ]
    return np.asarray(planes, dtype=np.float32) / np.float32(unit)


def table(rows: Sequence[tuple[str, ...]], archive: str) -> Table:
    """The table that the run ends with."""
    made = Table(
        title=f"Restored series, as read back from {archive}",
        caption=f"PSNR: {metrics.PROTOCOL}",
        caption_justify="left",
    )
    for name in ("series", "task"):
        made.add_column(name, no_wrap=True)
    for name in ("slices", "seconds", "PSNR before", "PSNR after"):
        made.add_column(name, justify="right")
    made.add_column("destination")
    made.add_column("job", justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def row(restored: Restored) -> tuple[str, ...]:
    """One line of the table."""
    job = restored.job
    seconds = sum(value or 0.0 for value in job["seconds"].values())
    deliveries = job["deliveries"]
    status = ", ".join(f"{item['state']} {item['sent']}/{item['total']}" for item in deliveries)
    return (
        restored.source.label,
        restored.task,
        str(len(restored.after)),
        f"{seconds:.1f}",
        _measured(restored, restored.before),
        _measured(restored, restored.after),
        status,
        str(job["id"]),
    )


def unrestored(label: str, state: str, job: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The line of a series, or of one job of it, that has nothing in the archive."""
    task, identifier = (str(job["task"]), str(job["id"])) if job else ("–", "–")
    return (label, task, "0", "–", "–", "–", state, identifier)


def why(label: str, job: Mapping[str, Any], node: Path) -> str:
    """Why a job has nothing in the archive, and where there is more to see; *node*: its folder."""
    words = f"{label}, job {job['id']}, is {job['state']}: {job['reason'] or 'no reason is known'}"
    page = node / "spool" / "review" / str(job["id"]) / "report.html"
    if job["state"] == "held":
        words += ". ARGS='--gates warn' sends what a gate fails, marked [QC]"
    return f"{words}. Input beside result: {page}" if page.exists() else words


def _measured(restored: Restored, image: Volume) -> str:
    if restored.truth is None:
        return "–"
    pairs = zip(image, restored.truth, strict=True)
    scores = [metrics.score(plane, truth, restored.task) for plane, truth in pairs]
    mean = metrics.mean_score([score for score in scores if score is not None])
    return f"{mean.psnr:.2f} dB"


def draw(restored: Restored, path: Path) -> None:
    """Before, after, difference and, where it is known, the truth of one plane."""
    plane, aspect, where = _plane(restored)
    panels = {"before": restored.before[plane], "after": restored.after[plane]}
    if restored.truth is not None:
        panels["truth"] = restored.truth[plane]
    difference = panels["after"] - panels["before"]
    low, high = _WINDOWS.get(restored.task, (0.0, float(np.percentile(panels["after"], 99.5))))
    height = 0.6 + 4 * min(aspect * _tall(difference), 1.6)
    figure = Figure(figsize=(4 * len(panels) + 4.6, height), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1)
    for axis, (name, image) in zip(axes, panels.items(), strict=False):
        grey = _GREY.get(restored.task, "gray")
        axis.imshow(image, cmap=grey, vmin=low, vmax=high, aspect=aspect)
        axis.set_title(name)
    reach = max(float(np.percentile(np.abs(difference), 99.5)), 1e-6)
    shown = axes[-1].imshow(difference, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect=aspect)
    axes[-1].set_title("after − before")
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle(f"{restored.source.label}: {restored.task}, {where}")
    figure.colorbar(shown, ax=axes, shrink=0.7, pad=0.01, fraction=0.02)
    figure.savefig(path, dpi=80)


def _tall(image: Volume) -> float:
    return float(image.shape[0] / image.shape[1])


def _plane(restored: Restored) -> tuple[tuple[slice | int, ...], float, str]:
    """The plane to draw, how much taller than wide its pixels are, and what to call it.

    A long stack of slices is seen from the front, anything else from the feet.
    """
    slices, rows, _ = restored.after.shape
    ratio = restored.slice_mm / restored.pixel_mm
    if slices * ratio > 0.7 * rows:
        return (slice(None), rows // 2), ratio, "coronal"
    return (slices // 2,), 1.0, f"slice {slices // 2 + 1} of {slices}"
