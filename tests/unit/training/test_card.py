from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from restoration.bundle import CARD, MANIFEST, WEIGHTS, builtin, read_manifest
from restoration.tasks import RestorationTask
from tests.training.command import call
from tests.training.tiny import tiny_set
from training.calibrated import with_gates
from training.card import fill, nameless
from training.evaluate import evaluate, tuned_methods
from training.evaluation import Volume
from training.manifest import Item

PLACES = "# Card {{sha256}}\n\n{{protocol}}\n\n{{figures}}\n\n{{protocols}}\n\n{{quantities}}\n"


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An evaluation of CT and PET phantoms, as JSON gives it back."""

    def dimmed(volume: Volume, item: Item) -> Volume:
        return 0.98 * volume

    dataset = tiny_set(tmp_path_factory.mktemp("tiny"), size=48)
    tasks = [RestorationTask.CT_DENOISE, RestorationTask.PET_SYNTHESIS]
    methods = tuned_methods(dataset, tasks)
    found = evaluate(dataset, {"restored": dimmed}, tasks=tasks, methods=methods)
    values: dict[str, Any] = json.loads(json.dumps(found.to_dict("classical")))
    return values


def row(card: str, *beginning: str) -> list[str]:
    start = f"| {' | '.join(beginning)} |"
    line = next(line for line in card.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_cards_figures_are_those_of_the_evaluation(metrics: dict[str, Any]) -> None:
    entry = metrics["tasks"]["ct_denoise"]
    cells = row(fill(PLACES, metrics, "abc"), "CT", "2 / 1")
    restored, classical = entry["restored"], entry["classical"]
    shown = f"{restored['psnr']:.2f} / {restored['ssim']:.4f} / {restored['rmse']:.4g}"
    assert cells[4] == shown
    assert f"({classical['method']})" in cells[3]
    assert cells[5] == f"{restored['psnr'] - entry['input']['psnr']:+.2f}"
    assert cells[6].endswith("(too few subjects for an interval)")


def test_each_further_protocol_has_its_rows(metrics: dict[str, Any]) -> None:
    card = fill(PLACES, metrics, "abc")
    lung = metrics["tasks"]["ct_denoise"]["protocols"]["lung-window/1"]["input"]
    assert row(card, "lung-window/1", "CT")[2].startswith(f"{lung['psnr']:.2f} / ")
    assert "| lung-window/1 | PET" not in card
    assert metrics["protocol"] in card


def test_the_card_says_how_much_activity_is_lost(metrics: dict[str, Any]) -> None:
    card = fill(PLACES, metrics, "abc")
    assert row(card, "PET", "activity_vs_input, %")[5] == "-2.00 (-2.00)"


@pytest.mark.parametrize(
    ("text", "metrics", "reason"),
    [
        ("{{figurse}}", {"tasks": {}}, "unknown place {{figurse}}"),
        ("{{figures}}", {}, "{{figures}} needs --metrics"),
    ],
    ids=["misspelt", "without-metrics"],
)
def test_a_place_that_cannot_be_filled_is_refused(
    text: str, metrics: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match="card") as caught:
        fill(text, metrics, "abc")
    assert reason in str(caught.value)


def test_a_bundle_carries_no_names_of_subjects(metrics: dict[str, Any]) -> None:
    entry = nameless(metrics)["tasks"]["ct_denoise"]
    kept = entry["differences"]["restored"]["psnr"]
    assert kept["subjects"] == pytest.approx([kept["mean"]])
    assert "val-ct_denoise" in json.dumps(metrics)
    assert "val-ct_denoise" not in json.dumps(nameless(metrics))
    assert entry["subjects"] == 1
    assert entry["restored"] == metrics["tasks"]["ct_denoise"]["restored"]


def test_a_card_without_places_stays_as_it_is() -> None:
    assert fill("# Tiny\n", {}, "abc") == "# Tiny\n"


def test_a_bundle_gets_new_figures_and_keeps_its_weights(
    metrics: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "card.md").write_text(PLACES, encoding="utf-8")
    (tmp_path / "evaluation.json").write_text(json.dumps(metrics), encoding="utf-8")
    command = (
        "card", "compact", tmp_path / "out", "--card", tmp_path / "card.md",
        "--metrics", tmp_path / "evaluation.json",
    )  # fmt: skip
    done = call(*command)
    assert done.exit_code == 0, done.stderr
    old, new = read_manifest(builtin("compact")), read_manifest(tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (builtin("compact") / WEIGHTS).read_bytes()
    assert new.metrics == nameless(metrics)
    assert {**new.to_dict(), "metrics": {}} == {**old.to_dict(), "metrics": {}}
    card = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert new.sha256 in card
    assert ("\n## Gates\n" in card) == bool(old.calibration)
    (tmp_path / "evaluation.json").write_text(json.dumps({**metrics, "split": "train"}))
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    refused = call(*command)
    assert refused.exit_code == 1
    assert "holds another bundle" in refused.stderr
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


def test_the_shipped_card_shows_the_figures_of_the_shipped_manifest(repository: Path) -> None:
    manifest = read_manifest(builtin("compact"))
    template = (repository / "config/training/compact-card.md").read_text(encoding="utf-8")
    shipped = (builtin("compact") / CARD).read_text(encoding="utf-8")
    text = fill(template, manifest.metrics, manifest.sha256)
    assert shipped == with_gates(text, manifest.calibration)
