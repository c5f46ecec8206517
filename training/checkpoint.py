"""Checkpoints: one safetensors file that a crash cannot leave half written, no pickle.

The file holds ``model/…``, ``average/…``, ``adam.…/…`` and ``upkeep/…`` tensors and, in its
metadata, the stage, the step and the whole recipe, which ``state.json`` repeats for people.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from training.recipe import Recipe

CHECKPOINT = "checkpoint.safetensors"
STATE = "state.json"
CHECKPOINT_VERSION = 1
_INFERENCE_ONLY = ("arch.tlc_",)  # settings that no weight depends on


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what and where, and nothing was overwritten."""


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Replace the checkpoint of ``folder`` in one step; a crash leaves the old one."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{CHECKPOINT}.new"
    contiguous = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(contiguous, temporary, metadata={"state": json.dumps(state)})
    _publish(temporary, folder / CHECKPOINT)
    temporary = folder / f".{STATE}.new"
    temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")
    _publish(temporary, folder / STATE)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint; TrainingError says which file cannot be read."""
    with _opened(folder) as (file, state):
        return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118


def read_state(folder: Path) -> dict[str, Any]:
    """The state alone, whatever the size of the weights."""
    with _opened(folder) as (_, state):
        return state


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    path = folder / CHECKPOINT
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            if state.get("version") != CHECKPOINT_VERSION:
                raise TrainingError(f"{path} has version {state.get('version')!r}")
            yield file, state
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise TrainingError(f"{path} is no checkpoint of this program: {error}") from error


def averaged_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights a stage hands on: averaged where trained, as they are where frozen."""
    tensors, state = read_checkpoint(folder)
    return under(tensors, "model/") | under(tensors, "average/"), state


def refuse_other_recipe(
    folder: Path, state: Mapping[str, Any], recipe: Recipe, table: str, force: bool
) -> None:
    """TrainingError when a checkpoint belongs to another network, schedule or data.

    ``table`` names the stage's table of the recipe; ``force`` lets all but the network differ.
    """
    # Read and written again, so that keys of a later release have their defaults on both sides.
    then, now = Recipe.from_dict(state["recipe"]).to_dict(), recipe.to_dict()
    keys = ["arch", "seed", "data", table]
    changed = [k for key in keys for k in _differences(then.get(key), now.get(key), key)]
    changed = [c for c in changed if not c.startswith(_INFERENCE_ONLY)]
    if force:
        changed = [c for c in changed if c.startswith("arch")]
    if changed:
        raise TrainingError(
            f"{folder} holds another run ({'; '.join(changed)}); choose another --out"
        )


def _differences(then: Any, now: Any, path: str) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        return [d for k in keys for d in _differences(then.get(k), now.get(k), f"{path}.{k}")]
    return [] if then == now else [f"{path} was {then!r}, is {now!r}"]


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _publish(temporary: Path, target: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
