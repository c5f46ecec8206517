"""What the slices of a series say alone, some at a time, and what neighbours say of each other."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restoration.fidelity import measures, series
from restoration.fidelity.catalogue import CT
from restoration.fidelity.measured import Measured, broken_in, mended, of_neighbours, per_slice
from restoration.kspace import Support
from restoration.tasks import RestorationTask
from restoration.volumes import Planes, taken
from restoration.workers import Waiting, at_once, begun

Volume = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
_SliceTold = tuple["SliceMeasures", float]  # with how many of the result's pixels are not finite
#: Of what a slice says alone, and when it is asked again: goes up where that changes, for slices
#: that were measured earlier.
MEASURES = 5
_BLOCK = 64  # slices that are compared with their neighbours at once
_AHEAD = 2  # chunks for each thread of a CPU that wait or are under way
# Pixels measured at once. On a CPU a slice of CT alone: one that is measured ahead of its series
# has to have the same sums, and in large slices company saves nothing.
_CHUNK_PIXELS = {"cuda": 64 * 512 * 512, "cpu": 4 * 256 * 256}


@dataclass(frozen=True)
class SliceMeasures:
    """What one slice says by itself, and what its neighbours are compared with."""

    values: dict[str, float]  #: NaN where there is nothing to measure
    before: Volume  #: the thumbnail of the input: `series.thumbnail`
    after: Volume  #: and that of the result
    features: tuple[float, ...] = ()  #: what the input is like: `inputs.describe`, if asked for


def measure_slices(
    before: Volume,
    after: Volume,
    task: RestorationTask,
    *,
    scale: float = 1.0,
    support: Support | None = None,
    described: bool = False,
    device: torch.device | str = "cpu",
) -> list[SliceMeasures]:
    """What each slice says by itself; (slices, rows, columns), finite, MR times `scale` at 1150.

    `described` asks for what an input model compares. On a CPU one thread does it.
    """
    at = torch.device(device)
    call = partial(_measure_slices, before, after, task, scale, support, described, at)
    return at_once([call], at)[0]


def _measure_slices(
    before: Volume,
    after: Volume,
    task: RestorationTask,
    scale: float,
    support: Support | None,
    described: bool,
    device: torch.device,
) -> list[SliceMeasures]:
    x, y = (torch.from_numpy(volume).to(device) * scale for volume in (before, after))
    found, features = measures.slice_measures(measures.Slices(x, y, task, support), described)
    small = (series.thumbnail(x).cpu().numpy(), series.thumbnail(y).cpu().numpy())
    values = {name: each.tolist() for name, each in found.items()}
    told = [()] * len(x) if features is None else [tuple(row) for row in features.tolist()]
    return [
        SliceMeasures(
            {name: each[i] for name, each in values.items()}, small[0][i], small[1][i], told[i]
        )
        for i in range(len(x))
    ]


@dataclass
class GatheredSlices:
    """What is gathered slice by slice; thumbnails go as soon as their neighbours have come."""

    #: By name; plain numbers, where a dictionary of objects for each slice takes ten times as much.
    values: dict[str, array[float]] = field(default_factory=dict)
    features: list[tuple[float, ...]] = field(default_factory=list)
    #: Pixels of the result that are not finite.
    broken: array[float] = field(default_factory=lambda: array("d"))
    _order: list[Tensor] = field(default_factory=list)
    _continuity: list[Tensor] = field(default_factory=list)
    _small: list[tuple[Volume, Volume]] = field(default_factory=list)
    _first: int = 0  # the slice of the first of them
    _compared: int = 0

    def add(self, made: SliceMeasures, broken: float) -> None:
        """Take the next slice."""
        if not self.values:
            self.values = {name: array("d") for name in made.values}
        for name, column in self.values.items():
            column.append(made.values[name])
        self.features.append(made.features)
        self.broken.append(broken)
        self._small.append((made.before, made.after))
        if len(self.broken) == self._compared + _BLOCK + series.REACH:
            self._compare(self._compared + _BLOCK)

    def found(self) -> dict[str, Measured]:
        """The values of all slices by name, with those that need their neighbours."""
        while self._compared < len(self.broken):
            self._compare(min(self._compared + _BLOCK, len(self.broken)))
        found = {name: per_slice(np.array(column)) for name, column in self.values.items()}
        found["slice_order"] = of_neighbours(torch.cat(self._order).numpy())
        found["continuity"] = of_neighbours(torch.cat(self._continuity).numpy())
        return found

    def _compare(self, stop: int) -> None:
        """Compare the next slices up to *stop* with those around them."""
        around = self._small[: stop + series.REACH - self._first]
        x, y = (torch.from_numpy(np.stack(stack)) for stack in zip(*around, strict=True))
        part = slice(self._compared - self._first, stop - self._first)
        self._order.append(series.slice_order(x, y)[part])
        self._continuity.append(series.continuity(x, y)[part])
        first = max(0, stop - series.REACH)
        del self._small[: first - self._first]
        self._first, self._compared = first, stop


def gathered(
    before: Planes,
    after: Planes,
    task: RestorationTask,
    scale: float,
    support: Support | None,
    described: bool,
    device: torch.device,
    progress: Progress | None,
    known: Mapping[int, SliceMeasures],
) -> GatheredSlices:
    """What each slice says, some slices at a time, what neighbours say of each other; features."""

    def measuring(chosen: Sequence[int]) -> Callable[[], list[_SliceTold]]:
        x, y = taken(before, chosen), taken(after, chosen)
        return partial(_tell, x, y, task, scale, support, described, device)

    room = 0 if task is CT and device.type == "cpu" else _CHUNK_PIXELS.get(device.type, 0)
    size = max(1, room // (before.shape[1] * before.shape[2]))
    left = [index for index in range(len(before)) if index not in known]
    chunks = (left[start : start + size] for start in range(0, len(left), size))
    ahead = _in_order(map(measuring, chunks), device)
    found, done = GatheredSlices(), len(before) - len(left)
    for index in range(len(before)):
        if index in known:
            made = known.get(index)
            if made is None:  # it is gone meanwhile
                ((told,),) = at_once([measuring([index])], device)
                found.add(*told)
            else:  # what was measured ahead was finite, or it would have been no result
                found.add(made, 0.0)
            continue
        found.add(*next(ahead))
        done += 1
        if progress is not None:
            progress(done, len(before))
    return found


def _tell(
    before: Volume,
    after: Volume,
    task: RestorationTask,
    scale: float,
    support: Support | None,
    described: bool,
    device: torch.device,
) -> list[_SliceTold]:
    broken = [broken_in(plane) for plane in after]
    if any(broken):
        after = mended(after)
    made = _measure_slices(before, after, task, scale, support, described, device)
    return list(zip(made, broken, strict=True))


def _in_order(
    calls: Iterable[Callable[[], list[_SliceTold]]], device: torch.device
) -> Iterator[_SliceTold]:
    """What the calls give; on a CPU those after the one that is waited for are under way."""
    most = _AHEAD * torch.get_num_threads() if device.type == "cpu" else 0
    waiting = deque[Waiting[list[_SliceTold]]]()
    for call in calls:
        waiting += begun([call], device)
        if len(waiting) > most:
            yield from waiting.popleft()()
    for wait in waiting:
        yield from wait()
