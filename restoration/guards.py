"""What a restorer notices on the way: the network's own change, and the values of its passes.

The guards are coarse nets for a network gone wrong, judged before its means are held: what holds
them would hide it. The gates (:mod:`restoration.fidelity`) judge the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from restoration.kspace import Support
from restoration.network import Pass
from restoration.tasks import RestorationTask, spec

Volume = npt.NDArray[np.float32]
PerSlice = npt.NDArray[np.float64]
Diagnostics = dict[str, float | list[float]]

# The fraction of the window below which a mean or a spread says nothing about the slice.
_FLAT = 1e-3
# Coarse nets for a network gone wrong; a manifest may tighten them. Drift is in HU for CT, else
# relative to the slice mean; the ratio is sd(change) / sd(input).
LIMITS = {
    RestorationTask.CT_DENOISE: {"mean_drift": 5.0, "residual_ratio": 0.5},
    RestorationTask.MRI_SR: {"mean_drift": 0.05, "residual_ratio": 0.5},
    RestorationTask.PET_SYNTHESIS: {"mean_drift": 0.1, "residual_ratio": 1.0},
}


def change_values(
    x: Volume, y: Volume, task: RestorationTask, scale: float
) -> list[dict[str, float]]:
    """What the network did to the mean of each slice, and with what energy."""
    # Slice by slice: how a sum is rounded must not depend on how many others come with it.
    return [
        {
            "mean_drift": float(_drift(x[i : i + 1], y[i : i + 1], task, scale)[0]),
            "residual_ratio": float(_residual_ratio(x[i : i + 1], y[i : i + 1], task, scale)[0]),
        }
        for i in range(len(x))
    ]


def tripped(values: Diagnostics, task: RestorationTask, tighter: Mapping[str, float]) -> list[str]:
    """The guards that did not hold in some slice; `tighter` limits replace those of the program."""
    limits = LIMITS[task] | dict(tighter)
    return [name for name in LIMITS[task] if (np.abs(values[name]) > limits[name]).any()]


def _floor(task: RestorationTask, scale: float) -> float:
    low, high = spec(task).window
    return _FLAT * (high - low) / scale


def _drift(x: Volume, y: Volume, task: RestorationTask, scale: float) -> PerSlice:
    """Change of each slice's mean: in HU for CT, relative to the mean for PET and MR."""
    change: PerSlice = (y - x).mean(axis=(1, 2), dtype=np.float64)
    if task is not RestorationTask.CT_DENOISE:
        mean = np.abs(x.mean(axis=(1, 2), dtype=np.float64))
        change = change / np.maximum(mean, _floor(task, scale))
    return change


def _residual_ratio(x: Volume, y: Volume, task: RestorationTask, scale: float) -> PerSlice:
    spread: PerSlice = x.std(axis=(1, 2), dtype=np.float64)
    change: PerSlice = (y - x).std(axis=(1, 2), dtype=np.float64)
    return change / np.maximum(spread, _floor(task, scale))


def support_values(support: Support | None) -> Diagnostics:
    """The acquired k-space, where it was found."""
    if support is None:
        return {}
    return {"support_rows": float(support.rows), "support_columns": float(support.columns)}


def scale_of(values: Diagnostics) -> float:
    """The factor that brought the intensities into the window."""
    scale = values["intensity_scale"]
    assert isinstance(scale, float)
    return scale


def support_of(values: Diagnostics) -> Support | None:
    """Inverse of `support_values`."""
    if "support_rows" not in values:
        return None
    rows, columns = (values[f"support_{axis}"] for axis in ("rows", "columns"))
    assert isinstance(rows, float)
    assert isinstance(columns, float)
    return Support(int(rows), int(columns))


def at_full_strength(values: Diagnostics, strength: float) -> Diagnostics:
    """The diagnostics of a restoration mixed with its input, as they would be without."""
    return {
        name: [each / strength for each in value]
        if name in ("mean_drift", "residual_ratio") and isinstance(value, list)
        else value
        for name, value in values.items()
    }


def pass_values(done: Pass) -> list[dict[str, float]]:
    """What a pass of the network said of each of its slices."""
    columns = {
        name: distance.tolist()
        for name in ("latent_distance", "reference_distance")
        if (distance := getattr(done, name)) is not None
    }
    if done.class_logits is not None:
        for task in RestorationTask:
            columns[f"class_logit_{task.value}"] = done.class_logits[:, task.index].tolist()
    slices = range(len(done.restored))
    return [{name: column[i] for name, column in columns.items()} for i in slices]
