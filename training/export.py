"""A finished run as a bundle: averaged weights, and a manifest that says where they come from."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restoration.bundle import Manifest, write_bundle
from restoration.tasks import RestorationTask
from training.run import restoration_folder, tasks_of, trained_model
from training.slices import PreparedSet

MODALITIES = {
    RestorationTask.MRI_SR: "MR",
    RestorationTask.CT_DENOISE: "CT",
    RestorationTask.PET_SYNTHESIS: "PT",
}


def export_bundle(
    run: Path,
    out: Path,
    data: Path,
    *,
    fields: Mapping[str, Any],
    variant: str | None = None,
    card: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    domain: Path | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write the restoration stage of ``run`` as the bundle ``out``.

    ``data`` is the prepared folder of the training: sources, licences, degradations and spacings
    are read from its manifest. Raises BundleError when ``out`` holds something else.
    """
    model, recipe = trained_model(restoration_folder(run, variant))
    dataset = PreparedSet.open(data)
    tasks = tasks_of(recipe)
    manifest = {
        **fields,
        "tasks": [task.value for task in tasks],
        "domain": _domains(dataset, tasks, domain),
        "degradation": {
            name: operator
            for name, operator in dataset.manifest.operators.items()
            if name in recipe.data.tasks
        },
        "training_data": training_data(dataset),
        "metrics": dict(metrics or {}),
    }
    return write_bundle(out, model, manifest, card, overwrite=overwrite)


def training_data(dataset: PreparedSet) -> list[dict[str, str]]:
    """Name and licence of each source that was trained on, simulations named as such."""
    found = {(item.source.split(" (")[0], item.licence) for item in dataset.items(split="train")}
    return [{"name": name, "licence": licence} for name, licence in sorted(found)]


def _domains(
    dataset: PreparedSet, tasks: list[RestorationTask], over: Path | None
) -> dict[str, dict[str, Any]]:
    given = tomllib.loads(over.read_text(encoding="utf-8")) if over else {}
    domains = {}
    for task in tasks:
        spacings = [item.spacing_mm[1] for item in dataset.items(task, "train")]
        seen: dict[str, Any] = {"modality": MODALITIES[task]}
        if spacings:
            seen["pixel_spacing_mm"] = [round(min(spacings), 3), round(max(spacings), 3)]
        domains[task.value] = seen | given.get(task.value, {})
    return domains
