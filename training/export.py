"""A finished run as a bundle: averaged weights, and a manifest that says where they come from."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restoration.bundle import Manifest, load_bundle, write_bundle
from restoration.diffcode import DiffCode
from restoration.restorer import bundle_folder
from restoration.tasks import RestorationTask
from training.calibrated import with_gates
from training.card import fill, nameless
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
    are read from its manifest. ``card`` gets its tables from ``metrics``: see :mod:`training.card`.
    Raises BundleError when ``out`` holds something else, ValueError for a card without its figures.
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
        "metrics": nameless(metrics or {}),
    }
    return _write(out, model, manifest, card, overwrite=overwrite)


def reissue_bundle(
    bundle: str | Path,
    out: Path,
    *,
    card: str,
    metrics: Mapping[str, Any],
    overwrite: bool = False,
) -> Manifest:
    """Write a bundle again with other figures and another card, its weights unchanged.

    Raises BundleError as ``write_bundle`` does, ValueError for a card without its figures.
    """
    old, model = load_bundle(bundle_folder(bundle))
    fields = {**old.to_dict(), "metrics": nameless(metrics)}
    if old.calibration:
        card = with_gates(card, old.calibration)
    return _write(out, model, fields, card, half=old.dtype == "float16", overwrite=overwrite)


def _write(
    out: Path,
    model: DiffCode,
    fields: Mapping[str, Any],
    card: str | None,
    *,
    half: bool = True,
    overwrite: bool,
) -> Manifest:
    if card is not None:
        # The card names the hash of the weights, which are known once they are written.
        with tempfile.TemporaryDirectory(prefix="diffcode-") as folder:
            sha256 = write_bundle(Path(folder) / "bundle", model, fields, half=half).sha256
        card = fill(card, fields["metrics"], sha256)
    return write_bundle(out, model, fields, card, half=half, overwrite=overwrite)


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
