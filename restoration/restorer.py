"""The public way in: open a bundle, restore a volume in physical units.

    restorer = Restorer.open("compact")
    result = restorer.restore(volume_hu, "ct_denoise")

A slice goes through window → network → un-window as a *change* that is added to the input, so
pixels outside the window, and all pixels at strength 0, keep their value bit by bit. A slice that
nothing of its volume enters may be restored before the others are there (`Restorer.stands_alone`,
`Restorer.restore_slice`), and its volume with it (`kept`).

    RestorationError
    ├── BundleError               see restoration.bundle
    └── RestorationMemoryError    not even one slice fits into the memory of the device
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from restoration.again import AskedAgain, Steps, probes
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
from restoration.fidelity import (
    LEAST_SIDE,
    MEASURES,
    Again,
    Evidence,
    Fidelity,
    Measured,
    SliceMeasures,
    Verdict,
    assess,
    measure_slices,
)
from restoration.guards import (
    Diagnostics,
    at_full_strength,
    scale_of,
    support_of,
    support_values,
    tripped,
)
from restoration.kspace import (
    SAME_GRID,
    GridChange,
)
from restoration.network import Limits, Network
from restoration.probes import Probe, probed
from restoration.slices import (
    Kept,
    Progress,
    RestorationMemoryError,
    SliceJob,
    SliceLoop,
    SliceResult,
    decode_plane,
    default_seed,
    encode_plane,
    hold,
    prepared,
    result_grid,
)
from restoration.tasks import RestorationTask
from restoration.volumes import (
    Planes,
    Spacing,
    Volume,
    checked,
    checked_planes,
    finer,
    full_strength,
    whole,
    zero_filled,
)
from restoration.workers import begun

__all__ = [
    "LEAST_SIDE",
    "BundleError",
    "Fidelity",
    "Limits",
    "Manifest",
    "Restoration",
    "RestorationError",
    "RestorationMemoryError",
    "RestorationTask",
    "Restorer",
    "SliceResult",
    "TaskDomain",
    "Verdict",
    "builtin",
    "bundle_folder",
    "decode_plane",
    "default_seed",
    "encode_plane",
    "missing",
    "outside",
    "probed",
    "read_manifest",
]


@dataclass(frozen=True)
class Restoration:
    """A restored volume and what was noticed on the way; per-slice lists are in slice order."""

    #: (slices, rows, columns), physical units, on the grid that `grid` tells; an array, or with
    #: slices that are read from where they were kept
    planes: Planes
    flags: tuple[str, ...]  #: guards that did not hold: mean_drift, residual_ratio, …
    seconds: float
    diagnostics: Diagnostics
    grid: GridChange = SAME_GRID  #: of the result over that of the input
    remarks: tuple[str, ...] = ()  #: how the device was short of memory, and what was done
    #: What the gates have measured already, of slices that were restored before.
    measured: Mapping[int, SliceMeasures] = field(default_factory=dict)
    probed: Mapping[int, Probe] = field(default_factory=dict)

    @property
    def volume(self) -> Volume:
        """All of `planes` as an array."""
        return whole(self.planes)


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
        volume: Planes,
        task: RestorationTask | str,
        *,
        spacing: Spacing | None = None,
        seeds: Sequence[int] | None = None,
        strength: float = 1.0,
        scale: float | None = None,
        upsample: int = 1,
        data_consistency: bool = True,
        kept: Kept | None = None,
        out: Volume | None = None,
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
        when an MR series has an empty high-frequency band. `kept` gives, by its index, what
        `restore_slice` made of the same pixels, seed and strength, and is taken as it is. The
        result is written into `out` where it has its shape. The same arguments and device give
        the same bytes.

        Raises TypeError or ValueError for an argument that is no such volume, task, seed, scale or
        strength; RestorationError when the network returns a value that is not finite;
        RestorationMemoryError when one slice alone does not fit.
        """
        started = time.perf_counter()
        task = self._accepted(task)
        x: Planes = self._looked_at(volume, task)
        grid, support = result_grid(self.manifest, x, task, upsample)
        if grid.factor > 1:
            x = zero_filled(whole(x), grid.factor)
        job = prepared(self.manifest, x, task, seeds, strength, data_consistency, scale, support)
        remarks = [self.network.remark] if self.network.remark else []
        loop = self._loop(x, job, remarks, out)
        _, diagnostics = self._run(loop, progress, kept if self.stands_alone(task) else None)
        flags = tripped(diagnostics, task, self.manifest.guards.get(task.value, {}))
        if spacing is not None and self._outside(task, spacing, grid.factor):
            flags.append("outside_domain")
        if job.wide:
            flags.append("wide_band")
        seconds = time.perf_counter() - started
        return Restoration(
            loop.planes,
            tuple(flags),
            seconds,
            diagnostics,
            grid,
            tuple(remarks),
            loop.measured,
            loop.probed,
        )

    def stands_alone(self, task: RestorationTask | str) -> bool:
        """Whether a slice of this task becomes the same whatever volume it is in.

        MR does not: its intensity scale and the k-space that was acquired are those of the volume.
        Nor does what is held to low frequencies through the slices, as PET is.
        """
        task = self._accepted(task)
        sigma = self.manifest.low_frequency.get(task.value, (0.0,))
        consistent = self.manifest.data_consistency.get(task.value, 0.0) > 0
        return task is not RestorationTask.MRI_SR and not consistent and sigma[0] == 0

    def restore_slice(
        self,
        plane: npt.NDArray[np.generic],
        task: RestorationTask | str,
        *,
        seed: int,
        strength: float = 1.0,
    ) -> SliceResult:
        """Restore (rows, columns) of a slice that stands alone, and measure it for the gates.

        Raises ValueError where the task's slices do not stand alone, else as `restore` does.
        """
        task = self._accepted(task)
        if not self.stands_alone(task):
            raise ValueError(f"A slice of {task.value} is restored with its volume alone.")
        x, remarks = checked(plane[None]), list[str]()
        job = prepared(self.manifest, x, task, [seed], strength, True, None, None)
        y, said = self._run(self._loop(x, job, remarks))
        values = {name: each[0] for name, each in said.items() if isinstance(each, list)}
        full = full_strength(x, y, strength)
        calibration = self.manifest.calibration.get(task.value)
        (measures,) = measure_slices(
            x,
            whole(full),
            task,
            described=calibration is not None and calibration.inputs is not None,
            device=self.device,
        )
        return SliceResult(y[0], values, measures, remarks=tuple(remarks))

    def probe_slice(
        self,
        plane: npt.NDArray[np.generic],
        made: SliceResult,
        task: RestorationTask | str,
        *,
        seed: int,
        strength: float = 1.0,
    ) -> SliceResult:
        """The result that `restore_slice` made of `plane`, with what `assess` asks of some slices.

        `probed` of :mod:`restoration.probes` says of which. Raises as `restore_slice` does.
        """
        task, x = self._accepted(task), checked(plane[None])
        job = prepared(self.manifest, x, task, [seed], 1.0, True, None, None)
        (found,) = probes(self.network, x, job)
        return replace(made, probe=found)

    def basis(self, task: RestorationTask | str) -> str:
        """What the bits of a slice rest on beside weights, seed and strength: a text to compare."""
        task = self._accepted(task)
        calibration = self.manifest.calibration.get(task.value)
        held = self.manifest.low_frequency.get(task.value)
        described = calibration is not None and calibration.inputs is not None
        return f"{self.network.basis}; held {held}; measures {MEASURES}, described {described}"

    def assess(
        self,
        volume: Planes,
        made: Restoration,
        task: RestorationTask | str,
        *,
        spacing: Spacing | None = None,
        facts: Mapping[str, Any] | None = None,
        seeds: Sequence[int] | None = None,
        strength: float = 1.0,
        progress: Progress | None = None,
    ) -> Fidelity:
        """Judge what `restore` made of `volume`, by the levels of the manifest.

        `seeds` and `strength` are those that `restore` was given; `facts` of the acquisition are
        compared with the model's domain. Some slices go through the network again, and the weights
        are looked at. What is judged is the restoration at full strength: a strength above 0 only
        mixes it with the input. `progress` is called with (steps done, steps in all) after every
        batch of the network and every few slices. Raises ValueError for a result of another
        volume, and for slices of fewer than `fidelity.LEAST_SIDE` rows or columns.
        """
        task = self._accepted(task)
        x: Planes = self._looked_at(volume, task)
        if made.grid.factor > 1:
            x = zero_filled(whole(x), made.grid.factor)
            spacing = spacing and finer(spacing, made.grid.factor)
        y, said = made.planes, made.diagnostics
        if 0 < strength < 1:
            y, said = full_strength(x, y, strength), at_full_strength(said, strength)
        chosen = probed(len(x)) if strength else []
        steps = Steps(progress, len(chosen) + len(x))
        job = self._again(x, task, seeds, said)
        asked = AskedAgain(self.network, x, job, chosen, made.probed, steps.another)
        (intact,) = begun([lambda: self.network.intact])
        evidence = Evidence(
            spacing_mm=spacing,
            facts=facts,
            domain=self.manifest.domain.get(task.value),
            diagnostics=said,
            support=support_of(said),
            again=lambda: Again(asked.found(), intact()),
            measured=made.measured,
        )
        return assess(
            x,
            y,
            task,
            evidence=evidence,
            calibration=self.manifest.calibration.get(task.value),
            device=self.device,
            progress=steps,
        )

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
        task, x = self._accepted(task), checked(volume)
        job = self._again(x, task, seeds, made.diagnostics)
        return AskedAgain(self.network, x, job, slices, {}).found()

    def _looked_at(self, volume: Planes, task: RestorationTask) -> Planes:
        """A volume that is checked: as a whole, or by slices where they stand alone."""
        return checked_planes(volume) if self.stands_alone(task) else checked(volume)

    def _again(
        self, x: Planes, task: RestorationTask, seeds: Sequence[int] | None, said: Diagnostics
    ) -> SliceJob:
        """The job for slices that go through the network again, without their volume."""
        job = prepared(self.manifest, x, task, seeds, 1.0, True, scale_of(said), support_of(said))
        sigma = self.manifest.low_frequency.get(task.value)
        return job if sigma is None else replace(job, held=sigma[1:])

    def _loop(
        self,
        x: Planes,
        job: SliceJob,
        remarks: list[str] | None = None,
        out: Volume | None = None,
    ) -> SliceLoop:
        y = np.empty(x.shape, np.float32) if out is None or out.shape != x.shape else out
        return SliceLoop(self.network, x, y, job, [] if remarks is None else remarks)

    def _run(
        self, loop: SliceLoop, progress: Progress | None = None, kept: Kept | None = None
    ) -> tuple[Volume, Diagnostics]:
        """Restore on the grid of the loop: the result, and what was noticed by slice."""
        values = loop.run(kept, progress)
        job = loop.job
        self._hold(loop.x, loop.y, job)
        return loop.y, {"intensity_scale": job.scale, **support_values(job.support), **values}

    def _hold(self, x: Planes, y: Volume, job: SliceJob) -> None:
        """Give a volume the low frequencies of its input, where its slices have not got theirs."""
        sigma = self.manifest.low_frequency.get(job.task.value)
        if sigma is not None and job.held is None:
            hold(whole(x), y, job, sigma)

    def _accepted(self, task: RestorationTask | str) -> RestorationTask:
        task = RestorationTask(task)
        if task.value not in self.manifest.tasks:
            raise ValueError(
                f"The model {self.manifest.name} restores {', '.join(self.manifest.tasks)}, "
                f"not {task.value}."
            )
        return task

    def _outside(
        self, task: RestorationTask, spacing: tuple[float, float, float], factor: int
    ) -> list[str]:
        domain = self.manifest.domain.get(task.value)
        restored = tuple(size / factor for size in spacing[1:])
        return outside(domain, {"pixel_spacing_mm": restored}) if domain else []


def bundle_folder(bundle: str | Path) -> Path:
    """The folder of a built-in bundle by its name, or of any bundle by its path."""
    is_name = isinstance(bundle, str) and Path(bundle).name == bundle
    if is_name and not Path(bundle).is_dir():
        return builtin(str(bundle))
    return Path(bundle)
