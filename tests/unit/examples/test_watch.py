"""What the main job makes of the ledger's rows."""

from __future__ import annotations

from typing import Any

import pytest

from examples.main_job.watch import STEPS, outcome

UID = "1.2.3"


def _job(state: str, *deliveries: str, reason: str | None = None) -> dict[str, Any]:
    rows = [{"destination": "archive", "state": each, "sent": 0, "total": 2} for each in deliveries]
    return {
        "id": 1,
        "series_instance_uid": UID,
        "state": state,
        "reason": reason,
        "deliveries": rows,
    }


@pytest.mark.parametrize(
    ("job", "step", "ended", "arrived"),
    [
        (_job("queued"), "queued", False, False),
        (_job("running"), "running", False, False),
        (_job("done", "queued"), "delivering", False, False),
        (_job("done", "sending"), "delivering", False, False),
        (_job("done", "waiting"), "delivering", False, False),
        (_job("done", "delivered"), "acknowledged", True, True),
        (_job("done", "committed"), "acknowledged", True, True),
        (_job("done", "delivered", "waiting"), "delivering", False, False),
        (_job("done", "dead"), "delivering", True, False),
    ],
    ids=lambda value: value["state"] if isinstance(value, dict) else None,
)
def test_a_series_has_arrived_only_when_every_delivery_has(
    job: dict[str, Any], step: str, ended: bool, arrived: bool
) -> None:
    found = outcome(UID, None, [job])
    assert (STEPS[found.step], found.ended, found.arrived) == (step, ended, arrived)


def test_a_refused_job_ends_the_wait_with_its_reason() -> None:
    found = outcome(UID, None, [_job("refused", reason="a coronal CT")])
    assert found.ended
    assert not found.arrived
    assert found.state == "a coronal CT"


def test_a_series_with_two_volumes_waits_for_both_jobs() -> None:
    found = outcome(UID, None, [_job("done", "delivered"), _job("running")])
    assert not found.ended
    assert STEPS[found.step] == "running"


def test_an_ignored_series_ends_with_the_reason() -> None:
    row = {"series_instance_uid": UID, "state": "ignored", "reason": "no route matches"}
    found = outcome(UID, row, [])
    assert found.ended
    assert found.state == "ignored: no route matches"


def test_a_dead_delivery_counts_as_undelivered() -> None:
    assert outcome(UID, None, [_job("done", "dead")]).undelivered
    assert not outcome(UID, None, [_job("done", "delivered")]).undelivered


def test_jobs_of_other_series_do_not_count() -> None:
    found = outcome("9.9", None, [_job("done", "delivered")])
    assert not found.ended
    assert STEPS[found.step] == "receiving"
