"""What a person decides: release, reject, reset, and what the doctor says until then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from dicom_node.cli import doctor
from dicom_node.cli.main import cli
from dicom_node.ledger import reports
from dicom_node.readings import Level
from tests.conftest import ManualClock
from tests.factories import make_series
from tests.unit.dicom_node.bench import Bench, Gain, bench, reading

FAILED = Gain(readings=(reading("structure", Level.FAIL, 9.0),))


@pytest.fixture
def node(tmp_path: Path, bench_ledger: Engine, clock: ManualClock) -> Bench:
    """A bench whose ledger a node.toml names, with one job that a gate holds."""
    (tmp_path / "node.toml").write_text(
        '[destinations.pacs]\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 104\n'
    )
    made = bench(tmp_path, bench_ledger, clock)
    made.receive(make_series("CT", slices=2, rows=16))
    made.tick()
    made.worker(FAILED).run_once(clock())
    return made


def run(node: Bench, *arguments: object) -> Result:
    words = [*map(str, arguments), "-c", str(node.folder / "node.toml")]
    return CliRunner().invoke(cli, words, prog_name="dicom-node")


def shown(node: Bench) -> Any:
    return json.loads(run(node, "jobs", "show", 1, "--json").stdout)


def test_jobs_show_says_why_a_job_is_held_and_where_its_report_lies(node: Bench) -> None:
    job = shown(node)
    assert job["state"] == "held"
    assert job["reason"] == "gate structure failed: is 9 (allowed at most 2)"
    assert {each["gate"] for each in job["gates"]} == {"structure"}
    for name in ("report.html", "montage.png"):
        assert node.spool.resolve(f"{job['review']}/{name}").is_file()
    told = run(node, "jobs", "show", 1).stdout
    assert "gate structure failed" in told
    assert "review/1" in told


def test_jobs_show_has_a_line_for_each_gate_with_its_worst_slice_and_its_limits(
    node: Bench,
) -> None:
    lines = [line.split() for line in run(node, "jobs", "show", 1).stdout.splitlines()]
    (heading,) = [line for line in lines if line[:2] == ["gate", "level"]]
    (told,) = [line for line in lines if line[:1] == ["structure"]]
    assert " ".join(heading) == "gate level worst slice warns unless fails unless reason"
    assert told[:2] == ["structure", "fail"]
    (measured,) = shown(node)["gates"]
    limits = " ".join(told)
    assert f" {max(measured['values']):.4g} " in limits
    assert f"at most {measured['warn'][1]:.4g} at most {measured['fail'][1]:.4g}" in limits


@pytest.mark.parametrize("action", ["release", "reject"])
@pytest.mark.parametrize("given", [["--operator", "Ann"], ["--reason", "seen"], []])
def test_a_decision_needs_a_name_and_a_reason(node: Bench, action: str, given: list[str]) -> None:
    done = run(node, "jobs", action, 1, *given)
    assert done.exit_code == 2
    assert "Missing option" in done.stderr
    assert shown(node)["state"] == "held"


@pytest.mark.parametrize("action", ["release", "reject"])
@pytest.mark.parametrize(("operator", "reason"), [(" ", "seen"), ("Ann", ""), ("", "seen")])
def test_a_decision_is_not_signed_by_blanks(
    node: Bench, action: str, operator: str, reason: str
) -> None:
    done = run(node, "jobs", action, 1, "--operator", operator, "--reason", reason)
    assert done.exit_code == 2
    assert "it is empty" in done.stderr
    assert shown(node)["state"] == "held"


@pytest.mark.parametrize(
    ("action", "state", "sent"), [("release", "done", ["pacs"]), ("reject", "rejected", [])]
)
def test_a_decision_is_done_once_and_kept(
    node: Bench, action: str, state: str, sent: list[str]
) -> None:
    words = ["jobs", action, 1, "--operator", "Ann", "--reason", "seen with Bob"]
    done = run(node, *words)
    assert (done.exit_code, done.stdout) == (0, f"job 1: held → {action.rstrip('e')}ed\n")
    job = shown(node)
    assert job["state"] == state
    assert [each["destination"] for each in job["deliveries"]] == sent
    (verdict,) = job["verdicts"]
    assert (verdict["operator"], verdict["decision_reason"]) == ("Ann", "seen with Bob")
    assert run(node, *words).exit_code == 1


def test_an_open_breaker_is_a_problem_until_it_is_reset(node: Bench) -> None:
    for number in range(2):
        node.receive(make_series("CT", slices=2, rows=16, study=f"study {number}"))
        node.tick()
        node.worker(FAILED).run_once(node.clock())
    assert reports.stats(node.ledger)["breakers"] == {"CT": "open"}
    (found,) = doctor.examine_breakers(node.ledger, window=50)
    assert (found.state, found.check) == ("problem", "breaker CT")
    assert "3 of the last 3" in found.detail
    assert "breakers reset CT" in found.advice
    (row,) = json.loads(run(node, "breakers", "list", "--json").stdout)
    assert (row["modality"], row["state"], row["failed"], row["judged"]) == ("CT", "open", 3, 3)
    reset = ["breakers", "reset", "CT", "--operator", "Ann", "--reason", "new kernel, calibrated"]
    assert run(node, *reset).exit_code == 0
    assert run(node, *reset).exit_code == 1
    (found,) = doctor.examine_breakers(node.ledger, window=50)
    assert found.state == "good"


def test_what_an_open_breaker_holds_has_a_report_that_says_so(
    tmp_path: Path, bench_ledger: Engine, clock: ManualClock
) -> None:
    made = bench(
        tmp_path,
        bench_ledger,
        clock,
        gates={"on_fail": "pass"},
        breaker={"highest": 0.01, "significance": 0.05},
        review={"write": "held"},
    )
    made.receive(make_series("CT", slices=2, rows=16))
    made.tick()
    made.worker(FAILED).run_once(clock())
    job = made.job()
    assert job["state"] == "held"
    page = made.spool.resolve(f"{job['review']}/report.html").read_text("utf-8")
    assert "<h1>Held for review</h1>" in page
    assert "circuit breaker CT opened: 1 of the last 1 jobs failed a gate" in page
    assert f"jobs release {job['id']}" in page
