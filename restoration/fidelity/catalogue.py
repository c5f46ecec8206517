"""The gates there are: names, units, what is too much by default, and how levels are learnt.

The defaults are coarse and hold until a bundle brings levels of its own; they fail what no model
should do and warn early. Names are stable: manifests, ledgers and policies refer to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from restoration.fidelity.verdicts import Bounds, Levels
from restoration.tasks import RestorationTask

CT, MR, PET = (
    RestorationTask.CT_DENOISE,
    RestorationTask.MRI_SR,
    RestorationTask.PET_SYNTHESIS,
)
_ALL = (CT, PET, MR)
#: The gates along directions of `InputModel`: towards a sharper kernel, and a better acquisition.
DIRECTIONS = ("sharpness", "cleanness")


@dataclass(frozen=True)
class GateSpec:
    """One gate; `learn` says which tails calibration sets, and whether on a logarithmic scale."""

    name: str
    unit: str  #: of all tasks, or "CT | PET | MR"
    default: Levels = field(default_factory=Levels)
    learn: str = ""  #: "high", "low", "both", or "" for a level that no data can move
    logarithmic: bool = False
    tasks: tuple[RestorationTask, ...] = _ALL
    by_task: Mapping[RestorationTask, Levels] = field(default_factory=dict)
    fixed: tuple[RestorationTask, ...] = ()  #: tasks whose level no data can move
    least: float = 0.1  #: of the default: nearer to zero no level is learnt, for rounding differs

    def learns(self, task: RestorationTask) -> bool:
        """Whether calibration sets the level of a task."""
        return bool(self.learn) and task in self.tasks and task not in self.fixed

    def unit_of(self, task: RestorationTask) -> str:
        """The unit of a task."""
        units = [unit.strip() for unit in self.unit.split("|")]
        return units[0] if len(units) == 1 else units[_ALL.index(task)]

    def level(self, task: RestorationTask) -> Levels:
        """The default of a task."""
        return self.by_task.get(task, self.default)


def _above(warn: float | None, fail: float | None) -> Levels:
    return Levels(Bounds(high=warn), Bounds(high=fail))


def _between(warn: tuple[float, float], fail: tuple[float, float]) -> Levels:
    return Levels(Bounds(*warn), Bounds(*fail))


def _within(warn: float, fail: float) -> Levels:
    return Levels(Bounds(-warn, warn), Bounds(-fail, fail))


_NONE = _above(0.0, 0.0)

GATES = (
    GateSpec("finite", "pixels", _NONE),
    GateSpec(
        "range", "HU | SUV | a.u.", learn="high",
        by_task={CT: _above(50, 100), PET: _above(0.5, 2), MR: _above(115, 575)},
    ),
    GateSpec(
        "low_frequency", "HU | % | %", learn="high", logarithmic=True,
        by_task={CT: _above(2, 5), PET: _above(2, 5), MR: _above(3, 6)},
    ),
    GateSpec(
        "gain", "%", learn="both",
        # The centre of k-space was measured: what a model of MR does to contrast must be little.
        by_task={CT: _within(1, 3), PET: _within(8, 20), MR: _between((-1, 2), (-1.5, 2.5))},
    ),
    *(
        GateSpec(f"hu_bias_{tissue}", "HU", _within(3, 10), "both", tasks=(CT,))
        for tissue in ("air", "lung", "fat", "soft", "bone")
    ),
    GateSpec("whiteness", "1", _within(0.15, 0.5), "both"),
    GateSpec("edge_correlation", "1", _above(0.7, 0.9), "both"),
    GateSpec(
        "structure", "sd", learn="high", logarithmic=True,
        by_task={CT: _above(10, 20), PET: _above(12, 25), MR: _above(25, 50)},
    ),
    GateSpec(
        "residual_energy", "1", Levels(Bounds(0.3, 3.0), Bounds(0.1, 6.0)), "both", True
    ),
    GateSpec(
        "network_drift", "HU | 1 | 1", learn="both",
        by_task={CT: _within(3, 10), PET: _within(0.05, 0.2), MR: _within(0.03, 0.1)},
    ),
    GateSpec("network_energy", "1", _above(1.0, 1.5), "high", True),
    # What is held to its low frequencies keeps its total but for rounding and the window's ends.
    GateSpec("activity", "%", _within(2, 10), "both", tasks=(PET,), least=0.01),
    GateSpec("local_activity", "%", _above(8, 20), "high", True, tasks=(PET,)),
    GateSpec("hot_suv", "%", _within(8, 15), "both", tasks=(PET,)),
    GateSpec("hot_suv_small", "%", _within(15, 40), "both", tasks=(PET,)),
    GateSpec("hot_peak", "%", _within(20, 40), "both", tasks=(PET,)),
    GateSpec("data_consistency", "%", _above(6, 15), "high", True, tasks=(MR,)),
    GateSpec(
        "noise_level", "HU | 1 | 1", learn="both", logarithmic=True,
        by_task={CT: Levels(Bounds(4, 60), Bounds(1, 200))},
    ),
    GateSpec(
        # Of CT it is a check of the units: how much of a body is lung, bone or contrast differs.
        "intensity", "1 | SUV | 1", learn="both", logarithmic=True,
        by_task={CT: Levels(Bounds(0.2), Bounds(0.05))}, fixed=(CT,),
    ),
    # Above 0 another intercept explains a CT better; no more activity than was injected is there,
    # within what scanner and dose calibrator may differ.
    GateSpec(
        "units", "1 | % | 1", tasks=(CT, PET),
        by_task={CT: _above(-0.02, 0.0), PET: _above(100, 115)},
    ),
    GateSpec("echo", "1", _above(0.3, 0.5), "high", True, tasks=(CT,)),
    # With an axis of k-space that is full there is nothing that the model learnt to restore.
    GateSpec("empty_band", "of Nyquist", _above(0.35, 0.9), tasks=(MR,)),
    # The eight subjects at hand, each left out of the learning, lie below 2.5 and 2.6.
    GateSpec("ghosting", "sd", _above(2.6, 2.8), "high", tasks=(MR,)),
    GateSpec("texture", "sd", _above(2.7, 3.2), "high", True, tasks=(MR,)),
    # Of theirs it is below 0.13, and from 0.38 in those that were restored before.
    GateSpec("restored_before", "1", _above(0.2, 0.26), "high", tasks=(MR,)),
    GateSpec("likeness", "sd", learn="high", logarithmic=True),
    *(GateSpec(name, "sd", learn="high") for name in DIRECTIONS),
    GateSpec("domain", "reasons", _NONE),
    GateSpec("routing", "nats", Levels(Bounds(low=0.0), Bounds(low=0.0)), "low"),
    GateSpec("latent", "1", learn="high", logarithmic=True),
    GateSpec("reference", "1", learn="high", logarithmic=True),
    GateSpec("continuity", "1", _above(1.5, 3), "high", True),
    GateSpec("slice_order", "1", _above(1.2, 1.6), "high", True),
    GateSpec("idempotence", "1", _above(1.5, 3), "high", True),
    GateSpec("perturbation", "1", _above(1.2, 3), "high", True),
    GateSpec("weights", "changes", _NONE),
)  # fmt: skip

BY_NAME = {spec.name: spec for spec in GATES}
