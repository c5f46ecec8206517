"""``dicom-node recall`` and ``dicom-node purge`` on a bench with a job in its ledger."""

from __future__ import annotations

import json
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pydicom import dcmread
from pydicom.dataset import Dataset
from sqlalchemy import Engine

from dicom_node.cli.main import cli
from dicom_node.dicom.rejection import KEY_OBJECT_SELECTION
from dicom_node.ledger import answers, commitments, queue, reports, retention
from dicom_node.ledger.retention import Ages
from dicom_node.ledger.tables import DeliveryState
from tests.conftest import ManualClock
from tests.factories import make_series
from tests.unit.dicom_node.bench import Bench, Gain, bench

MODEL = "ab" * 32


@pytest.fixture
def node(tmp_path: Path, bench_ledger: Engine, clock: ManualClock) -> Bench:
    """A restored series of three slices, with a delivery that waits."""
    (tmp_path / "node.toml").write_text(
        "[retention]\ndelivered_s = 3600\n"
        '[destinations.pacs]\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 104\n'
    )
    made = bench(tmp_path, bench_ledger, clock)
    made.receive(make_series("CT", slices=3, rows=16))
    made.tick()
    assert made.worker(Gain()).run_once(made.clock())
    return made


def run(node: Bench, *arguments: object) -> Result:
    words = [*map(str, arguments), "-c", str(node.folder / "node.toml")]
    return CliRunner().invoke(cli, words, prog_name="dicom-node")


def asked(node: Bench, *arguments: object) -> Any:
    done = run(node, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def deliver(node: Bench, count: int = 99) -> None:
    """Send the next delivery, its first *count* instances; the rest waits."""
    now = node.clock.advance(3600)
    delivery = queue.claim_delivery(node.ledger, "w", lease_s=60, now=now)
    assert delivery is not None
    for item in delivery.items[:count]:
        answers.record_sent(node.ledger, delivery.id, (item.sop_instance_uid, 0, "delivered"), now)
    state = DeliveryState.DELIVERED if count >= len(delivery.items) else DeliveryState.WAITING
    queue.conclude_delivery(
        node.ledger, delivery.id, "w", state=state, reason=None, next_attempt=None, now=now
    )


def delivery(node: Bench) -> dict[str, Any]:
    return reports.delivery(node.ledger, 1)


def note(node: Bench, rejection: dict[str, Any]) -> Dataset:
    return dcmread(BytesIO(node.spool.resolve(rejection["note_path"]).read_bytes()))


def test_every_instance_of_a_model_is_listed_with_where_it_is(node: Bench) -> None:
    assert {tuple(each["destinations"]) for each in asked(node, "recall", "--model", MODEL)} == {()}
    deliver(node)
    found = asked(node, "recall", "--model", MODEL[:12])
    outputs = reports.job(node.ledger, 1)["outputs"]
    assert {each["sop_instance_uid"] for each in found} == {o["sop_instance_uid"] for o in outputs}
    assert {tuple(each["destinations"]) for each in found} == {("pacs",)}
    told = run(node, "recall", "--model", MODEL).stdout
    assert told.startswith("3 instances of 1 jobs")
    series = reports.job(node.ledger, 1)["derived_series_instance_uid"]
    assert "".join(told.split()).count(series[:20]) == 1, "a line for the series"


@pytest.mark.parametrize(
    ("model", "words"), [("cd" * 32, "knows no result"), ("abab", "8 to 64 hexadecimal digits")]
)
def test_a_model_that_made_nothing_is_refused_with_the_reason(
    node: Bench, model: str, words: str
) -> None:
    done = run(node, "recall", "--model", model)
    assert done.exit_code == 1
    assert words in done.stderr


def test_a_rejection_asks_before_it_acts(node: Bench) -> None:
    done = run(node, "recall", "--model", MODEL, "--reject")
    assert done.exit_code == 1
    assert "Reject 3 instances of 1 jobs" in done.stderr
    assert delivery(node)["state"] == "queued"


def test_what_was_delivered_is_followed_by_a_note_through_the_outbox(node: Bench) -> None:
    deliver(node)
    words = ["--reject", "--yes", "--reason", "halo at edges"]
    (rejection,) = asked(node, "recall", "--model", MODEL, *words)
    assert (rejection["instances"], rejection["destinations"]) == (3, ["pacs"])
    waiting = delivery(node)
    assert (waiting["state"], waiting["sent"], waiting["total"]) == ("queued", 3, 4)
    assert waiting["reason"] == "recalled: halo at edges"
    due = queue.claim_delivery(node.ledger, "w", lease_s=60, now=node.clock() + 1e9)
    assert due is not None
    assert [item.sop_instance_uid for item in due.items] == [rejection["note_sop_instance_uid"]]
    made = note(node, rejection)
    assert made.SOPClassUID == KEY_OBJECT_SELECTION
    assert made.Modality == "KO"
    title = made.ConceptNameCodeSequence[0]
    assert (title.CodeValue, title.CodingSchemeDesignator) == ("113001", "DCM")
    evidence = made.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    uids = {item.ReferencedSOPInstanceUID for item in evidence.ReferencedSOPSequence}
    assert uids == {one["sop_instance_uid"] for one in asked(node, "recall", "--model", MODEL)}


def test_what_was_not_sent_yet_is_not_sent_any_more(node: Bench) -> None:
    (rejection,) = asked(node, "recall", "--model", MODEL, "--reject", "--yes")
    assert rejection["destinations"] == []
    assert delivery(node)["state"] == "dead"
    assert queue.claim_delivery(node.ledger, "w", lease_s=60, now=node.clock() + 1e9) is None


def test_of_a_series_that_arrived_in_part_the_rest_stays_here(node: Bench) -> None:
    deliver(node, count=1)
    (rejection,) = asked(node, "recall", "--model", MODEL, "--reject", "--yes")
    assert rejection["destinations"] == ["pacs"]
    states = [item["state"] for item in delivery(node)["items"]]
    assert sorted(states) == ["dead", "dead", "delivered", "pending"]


def test_what_was_rejected_is_not_sent_by_a_retry_either(node: Bench) -> None:
    asked(node, "recall", "--model", MODEL, "--reject", "--yes")
    done = run(node, "deliveries", "retry", 1, "--reason", "the archive is back")
    assert done.exit_code == 1
    assert "dead" in done.stderr
    assert queue.claim_delivery(node.ledger, "w", lease_s=60, now=node.clock() + 1e9) is None


def test_a_retry_after_a_recall_sends_the_note_alone(node: Bench) -> None:
    deliver(node, count=1)
    (rejection,) = asked(node, "recall", "--model", MODEL, "--reject", "--yes")
    now = node.clock() + 1e9
    sending = queue.claim_delivery(node.ledger, "w", lease_s=60, now=now)
    assert sending is not None
    uid = rejection["note_sop_instance_uid"]
    answers.record_sent(node.ledger, sending.id, (uid, 0xC000, "dead"), now)
    queue.conclude_delivery(
        node.ledger,
        sending.id,
        "w",
        state=DeliveryState.DEAD,
        reason="",
        next_attempt=None,
        now=now,
    )
    assert run(node, "deliveries", "retry", 1, "--reason", "it takes notes now").exit_code == 0
    again = queue.claim_delivery(node.ledger, "w", lease_s=60, now=now + 1e9)
    assert again is not None
    assert [item.sop_instance_uid for item in again.items] == [uid]


def test_what_was_rejected_is_not_sent_again_where_a_late_report_misses_it(node: Bench) -> None:
    now = node.clock.advance(3600)
    sending = queue.claim_delivery(node.ledger, "w", lease_s=60, now=now)
    assert sending is not None
    uids = [item.sop_instance_uid for item in sending.items]
    for uid in uids:
        answers.record_sent(node.ledger, sending.id, (uid, 0, "delivered"), now)
    ended: Any = {"state": DeliveryState.DELIVERED, "reason": None, "next_attempt": None}
    queue.conclude_delivery(node.ledger, sending.id, "w", **ended, now=now)
    commitments.request_commitment(
        node.ledger, sending.id, transaction_uid="1.9", now=now, next_ask=now + 60
    )
    (rejection,) = asked(node, "recall", "--model", MODEL, "--reject", "--yes")
    noted = queue.claim_delivery(node.ledger, "w", lease_s=60, now=now + 1e9)
    assert noted is not None
    uid = rejection["note_sop_instance_uid"]
    answers.record_sent(node.ledger, noted.id, (uid, 0, "delivered"), now)
    queue.conclude_delivery(node.ledger, noted.id, "w", **ended, now=now)
    failed = dict.fromkeys(uids, 0x0112)
    commitments.report_commitment(node.ledger, "1.9", committed=[], failed=failed, now=now + 90)
    assert delivery(node)["state"] == "delivered"
    assert queue.claim_delivery(node.ledger, "w", lease_s=60, now=now + 2e9) is None


def test_a_second_rejection_says_so_and_changes_nothing(node: Bench) -> None:
    deliver(node)
    asked(node, "recall", "--model", MODEL, "--reject", "--yes")
    before = delivery(node)
    done = run(node, "recall", "--model", MODEL, "--reject", "--yes")
    assert done.exit_code == 1
    assert "job 1: its note has been made before" in done.stderr
    assert delivery(node) == before
    assert len(asked(node, "recall", "--model", MODEL)) == 3  # the note is no result


def test_of_a_series_whose_files_are_gone_the_archive_has_to_be_told_by_a_person(
    node: Bench,
) -> None:
    deliver(node)
    until = Ages(node.clock(), None, None)
    chosen = retention.removable(node.ledger, until)
    retention.mark(node.ledger, chosen, until, node.clock())
    before = delivery(node)
    assert {each["purged"] for each in asked(node, "recall", "--model", MODEL)} == {True}
    done = run(node, "recall", "--model", MODEL, "--reject", "--yes", "--json")
    assert done.exit_code == 1
    series = reports.job(node.ledger, 1)["derived_series_instance_uid"]
    assert "of 1 of 1 series the files have left the spool" in done.stderr
    assert f"reject series {series} in the archive itself" in done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["series_instance_uid"], row["destinations"]) == (series, [])
    assert delivery(node) == before


def test_a_delivery_that_is_under_way_is_waited_for(node: Bench) -> None:
    now = node.clock()
    assert queue.claim_delivery(node.ledger, "w", lease_s=60, now=now)
    done = run(node, "recall", "--model", MODEL, "--reject", "--yes")
    assert done.exit_code == 1
    assert "delivery 1 is being sent" in done.stderr
    assert delivery(node)["state"] == "sending"
    assert run(node, "recall", "--model", MODEL, "--reject", "--yes").exit_code == 1


def test_purge_says_what_would_go_and_then_removes_it(
    node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {"dry_run": True, "removed": {}, "bytes": 0}
    assert asked(node, "purge", "--dry-run") == nothing
    deliver(node)  # in 2023, so its age is past
    would = asked(node, "purge", "--dry-run")
    assert would["removed"].keys() == {"original", "result"}
    assert would["removed"]["original"]["files"] == would["removed"]["result"]["files"] == 3
    assert asked(node, "purge", "--dry-run") == would
    # Files of this second stay, whatever the ledger of 2023 says of them.
    oldest = min(file.stat().st_ctime for file in node.spool.root.rglob("*.dcm"))
    monkeypatch.setattr(time, "time", lambda: oldest)
    assert asked(node, "purge")["removed"] == {}
    assert reports.stats(node.ledger)["kept_bytes"] == 0


def test_purge_in_words(node: Bench) -> None:
    assert run(node, "purge", "--dry-run").stdout == "nothing may go\n"
    deliver(node)
    lines = run(node, "purge", "--dry-run").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["3", "original"], ["3", "result"]]
    assert all(line.endswith("would go") for line in lines)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script_that_completes(shell: str) -> None:
    done = CliRunner().invoke(cli, ["completion", shell], prog_name="dicom-node")
    assert done.exit_code == 0
    assert f"_DICOM_NODE_COMPLETE={shell}_complete" in done.stdout
    line = {"COMP_WORDS": "dicom-node jobs list --state he", "COMP_CWORD": "4"}
    variables = line | {"_DICOM_NODE_COMPLETE": "bash_complete"}
    completed = CliRunner().invoke(cli, env=variables, prog_name="dicom-node")
    assert completed.stdout.split() == ["plain,held"]
