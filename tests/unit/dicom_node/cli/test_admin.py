"""Listings, stories and actions on a ledger with jobs in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from dicom_node.cli.main import cli
from dicom_node.errors import PermanentError
from dicom_node.ledger import intake, queue, reports
from tests.conftest import ManualClock
from tests.factories import make_series
from tests.unit.dicom_node.bench import Bench, Gain, bench


@pytest.fixture
def node(tmp_path: Path, bench_ledger: Engine, clock: ManualClock) -> Bench:
    """A bench whose ledger a node.toml names: one queued CT job, one ignored MR series."""
    (tmp_path / "node.toml").write_text(
        '[destinations.pacs]\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 104\n'
    )
    made = bench(tmp_path, bench_ledger, clock)
    made.receive(make_series("CT", slices=3, rows=16))
    made.receive(make_series("MR", slices=2, rows=16, ImageType=["ORIGINAL", "PRIMARY", "P"]))
    made.tick()
    return made


def run(node: Bench, *arguments: object) -> Result:
    words = [*map(str, arguments), "-c", str(node.folder / "node.toml")]
    return CliRunner().invoke(cli, words, prog_name="dicom-node")


def listed(node: Bench, *arguments: object) -> Any:
    done = run(node, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def restore(node: Bench, engine: Gain | None = None) -> None:
    assert node.worker(engine or Gain()).run_once(node.clock())


def failing(number: int) -> None:
    raise PermanentError("not finite")


def test_what_was_set_aside_without_a_uid_is_found_by_its_file(node: Bench) -> None:
    path = f"quarantine/{'ab' * 32}.dcm"
    intake.reject_instance(
        node.ledger,
        sop_instance_uid=None,
        path=path,
        reason="no header",
        association_id=None,
        now=node.clock(),
    )
    words = "".join(run(node, "instances", "list", "--state", "rejected").stdout.split())
    assert "noheader;see" in words
    assert path[:30] in words
    (row,) = listed(node, "instances", "list", "--state", "rejected")
    assert (row["reason"], row["path"]) == ("no header", path)


def test_a_job_as_json_has_what_was_promised(node: Bench) -> None:
    restore(node)
    (job,) = listed(node, "jobs", "list")
    promised = {
        *("id", "state", "task", "reason", "study_instance_uid", "series_instance_uid"),
        *("derived_series_instance_uid", "instances", "model_sha256", "created", "finished"),
        *("seconds", "deliveries"),
    }
    assert promised <= set(job)
    assert set(job["seconds"]) == {"load", "restore", "derive"}
    assert {"destination", "state", "sent", "total"} <= set(job["deliveries"][0])


def test_listings_filter_by_state_and_time(node: Bench) -> None:
    assert [s["modality"] for s in listed(node, "series", "list", "--state", "ignored")] == ["MR"]
    assert [s["modality"] for s in listed(node, "series", "list", "--state", "complete")] == ["CT"]
    assert listed(node, "jobs", "list", "--state", "done") == []
    assert listed(node, "jobs", "list", "--since", "1h") == []  # the bench lives in 2023
    assert len(listed(node, "jobs", "list", "--since", "2023-11-01")) == 1


@pytest.mark.parametrize("state", ["queued", "running", "done"])
def test_tables_and_stories_can_be_read_in_every_state(node: Bench, state: str) -> None:
    if state == "running":
        assert queue.claim(node.ledger, "w", lease_s=60, now=node.clock())
    if state == "done":
        restore(node)
    uid = node.jobs()[0]["series_instance_uid"]
    for words in (
        ["jobs", "list"],
        ["jobs", "show", "1"],
        ["series", "list"],
        ["series", "show", uid],
        ["watch", "--once"],
    ):
        done = run(node, *words)
        assert done.exit_code == 0, (words, done.stderr, done.exception)
        assert "ct_denoise" in done.stdout or words[:2] == ["series", "list"]


def test_a_delivery_can_be_listed_shown_and_not_retried_while_queued(node: Bench) -> None:
    restore(node)
    (delivery,) = listed(node, "deliveries", "list")
    assert (delivery["state"], delivery["sent"], delivery["total"]) == ("queued", 0, 3)
    assert len(listed(node, "deliveries", "show", delivery["id"])["items"]) == 3
    assert run(node, "deliveries", "list").exit_code == 0
    assert run(node, "deliveries", "show", delivery["id"]).exit_code == 0


def test_an_operator_holds_releases_and_cancels(node: Bench) -> None:
    for action, state in [("hold", "held"), ("release", "queued"), ("cancel", "cancelled")]:
        who = ["--operator", "Ann"] if action == "release" else []
        done = run(node, "jobs", action, 1, "--reason", f"to {action}", *who)
        assert done.exit_code == 0, done.stderr
        assert reports.job(node.ledger, 1)["state"] == state
    history = listed(node, "jobs", "show", 1)["history"]
    assert [event["reason"] for event in history][-3:] == [
        "to hold",
        "released by Ann: to release",
        "to cancel",
    ]


def test_a_failed_job_is_retried(node: Bench) -> None:
    restore(node, Gain(before=failing))
    done = run(node, "jobs", "retry", 1)
    assert (done.exit_code, done.stdout) == (0, "job 1: failed → queued\n")
    restore(node)
    assert reports.job(node.ledger, 1)["state"] == "done"


def test_an_action_that_does_not_apply_is_refused_with_the_state(node: Bench) -> None:
    restore(node)
    done = run(node, "jobs", "release", 1, 99, "--operator", "Ann", "--reason", "seen")
    assert done.exit_code == 1
    assert "job 1 is done; release does not apply" in done.stderr
    assert "there is no job 99" in done.stderr


def test_an_ignored_series_is_forced(node: Bench) -> None:
    (ignored,) = listed(node, "series", "list", "--state", "ignored")
    done = run(node, "series", "force", ignored["series_instance_uid"])
    assert done.exit_code == 0
    assert listed(node, "series", "list", "--state", "receiving") != []


def test_listings_take_several_states_and_an_end(node: Bench) -> None:
    both = ["--state", "ignored", "--state", "complete"]
    assert {s["modality"] for s in listed(node, "series", "list", *both)} == {"CT", "MR"}
    assert listed(node, "series", "list", "--until", "2023-11-01") == []
    assert len(listed(node, "series", "list", "--until", "2023-12-01")) == 2
    assert len(listed(node, "series", "list", "--limit", 1)) == 1
    assert [s["modality"] for s in listed(node, "series", "list", "--modality", "MR")] == ["MR"]
    assert listed(node, "series", "list", "--calling-ae", "NOBODY") == []


def test_jobs_and_deliveries_are_found_by_what_they_belong_to(node: Bench) -> None:
    restore(node)
    (job,) = listed(node, "jobs", "list", "--model", "ab" * 32, "--destination", "pacs")
    assert listed(node, "jobs", "list", "--series", job["series_instance_uid"]) == [job]
    assert listed(node, "jobs", "list", "--model", "cd" * 32) == []
    assert listed(node, "jobs", "list", "--destination", "elsewhere") == []
    assert len(listed(node, "deliveries", "list", "--job", job["id"])) == 1
    assert listed(node, "deliveries", "list", "--job", 99) == []


def test_a_state_that_is_none_is_wrong_usage(node: Bench) -> None:
    done = run(node, "jobs", "list", "--state", "gone")
    assert done.exit_code == 2
    assert "'queued', 'running'" in done.stderr


def test_an_instance_tells_its_story_by_either_uid(node: Bench) -> None:
    restore(node)
    source = listed(node, "instances", "list", "--state", "received")[-1]["sop_instance_uid"]
    story = listed(node, "instances", "show", source)
    (made,) = story["outputs"]
    again = listed(node, "instances", "show", made["sop_instance_uid"])
    assert again["source_sop_instance_uid"] == source
    assert again["story"] == story["story"]
    assert [(each["what"], each["happened"]) for each in story["story"]] == [
        ("instance", "received"),
        ("series", "receiving"),
        ("series", "complete"),
        ("job 1", "queued"),
        ("job 1", "running"),
        ("job 1", "done"),
        ("delivery 1 to pacs", "queued"),
    ]
    assert story == listed(node, "jobs", "show", 1, "--instance", source)
    assert run(node, "instances", "show", source).exit_code == 0
    assert run(node, "instances", "list").exit_code == 0


def test_an_instance_that_a_job_does_not_have_is_refused(node: Bench) -> None:
    done = run(node, "jobs", "show", 1, "--instance", "1.2.3")
    assert (done.exit_code, done.stderr) == (1, "Error: job 1 has no instance 1.2.3\n")
    assert run(node, "instances", "show", "1.2.3").exit_code == 1


def test_stats_are_an_object_and_lines(node: Bench) -> None:
    found = listed(node, "stats")
    assert found["instances"] == {
        "received": 5, "duplicate": 0, "conflict": 0, "ignored": 0, "rejected": 0,
    }  # fmt: skip
    assert found["kept_bytes"] > 0
    lines = run(node, "stats").stdout
    assert re.search(r"(?m)^jobs +queued 1$", lines)
    assert "duplicate" not in lines
