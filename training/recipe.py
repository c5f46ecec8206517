"""What to train and how: frozen settings read from TOML, the paper's values as defaults.

A recipe is one TOML file with the tables ``[arch]``, ``[stage1]``, ``[stage2]``, ``[stage3]`` and
``[data]``. Unknown keys are refused, and every problem is reported at once with its key path.
"""

from __future__ import annotations

import dataclasses
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from restoration.diffcode import VARIANTS, DiffCodeConfig

PRESETS = ("paper", "compact", "compact-polish", "tiny", "compact-ladder", "tiny-ladder")
_CHECKOUT = Path(__file__).resolve().parent.parent / "config" / "training"
_INSTALLED = Path("share", "diffcode", "recipes")  # below sys.prefix, by setup.cfg
Node = TypeVar("Node")


def preset_folder() -> Path:
    """Where the presets lie: in the checkout, else where a wheel put them."""
    return _CHECKOUT if _CHECKOUT.is_dir() else Path(sys.prefix) / _INSTALLED


class RecipeError(ValueError):
    """A recipe that cannot be used; ``problems`` has one line per fault, each with its key path."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


@dataclass(frozen=True)
class Optimisation:
    """Adam (.9, .999), cosine over the total steps; the defaults are the paper's Sec. 3.1."""

    steps: int = 200_000
    lr: float = 2e-4
    lr_final: float = 1e-6
    warmup: int = 0  #: steps of linear rise to `lr`
    per_task: int = 3  #: patches of each task in a batch; the paper's batch of 8 has three tasks
    patch: int = 128
    ema: float = 0.999
    clip: float = 1.0  #: largest gradient norm
    log_every: int = 50
    validate_every: int = 2_000


@dataclass(frozen=True)
class CodebookStage(Optimisation):
    """Stage I: VQ autoencoder and codebook bank, Eq. (3)."""

    ae_warmup: int = 1_000  #: steps without quantisation before the bank is made from data
    init_tokens: int = 200_000  #: latent tokens per task that the residual k-means sees
    kmeans_iterations: int = 8
    commitment: float = 0.25  #: weight of the commitment term in Eq. (3)
    codebook_loss: Literal["final", "per_depth"] = "final"
    codebook_lr_factor: float = 10.0
    restart_every: int = 200  #: codes unused for this many steps start again
    restart_until: float = 0.8  #: no restarts after this part of the steps
    gate_tokens: int = 50_000  #: per task; fewer understate how many codes are in use


@dataclass(frozen=True)
class DiffusionStage(Optimisation):
    """Stage II: condition encoder and latent denoiser, Eq. (6)."""


@dataclass(frozen=True)
class RestorationStage(Optimisation):
    """Stage III: backbone, task-adaptive routing modules and classifier, Eq. (7)."""

    pixel_loss: Literal["l1", "psnr"] = "l1"  #: Eq. 7, or the mean of the logarithms of errors²
    class_loss: float = 0.01  #: weight of the classifier's cross entropy
    init_from: str | None = None  #: run folder or bundle of a V2 whose backbone starts this one


@dataclass(frozen=True)
class Data:
    """Which images are drawn and how patches are varied."""

    tasks: tuple[str, ...] = ("mri_sr", "ct_denoise", "pet_synthesis")
    flip: tuple[str, ...] = ()  #: tasks with random left-right flips
    rotate: tuple[str, ...] = ()  #: tasks with random quarter turns
    validation_slices: int = 4  #: per task, for the figures in the log
    gate_slices: int = 0  #: per task, for the gates; 0 takes every validation slice
    simulated_pet: float = 0.0  #: least share of PET patches from simulated whole bodies
    fresh_noise: int = 0  #: steps after which the noise of CT is drawn anew; 0 keeps the prepared


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, apart from its data folder and its device."""

    arch: DiffCodeConfig
    stage1: CodebookStage = field(default_factory=CodebookStage)
    stage2: DiffusionStage = field(default_factory=DiffusionStage)
    stage3: RestorationStage = field(default_factory=RestorationStage)
    data: Data = field(default_factory=Data)
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"  #: bf16 is used on a GPU only

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a preset by its name, one of PRESETS, or a TOML file.

        Raises RecipeError with every fault found.
        """
        path = preset_folder() / f"{source}.toml" if str(source) in PRESETS else Path(source)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            known = ", ".join(PRESETS)
            message = f"cannot be read ({error.strerror}); presets are {known}"
            raise RecipeError(str(source), [message]) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(str(source), [str(error)]) from error
        return cls.from_dict(table, source=str(source))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
        """Build a recipe from nested tables; raises RecipeError with every fault found."""
        problems: list[str] = []
        recipe = _build(cls, table, "", problems)
        if recipe is None or problems:
            raise RecipeError(source, problems)
        problems = _contradictions(recipe)
        if problems:
            raise RecipeError(source, problems)
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Nested tables that `from_dict` reads back to an equal recipe."""
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]

    def with_variant(self, variant: str) -> Recipe:
        """The same recipe for another rung of the ladder V1, V2, V3, full."""
        if variant not in VARIANTS:
            raise RecipeError("variant", [f"{variant!r} is none of {', '.join(VARIANTS)}"])
        return dataclasses.replace(self, arch=dataclasses.replace(self.arch, variant=variant))


def _build(cls: type[Node], table: Any, path: str, problems: list[str]) -> Node | None:
    if not isinstance(table, Mapping):
        where = path.rstrip(".") or "recipe"
        problems.append(f"{where}: must be a table, not {type(table).__name__}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    known = ", ".join(sorted(fields))
    unknown = sorted(table.keys() - fields.keys())
    problems.extend(f"{path}{key}: unknown key; known are {known}" for key in unknown)
    before = len(problems)
    values = {
        key: _convert(hints[key], table[key], f"{path}{key}", problems)
        for key in fields
        if key in table
    }
    for key, spec in fields.items():
        required = spec.default is spec.default_factory is dataclasses.MISSING
        if required and key not in table:
            problems.append(f"{path}{key}: missing")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        problems.append(f"{path.rstrip('.') or 'recipe'}: {error}")
        return None


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, f"{path}.", problems)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, path, problems)
    if origin is Literal:
        if value not in arguments:
            problems.append(f"{path}: {value!r} is none of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, path, problems)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        problems.append(f"{path}: must be {hint.__name__}, not {value!r}")
    return value


def _convert_tuple(
    arguments: tuple[Any, ...], value: Any, path: str, problems: list[str]
) -> tuple[Any, ...] | None:
    if not isinstance(value, list | tuple):
        problems.append(f"{path}: must be a list, not {value!r}")
        return None
    open_ended = len(arguments) == 2 and arguments[1] is Ellipsis
    if not open_ended and len(value) != len(arguments):
        problems.append(f"{path}: must have {len(arguments)} entries, not {len(value)}")
        return None
    hints = [arguments[0]] * len(value) if open_ended else list(arguments)
    pairs = zip(hints, value, strict=True)
    return tuple(_convert(h, v, f"{path}[{i}]", problems) for i, (h, v) in enumerate(pairs))


def _contradictions(recipe: Recipe) -> list[str]:
    problems = []
    factor = recipe.arch.factor
    for name in ("stage1", "stage2", "stage3"):
        stage: Optimisation = getattr(recipe, name)
        problems += [
            f"{name}.{key}: must be positive, not {getattr(stage, key)!r}"
            for key in ("steps", "lr", "per_task", "patch", "clip", "log_every", "validate_every")
            if not getattr(stage, key) > 0
        ]
        if stage.patch % factor:
            problems.append(f"{name}.patch: must be a multiple of {factor}, not {stage.patch}")
        if not 0 <= stage.ema < 1:
            problems.append(f"{name}.ema: must be in [0, 1), not {stage.ema}")
        if not 0 <= stage.warmup < stage.steps:
            problems.append(f"{name}.warmup: must be fewer than the {stage.steps} steps")
    if not 0 < recipe.stage1.ae_warmup < recipe.stage1.steps:
        problems.append(f"stage1.ae_warmup: must be in 1 … {recipe.stage1.steps - 1}")
    if recipe.arch.codes <= recipe.arch.depths:
        problems.append(f"arch.codes: must be more than the {recipe.arch.depths} depths")
    if not 0 <= recipe.data.simulated_pet < 1:
        problems.append(f"data.simulated_pet: must be in [0, 1), not {recipe.data.simulated_pet}")
    if recipe.data.fresh_noise < 0:
        problems.append(f"data.fresh_noise: must not be negative, is {recipe.data.fresh_noise}")
    return problems + _unknown_tasks(recipe.data)


def _unknown_tasks(data: Data) -> list[str]:
    known = Data().tasks
    return [
        f"data.{key}: {task!r} is none of {', '.join(known)}"
        for key in ("tasks", "flip", "rotate")
        for task in getattr(data, key)
        if task not in known
    ]


def _plain(value: Any) -> Any:
    """Tuples as lists and no None, as TOML and JSON have them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
