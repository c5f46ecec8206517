"""The figures of a model card: Markdown tables made from what ``diffcode evaluate --json`` printed.

A card's text is written by hand with a place for each table: ``{{figures}}``, ``{{protocols}}``,
``{{quantities}}``, ``{{protocol}}`` and ``{{sha256}}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from restoration.tasks import RestorationTask
from training.metrics import AMIR
from training.quantities import UNITS
from training.report import cell, quantity_cell

METHODS = ("input", "classical", "restored")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_TITLES = {
    RestorationTask.MRI_SR: "MR T2",
    RestorationTask.CT_DENOISE: "CT",
    RestorationTask.PET_SYNTHESIS: "PET",
}
_KINDS = {"real": "real crops", "simulated": "simulated FDG"}


def fill(text: str, metrics: Mapping[str, Any], sha256: str) -> str:
    """The card with its tables; ValueError for a place that nothing can fill."""
    makers = {"figures": figures, "protocols": protocols, "quantities": quantities}

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name == "sha256":
            return sha256
        if name not in (*makers, "protocol"):
            raise ValueError(f"the card has the unknown place {{{{{name}}}}}")
        if not metrics:
            raise ValueError(f"the card's {{{{{name}}}}} needs --metrics, what evaluate printed")
        return str(metrics["protocol"]) if name == "protocol" else makers[name](metrics)

    return _PLACE.sub(made, text)


def nameless(metrics: Any) -> Any:
    """An evaluation without the names of subjects, which a bundle must not carry abroad."""
    if isinstance(metrics, Mapping):
        return {
            key: list(value.values())
            if key == "subjects" and isinstance(value, Mapping)
            else nameless(value)
            for key, value in metrics.items()
        }
    return [nameless(value) for value in metrics] if isinstance(metrics, list) else metrics


def figures(metrics: Mapping[str, Any]) -> str:
    """PSNR / SSIM / RMSE by the first protocol, and gains with their intervals over subjects."""
    head = [
        "images", "slices / subjects", "input", "best classical method", "restored",
        "gain over input, dB", "gain over classical, dB [95 % interval over subjects]",
    ]  # fmt: skip
    rows = []
    for title, entry in entries(metrics):
        shown = {m: entry["protocols"][AMIR.id].get(m) for m in METHODS}
        method = entry.get("classical", {}).get("method", "")
        rows.append([
            title, f"{entry['slices']} / {entry['subjects']}", cell(shown["input"]),
            cell(shown["classical"]) + (f" ({method})" if method else ""), cell(shown["restored"]),
            _gain(shown["restored"], shown["input"]), _classical_gain(entry, shown),
        ])  # fmt: skip
    return _markdown(head, rows)


def protocols(metrics: Mapping[str, Any]) -> str:
    """The same figures by the other protocols, each row with the protocol's id."""
    rows = [
        [identity, title, *(cell(entry["protocols"][identity].get(m)) for m in METHODS)]
        for identity in metrics["protocols"]
        for title, entry in entries(metrics)
        if identity != AMIR.id and identity in entry["protocols"]
    ]
    return _markdown(["protocol", "images", *METHODS], rows)


def quantities(metrics: Mapping[str, Any]) -> str:
    """Bias of HU, SUV and activity: mean over subjects, and the worst subject in parentheses."""
    rows = []
    for title, entry in entries(metrics, apart=True):
        found = entry["quantities"]
        for name in (n for n in UNITS if n in found.get("restored", {})):
            first = found["restored"][name]
            rows.append([
                title, f"{name}, {first['units']}", f"{first['subjects']} / {first['regions']}",
                *(quantity_cell(found.get(m, {}).get(name)) for m in METHODS),
            ])  # fmt: skip
    return _markdown(["images", "quantity", "subjects / regions", *METHODS], rows)


def entries(
    metrics: Mapping[str, Any], *, apart: bool = False
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(title, figures) of tasks and kinds of reference; ``apart`` leaves mixtures out."""
    for task, entry in metrics["tasks"].items():
        title = _TITLES[RestorationTask(task)]
        groups = entry.get("groups", {})
        if not groups or not apart:
            yield (f"{title}, all" if groups else title), entry
        for kind, group in groups.items():
            yield f"{title}, {_KINDS[kind]}", group


def _gain(of: Mapping[str, float] | None, over: Mapping[str, float] | None) -> str:
    return f"{of['psnr'] - over['psnr']:+.2f}" if of and over else "-"


def _classical_gain(entry: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    gain = _gain(shown["restored"], shown["classical"])
    found = entry.get("differences", {}).get("restored", {}).get("psnr", {})
    if gain == "-" or not found:
        return gain
    if "interval_95" not in found:
        return f"{gain} (too few subjects for an interval)"
    low, high = found["interval_95"]
    return f"{gain} [{low:+.2f}, {high:+.2f}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
