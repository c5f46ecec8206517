"""A trained model as a folder: `model.safetensors`, `manifest.json` and `MODEL_CARD.md`.

Nothing in a bundle is executable. The manifest says what the weights are, what they were trained
on and where they may be used; its SHA-256 identifies the model in every derived series.

    RestorationError
    └── BundleError      a bundle is missing, damaged, or not what its manifest says
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from restoration.diffcode import DiffCode, DiffCodeConfig
from restoration.domain import TaskDomain, refuse_unknown
from restoration.fidelity import Calibration
from restoration.tasks import RestorationTask, spec

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
CARD = "MODEL_CARD.md"
# Weight of the measured k-space: docs/decisions/0010-data-consistency.md
CONSISTENCY = 0.5
# Widths of the Gaussian below which a result keeps the measurement, in voxels (z, y, x). CT slices
# are independent of each other; PET has its volume. Chosen on training subjects, decision 0023.
LOW_FREQUENCY = {
    RestorationTask.CT_DENOISE.value: (0.0, 4.0, 4.0),
    RestorationTask.PET_SYNTHESIS.value: (1.5, 1.5, 1.5),
}
_TRAINING_ONLY = ("vq_encoder.",)
_NAMED_AT_MOST = 3


class RestorationError(Exception):
    """A model could not be opened or gave no usable result."""


class BundleError(RestorationError):
    """A bundle is missing, damaged, or not what its manifest says."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle is; the value of `manifest.json`."""

    name: str
    version: str
    variant: str
    config: dict[str, Any]
    tasks: tuple[str, ...]
    sha256: str  #: of the weights file
    dtype: str  #: of the stored weights; they are used in float32
    created: str  #: ISO 8601, UTC
    licence: str
    normalisation: dict[str, Any]  #: per task: units and window
    domain: dict[str, TaskDomain] = field(default_factory=dict)
    #: per task: operator, version, params
    degradation: dict[str, Any] = field(default_factory=dict)
    training_data: tuple[dict[str, Any], ...] = ()  #: name and licence of each source
    metrics: dict[str, Any] = field(default_factory=dict)  #: protocol and figures
    data_consistency: dict[str, float] = field(default_factory=dict)  #: per task: weight, 0 = off
    #: per task: widths in voxels (z, y, x) of restoration.lowpass; a task without one is left
    low_frequency: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    guards: dict[str, dict[str, float]] = field(default_factory=dict)  #: per task: limits
    calibration: dict[str, Calibration] = field(default_factory=dict)  #: per task: of the gates
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        domain = {task: limits.to_dict() for task, limits in self.domain.items()}
        return {
            **values,
            "domain": domain,
            "calibration": {task: made.to_dict() for task, made in self.calibration.items()},
            "tasks": list(self.tasks),
            "training_data": list(self.training_data),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_dict`; ValueError says which entry is wrong."""
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}; this release reads {FORMAT_VERSION}")
        refuse_unknown(values, (f.name for f in fields(cls)), "manifest")
        manifest = cls(
            **{
                **values,
                "tasks": tuple(values.get("tasks", ())),
                "training_data": tuple(values.get("training_data", ())),
                "domain": {
                    task: limits if isinstance(limits, TaskDomain) else TaskDomain.from_dict(limits)
                    for task, limits in values.get("domain", {}).items()
                },
                "calibration": {
                    task: made if isinstance(made, Calibration) else Calibration.from_dict(made)
                    for task, made in values.get("calibration", {}).items()
                },
                "low_frequency": {
                    task: _widths(task, widths)
                    for task, widths in values.get("low_frequency", {}).items()
                },
            }
        )
        _check_tasks(manifest)
        return manifest


def builtin(name: str = "compact") -> Path:
    """The folder of a bundle that ships with the package; BundleError lists those that do."""
    shipped = Path(__file__).parent / "bundles"
    folder = shipped / name
    if not (folder / MANIFEST).is_file():
        names = sorted(path.parent.name for path in shipped.glob(f"*/{MANIFEST}"))
        raise BundleError(f"No built-in bundle is called {name!r}; there are: {names}.")
    return folder


def write_bundle(
    folder: Path,
    model: DiffCode,
    manifest_fields: Mapping[str, Any],
    card: str | None = None,
    *,
    half: bool = True,
    overwrite: bool = False,
) -> Manifest:
    """Write the parts of `model` that inference needs as a bundle, all of it or nothing.

    `manifest_fields` gives name, version, licence, tasks and what else `Manifest` holds; config,
    variant, normalisation, dtype and sha256 are filled in, and MR data consistency and the low
    frequencies of CT and PET are on unless it says otherwise. The same bundle may be written twice.
    Raises BundleError when the folder holds anything else (unless `overwrite` and a bundle), or
    when the weights are not finite as stored.
    """
    dtype = torch.float16 if half else torch.float32
    weights = save_tensors(_stored(model, dtype))
    manifest = _describe(model, manifest_fields, weights, dtype)
    if folder.exists() and any(folder.iterdir()):
        existing = read_manifest(folder)
        if _content(existing) == _content(manifest) and _read_card(folder) == card:
            return existing
        if not overwrite:
            raise BundleError(f"{folder}: holds another bundle, {existing.name} {existing.version}")
    _replace(folder, manifest, weights, card)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest alone; BundleError says what is wrong and where."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("a manifest is a JSON object")
        return Manifest.from_dict(values)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: {error}") from error


def load_bundle(folder: Path, device: torch.device | str = "cpu") -> tuple[Manifest, DiffCode]:
    """Open a bundle for inference, in float32 on `device`.

    Raises BundleError when the weights are not those of the manifest or do not fit its config.
    """
    manifest = read_manifest(folder)
    path = folder / WEIGHTS
    state = _verified_weights(path, manifest.sha256)
    try:
        # Building the network must not move the random numbers of a program that trains.
        with torch.random.fork_rng(devices=[]):
            model = DiffCode(DiffCodeConfig.from_dict(manifest.config))
    except (ValueError, TypeError) as error:
        raise BundleError(f"{folder / MANIFEST}: config: {error}") from error
    _check_shapes(path, state, model.state_dict())
    model.load_state_dict(state)
    return manifest, model.to(device).eval().requires_grad_(False)


def _check_tasks(manifest: Manifest) -> None:
    known = [task.value for task in RestorationTask]
    if not manifest.tasks or len(set(manifest.tasks)) < len(manifest.tasks):
        raise ValueError("tasks must name each task once, and at least one")
    for task in manifest.tasks:
        if task not in known:
            raise ValueError(f"task {task!r} is not one of {', '.join(known)}")
        # A model fed through another window would be wrong without any sign of it.
        if manifest.normalisation.get(task) != _normalisation(task):
            raise ValueError(f"normalisation of {task} is not {_normalisation(task)}")
    for name in (
        "domain",
        "degradation",
        "data_consistency",
        "low_frequency",
        "guards",
        "calibration",
    ):
        refuse_unknown(getattr(manifest, name), manifest.tasks, name)


def _widths(task: str, given: Sequence[float]) -> tuple[float, float, float]:
    widths = tuple(float(width) for width in given)
    if len(widths) != 3 or not all(0 <= width < math.inf for width in widths):
        raise ValueError(f"low_frequency of {task} must be three widths in voxels, not {given}")
    return widths[0], widths[1], widths[2]


def _normalisation(task: str) -> dict[str, Any]:
    return {"units": spec(task).units, "window": list(spec(task).window)}


def _stored(model: DiffCode, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(_TRAINING_ONLY):
            continue
        kept = tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype)
        if not bool(kept.isfinite().all()):
            raise BundleError(f"{name}: not finite as {dtype}")
        state[name] = kept.contiguous()
    return state


def _describe(
    model: DiffCode, given: Mapping[str, Any], weights: bytes, dtype: torch.dtype
) -> Manifest:
    try:
        computed = {
            "format_version": FORMAT_VERSION,
            "variant": model.config.variant,
            "config": model.config.to_dict(),
            "normalisation": {task: _normalisation(task) for task in given.get("tasks", ())},
            "dtype": str(dtype).removeprefix("torch."),
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        defaults = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "data_consistency": {
                task: CONSISTENCY
                for task in given.get("tasks", ())
                if task == RestorationTask.MRI_SR.value
            },
            "low_frequency": {
                task: LOW_FREQUENCY[task]
                for task in given.get("tasks", ())
                if task in LOW_FREQUENCY
            },
        }
        manifest = Manifest.from_dict({**defaults, **given, **computed})
        # What is returned and compared is what a reader will see.
        return Manifest.from_dict(json.loads(_text(manifest)))
    except (ValueError, TypeError) as error:
        raise BundleError(f"manifest fields: {error}") from error


def _text(manifest: Manifest) -> str:
    return json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _content(manifest: Manifest) -> dict[str, Any]:
    return {name: value for name, value in manifest.to_dict().items() if name != "created"}


def _read_card(folder: Path) -> str | None:
    path = folder / CARD
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _replace(folder: Path, manifest: Manifest, weights: bytes, card: str | None) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        new = Path(staging) / "new"
        new.mkdir()
        (new / WEIGHTS).write_bytes(weights)
        (new / MANIFEST).write_text(_text(manifest), encoding="utf-8")
        if card is not None:
            (new / CARD).write_text(card, encoding="utf-8")
        if folder.exists():
            os.rename(folder, Path(staging) / "old")
        os.rename(new, folder)


def _verified_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BundleError(f"{path}: SHA-256 is {found}, the manifest says {sha256}")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise BundleError(f"{path}: {error}") from error


def _check_shapes(path: Path, stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    problems = [f"lacks {name}" for name in wanted if name not in stored]
    problems += [f"has unknown {name}" for name in stored if name not in wanted]
    problems += [
        f"{name} is {tuple(stored[name].shape)}, the config says {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if problems:
        more = len(problems) - _NAMED_AT_MOST
        rest = [f"and {more} more"] if more > 0 else []
        raise BundleError(f"{path}: {'; '.join([*problems[:_NAMED_AT_MOST], *rest])}")
