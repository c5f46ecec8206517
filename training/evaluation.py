"""What an evaluation found: scores, quantities and differences, and their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from restoration.tasks import RestorationTask
from training.metrics import AMIR, PROTOCOLS, Score, mean_score
from training.quantities import UNITS, Measure, summarise
from training.statistics import Difference, average_difference, difference

Volume = npt.NDArray[np.float32]
Group = tuple[RestorationTask, bool]  # a task, and whether its references are simulated
INPUT, CLASSICAL, RESTORED = "input", "classical", "restored"
FIGURES = ("psnr", "ssim", "rmse")


@dataclass(frozen=True)
class SliceScore:
    """Quality of one slice by one method, by protocol id; a protocol without a figure is absent."""

    task: RestorationTask
    item: str
    subject: str
    simulated: bool
    index: int
    method: str
    scores: Mapping[str, Score]

    @property
    def place(self) -> tuple[str, int]:
        """The slice, whichever the method."""
        return self.item, self.index


@dataclass(frozen=True)
class VolumeMeasure:
    """A quantity of one volume, or of one region in it, by one method."""

    task: RestorationTask
    item: str
    subject: str
    simulated: bool
    method: str
    measure: Measure


@dataclass(frozen=True)
class Tuning:
    """The classical method a group got: its label, and the PSNR of each that was tried."""

    label: str
    tried: Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """The slice that is drawn for a task: images by method, in the order of the table."""

    task: RestorationTask
    simulated: bool
    images: Mapping[str, Volume]
    truth: Volume


@dataclass(frozen=True)
class Evaluation:
    """Scores of every slice and quantities of every volume.

    ``labels`` says what each method is, in the order of the table's rows; ``models`` are those
    among them that were trained, the first of which stands as ``restored`` in the JSON.
    """

    split: str
    scores: tuple[SliceScore, ...]
    measures: tuple[VolumeMeasure, ...]
    labels: Mapping[str, str]
    models: tuple[str, ...]
    classical: Mapping[Group, Tuning] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    central: int | None = None

    def select(
        self, task: RestorationTask, method: str, simulated: bool | None = None
    ) -> list[SliceScore]:
        """The scores of a task and a method, of all references or of real or simulated ones."""
        return [
            s
            for s in self.scores
            if s.task is task and s.method == method and simulated in (None, s.simulated)
        ]

    @property
    def tasks(self) -> list[RestorationTask]:
        """The tasks that were evaluated, in order."""
        found = {s.task for s in self.scores}
        return [task for task in RestorationTask if task in found]

    def mean(
        self, task: RestorationTask, method: str, protocol: str, simulated: bool | None = None
    ) -> Score | None:
        """Mean over slices, None where the method or the protocol has none."""
        rows = self.select(task, method, simulated)
        found = [row.scores[protocol] for row in rows if protocol in row.scores]
        return mean_score(found) if found else None

    def pairs(
        self,
        task: RestorationTask,
        method: str,
        against: str,
        figure: str = "psnr",
        simulated: bool | None = None,
    ) -> list[tuple[str, float]]:
        """(subject, paired difference) of each slice that both methods have, by amir/1."""
        base = {s.place: s.scores for s in self.select(task, against, simulated)}
        return [
            (s.subject, getattr(s.scores[AMIR.id], figure) - getattr(other[AMIR.id], figure))
            for s in self.select(task, method, simulated)
            if AMIR.id in s.scores and AMIR.id in (other := base.get(s.place, {}))
        ]

    def compare(
        self,
        task: RestorationTask,
        method: str,
        against: str,
        figure: str = "psnr",
        simulated: bool | None = None,
    ) -> Difference | None:
        """Difference of two methods on a task; None where they share no slice."""
        pairs = self.pairs(task, method, against, figure, simulated)
        return difference(pairs) if pairs else None

    def compare_average(self, method: str, against: str) -> Difference | None:
        """Difference of the three-task average of PSNR; None unless both have every task."""
        groups = [self.pairs(task, method, against) for task in self.tasks]
        return average_difference(groups) if groups and all(groups) else None

    def to_dict(self, baseline: str | None = None) -> dict[str, Any]:
        """What ``diffcode evaluate --json`` prints; differences against ``baseline`` if given."""
        tasks = {task.value: self._task(task, baseline) for task in self.tasks}
        values: dict[str, Any] = {
            "protocol": AMIR.description,
            "protocols": {p.id: p.description for p in PROTOCOLS},
            "split": self.split,
            "methods": dict(self.labels),
            "tasks": tasks,
            "average": self._averages(tasks),
        }
        if self.central is not None:
            values["slices_per_volume"] = self.central
        if baseline is not None:
            found = {m: self.compare_average(m, baseline) for m in self.labels if m != baseline}
            values["baseline"] = baseline
            values["average_differences"] = {m: d.to_dict() for m, d in found.items() if d}
        return values

    def _task(self, task: RestorationTask, baseline: str | None) -> dict[str, Any]:
        entry = self._group(task, None, baseline)
        if CLASSICAL in entry:
            names = self._classical_names(task)
            entry[CLASSICAL]["method"] = "; ".join(dict.fromkeys(names.values()))
            entry["tuning"] = {
                _kind(simulated): dict(method.tried)
                for (of, simulated), method in self.classical.items()
                if of is task
            }
        kinds = {s.simulated for s in self.select(task, INPUT)}
        if len(kinds) > 1:
            entry["groups"] = {
                _kind(kind): self._group(task, kind, baseline) for kind in (False, True)
            }
            for kind, name in self._classical_names(task).items():
                entry["groups"][_kind(kind)][CLASSICAL]["method"] = name
        return entry

    def _classical_names(self, task: RestorationTask) -> dict[bool, str]:
        kinds = sorted({s.simulated for s in self.select(task, CLASSICAL)})
        return {kind: self.classical[task, kind].label for kind in kinds}

    def _group(
        self, task: RestorationTask, simulated: bool | None, baseline: str | None
    ) -> dict[str, Any]:
        rows = self.select(task, INPUT, simulated)
        entry: dict[str, Any] = {
            "slices": len(rows), "subjects": len({row.subject for row in rows})
        }  # fmt: skip
        methods: dict[str, Any] = {}
        for name in self.labels:
            found = self.mean(task, name, AMIR.id, simulated)
            if found is not None:
                methods[name] = asdict(found)
        entry |= {name: methods[name] for name in (INPUT, CLASSICAL) if name in methods}
        if self.models:
            entry[RESTORED] = methods[self.models[0]]
        if len(self.models) > 1:
            entry["methods"] = methods
        entry["protocols"] = self._protocols(task, simulated)
        entry["quantities"] = self._quantities(task, simulated)
        if baseline is not None:
            entry["differences"] = self._differences(task, baseline, simulated)
        return entry

    def _protocols(self, task: RestorationTask, simulated: bool | None) -> dict[str, Any]:
        table: dict[str, dict[str, Any]] = {}
        for protocol in PROTOCOLS:
            for name in self.labels:
                found = self.mean(task, name, protocol.id, simulated)
                if found is not None:
                    table.setdefault(protocol.id, {})[name] = asdict(found)
        return table

    def _quantities(self, task: RestorationTask, simulated: bool | None) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name in self.labels:
            found = [
                (m.subject, m.measure)
                for m in self.measures
                if m.task is task and m.method == name and simulated in (None, m.simulated)
            ]
            if found:
                table[name] = {
                    quantity: {"units": UNITS[quantity], **asdict(summary)}
                    for quantity, summary in summarise(found).items()
                }
        return table

    def _differences(
        self, task: RestorationTask, baseline: str, simulated: bool | None
    ) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name in self.labels:
            for figure in FIGURES:
                found = self.compare(task, name, baseline, figure, simulated)
                if name != baseline and found is not None:
                    table.setdefault(name, {})[figure] = found.to_dict()
        return table

    def _averages(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """Mean over tasks of each method that has all of them; RMSE mixes units, as the paper's."""
        averages = {}
        for name in self.labels:
            rows = [entry["protocols"][AMIR.id].get(name) for entry in tasks.values()]
            if rows and all(rows):
                averages[name] = {k: float(np.mean([row[k] for row in rows])) for k in FIGURES}
        return averages


def _kind(simulated: bool) -> str:
    return "simulated" if simulated else "real"
