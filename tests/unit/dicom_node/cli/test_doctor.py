"""``dicom-node doctor``: what it finds, and what it says to do about it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dicom_node import audit
from dicom_node.audit import RemoteNode, Study
from dicom_node.audit_trail import AuditTrail
from dicom_node.cli import doctor
from dicom_node.cli.doctor import Diagnosis
from dicom_node.disk import Disk, Marks, Space
from dicom_node.ledger import queue
from dicom_node.ledger.tables import Entity, record_event, writing
from dicom_node.settings import NodeSettings
from tests.factories import make_series
from tests.unit.dicom_node.bench import Bench
from tests.unit.dicom_node.certificates import Authority


def settings(folder: Path, **sections: Any) -> NodeSettings:
    return NodeSettings.model_validate({"audit": {"journal": folder / "audit.log"}, **sections})


def tls(authority: Authority, stem: str = "node", days: int = 300) -> dict[str, Any]:
    files = authority.issue(stem, "node.example", days=days)
    return {"port": 2762, "certificate": files.certificate, "key": files.key, "ca": files.ca}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "tls")


def states(found: list[Diagnosis]) -> list[str]:
    return [each.state for each in found]


@pytest.mark.parametrize(
    ("days", "state", "words"),
    [(300, "good", "is valid until"), (10, "warning", "valid until"), (-1, "problem", "expired")],
)
def test_a_certificate_is_told_by_its_end_of_validity(
    days: int, state: str, words: str, authority: Authority, tmp_path: Path
) -> None:
    (found,) = doctor._tls(settings(tmp_path, tls=tls(authority, days=days)))
    assert found.state == state
    assert words in found.detail
    assert ("new certificate" in found.advice) is (state != "good")


def test_a_key_that_others_may_read_is_a_warning(authority: Authority, tmp_path: Path) -> None:
    given = tls(authority)
    given["key"].chmod(0o640)
    found = list(doctor._tls(settings(tmp_path, tls=given)))
    assert states(found) == ["warning", "good"]
    assert found[0].advice.startswith("chmod 600")


def test_a_file_that_cannot_be_used_is_a_problem(authority: Authority, tmp_path: Path) -> None:
    given = tls(authority)
    given["ca"].write_text("nothing")
    (found,) = doctor._tls(settings(tmp_path, tls=given))
    assert found.state == "problem"
    assert "no certificates in PEM" in found.detail


def test_without_tls_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert list(doctor._tls(settings(tmp_path))) == []


@pytest.mark.parametrize(
    ("sections", "state", "words"),
    [
        ({}, "good", "everyone on this machine"),
        ({"node": {"host": "0.0.0.0"}}, "warning", "everyone who reaches the port"),
        ({"association": {"allow": [{"calling_ae": "CT1"}]}}, "good", "1 rules"),
    ],
)
def test_an_open_door_is_pointed_out(
    sections: dict[str, Any], state: str, words: str, tmp_path: Path
) -> None:
    (found,) = doctor._access(settings(tmp_path, **sections))
    assert found.state == state
    assert words in found.detail


@pytest.mark.parametrize(("on_fail", "state"), [("hold", "good"), ("pass", "warning")])
def test_a_policy_that_says_nothing_of_a_failed_gate_is_pointed_out(
    on_fail: str, state: str, tmp_path: Path
) -> None:
    (found,) = doctor._gates(settings(tmp_path, gates={"on_fail": on_fail}))
    assert found.state == state
    assert ("on_fail" in found.detail) == (on_fail == "pass")


def test_the_last_refusals_are_told_without_any_patient(tmp_path: Path) -> None:
    given = settings(tmp_path)
    assert list(doctor._refused(given)) == []
    trail = AuditTrail(given)
    stranger = RemoteNode("STRANGER", "10.9.9.9")
    study = Study("1.2.3", "PID-1", "Doe^Jane", {"1.2": 1})
    trail.write(
        *(
            audit.node_refused("D", stranger, f"why {number}", 0.0, authentication=True)
            for number in range(7)
        ),
        audit.instances_received("D", stranger, study, 1.0),
    )
    trail.close()
    found = list(doctor._refused(given))
    assert [each.detail for each in found] == [
        f"1970-01-01T00:00:00Z STRANGER at 10.9.9.9: why {number}" for number in (6, 5, 4, 3, 2)
    ]
    assert states(found) == ["warning"] * 5
    assert "Doe" not in repr(found)


def stores(folder: Path, **sections: Any) -> NodeSettings:
    """Settings of a node whose ledger and spool are in *folder*."""
    return settings(
        folder,
        ledger={"url": f"sqlite:///{folder / 'ledger.sqlite'}"},
        spool={"path": folder, "min_free_bytes": 0, "min_free_percent": 0},
        **sections,
    )


def test_a_settings_file_that_others_may_change_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("")
    file.chmod(0o644)
    assert doctor._settings_file(file).state == "good"
    file.chmod(0o664)
    found = doctor._settings_file(file)
    assert (found.state, found.advice) == ("problem", f"chmod go-w {file}")


def test_a_ledger_that_every_account_reaches_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = stores(tmp_path)
    ledger = tmp_path / "ledger.sqlite"
    ledger.write_bytes(b"")
    ledger.chmod(0o600)
    assert states(list(doctor._permissions(given))) == ["good"]
    monkeypatch.setattr(doctor, "_is_open", lambda file: bool(file.stat().st_mode & 0o004))
    ledger.chmod(0o644)
    (found,) = doctor._permissions(given)
    assert (found.state, found.advice) == ("warning", f"chmod o= {ledger}")


def test_a_ledger_that_does_not_open_is_told_once(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('[ledger]\nurl = "sqlite:///not-a-database"\n')
    (tmp_path / "not-a-database").write_bytes(b"plain text, and more than a page of it" * 500)
    told = [each for each in doctor.examine(config) if "ledger: " in each.detail]
    assert [(each.check, each.state) for each in told] == [("ledger", "problem")]
    assert "may write to it" in told[0].advice


def test_a_file_is_closed_by_a_folder_above_it(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    file = closed / "audit.log"
    file.write_text("")
    file.chmod(0o644)
    assert not doctor._is_open(file)
    file.chmod(0o600)
    assert not doctor._is_open(file)


def test_the_disk_is_told_by_both_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((99, "problem"), (110, "warning"), (200, "good")):
        space = Space(free, Marks(100, 125))
        monkeypatch.setattr(Disk, "space", lambda self, found=space: found)
        (found,) = doctor._disk(stores(tmp_path))
        assert found.state == state
        assert bool(found.advice) is (state != "good")


def test_a_clock_that_went_back_is_a_problem(
    tmp_path: Path, bench_ledger: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = stores(tmp_path)
    monkeypatch.setattr(doctor, "_is_synchronised", lambda: True)
    assert states(list(doctor._clock(given))) == ["good"]
    with writing(bench_ledger) as connection:
        ahead = time.time() + 600
        record_event(connection, Entity.SERIES, "1.2", None, "receiving", None, ahead)
    (found,) = doctor._clock(given)
    assert found.state == "problem"
    assert "the clock went back" in found.detail
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert states(list(doctor._clock(given))) == ["good"]


def test_a_clock_that_nobody_keeps_is_a_warning(
    tmp_path: Path, bench_ledger: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_is_synchronised", lambda: False)
    (found,) = doctor._clock(stores(tmp_path))
    assert (found.state, "chrony" in found.advice) == ("warning", True)


def test_what_waits_for_a_person_is_told_with_the_command(
    node: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = stores(tmp_path)
    assert states(list(doctor._backlog(given))) == ["good"]
    node.receive(make_series("CT", slices=2, rows=16))
    node.tick()
    # The bench lives in 2023, so its job has waited for years.
    (found,) = doctor._backlog(given)
    assert (found.state, found.advice) == ("problem", "see that the restore role runs")
    queue.hold(node.ledger, 1, reason="look", now=node.clock())
    (found,) = doctor._backlog(given)
    assert found.state == "warning"
    assert "1 jobs are held" in found.detail
    assert "--state held" in found.advice
