"""A card has one section about the gates, wherever it stood."""

from __future__ import annotations

from restoration.fidelity import Calibration
from training.calibrated import with_gates

BASIS = {
    "slices": 120, "subjects": 9, "kept_out": 4,
    "margins": {"gain": [1.2, 1.5], "structure": [1.0, 2.5]},
    "left_out_alarms": {"warn": 0.04, "fail": 0.003},
}  # fmt: skip


def test_the_section_comes_last_and_is_replaced_in_place() -> None:
    once = with_gates("# Card\n\n## Figures\nmany\n", {"ct_denoise": Calibration({}, None, BASIS)})
    assert once.startswith("# Card\n\n## Figures\nmany\n\n## Gates\n")
    assert "| ct_denoise | 120 | 9, 4 | 1.5 ... 2.5 | 4.00 % | 0.30 % |" in once
    longer = once + "\n## Training data\nmuch\n"
    again = with_gates(longer, {"ct_denoise": Calibration({}, None, {**BASIS, "slices": 7})})
    assert again.count("## Gates") == 1
    assert "| ct_denoise | 7 |" in again
    assert again.endswith("\n## Training data\nmuch\n")
    assert with_gates(again, {"ct_denoise": Calibration({}, None, {**BASIS, "slices": 7})}) == again
