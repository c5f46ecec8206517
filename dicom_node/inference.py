"""The one door to the model: a request in, a result out, whichever engine does the work.

Nothing else in the node imports ``restoration``, and this module does so only when an engine is
opened: the processes that receive or deliver never load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dicom_node.dicom.geometry import SAME_GRID, Resampling
from dicom_node.dicom.planes import Planes
from dicom_node.errors import ConfigurationError, EngineMemoryError, NodeError, PermanentError
from dicom_node.readings import GateReading, Level

if TYPE_CHECKING:
    from restoration.restorer import Fidelity, Restorer, SliceResult

Progress = Callable[[int, int], None]

# torch raises a plain RuntimeError where the host's memory ends; only its text tells.
_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "no memory for")


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights made a result; *sha256* is that of the weights file."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class MadeSlice:
    """What an engine made of one slice, in octets of its own."""

    facts: bytes  #: all but the restored pixels: small, and read for every slice of a job
    plane: bytes


class Kept(Protocol):
    """What `Engine.restore_slice` made of the slices of a volume, by their indices."""

    def facts(self, index: int) -> bytes | None:
        """Of a slice; None: it is not known."""

    def plane(self, index: int) -> bytes | None:
        """The pixels that belong to them; None: they are gone."""


@dataclass(frozen=True)
class RestorationRequest:
    """One volume in physical units: HU, SUV or MR arbitrary units.

    ``array`` is float32 of shape (slices, rows, columns), its planes asked for where they are
    needed; ``spacing`` is (z, y, x) in mm; ``seeds`` holds one integer for each slice, so a slice
    restores alike in any company.
    """

    array: Planes
    task: str
    spacing: tuple[float, float, float]
    seeds: tuple[int, ...]
    strength: float = 1.0
    #: MR: brings intensities into the window of the model, where a slice is restored apart from
    #: its volume; None: taken from this volume. ``intensity_scale`` of the diagnostics tells it.
    scale: float | None = None
    #: MR stored at its acquired matrix: how many times the rows and columns the result shall have.
    upsample: int = 1
    #: What the header says of the acquisition, by the keys of `Engine.judge`.
    facts: Mapping[str, Any] = field(default_factory=dict)
    #: Slices that were restored before; they are taken as they are.
    kept: Kept | None = None
    #: An array of the result's shape to write it into, where the engine shares this memory.
    out: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class SliceRequest:
    """One slice (rows, columns) of a volume that is not there yet; as in `RestorationRequest`."""

    array: NDArray[np.float32]
    task: str
    seed: int
    strength: float = 1.0


@dataclass(frozen=True)
class RestorationResult:
    """The restored volume in the same units, with what the engine has to say about it.

    ``array`` has the shape of the request's, or ``resampling.factor`` times its rows and columns.
    """

    array: Planes
    model: ModelIdentity
    flags: tuple[str, ...]
    seconds: float
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    resampling: Resampling = SAME_GRID
    #: What the gates measured; a result without any is never sent unseen.
    readings: tuple[GateReading, ...] = ()
    #: Whether the levels of the gates were learnt for these weights.
    calibrated: bool = False
    #: What the device could not do as it was meant to, and what was done: words for a person.
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class DomainVerdict:
    """How an acquisition stands to what the bundle was trained on, in words for a person."""

    outside: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    #: MR stored at its acquired matrix: how many times the grid has to be finer to lie inside.
    upsample: int = 1


class Engine(Protocol):
    """Restores volumes: LocalEngine in this process, others elsewhere."""

    @property
    def model(self) -> ModelIdentity:
        """The identity of the bundle that is loaded."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the bundle can do."""

    def judge(self, task: str, facts: Mapping[str, Any]) -> DomainVerdict:
        """Compare *facts* of an acquisition with the domain that the bundle states for *task*.

        Keys: modality, pixel_spacing_mm, slice_thickness_mm, field_strength_t, kernel, contrast;
        None where the header says nothing.
        """

    def parameters(self, task: str) -> Mapping[str, Any]:
        """What steers *task* beside the weights: another value makes other pixels."""

    def basis(self, task: str) -> str | None:
        """What the bits of a slice rest on beside weights, parameters, seed and pixels.

        None where a slice of *task* becomes another in another volume.
        """

    def restore_slice(self, request: SliceRequest) -> MadeSlice | None:
        """Restore a slice ahead of its volume, for `RestorationRequest.kept`.

        None where the device cannot at the moment do it as it
        would with the volume.
        """

    def plane(self, made: MadeSlice, shape: tuple[int, int]) -> NDArray[np.float32]:
        """The restored slice in what `restore_slice` made of one of this shape."""

    def probed(self, task: str, slices: int) -> Sequence[int]:
        """The places in a volume of so many slices at which its gates look twice."""

    def probe_slice(self, request: SliceRequest, facts: bytes) -> bytes | None:
        """The *facts* of what `restore_slice` made, with that second look; None as there."""

    def restore(
        self, request: RestorationRequest, progress: Progress | None = None
    ) -> RestorationResult:
        """Restore one volume; *progress* is called with (slices done, slices in all)."""


class LocalEngine:
    """The model in this process, on the accelerator or the CPU."""

    def __init__(self, restorer: Restorer) -> None:
        """Wrap an open restorer; :meth:`open` is the usual way in."""
        self._restorer = restorer
        manifest = restorer.manifest
        self.model = ModelIdentity(manifest.name, manifest.version, manifest.sha256)
        self.tasks = tuple(manifest.tasks)

    @classmethod
    def open(
        cls, bundle: str = "compact", *, device: str = "auto", threads: int | None = None
    ) -> LocalEngine:
        """Load and verify a bundle: a name that is shipped or the path of a folder.

        Raises:
            ConfigurationError: the bundle is missing, damaged or not for this device.
        """
        from restoration.restorer import RestorationError, Restorer

        try:
            return cls(Restorer.open(bundle, device=device, threads=threads))
        except RestorationError as error:
            raise ConfigurationError([f"engine: {error}"]) from error
        except (MemoryError, RuntimeError) as error:
            raise _translated(error, f"bundle {bundle}") from error

    def judge(self, task: str, facts: Mapping[str, Any]) -> DomainVerdict:
        """Compare *facts* with the manifest's domain; a domain that is not stated allows all."""
        from restoration.restorer import missing, outside

        domain = self._restorer.manifest.domain.get(task)
        if domain is None:
            return DomainVerdict()
        against, unsaid = tuple(outside(domain, facts)), tuple(missing(domain, facts))
        factor = self._trained_factor(task)
        if against and factor > 1 and not outside(domain, _finer(facts, factor)):
            return DomainVerdict((), unsaid, factor)
        return DomainVerdict(against, unsaid)

    def _trained_factor(self, task: str) -> int:
        """By how much the training operator truncated k-space, where it is a whole number."""
        operator = self._restorer.manifest.degradation.get(task, {})
        factor = operator.get("params", {}).get("factor", 1)
        by_truncation = operator.get("name") == "kspace-truncation"
        return int(factor) if by_truncation and float(factor).is_integer() else 1

    def parameters(self, task: str) -> Mapping[str, Any]:
        """How the manifest holds a result to the measurement: k-space weight, widths in voxels."""
        manifest = self._restorer.manifest
        low = manifest.low_frequency.get(task)
        return {
            "data_consistency": manifest.data_consistency.get(task, 0.0),
            **({} if low is None else {"low_frequency": list(low)}),
        }

    def basis(self, task: str) -> str | None:
        """Device, precision and what the manifest holds a slice to; None for PET and MR."""
        return self._restorer.basis(task) if self._restorer.stands_alone(task) else None

    def restore_slice(self, request: SliceRequest) -> MadeSlice | None:
        """Restore and measure one slice; errors as for `restore`."""
        from restoration.restorer import RestorationError, encode_plane

        try:
            made = self._restorer.restore_slice(
                request.array, request.task, seed=request.seed, strength=request.strength
            )
        except (RestorationError, MemoryError, RuntimeError, ValueError, TypeError) as error:
            raise _translated(error, request.task) from error
        # Short of memory it took a way of its own, which a volume later would not.
        if made.remarks or made.restored is None:
            return None
        return MadeSlice(made.encode(), encode_plane(made.restored))

    def plane(self, made: MadeSlice, shape: tuple[int, int]) -> NDArray[np.float32]:
        """The restored slice; ValueError for octets that are none of that shape."""
        from restoration.restorer import decode_plane

        restored = decode_plane(made.plane, shape)
        if restored is None:
            raise ValueError(f"no slice of {shape}")
        return restored

    def probed(self, task: str, slices: int) -> Sequence[int]:
        """Slices that go through the network again: evenly spread."""
        from restoration.restorer import probed

        return probed(slices)

    def probe_slice(self, request: SliceRequest, facts: bytes) -> bytes | None:
        """Send the result of a slice through the network again; errors as for `restore`."""
        from restoration.restorer import RestorationError, SliceResult

        try:
            result = self._restorer.probe_slice(
                request.array,
                SliceResult.decode(facts, lambda: None),
                request.task,
                seed=request.seed,
                strength=request.strength,
            )
        except (RestorationError, MemoryError, RuntimeError, ValueError, TypeError) as error:
            raise _translated(error, request.task) from error
        return None if result.remarks else result.encode()

    def restore(
        self, request: RestorationRequest, progress: Progress | None = None
    ) -> RestorationResult:
        """Restore one volume and have the gates measure what came of it.

        Raises:
            EngineMemoryError: host or accelerator memory ran out; worth another try.
            PermanentError: the volume cannot be restored by this bundle, now or later; slices of
                too few pixels to be judged are refused before anything is restored.
        """
        from restoration.restorer import LEAST_SIDE, RestorationError

        slices, rows, columns = request.array.shape
        if min(rows, columns) * request.upsample < LEAST_SIDE:
            raise PermanentError(
                f"{request.task}: slices of {rows}x{columns} pixels are too small to be judged, "
                f"{LEAST_SIDE} are the least; nothing was restored"
            )
        try:
            made = self._restorer.restore(
                request.array,
                request.task,
                spacing=request.spacing,
                seeds=request.seeds,
                strength=request.strength,
                scale=request.scale,
                upsample=request.upsample,
                kept=_known(request.kept),
                out=request.out,
                progress=progress,
            )
            fidelity = self._restorer.assess(
                request.array,
                made,
                request.task,
                spacing=request.spacing,
                facts=_on_grid(request),
                seeds=request.seeds,
                strength=request.strength,
                # The series is restored; who waits learns that there is still life.
                progress=progress and (lambda *_: progress(slices, slices)),
            )
        except (RestorationError, MemoryError, RuntimeError, ValueError, TypeError) as error:
            raise _translated(error, request.task) from error
        return RestorationResult(
            made.planes,
            self.model,
            tuple(made.flags),
            made.seconds,
            made.diagnostics,
            Resampling(made.grid.factor, made.grid.shift),
            (*_readings(fidelity), guard_reading(made.flags, made.diagnostics)),
            fidelity.calibrated,
            tuple(made.remarks),
        )


def _known(kept: Kept | None) -> Callable[[int], SliceResult | None] | None:
    """Early results as the restorer takes them; octets that it did not write are none."""
    from restoration.restorer import SliceResult

    if kept is None:
        return None

    def known(index: int) -> SliceResult | None:
        octets = kept.facts(index)
        try:
            if octets is None:
                return None
            return SliceResult.decode(octets, lambda: kept.plane(index))
        except ValueError:
            return None

    return known


def _on_grid(request: RestorationRequest) -> Mapping[str, Any] | None:
    """The facts of the acquisition for the grid of the result; None where nothing is known."""
    if request.upsample > 1:
        return _finer(request.facts, request.upsample)
    return request.facts or None


def _readings(fidelity: Fidelity) -> Iterator[GateReading]:
    """What the model's gates say, as plain data of the node."""
    for gate in fidelity.gates:
        yield GateReading(
            gate=gate.name,
            unit=gate.unit,
            values=gate.values,
            slices=gate.slices,
            levels=tuple(Level(verdict.value) for verdict in gate.verdicts),
            warn=(gate.levels.warn.low, gate.levels.warn.high),
            fail=(gate.levels.fail.low, gate.levels.fail.high),
            worst_slice=gate.worst_slice,
            reason=gate.reason,
        )


def guard_reading(flags: Sequence[str], diagnostics: Mapping[str, Any]) -> GateReading:
    """The engine's own guards, which a network gone wrong trips, as a gate of the volume."""
    tripped = [name for name in _GUARDS if name in flags]
    worst = (max(abs(value) for value in diagnostics[name]) for name in tripped)
    words = ", ".join(f"{name} {value:.3g}" for name, value in zip(tripped, worst, strict=True))
    level = Level.FAIL if tripped else Level.PASS
    count, any_value, none = float(len(tripped)), (None, None), (0.0, 0.0)
    return GateReading("guard", "guards", (count,), (), (level,), any_value, none, None, words)


_GUARDS = ("mean_drift", "residual_ratio")


def _finer(facts: Mapping[str, Any], factor: int) -> Mapping[str, Any]:
    spacing = facts.get("pixel_spacing_mm") or ()
    return {**facts, "pixel_spacing_mm": tuple(each / factor for each in spacing) or None}


def _translated(error: Exception, what: str) -> NodeError:
    """The node's error for one of the model's; only exhausted memory is worth another try."""
    text = str(error).lower()
    memory = isinstance(error, MemoryError) or any(phrase in text for phrase in _MEMORY_PHRASES)
    kind = EngineMemoryError if memory else PermanentError
    return kind(f"{what}: {error}")
