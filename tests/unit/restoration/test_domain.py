from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from restoration.domain import FACTS, TaskDomain, missing, outside

CT = TaskDomain(
    modality="CT",
    pixel_spacing_mm=(0.5, 1.0),
    slice_thickness_mm=(0.5, 5.0),
    kernels_accepted=("B[23].*", "standard", "fc[0-9]+"),
    kernels_refused=("B7.*", "B39x"),
    notes="chest and abdomen",
)
MR = TaskDomain(modality="MR", field_strength_t=(1.0, 3.0), contrasts=("T2", "flair"))
INSIDE = {
    "modality": "CT",
    "pixel_spacing_mm": (0.7, 0.7),
    "slice_thickness_mm": 5.0,
    "kernel": "B31f",
}


def test_an_acquisition_like_the_training_data_is_inside() -> None:
    assert outside(CT, INSIDE) == []
    assert outside(MR, {"modality": "MR", "field_strength_t": 3, "contrast": "FLAIR"}) == []


@pytest.mark.parametrize(
    ("fact", "value", "reason"),
    [
        ("modality", "PT", "modality PT is not CT"),
        ("slice_thickness_mm", 5.01, "slice thickness 5.01 mm is outside 0.5 ... 5 mm"),
        ("pixel_spacing_mm", (0.7, 1.2), "pixel spacing 1.2 mm is outside 0.5 ... 1 mm"),
        ("pixel_spacing_mm", float("nan"), "pixel spacing nan mm is outside 0.5 ... 1 mm"),
        ("kernel", "B70f", "convolution kernel B70f is not among B[23].*, standard, fc[0-9]+"),
        ("kernel", "B39x", "convolution kernel B39x is refused"),
        ("kernel", "XB31f", "convolution kernel XB31f is not among B[23].*, standard, fc[0-9]+"),
    ],
)
def test_each_fact_outside_has_its_reason(fact: str, value: Any, reason: str) -> None:
    assert reason in outside(CT, INSIDE | {fact: value})


def test_equal_spacings_give_one_reason() -> None:
    assert len(outside(CT, {"pixel_spacing_mm": (3.0, 3.0)})) == 1


def test_the_case_of_a_kernel_does_not_matter() -> None:
    assert outside(CT, {"kernel": "STANDARD"}) == []


def test_a_kernel_of_several_values_is_inside_by_one_and_refused_by_one() -> None:
    assert outside(CT, {"kernel": ["Qr36", "B31f"]}) == []
    assert outside(CT, {"kernel": ["B31f", "B70f"]}) == ["convolution kernel B70f is refused"]


def test_absent_facts_are_missing_and_not_outside() -> None:
    facts = {"modality": "CT", "kernel": None}
    assert outside(CT, facts) == []
    assert missing(CT, facts) == ["pixel_spacing_mm", "slice_thickness_mm", "kernel"]
    assert missing(MR, {}) == ["modality", "field_strength_t", "contrast"]
    assert missing(CT, INSIDE) == []


def test_a_fact_that_nobody_constrains_is_never_missing() -> None:
    assert missing(TaskDomain("PT"), {"modality": "PT"}) == []
    assert outside(TaskDomain("PT"), {"slice_thickness_mm": 99}) == []


def test_a_misspelt_fact_is_an_error() -> None:
    with pytest.raises(ValueError, match="thickness"):
        outside(CT, {"thickness": 1})
    with pytest.raises(ValueError, match="thickness"):
        missing(CT, {"thickness": 1})


@pytest.mark.parametrize("domain", [CT, MR, TaskDomain("PT")])
def test_a_domain_survives_the_way_through_plain_values(domain: TaskDomain) -> None:
    values = domain.to_dict()
    assert TaskDomain.from_dict(values) == domain
    assert all(isinstance(v, str | list | None) for v in values.values())


def test_unknown_keys_and_bad_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown key in domain: kernals"):
        TaskDomain.from_dict({"modality": "CT", "kernals": []})
    with pytest.raises(ValueError, match=r"\(\["):
        TaskDomain("CT", kernels_refused=("([",))


def test_each_constraint_has_a_fact_that_it_judges() -> None:
    constraints = {f.name for f in dataclasses.fields(TaskDomain)} - {"notes"}
    judged: dict[str, set[str]] = {
        "kernel": {"kernels_accepted", "kernels_refused"},
        "contrast": {"contrasts"},
        "patient_weight_kg": set(),  # a gate asks for it: the bound on PET activity
    }
    assert constraints == set().union(*(judged.get(fact, {fact}) for fact in FACTS))
