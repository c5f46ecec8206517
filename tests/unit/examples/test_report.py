"""What the main job says of a series that has nothing in the archive."""

from __future__ import annotations

from pathlib import Path

from examples.main_job import report


def test_a_held_job_is_told_with_its_reason_its_report_and_the_way_to_send_it(
    tmp_path: Path,
) -> None:
    job = {"id": 3, "task": "ct_denoise", "state": "held", "reason": "gate units failed"}
    assert report.unrestored("CT series 2", "held", job)[-2:] == ("held", "3")
    words = report.why("CT series 2", job, tmp_path)
    assert words.startswith("CT series 2, job 3, is held: gate units failed. ")
    assert "--gates warn" in words
    assert "report.html" not in words
    page = tmp_path / "spool" / "review" / "3" / "report.html"
    page.parent.mkdir(parents=True)
    page.touch()
    assert report.why("CT series 2", job, tmp_path).endswith(f"Input beside result: {page}")


def test_a_refused_job_is_told_without_a_way_to_send_it(tmp_path: Path) -> None:
    job = {"id": 3, "task": "ct_denoise", "state": "refused", "reason": None}
    assert report.why("CT", job, tmp_path) == "CT, job 3, is refused: no reason is known"
