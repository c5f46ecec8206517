"""Slices through the network: batch by batch, what is known of a slice already left as it is.

A slice goes through window → network → un-window as a *change* that is added to the input. Where
nothing of its volume enters (`SliceJob.held` within the plane, a scale that is given), what it
becomes is the same in any company, and may be made before the others are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restoration.bundle import Manifest, RestorationError
from restoration.fidelity import SliceMeasures
from restoration.guards import change_values, pass_values
from restoration.kspace import (
    GridChange,
    Support,
    data_consistency,
    empty_band,
    zero_filled_grid,
    zero_filled_support,
)
from restoration.lowpass import low_frequency_change
from restoration.network import Network
from restoration.probes import Probe
from restoration.tasks import RestorationTask, intensity_scale, normalise, spec
from restoration.volumes import OnDemand, Planes, Volume, taken, whole

Progress = Callable[[int, int], None]
Values = dict[str, float]

# The operator of training.degrade whose inputs are zero-filled k-space.
KSPACE_TRUNCATION = "kspace-truncation"
# Of so many slices the measures of the gates are held, with thumbnails of 32 kB each.
_HELD = 512
# A band this much wider than the training's is another problem than the one that was learnt.
_WIDE = 1.3


class RestorationMemoryError(RestorationError):
    """The device has no memory for even one slice; another time or device may."""


@dataclass(frozen=True)
class SliceJob:
    """What all slices of one call share."""

    task: RestorationTask
    seeds: Sequence[int]
    strength: float
    scale: float
    support: Support | None
    weight: float  #: of the data consistency inside `support`
    wide: bool = False  #: `support` is wider than that of the training
    #: Low frequencies that each slice keeps by itself: standard deviations in pixels.
    held: tuple[float, float] | None = None


@dataclass(frozen=True)
class Elsewhere:
    """A plane (rows, columns) that is read when it is asked for; None: it is gone."""

    shape: tuple[int, ...]
    read: Callable[[], Volume | None]


@dataclass(frozen=True)
class SliceResult:
    """What one slice became apart from its volume, with what was noticed on the way."""

    plane: Volume | Elsewhere  #: (rows, columns), physical units
    values: Values  #: diagnostics of the pass by name
    measures: SliceMeasures | None = None  #: what the gates measure in a slice alone
    probe: Probe | None = None  #: what the network does to the result, and to a noisier input
    #: How the device was short of memory: such a result is not what it makes when it is not.
    remarks: tuple[str, ...] = field(default=(), compare=False)

    @property
    def restored(self) -> Volume | None:
        """The plane; None where it was elsewhere and is gone."""
        return self.plane.read() if isinstance(self.plane, Elsewhere) else self.plane

    def encode(self) -> bytes:
        """All but the plane as octets, bit by bit; `remarks` are left out."""
        told: dict[str, Any] = {"values": self.values, "plane": self.plane.shape}
        arrays: list[Volume] = []
        if self.measures is not None:
            told["measures"] = self.measures.values
            told["features"] = self.measures.features
            arrays += [self.measures.before, self.measures.after]
        if self.probe is not None:
            told["probe"] = self.probe
        told["shapes"] = [array.shape for array in arrays]
        head = json.dumps(told).encode()
        octets = [np.ascontiguousarray(array, "<f4").tobytes() for array in arrays]
        return b"".join((len(head).to_bytes(8, "little"), head, *octets))

    @classmethod
    def decode(cls, octets: bytes, plane: Callable[[], bytes | None]) -> SliceResult:
        """Inverse of `encode`; ValueError for octets that are no such result.

        `plane` gives what `encode_plane` made, and is asked when the plane is.
        """
        try:
            begin = 8 + int.from_bytes(octets[:8], "little")
            told = json.loads(octets[8:begin])
            arrays = list(_arrays(memoryview(octets)[begin:], told["shapes"]))
            measures = told.get("measures")
            rows, columns = told["plane"]
            return cls(
                Elsewhere((rows, columns), lambda: decode_plane(plane(), (rows, columns))),
                told["values"],
                None
                if measures is None
                else SliceMeasures(measures, arrays[0], arrays[1], tuple(told["features"])),
                told.get("probe"),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError("not a restored slice") from error


def encode_plane(plane: Volume) -> bytes:
    """A restored plane as octets."""
    return np.ascontiguousarray(plane, "<f4").tobytes()


def decode_plane(octets: bytes | None, shape: tuple[int, int]) -> Volume | None:
    """Inverse of `encode_plane`; None for octets that are none of this shape."""
    if octets is None or len(octets) != 4 * shape[0] * shape[1]:
        return None
    return np.frombuffer(octets, "<f4").reshape(shape)


def _arrays(octets: memoryview, shapes: Sequence[Sequence[int]]) -> list[Volume]:
    found, at = [], 0
    for shape in shapes:
        size = 4 * int(np.prod(shape))
        found.append(np.frombuffer(octets[at : at + size], "<f4").reshape(shape))
        at += size
    if at != len(octets):
        raise ValueError(f"{len(octets)} octets for {at}")
    return found


def default_seed(sha256: str, index: int) -> int:
    """The seed of slice `index` under the model of that SHA-256: a number below 2⁶³."""
    digest = hashlib.sha256(f"{sha256}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prepared(
    manifest: Manifest,
    x: Planes,
    task: RestorationTask,
    seeds: Sequence[int] | None,
    strength: float,
    consistent: bool,
    scale: float | None,
    support: Support | None,
) -> SliceJob:
    """What the slices of `x` share; ValueError for a scale, a strength or seeds that are none."""
    if scale is not None and not 0 < scale < np.inf:
        raise ValueError(f"'scale' must be positive, not {scale}.")
    if not 0 <= strength <= 1:
        raise ValueError(f"'strength' must lie in 0 ... 1, not {strength}.")
    if seeds is None:
        seeds = [default_seed(manifest.sha256, index) for index in range(len(x))]
    if len(seeds) != len(x):
        raise ValueError(f"'seeds' has {len(seeds)} values for {len(x)} slices.")
    weight = manifest.data_consistency.get(task.value, 0.0) if consistent else 0.0
    if weight == 0:
        support = None
    elif support is None:
        support = empty_band(torch.from_numpy(whole(x)))
    if scale is None:
        scale = intensity_scale(whole(x), task) if task is RestorationTask.MRI_SR else 1.0
    wide = support is not None and _is_wide(manifest, x, task, support)
    # What was measured beyond the band of the training is no business of the network.
    weight = 1.0 if wide else weight
    through, *plane = manifest.low_frequency.get(task.value, (1.0,))
    held = (plane[0], plane[1]) if through == 0 else None
    return SliceJob(task, seeds, strength, scale, support, weight, wide, held)


def _is_wide(manifest: Manifest, x: Planes, task: RestorationTask, support: Support) -> bool:
    """Whether more of k-space was measured than the model has seen: it would blur and invent.

    docs/decisions/0014-a-wider-band-than-the-training.md
    """
    recorded = manifest.degradation.get(task.value, {}).get("params", {})
    factor = min(recorded.get("factors", [recorded.get("factor", 1.0)]))
    band = (size / (2 * factor) for size in x.shape[1:])
    return any(
        found > _WIDE * trained
        for found, trained in zip((support.rows, support.columns), band, strict=True)
    )


def result_grid(
    manifest: Manifest, x: Planes, task: RestorationTask, upsample: int
) -> tuple[GridChange, Support | None]:
    """The grid of the result and, where it is finer, the k-space acquired on it."""
    grid = zero_filled_grid(upsample)
    if grid.factor == 1:
        return grid, None
    if task is not RestorationTask.MRI_SR:
        raise ValueError(f"'upsample' is for MR; {task.value} keeps its grid.")
    trained = manifest.degradation.get(task.value, {}).get("name", KSPACE_TRUNCATION)
    if trained != KSPACE_TRUNCATION:
        raise ValueError(
            f"The model {manifest.name} was trained on {trained}, not on zero-filled "
            "k-space: it cannot take a low matrix."
        )
    return grid, zero_filled_support(torch.from_numpy(whole(x)))


Kept = Callable[[int], SliceResult | None]


class _KeptMeasures(Mapping[int, SliceMeasures]):
    """The measures of slices that were kept: those of so many are held, others are read again."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._held: dict[int, SliceMeasures | None] = {}

    def note(self, index: int, result: SliceResult) -> None:
        """Take note that they are there, if they are."""
        if result.measures is not None:
            self._held[index] = result.measures if len(self._held) < _HELD else None

    def __getitem__(self, index: int) -> SliceMeasures:
        held = self._held[index]
        if held is None:
            again = self._kept(index)
            held = None if again is None else again.measures
        if held is None:
            raise KeyError(index)
        return held

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, index: object) -> bool:
        return index in self._held


Batch = list[int]
Finish = Callable[[], list[Values]]


class SliceLoop:
    """The slices of one volume `x`, restored into `y`, a GPU one batch ahead of its results.

    Those that were kept are not in `y` but in `planes`.

    What does not fit is tried again: half as many slices, then what `Network.give_way` finds, with
    words for it in `remarks`.
    """

    def __init__(
        self, network: Network, x: Planes, y: Volume, job: SliceJob, remarks: list[str]
    ) -> None:
        self._network = network
        self.x, self.y, self.job, self._remarks = x, y, job, remarks
        self._elsewhere: dict[int, SliceResult] = {}
        #: What the gates have measured of the slices that were `kept`.
        self.measured: Mapping[int, SliceMeasures] = {}
        self.probed: dict[int, Probe] = {}

    def run(
        self, kept: Kept | None = None, progress: Progress | None = None
    ) -> dict[str, list[float]]:
        """Fill `y`; what was noticed, by name and slice.

        `kept` knows slices that need no pass any more. Raises RestorationMemoryError where one
        slice alone does not fit, RestorationError for a value that is not finite.
        """
        total = len(self.x)
        values: dict[int, Values] = {}
        if kept is not None:
            self.measured = measured = _KeptMeasures(kept)
        for index in range(total if kept is not None else 0):
            assert kept is not None
            result = kept(index)
            if result is not None and self._take(index, result):
                values[index] = result.values
                measured.note(index, result)
                if progress is not None:
                    progress(len(values), total)
        for batch, found in self._batches([index for index in range(total) if index not in values]):
            values |= dict(zip(batch, found, strict=True))
            if progress is not None:
                progress(len(values), total)
        return {name: [values[index][name] for index in range(total)] for name in values[0]}

    @property
    def planes(self) -> Planes:
        """The result: `y`, or with slices that are read from where they were kept."""
        return OnDemand(self.x.shape, self._plane) if self._elsewhere else self.y

    def _plane(self, index: int) -> Volume:
        kept = self._elsewhere.get(index)
        if kept is not None:
            if (found := kept.restored) is not None:
                return found
            # It is gone meanwhile: what is made of it now has the same bits.
            del self._elsewhere[index]
            for _ in self._batches([index]):
                pass
        plane: Volume = self.y[index]
        return plane

    def _take(self, index: int, result: SliceResult) -> bool:
        if result.plane.shape != self.x.shape[1:]:
            return False
        # Thumbnails among the measures are larger than all else that is not read later.
        self._elsewhere[index] = replace(result, measures=None)
        if result.probe is not None:
            self.probed[index] = result.probe
        return True

    def _batches(self, left: Sequence[int]) -> Iterator[tuple[Batch, list[Values]]]:
        """Each batch of `left` with its values, once its slices are in `y`."""
        self._network.recover()
        size = self._network.slices(*self.x.shape[1:])
        ahead: tuple[Batch, Finish] | None = None
        start = 0
        while start < len(left) or ahead is not None:
            batch = list(left[start : start + size])
            begun = self._try(batch) if batch else None
            if ahead is not None:
                yield ahead[0], ahead[1]()
                ahead = None
            if begun is not None:
                ahead, start = (batch, begun), start + len(batch)
            elif batch:
                size = self._smaller(size)

    def _smaller(self, size: int) -> int:
        """The number of slices for the next try, after `size` of them did not fit."""
        network, device = self._network, self._network.device
        network.forget()
        if size > 1:
            self._remarks.append(f"no memory on {device} for {size} slices: {size // 2} at once")
            return size // 2
        done = network.give_way()
        if done is None:
            rows, columns = self.x.shape[1:]
            raise RestorationMemoryError(
                f"{device}: no memory for a slice of {rows}x{columns} pixels"
            )
        self._remarks.append(done)
        return 1

    def _try(self, batch: Batch) -> Finish | None:
        try:
            return self._begin(batch)
        except torch.OutOfMemoryError:
            # The failed pass's memory is free once its error is gone.
            return None

    def _begin(self, batch: Batch) -> Finish:
        """Start a batch; calling what comes back waits for it and fills its slices of `y`."""
        job, (low, high) = self.job, spec(self.job.task).window
        before = taken(self.x, batch)
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ),
        ):
            physical = torch.from_numpy(before)[:, None]  # (B, 1, H, W)
            scaled = physical * job.scale
            lq = normalise(scaled.clamp(low, high), job.task)
            wait = self._network.start(lq, job.task, [job.seeds[index] for index in batch])

        def finish() -> list[Values]:
            with torch.inference_mode():
                done = wait()
                restored = done.restored
                if job.support is not None:
                    restored = data_consistency(lq, restored, job.support, job.weight)
                # A scale of 1 and a change of 0 are exact: an idle network returns its input.
                change = (restored - lq) * ((high - low) / job.scale)
                inside = (scaled >= low) & (scaled <= high)
                result = torch.where(inside, physical + job.strength * change, physical)
                _require_finite(result, batch)
                after = result[:, 0].numpy()
            # Judged before the means are held: a network gone wrong must not be hidden by it.
            changes = change_values(before, after, job.task, job.scale)
            values = [a | b for a, b in zip(changes, pass_values(done), strict=True)]
            if job.held is not None:
                hold(before, after, job, (0.0, *job.held))
            self.y[batch] = after
            return values

        return finish


def hold(x: Volume, y: Volume, job: SliceJob, sigma: Sequence[float]) -> None:
    """Give `y` the local means of `x`; what lies outside the window stays as it is.

    docs/decisions/0023-low-frequencies-of-the-measurement.md
    """
    low, high = spec(job.task).window
    scaled = x * np.float32(job.scale)
    inside = (scaled >= low) & (scaled <= high)
    np.add(y, low_frequency_change(x, y, sigma), out=y, where=inside)


def _require_finite(result: Tensor, batch: Batch) -> None:
    bad = torch.nonzero(~result.flatten(1).isfinite().all(dim=1))
    if len(bad):
        raise RestorationError(
            f"The network returned a value that is not finite in slice {batch[int(bad[0])]}."
        )
