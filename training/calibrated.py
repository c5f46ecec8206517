"""A bundle with calibrated gates, and the pictures of what its levels were learnt from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from restoration.bundle import CARD, Manifest, load_bundle, write_bundle
from restoration.fidelity import GATES, Calibration, GateSpec, Levels
from restoration.restorer import bundle_folder
from restoration.tasks import RestorationTask
from training.calibrate import Outcome

_COLUMNS = 4
_HEADING = "## Gates\n"


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
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# Model card: {old.name}\n"
    return write_bundle(
        out,
        model,
        made.to_dict(),
        with_gates(text, made.calibration),
        half=old.dtype == "float16",
        overwrite=overwrite,
    )


def with_gates(card: str, calibrations: Mapping[str, Calibration]) -> str:
    """The text of a card with the section about the gates, which replaces an older one."""
    before, _, rest = card.partition(_HEADING)
    _, found, after = rest.partition("\n## ")
    section = "\n".join([_HEADING.strip(), *_section(calibrations)])
    return f"{before.rstrip()}\n\n{section}\n" + (f"\n## {after}" if found else "")


def _section(calibrations: Mapping[str, Calibration]) -> Iterator[str]:
    yield "Levels of the gates are learnt from subjects (`diffcode calibrate`). A level is a"
    yield "quantile of slices (warn 0.99, fail 0.999), moved out from the median by a margin: the"
    yield "least with which subjects left out of the learning, one by one, raise few alarms."
    yield ""
    yield (
        "| task | slices | subjects, of them not trained on | margins of failure "
        "| left out: warn | left out: fail |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    for task, calibration in calibrations.items():
        basis = calibration.basis
        alarms = basis["left_out_alarms"]
        fails = [fail for _, fail in basis["margins"].values()]
        yield (
            f"| {task} | {basis['slices']} | {basis['subjects']}, {basis['kept_out']} "
            f"| {min(fails):g} ... {max(fails):g} "
            f"| {100 * alarms['warn']:.2f} % | {100 * alarms['fail']:.2f} % |"
        )
    yield ""
    yield "The last two columns: the share of slices with any gate beyond its level. Distributions"
    yield "and levels are in `docs/gates/TASK.png`, what the gates catch in `docs/gates.md`."


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
