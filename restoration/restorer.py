"""The public way in: open a bundle, restore a volume in physical units.

    restorer = Restorer.open("compact")
    result = restorer.restore(volume_hu, "ct_denoise")

A slice goes through window → network → un-window as a *change* that is added to the input, so
pixels outside the window, and all pixels at strength 0, keep their value bit by bit.

    RestorationError
    ├── BundleError               see restoration.bundle
    └── RestorationMemoryError    not even one slice fits into the memory of the device
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restoration.bundle import (
    BundleError,
    Manifest,
    RestorationError,
    builtin,
    load_bundle,
    read_manifest,
)
from restoration.diffcode import DiffCode
from restoration.domain import TaskDomain, missing, outside
from restoration.execution import chosen_device
from restoration.fidelity import Evidence, Fidelity, Measured, Verdict, assess
from restoration.guards import (
    Diagnostics,
    at_full_strength,
    change_values,
    pass_values,
    scale_of,
    support_of,
    support_values,
    tripped,
)
from restoration.kspace import (
    SAME_GRID,
    GridChange,
    Support,
    data_consistency,
    empty_band,
    zero_fill,
    zero_filled_grid,
    zero_filled_support,
)
from restoration.lowpass import low_frequency_change
from restoration.network import Limits, Network, Pass
from restoration.probes import disturbed, probed, relative
from restoration.tasks import RestorationTask, intensity_scale, normalise, spec

__all__ = [
    "BundleError",
    "Fidelity",
    "Limits",
    "Manifest",
    "Restoration",
    "RestorationError",
    "RestorationMemoryError",
    "RestorationTask",
    "Restorer",
    "TaskDomain",
    "Verdict",
    "builtin",
    "bundle_folder",
    "missing",
    "outside",
    "read_manifest",
]

Volume = npt.NDArray[np.float32]
Spacing = tuple[float, float, float]  # z, y, x in mm
Progress = Callable[[int, int], None]

# The operator of training.degrade whose inputs are zero-filled k-space.
KSPACE_TRUNCATION = "kspace-truncation"
# A band this much wider than the training's is another problem than the one that was learnt.
_WIDE = 1.3


class RestorationMemoryError(RestorationError):
    """The device has no memory for even one slice; another time or device may."""


@dataclass(frozen=True)
class Restoration:
    """A restored volume and what was noticed on the way; per-slice lists are in slice order."""

    volume: Volume  #: (slices, rows, columns), physical units; on the grid that `grid` tells
    flags: tuple[str, ...]  #: guards that did not hold: mean_drift, residual_ratio, …
    seconds: float
    diagnostics: Diagnostics
    grid: GridChange = SAME_GRID  #: of the result over that of the input
    remarks: tuple[str, ...] = ()  #: how the device was short of memory, and what was done


@dataclass(frozen=True)
class _Job:
    """What all slices of one call share."""

    task: RestorationTask
    seeds: Sequence[int]
    strength: float
    scale: float
    support: Support | None
    weight: float  #: of the data consistency inside `support`
    wide: bool = False  #: `support` is wider than that of the training


class Restorer:
    """A model on a device. Not for use by several threads at once."""

    def __init__(
        self,
        manifest: Manifest,
        model: DiffCode,
        device: torch.device | str = "cpu",
        limits: Limits | None = None,
        precision: str = "auto",
    ) -> None:
        self.manifest = manifest
        self.device = torch.device(device)
        self.network = Network(model, self.device, limits or Limits(), precision)

    @classmethod
    def open(
        cls,
        bundle: str | Path = "compact",
        *,
        device: str = "auto",
        threads: int | None = None,
        limits: Limits | None = None,
        precision: str = "auto",
    ) -> Restorer:
        """Open a built-in bundle by its name, or any bundle by its folder.

        `device` is "auto" (CUDA when there is one), "cpu" or "cuda[:n]"; `threads` bounds the
        CPU threads of this process; `precision` of the inner layers is "fp32", "bf16", "fp16" or
        "auto": bf16 where the device computes in it. Raises BundleError, RestorationError for the
        device, or ValueError for another precision.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        chosen = chosen_device(device)
        manifest, model = load_bundle(bundle_folder(bundle), chosen)
        return cls(manifest, model, chosen, limits, precision)

    def restore(
        self,
        volume: npt.NDArray[np.generic],
        task: RestorationTask | str,
        *,
        spacing: Spacing | None = None,
        seeds: Sequence[int] | None = None,
        strength: float = 1.0,
        scale: float | None = None,
        upsample: int = 1,
        data_consistency: bool = True,
        progress: Progress | None = None,
    ) -> Restoration:
        """Restore (slices, rows, columns) in HU, SUV or MR units; y = x + strength·(net − x).

        `spacing` (z, y, x) in mm is compared with the model's domain. `seeds`, one per slice,
        start the diffusion chain; by default they follow from the model and the slice's index.
        `scale` brings MR intensities into the window; by default it is taken from the volume, and
        a slice restored apart from its volume needs that of the volume (`intensity_scale` of the
        diagnostics). `upsample` says that an MR series has the acquired matrix alone: it is zero
        filled to that many times its rows and columns, as the training inputs were, and restored
        there (`Restoration.grid`). `data_consistency=False` leaves out what the manifest asks for
        when an MR series has an empty high-frequency band. The same arguments and device give the
        same bytes.

        Raises TypeError or ValueError for an argument that is no such volume, task, seed, scale or
        strength; RestorationError when the network returns a value that is not finite;
        RestorationMemoryError when one slice alone does not fit.
        """
        started = time.perf_counter()
        task = self._accepted(task)
        x = _checked(volume)
        grid, support = self._grid(x, task, upsample)
        if grid.factor > 1:
            x = _zero_filled(x, grid.factor)
        job = self._prepare(x, task, seeds, strength, data_consistency, scale, support)
        remarks = [self.network.remark] if self.network.remark else []
        y, diagnostics = self._run(x, job, progress, remarks)
        flags = tripped(diagnostics, task, self.manifest.guards.get(task.value, {}))
        if spacing is not None and self._outside(task, spacing, grid.factor):
            flags.append("outside_domain")
        if job.wide:
            flags.append("wide_band")
        seconds = time.perf_counter() - started
        return Restoration(y, tuple(flags), seconds, diagnostics, grid, tuple(remarks))

    def assess(
        self,
        volume: npt.NDArray[np.generic],
        made: Restoration,
        task: RestorationTask | str,
        *,
        spacing: Spacing | None = None,
        facts: Mapping[str, Any] | None = None,
        seeds: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> Fidelity:
        """Judge what `restore` made of `volume`, by the levels of the manifest.

        `seeds` and `strength` are those that `restore` was given; `facts` of the acquisition are
        compared with the model's domain. Some slices go through the network again, and the weights
        are looked at. What is judged is the restoration at full strength: a strength above 0 only
        mixes it with the input. Raises ValueError for a result of another volume.
        """
        task = self._accepted(task)
        x = _checked(volume)
        if made.grid.factor > 1:
            x = _zero_filled(x, made.grid.factor)
            spacing = spacing and _finer(spacing, made.grid.factor)
        y, said = made.volume, made.diagnostics
        if 0 < strength < 1:
            y, said = x + (y - x) / np.float32(strength), at_full_strength(said, strength)
        evidence = Evidence(
            spacing_mm=spacing,
            facts=facts,
            domain=self.manifest.domain.get(task.value),
            diagnostics=said,
            support=support_of(said),
            probes=self._probes(x, y, said, task, seeds, probed(len(x), task)) if strength else {},
            intact=self.network.intact,
        )
        calibration = self.manifest.calibration.get(task.value)
        return assess(x, y, task, evidence=evidence, calibration=calibration, device=self.device)

    def probe(
        self,
        volume: npt.NDArray[np.generic],
        made: Restoration,
        task: RestorationTask | str,
        slices: Sequence[int],
        *,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Measured]:
        """What `assess` asks of some slices, of the slices that are named: on their own grid."""
        task, x = self._accepted(task), _checked(volume)
        return self._probes(x, made.volume, made.diagnostics, task, seeds, slices)

    def _probes(
        self,
        x: Volume,
        y: Volume,
        said: Diagnostics,
        task: RestorationTask,
        seeds: Sequence[int] | None,
        slices: Sequence[int],
    ) -> dict[str, Measured]:
        """What the network does to its own result, and to its input with a little more noise."""
        job = self._prepare(x, task, seeds, 1.0, True, scale_of(said), support_of(said))
        chosen = list(slices)
        job = replace(job, seeds=[job.seeds[index] for index in chosen])
        before, after = x[chosen], y[chosen]
        noisy = disturbed(before, task, job.scale, job.seeds)
        # PET is held in its volume: a slice alone is to be compared with itself alone.
        alone = task is RestorationTask.PET_SYNTHESIS
        result = self._run(before, job)[0] if alone else after
        # A result has no empty band to be drawn back to.
        again = self._run(after, replace(job, support=None))[0]
        disturbance = self._run(noisy, job)[0] - result
        return {
            "idempotence": relative(again - after, after - before, chosen),
            "perturbation": relative(disturbance, noisy - before, chosen),
        }

    def _run(
        self,
        x: Volume,
        job: _Job,
        progress: Progress | None = None,
        remarks: list[str] | None = None,
    ) -> tuple[Volume, Diagnostics]:
        """Restore on the grid of `x`: the result, and what was noticed by slice."""
        y = np.empty_like(x)
        passes = self._restore_slices(x, y, job, progress, [] if remarks is None else remarks)
        # Judged before the means are held: a network gone wrong must not be hidden by it.
        diagnostics = {
            "intensity_scale": job.scale,
            **change_values(x, y, job.task, job.scale),
            **support_values(job.support),
            **pass_values(passes),
        }
        self._hold_low_frequencies(x, y, job)
        return y, diagnostics

    def _accepted(self, task: RestorationTask | str) -> RestorationTask:
        task = RestorationTask(task)
        if task.value not in self.manifest.tasks:
            raise ValueError(
                f"The model {self.manifest.name} restores {', '.join(self.manifest.tasks)}, "
                f"not {task.value}."
            )
        return task

    def _grid(
        self, x: Volume, task: RestorationTask, upsample: int
    ) -> tuple[GridChange, Support | None]:
        """The grid of the result and, where it is finer, the k-space acquired on it."""
        grid = zero_filled_grid(upsample)
        if grid.factor == 1:
            return grid, None
        if task is not RestorationTask.MRI_SR:
            raise ValueError(f"'upsample' is for MR; {task.value} keeps its grid.")
        trained = self.manifest.degradation.get(task.value, {}).get("name", KSPACE_TRUNCATION)
        if trained != KSPACE_TRUNCATION:
            raise ValueError(
                f"The model {self.manifest.name} was trained on {trained}, not on zero-filled "
                "k-space: it cannot take a low matrix."
            )
        return grid, zero_filled_support(torch.from_numpy(x))

    def _outside(
        self, task: RestorationTask, spacing: tuple[float, float, float], factor: int
    ) -> list[str]:
        domain = self.manifest.domain.get(task.value)
        restored = tuple(size / factor for size in spacing[1:])
        return outside(domain, {"pixel_spacing_mm": restored}) if domain else []

    def _prepare(
        self,
        x: Volume,
        task: RestorationTask,
        seeds: Sequence[int] | None,
        strength: float,
        consistent: bool,
        scale: float | None,
        support: Support | None,
    ) -> _Job:
        if scale is not None and not 0 < scale < np.inf:
            raise ValueError(f"'scale' must be positive, not {scale}.")
        if not 0 <= strength <= 1:
            raise ValueError(f"'strength' must lie in 0 ... 1, not {strength}.")
        if seeds is None:
            seeds = [default_seed(self.manifest.sha256, index) for index in range(len(x))]
        if len(seeds) != len(x):
            raise ValueError(f"'seeds' has {len(seeds)} values for {len(x)} slices.")
        weight = self.manifest.data_consistency.get(task.value, 0.0) if consistent else 0.0
        if weight == 0:
            support = None
        elif support is None:
            support = empty_band(torch.from_numpy(x))
        scale = intensity_scale(x, task) if scale is None else scale
        wide = support is not None and self._is_wide(x, task, support)
        # What was measured beyond the band of the training is no business of the network.
        return _Job(task, seeds, strength, scale, support, 1.0 if wide else weight, wide)

    def _is_wide(self, x: Volume, task: RestorationTask, support: Support) -> bool:
        """Whether more of k-space was measured than the model has seen: it would blur and invent.

        docs/decisions/0014-a-wider-band-than-the-training.md
        """
        recorded = self.manifest.degradation.get(task.value, {}).get("params", {})
        factor = min(recorded.get("factors", [recorded.get("factor", 1.0)]))
        band = (size / (2 * factor) for size in x.shape[1:])
        return any(
            found > _WIDE * trained
            for found, trained in zip((support.rows, support.columns), band, strict=True)
        )

    def _restore_slices(
        self, x: Volume, y: Volume, job: _Job, progress: Progress | None, remarks: list[str]
    ) -> list[Pass]:
        """Fill `y` batch by batch, a GPU one batch ahead of what is done with its results.

        What does not fit is tried again: half as many slices, then what `Network.give_way` finds.
        """
        self.network.recover()
        total, size = len(x), self.network.slices(x.shape[1], x.shape[2])
        passes: list[Pass] = []
        ahead: Callable[[], Pass] | None = None
        start = 0
        while start < total or ahead is not None:
            batch = slice(start, min(start + size, total))
            begun = self._try(x, y, batch, job) if start < total else None
            if ahead is not None:
                passes.append(ahead())
                ahead = None
                if progress is not None:
                    progress(start, total)
            if begun is not None:
                ahead, start = begun, batch.stop
            elif start < total:
                size = self._smaller(size, x, remarks)
        return passes

    def _smaller(self, size: int, x: Volume, remarks: list[str]) -> int:
        """The number of slices for the next try, after `size` of them did not fit."""
        self.network.forget()
        if size > 1:
            remarks.append(f"no memory on {self.device} for {size} slices: {size // 2} at once")
            return size // 2
        done = self.network.give_way()
        if done is None:
            raise RestorationMemoryError(
                f"{self.device}: no memory for a slice of {x.shape[1]}x{x.shape[2]} pixels"
            )
        remarks.append(done)
        return 1

    def _hold_low_frequencies(self, x: Volume, y: Volume, job: _Job) -> None:
        """Give `y` the local means of `x` where the manifest asks for it; outside the window as is.

        docs/decisions/0023-low-frequencies-of-the-measurement.md
        """
        sigma = self.manifest.low_frequency.get(job.task.value)
        if sigma is None:
            return
        low, high = spec(job.task).window
        scaled = x * np.float32(job.scale)
        inside = (scaled >= low) & (scaled <= high)
        np.add(y, low_frequency_change(x, y, sigma), out=y, where=inside)

    def _try(self, x: Volume, y: Volume, batch: slice, job: _Job) -> Callable[[], Pass] | None:
        try:
            return self._begin_batch(x, y, batch, job)
        except torch.OutOfMemoryError:
            # The failed pass's memory is free once its error is gone.
            return None

    def _begin_batch(self, x: Volume, y: Volume, batch: slice, job: _Job) -> Callable[[], Pass]:
        """Start a batch; calling what comes back waits for it and fills its slices of `y`."""
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ),
        ):
            physical = torch.from_numpy(x[batch])[:, None]  # (B, 1, H, W)
            low, high = spec(job.task).window
            scaled = physical * job.scale
            lq = normalise(scaled.clamp(low, high), job.task)
            wait = self.network.start(lq, job.task, job.seeds[batch])

        def finish() -> Pass:
            with torch.inference_mode():
                done = wait()
                restored = done.restored
                if job.support is not None:
                    restored = data_consistency(lq, restored, job.support, job.weight)
                # A scale of 1 and a change of 0 are exact: an idle network returns its input.
                change = (restored - lq) * ((high - low) / job.scale)
                inside = (scaled >= low) & (scaled <= high)
                result = torch.where(inside, physical + job.strength * change, physical)
                _require_finite(result, batch.start)
                y[batch] = result[:, 0].numpy()
            return done

        return finish


def default_seed(sha256: str, index: int) -> int:
    """The seed of slice `index` under the model of that SHA-256: a number below 2⁶³."""
    digest = hashlib.sha256(f"{sha256}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def bundle_folder(bundle: str | Path) -> Path:
    """The folder of a built-in bundle by its name, or of any bundle by its path."""
    is_name = isinstance(bundle, str) and Path(bundle).name == bundle
    if is_name and not Path(bundle).is_dir():
        return builtin(str(bundle))
    return Path(bundle)


def _checked(volume: npt.NDArray[np.generic]) -> Volume:
    """The volume as float32; TypeError for what cannot be physical units, ValueError for values."""
    if not isinstance(volume, np.ndarray):
        raise TypeError(f"'volume' must be a NumPy array, not {type(volume).__name__}.")
    integer = np.issubdtype(volume.dtype, np.integer) and volume.dtype.itemsize > 1
    if not (integer or np.issubdtype(volume.dtype, np.floating)):
        raise TypeError(
            f"'volume' must hold floats or integers of 16 bits or more, not {volume.dtype}."
        )
    if volume.ndim != 3 or 0 in volume.shape:
        raise ValueError(
            f"'volume' must be (slices, rows, columns), none of them 0, not {volume.shape}."
        )
    # torch cannot share memory that is read-only, as that of a mapped file is.
    x = np.require(volume, dtype=np.float32, requirements=["C", "W"])
    bad = np.flatnonzero(~np.isfinite(x).all(axis=(1, 2)))
    if bad.size:
        raise ValueError(f"Slice {bad[0]} of 'volume' holds a value that is not finite.")
    return x


def _zero_filled(x: Volume, factor: int) -> Volume:
    # Slice by slice, in double precision: the samples of the source come back as they were.
    slices = [zero_fill(torch.from_numpy(plane).double(), factor).float() for plane in x]
    return torch.stack(slices).numpy()


def _finer(spacing: Spacing, factor: int) -> Spacing:
    return spacing[0], spacing[1] / factor, spacing[2] / factor


def _require_finite(result: Tensor, start: int) -> None:
    bad = torch.nonzero(~result.flatten(1).isfinite().all(dim=1))
    if len(bad):
        raise RestorationError(
            f"The network returned a value that is not finite in slice {start + int(bad[0])}."
        )
