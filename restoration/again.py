"""Some slices through the network again: what it does to its own result, and to a noisier input."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from restoration.fidelity import Measured
from restoration.network import Network
from restoration.probes import Probe, disturbed, measured, middle, relative
from restoration.slices import Progress, SliceJob, SliceLoop
from restoration.volumes import Planes, Volume, taken
from restoration.workers import Waiting, begun

_AT_ONCE = 4  # slices on an accelerator; on a CPU each is a thread's


@dataclass
class Steps:
    """One progress over work in slices and `others` beside it."""

    progress: Progress | None
    total: int
    slices: int = 0
    others: int = 0

    def __call__(self, done: int, _: int) -> None:
        """So many slices are done."""
        self.slices = done
        self._tell()

    def another(self) -> None:
        """Something beside the slices is done."""
        self.others += 1
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.slices + self.others, self.total)


class AskedAgain:
    """Slices that are under way; of many, all but the last for the threads have come already.

    `job` is that of the volume `x`, with what a slice by itself is held to; slices whose probe is
    `known` are not asked. `told` is called after each step. Slices are read here and now, not by
    the threads: what reads them need not be made for several.
    """

    def __init__(
        self,
        network: Network,
        x: Planes,
        job: SliceJob,
        slices: Sequence[int],
        known: Mapping[int, Probe],
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._slices, self._told = slices, told
        self._found = {index: known[index] for index in slices if index in known}
        self._waiting = deque[tuple[Sequence[int], Waiting[list[Probe]]]]()
        on_cpu = network.device.type == "cpu"
        size, most = (1, torch.get_num_threads()) if on_cpu else (_AT_ONCE, 0)
        left = [index for index in slices if index not in known]
        for start in range(0, len(left), size):
            part = left[start : start + size]
            own = replace(job, seeds=[job.seeds[index] for index in part])
            call = partial(probes, network, taken(x, part), own)
            self._waiting.append((part, begun([call], network.device)[0]))
            while len(self._waiting) > most:
                self._come()

    def found(self) -> dict[str, Measured]:
        """What all of them gave, by the name of the probe."""
        while self._waiting:
            self._come()
        return measured(self._found, self._slices)

    def _come(self) -> None:
        part, wait = self._waiting.popleft()
        self._found |= dict(zip(part, wait(), strict=True))
        self._told()


def probes(network: Network, slices: Volume, job: SliceJob) -> list[Probe]:
    """What the network does to the middle of slices of one job, each by itself.

    Volume and k-space are not looked at. It is a chain of two passes, the first of two forms.
    """
    before, own = middle(slices), replace(job, support=None)
    noisy = disturbed(before, job.task, job.scale, own.seeds)
    after, disturbance = _passed(network, [before, noisy], own)
    (again,) = _passed(network, [after], own)
    return [
        {"idempotence": same, "perturbation": other}
        for same, other in zip(
            relative(again - after, after - before),
            relative(disturbance - after, noisy - before),
            strict=True,
        )
    ]


def _passed(network: Network, stacks: Sequence[Volume], job: SliceJob) -> list[Volume]:
    """What stacks of the same slices become, which know nothing of each other."""
    company = np.concatenate(stacks)
    job = replace(job, seeds=[*job.seeds] * len(stacks))
    loop = SliceLoop(network, company, np.empty_like(company), job, [])
    loop.run()
    return np.split(loop.y, len(stacks))
