"""All gates over one restored series: measure, then judge by the levels of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from restoration.domain import TaskDomain, outside
from restoration.fidelity import scans, uptake
from restoration.fidelity.calibration import Calibration, InputModel, ScanModel
from restoration.fidelity.catalogue import CT, DIRECTIONS, GATES, MR, PET
from restoration.fidelity.gathered import Progress, SliceMeasures, gathered
from restoration.fidelity.inputs import unlikeness
from restoration.fidelity.measured import Measured, broken_in, mended, per_slice
from restoration.fidelity.verdicts import Fidelity, Gate
from restoration.kspace import Support, empty_band
from restoration.tasks import RestorationTask, intensity_scale
from restoration.volumes import Planes, whole
from restoration.workers import begun

Volume = npt.NDArray[np.float32]
LEAST_SIDE = 16  #: rows and columns below which a slice says too little about itself


@dataclass(frozen=True)
class Again:
    """What the network gave when it was looked at again."""

    probes: Mapping[str, Measured] = field(default_factory=dict)  #: of some slices
    intact: bool | None = None  #: whether the weights in memory are those that were loaded


@dataclass(frozen=True)
class Evidence:
    """What is known beside the two images; None is unknown, and the gates that need it say so."""

    spacing_mm: tuple[float, float, float] | None = None  #: (z, y, x)
    facts: Mapping[str, Any] | None = None  #: of the acquisition: restoration.domain.FACTS
    domain: TaskDomain | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)  #: of Restoration
    support: Support | None = None  #: the acquired k-space of MR; None: look for it
    #: Asked for when all else is measured: it may be under way meanwhile.
    again: Callable[[], Again] = Again
    #: Slices that were measured by `measure_slices` before, by their index.
    measured: Mapping[int, SliceMeasures] = field(default_factory=dict)


_FULL = Measured((), reason="no empty band of k-space was found")


def assess(
    before: Planes,
    after: Planes,
    task: RestorationTask | str,
    *,
    evidence: Evidence | None = None,
    calibration: Calibration | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Fidelity:
    """Judge `after` beside `before`, both (slices, rows, columns) in HU, SUV or MR units.

    Raises ValueError for shapes that differ, for slices of fewer than LEAST_SIDE rows or columns
    and for an input that is not finite; an output that is not finite fails. `progress` is called
    with (slices measured, slices in all). A gate that had nothing to judge is NOT_APPLICABLE and
    says why.
    """
    task = RestorationTask(task)
    found = measure(
        before,
        after,
        task,
        evidence=evidence,
        inputs=None if calibration is None else calibration.inputs,
        scan=None if calibration is None else calibration.scans,
        device=device,
        progress=progress,
    )
    return judge(found, task, len(before), calibration)


def judge(
    found: Mapping[str, Measured],
    task: RestorationTask,
    slices: int,
    calibration: Calibration | None = None,
) -> Fidelity:
    """The verdicts on what was measured; levels that the model does not bring are the program's."""
    learnt = {} if calibration is None else calibration.levels
    gates = tuple(
        Gate(
            name=spec.name,
            unit=spec.unit_of(task),
            values=found[spec.name].values,
            slices=found[spec.name].slices,
            levels=learnt.get(spec.name, spec.level(task)),
            reason=found[spec.name].reason,
        )
        for spec in GATES
        if task in spec.tasks
    )
    return Fidelity(task.value, slices, gates, calibrated=bool(learnt))


def measure(
    before: Planes,
    after: Planes,
    task: RestorationTask | str,
    *,
    evidence: Evidence | None = None,
    inputs: InputModel | None = None,
    scan: ScanModel | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Measured]:
    """The values of every gate of a task, without a verdict."""
    task = RestorationTask(task)
    evidence = evidence or Evidence()
    _require_alike(before, after)
    if task is not CT or isinstance(before, np.ndarray):
        # Measures of MR and PET look at volumes; of CT a slice is read where it is not measured.
        before, after = _checked(whole(before), whole(after))
    support = evidence.support
    if task is MR and support is None:
        support = empty_band(torch.from_numpy(whole(before)))
    scale = evidence.diagnostics.get("intensity_scale")
    if scale is None:
        scale = 1.0 if task is CT else intensity_scale(whole(before), task)
    volumes = begun(_of_volumes(before, after, task, evidence, float(scale), support, scan))
    slices = gathered(
        before,
        after,
        task,
        float(scale),
        support,
        inputs is not None,
        torch.device(device),
        progress,
        evidence.measured,
    )
    found = slices.found()
    found |= _likeness(slices.features, inputs, evidence.spacing_mm)
    found["finite"] = per_slice(np.array(slices.broken))
    found["domain"] = _domain(evidence)
    for told in volumes:
        found |= told()
    if task is MR and support is None:
        found["data_consistency"] = _FULL
    again = evidence.again()
    found["weights"] = _weights(again.intact)
    found |= _network(evidence.diagnostics, again.probes, task, len(before))
    return found


def _of_volumes(
    before: Planes,
    after: Planes,
    task: RestorationTask,
    evidence: Evidence,
    scale: float,
    support: Support | None,
    scan: ScanModel | None,
) -> list[Callable[[], dict[str, Measured]]]:
    """What looks at a series as a whole; each for one thread: two wait for each other in it."""
    if task is CT:
        return []
    both = whole(before), whole(after)
    if task is PET:
        return [partial(_activity, *both, evidence), partial(_uptake, *both, evidence)]
    return [partial(_scan, *both, scale, support, scan)]


def _likeness(
    features: Sequence[tuple[float, ...]],
    model: InputModel | None,
    spacing_mm: tuple[float, float, float] | None,
) -> dict[str, Measured]:
    """How far the slices of the input are from those of the training, and in which direction."""
    if model is None or spacing_mm is None:
        reason = (
            "the model brings no statistics of its inputs"
            if model is None
            else "the size of a voxel is not known"
        )
        return dict.fromkeys(("likeness", *DIRECTIONS), Measured((), reason=reason))
    found = unlikeness(np.array(features, np.float64), spacing_mm, model)
    unknown = Measured((), reason="the model knows no such direction")
    return {
        name: per_slice(found[name]) if name in found else unknown
        for name in ("likeness", *DIRECTIONS)
    }


def _require_alike(before: Planes, after: Planes) -> None:
    if before.shape != after.shape or len(before.shape) != 3 or 0 in before.shape:
        raise ValueError(
            f"input and output must be volumes of one shape, not {before.shape} and {after.shape}"
        )
    if min(before.shape[1:]) < LEAST_SIDE:
        raise ValueError(
            f"slices of {before.shape[1]}x{before.shape[2]} pixels are too small to be judged: "
            f"{LEAST_SIDE} are the least"
        )


def _checked(before: Volume, after: Volume) -> tuple[Volume, Volume]:
    if any(broken_in(plane) for plane in before):
        raise ValueError("the input holds values that are not finite")
    return _plain(before), _plain(after)


def _plain(volume: Volume) -> Volume:
    """As PyTorch takes it: to NumPy a single slice is contiguous whatever its stride is."""
    found = np.require(volume, np.float32, ["C", "W"])
    return found if min(found.strides) > 0 else found.copy()


def _domain(evidence: Evidence) -> Measured:
    if evidence.domain is None:
        return Measured((), reason="the model states no domain")
    facts = dict(evidence.facts or {})
    if evidence.spacing_mm is not None:
        facts.setdefault("pixel_spacing_mm", evidence.spacing_mm[1:])
    if not facts:
        return Measured((), reason="nothing is known of the acquisition")
    reasons = outside(evidence.domain, facts)
    return Measured((float(len(reasons)),), reason="; ".join(reasons))


def _weights(intact: bool | None) -> Measured:
    if intact is None:
        return Measured((), reason="there is no network to look at")
    changed = "" if intact else "the weights in memory are not those that were loaded"
    return Measured((0.0 if intact else 1.0,), reason=changed)


def _network(
    said: Mapping[str, Any], probes: Mapping[str, Measured], task: RestorationTask, slices: int
) -> dict[str, Measured]:
    """What the network said about its own pass, and the probes that were made of it."""
    found: dict[str, Measured] = {}
    for gate, key, missing in (
        ("network_drift", "mean_drift", "no diagnostics of the network"),
        ("network_energy", "residual_ratio", "no diagnostics of the network"),
        ("latent", "latent_distance", "this model has no latent"),
        ("reference", "reference_distance", "this model has no reference image"),
    ):
        values = said.get(key)
        reason = missing if said else "no diagnostics of the network"
        found[gate] = Measured((), reason=reason) if values is None else _listed(values, slices)
    found["routing"] = _routing(said, task)
    for probe in ("idempotence", "perturbation"):
        unrun = Measured((), reason="the network was not run again")
        found[probe] = probes.get(probe, unrun)
    return found


def _routing(said: Mapping[str, Any], task: RestorationTask) -> Measured:
    """By how much the classifier prefers the task of the route to the next best one.

    All slices of a series came one way, so they answer together: the mean of their logits is that
    of independent votes, in which the last slice of a head, nearly empty, has little to say.
    """
    keys = {other: f"class_logit_{other.value}" for other in RestorationTask}
    if any(key not in said for key in keys.values()):
        reason = "this model has no task classifier" if said else "no diagnostics of the network"
        return Measured((), reason=reason)
    votes = {other: float(np.mean(said[key])) for other, key in keys.items()}
    return Measured((votes[task] - max(v for other, v in votes.items() if other is not task),))


def _listed(values: Sequence[float] | npt.NDArray[np.floating[Any]], slices: int) -> Measured:
    if len(values) != slices:
        raise ValueError(f"diagnostics of {len(values)} slices for a series of {slices}")
    return per_slice(np.asarray(values, np.float64))


def _activity(before: Volume, after: Volume, evidence: Evidence) -> dict[str, Measured]:
    """Whether the activity of a PET is what and where it was."""
    after = _finite(after)
    return {
        "units": _injected(before, evidence),
        "activity": _one(uptake.activity_change(before, after), "there is no activity"),
        "local_activity": per_slice(uptake.local_change(before, after)),
    }


def _uptake(before: Volume, after: Volume, evidence: Evidence) -> dict[str, Measured]:
    """Whether the uptake of hot regions of a PET came through."""
    if evidence.spacing_mm is None:
        unknown = Measured((), reason="the size of a voxel is not known")
        return dict.fromkeys(("hot_suv", "hot_suv_small", "hot_peak"), unknown)
    found: dict[str, Measured] = {}
    regions = uptake.hot_regions(before, _finite(after), evidence.spacing_mm)
    total = len(before)
    large = [region for region in regions if region.volume_mm3 >= uptake.LARGE_MM3]
    small = [region for region in regions if region.volume_mm3 < uptake.LARGE_MM3]
    for name, changes, what in (
        ("hot_suv", [(r, r.mean_change) for r in large], "5 ml"),
        ("hot_suv_small", [(r, r.wide_change) for r in small], "1 to 5 ml"),
        ("hot_peak", [(r, r.peak_change) for r in large], "5 ml"),
    ):
        reason = "" if changes else f"no region above {uptake.HOT_SUV:g} SUV of {what}"
        values = uptake.worst_by_slice(changes, total)
        found[name] = Measured(values, tuple(range(total)), reason)
    return found


def _injected(before: Volume, evidence: Evidence) -> Measured:
    """The activity in the field of view in % of what was injected: it cannot be more than all."""
    weight = (evidence.facts or {}).get("patient_weight_kg")
    if evidence.spacing_mm is None or not weight or not weight > 0:
        return Measured((), reason="the size of a voxel or the weight of the patient is not known")
    return Measured((uptake.injected_share(before, evidence.spacing_mm, float(weight)),))


def _scan(
    before: Volume, after: Volume, scale: float, support: Support | None, model: ScanModel | None
) -> dict[str, Measured]:
    """What an MR series says about how it was scanned, and whether it was restored before."""
    chosen = scans.looked_at(len(before))
    x = torch.from_numpy(before[chosen]) * scale
    spectrum = scans.spectra(x)
    unlearnt = Measured((), reason="the model brings no statistics of scans")
    found = {"ghosting": unlearnt, "texture": unlearnt, "restored_before": _FULL}
    found["empty_band"] = _empty_band(support, before)
    if support is not None:
        change = torch.from_numpy(mended(after[chosen])) * scale - x
        known = scans.detail_before(spectrum, change, support)
        found["restored_before"] = _one(known, "nothing lies beyond the acquired k-space")
    if model is None:
        return found
    lines = scans.lines(spectrum, support)
    ghosting = None if lines is None else scans.ghosting(lines, model)
    found["ghosting"] = _one(ghosting, "too few lines of k-space")
    reason = scans.why_not(support, before.shape[1:])
    if support is None or reason:
        found["texture"] = Measured((), reason=reason)
    else:
        texture = scans.texture(scans.at_acquired_matrix(spectrum, support))
        strangeness = None if texture is None else scans.strangeness(texture, model)
        found["texture"] = _one(strangeness, "there is nothing but air")
    return found


def _finite(after: Volume) -> Volume:
    return mended(after) if any(broken_in(plane) for plane in after) else after


def _one(value: float | None, missing: str) -> Measured:
    return Measured((), reason=missing) if value is None else Measured((value,))


def _empty_band(support: Support | None, before: Volume) -> Measured:
    """The larger measured share of the two axes of k-space; 1 where all of it is full."""
    if support is None:
        return Measured((1.0,), reason="no empty band of k-space: nothing says it needs restoring")
    half = [size / 2 for size in before.shape[1:]]
    return Measured((max(support.rows / half[0], support.columns / half[1]),))
