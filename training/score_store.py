"""Evaluations as JSON files, so that a rung is restored once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from restoration.tasks import RestorationTask
from training.evaluation import Evaluation, SliceScore, Tuning, VolumeMeasure
from training.metrics import Score
from training.quantities import Measure


def cached(path: Path, key: Mapping[str, Any], measure: Callable[[], Evaluation]) -> Evaluation:
    """What ``path`` keeps under an equal key, else what ``measure`` finds, which is then kept."""
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return _from_dict(stored)
    evaluation = measure()
    text = json.dumps({"key": key, **_to_dict(evaluation)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return evaluation


def _to_dict(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "split": evaluation.split,
        "labels": dict(evaluation.labels),
        "models": list(evaluation.models),
        "central": evaluation.central,
        "classical": [
            [task.value, simulated, tuning.label, dict(tuning.tried)]
            for (task, simulated), tuning in evaluation.classical.items()
        ],
        "scores": [
            {
                **asdict(s),
                "task": s.task.value,
                "scores": {k: asdict(v) for k, v in s.scores.items()},
            }
            for s in evaluation.scores
        ],
        "measures": [{**asdict(m), "task": m.task.value} for m in evaluation.measures],
    }


def _from_dict(values: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        split=values["split"],
        scores=tuple(
            SliceScore(
                **{
                    **row,
                    "task": RestorationTask(row["task"]),
                    "scores": {name: Score(**score) for name, score in row["scores"].items()},
                }
            )
            for row in values["scores"]
        ),
        measures=tuple(
            VolumeMeasure(
                **{
                    **row,
                    "task": RestorationTask(row["task"]),
                    "measure": Measure(**row["measure"]),
                }
            )
            for row in values["measures"]
        ),
        labels=values["labels"],
        models=tuple(values["models"]),
        classical={
            (RestorationTask(task), simulated): Tuning(label, tried)
            for task, simulated, label, tried in values["classical"]
        },
        central=values["central"],
    )
