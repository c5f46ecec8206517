"""Where a model may be used: the acquisitions it was trained on, and how to tell one from outside.

Pure data and decisions: who calls them reads the facts from a header, and decides what follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

Range = tuple[float, float]

#: What `outside` and `missing` can judge, and what gates ask for beside: fact -> (label, unit). A
#: sequence is several values.
FACTS = {
    "modality": ("modality", ""),
    "pixel_spacing_mm": ("pixel spacing", " mm"),
    "slice_thickness_mm": ("slice thickness", " mm"),
    "field_strength_t": ("field strength", " T"),
    "kernel": ("convolution kernel", ""),
    "contrast": ("contrast", ""),
    "patient_weight_kg": ("weight of the patient", " kg"),
}
_RANGES = ("pixel_spacing_mm", "slice_thickness_mm", "field_strength_t")


@dataclass(frozen=True)
class TaskDomain:
    """Where a model may be used for one task; None and () leave a fact unconstrained.

    Ranges are inclusive. Kernels and contrasts are regular expressions that must match the whole
    term, in any case; a refused kernel is refused even if it is accepted too.
    """

    modality: str
    pixel_spacing_mm: Range | None = None
    slice_thickness_mm: Range | None = None
    field_strength_t: Range | None = None
    kernels_accepted: tuple[str, ...] = ()
    kernels_refused: tuple[str, ...] = ()
    contrasts: tuple[str, ...] = ()
    notes: str = ""

    def __post_init__(self) -> None:
        for pattern in (*self.kernels_accepted, *self.kernels_refused, *self.contrasts):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskDomain:
        """Inverse of `to_dict`; ValueError names unknown keys."""
        refuse_unknown(values, (f.name for f in fields(cls)), "domain")
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**known)


def outside(domain: TaskDomain, facts: Mapping[str, Any]) -> list[str]:
    """Why an acquisition lies outside the domain; empty when it does not.

    Facts that are absent or None are not judged: see `missing`. ValueError for an unknown fact.
    """
    known = _known(facts)
    reasons = []
    if known.get("modality", domain.modality) != domain.modality:
        reasons.append(f"modality {known['modality']} is not {domain.modality}")
    for name in _RANGES:
        reasons += _outside_range(name, getattr(domain, name), _sequence(known.get(name)))
    kernels = [str(kernel) for kernel in _sequence(known.get("kernel"))]
    reasons += [
        f"convolution kernel {kernel} is refused"
        for kernel in kernels
        if _matches(domain.kernels_refused, kernel)
    ]
    reasons += _none_matches("kernel", domain.kernels_accepted, kernels)
    reasons += _none_matches("contrast", domain.contrasts, _sequence(known.get("contrast")))
    return reasons


def missing(domain: TaskDomain, facts: Mapping[str, Any]) -> list[str]:
    """The facts that the domain constrains and the acquisition does not state."""
    constrained = {
        "modality": True,
        **{name: getattr(domain, name) is not None for name in _RANGES},
        "kernel": bool(domain.kernels_accepted or domain.kernels_refused),
        "contrast": bool(domain.contrasts),
    }
    known = _known(facts)
    return [name for name in FACTS if constrained.get(name) and name not in known]


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise ValueError that names the keys of `values` that are not known."""
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown key in {where}: {', '.join(unknown)}")


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    refuse_unknown(facts, FACTS, "facts")
    return {name: value for name, value in facts.items() if value is not None}


def _sequence(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    many = isinstance(value, Iterable) and not isinstance(value, str)
    return tuple(value) if many else (value,)


def _outside_range(name: str, limits: Range | None, values: Iterable[float]) -> list[str]:
    if limits is None:
        return []
    label, unit = FACTS[name]
    low, high = limits
    return [
        f"{label} {value:g}{unit} is outside {low:g} ... {high:g}{unit}"
        for value in dict.fromkeys(float(v) for v in values)
        if not low <= value <= high
    ]


def _matches(patterns: Iterable[str], text: str) -> bool:
    return any(re.fullmatch(pattern, text, re.IGNORECASE) for pattern in patterns)


def _none_matches(fact: str, patterns: tuple[str, ...], values: Iterable[Any]) -> list[str]:
    texts = [str(value) for value in values]
    if not patterns or not texts or any(_matches(patterns, text) for text in texts):
        return []
    return [f"{FACTS[fact][0]} {', '.join(texts)} is not among {', '.join(patterns)}"]
