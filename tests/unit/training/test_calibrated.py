"""A card has one section about the gates, wherever it stood."""

from __future__ import annotations

from restoration.fidelity import Calibration, Levels
from training.calibrated import with_gates

BASIS = {
    "slices": 120, "subjects": 9, "kept_out": 4,
    "margins": {"gain": [1.2, 1.5], "structure": [1.0, 2.5]},
    "left_out_alarms": {"warn": 0.04, "fail": 0.003},
    "least_subjects": 19, "program_levels": {"hot_peak": 12},
}  # fmt: skip
LEARNT = {"gain": Levels()}


def test_the_section_comes_last_and_is_replaced_in_place() -> None:
    once = with_gates(
        "# Card\n\n## Figures\nmany\n", {"ct_denoise": Calibration(LEARNT, None, BASIS)}
    )
    assert once.startswith("# Card\n\n## Figures\nmany\n\n## Gates\n")
    assert "| ct_denoise | 120 | 9, 4 | 1.5 ... 2.5 | 4.00 % | 0.30 % | `hot_peak` (12) |" in once
    longer = once + "\n## Training data\nmuch\n"
    made = {"ct_denoise": Calibration(LEARNT, None, {**BASIS, "slices": 7})}
    again = with_gates(longer, made)
    assert again.count("## Gates") == 1
    assert "| ct_denoise | 7 |" in again
    assert again.endswith("\n## Training data\nmuch\n")
    assert (
        with_gates(again, {"ct_denoise": Calibration(LEARNT, None, {**BASIS, "slices": 7})})
        == again
    )


def test_a_task_of_too_few_subjects_says_so() -> None:
    few = {**BASIS, "subjects": 8, "margins": {}, "left_out_alarms": None}
    text = with_gates("# Card\n", {"mri_sr": Calibration({}, None, few)})
    assert "| mri_sr | 120 | 8, 4 | - | - | - | **all**: 19 subjects are the least |" in text
