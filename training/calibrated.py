"""A bundle with calibrated gates, and the pictures of what its levels were learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from restoration.bundle import CARD, Manifest, load_bundle, write_bundle
from restoration.fidelity import GATES, GateSpec, Levels
from restoration.restorer import bundle_folder
from restoration.tasks import RestorationTask
from training.calibrate import Outcome

_COLUMNS = 4


def write(
    bundle: str | Path, out: Path, outcomes: Mapping[str, Outcome], *, overwrite: bool
) -> Manifest:
    """Write a bundle again with these calibrations; weights, card and other tasks stay.

    Raises BundleError as `write_bundle` does.
    """
    folder = bundle_folder(bundle)
    old, model = load_bundle(folder)
    learnt = {task: outcome.calibration for task, outcome in outcomes.items()}
    made = replace(old, calibration={**old.calibration, **learnt})
    card = folder / CARD
    return write_bundle(
        out,
        model,
        made.to_dict(),
        card.read_text(encoding="utf-8") if card.is_file() else None,
        half=old.dtype == "float16",
        overwrite=overwrite,
    )


def draw(outcome: Outcome, task: str, path: Path) -> None:
    """The distribution of every learnt gate over slices, its levels as lines, as a PNG."""
    from matplotlib.figure import Figure

    specs = [spec for spec in GATES if spec.name in outcome.calibration.levels]
    rows = -(-len(specs) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.2 * rows), layout="constrained")
    for place, spec in enumerate(specs, 1):
        axes = figure.add_subplot(rows, _COLUMNS, place)
        values = np.concatenate(list(outcome.values[spec.name].values()))
        values = values[np.isfinite(values)]
        if spec.logarithmic and (values > 0).all():
            axes.set_xscale("log")
            low, high = np.log10(values.min()), np.log10(values.max())
            axes.hist(values, bins=np.logspace(low, high + 1e-9, 40).tolist(), color="0.6")
        else:
            axes.hist(values, bins=40, color="0.6")
        _lines(axes, outcome.calibration.levels[spec.name])
        axes.set_yticks([])
        axes.set_title(_title(spec, RestorationTask(task)), fontsize=8)
        axes.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _lines(axes: object, levels: Levels) -> None:
    for bounds, colour in ((levels.warn, "tab:orange"), (levels.fail, "tab:red")):
        for end in (bounds.low, bounds.high):
            if end is not None:
                axes.axvline(end, color=colour, linewidth=1)  # type: ignore[attr-defined]


def _title(spec: GateSpec, task: RestorationTask) -> str:
    return f"{spec.name}, {spec.unit_of(task)}"
