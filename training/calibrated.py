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
    yield "quantile of slices (warn 0.99, fail 0.999), moved out from the median by a margin, the"
    yield "least with which subjects left out of the learning, one by one, raise few alarms, and at"
    yield "least to the tolerance limit over subjects, which is wider the fewer they are. A gate"
    yield "that too few subjects speak for keeps the coarse level of the program; a task of such"
    yield "gates alone counts as not calibrated, and the node marks its results."
    yield ""
    yield (
        "| task | slices | subjects, of them not trained on | margins of failure "
        "| left out: warn | left out: fail | with the program's levels |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for task, calibration in calibrations.items():
        basis = calibration.basis
        alarms = basis["left_out_alarms"]
        shares = [f"{100 * alarms[level]:.2f} %" if alarms else "-" for level in ("warn", "fail")]
        fails = [fail for _, fail in basis["margins"].values()]
        margins = f"{min(fails):g} ... {max(fails):g}" if fails else "-"
        yield (
            f"| {task} | {basis['slices']} | {basis['subjects']}, {basis['kept_out']} "
            f"| {margins} | {shares[0]} | {shares[1]} | {_kept(calibration)} |"
        )
    yield ""
    yield "Left out: the share of slices with any learnt gate beyond its level. Distributions and"
    yield "levels are in `docs/gates/TASK.png`, what the gates catch in `docs/gates.md`."


def _kept(calibration: Calibration) -> str:
    """The gates that keep the levels of the program, and how many subjects spoke for each."""
    kept = calibration.basis["program_levels"]
    if not calibration.levels:
        return f"**all**: {calibration.basis['least_subjects']} subjects are the least"
    return ", ".join(f"`{name}` ({count})" for name, count in kept.items()) or "none"


def draw(outcome: Outcome, task: str, path: Path) -> None:
    """The distribution of every gate with values, its levels as lines, dashed if not learnt."""
    from matplotlib.figure import Figure

    learnt = outcome.calibration.levels
    specs = [spec for spec in GATES if spec.name in outcome.calibration.basis["medians"]]
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
        own = learnt.get(spec.name)
        _lines(axes, own or spec.level(RestorationTask(task)), "solid" if own else "dashed")
        axes.set_yticks([])
        axes.set_title(_title(spec, RestorationTask(task)), fontsize=8)
        axes.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _lines(axes: object, levels: Levels, style: str) -> None:
    for bounds, colour in ((levels.warn, "tab:orange"), (levels.fail, "tab:red")):
        for end in (bounds.low, bounds.high):
            if end is not None:
                axes.axvline(end, color=colour, linewidth=1, linestyle=style)  # type: ignore[attr-defined]


def _title(spec: GateSpec, task: RestorationTask) -> str:
    return f"{spec.name}, {spec.unit_of(task)}"
