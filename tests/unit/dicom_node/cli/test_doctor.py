"""``dicom-node doctor`` on TLS, on who may associate, and on who was turned away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dicom_node import audit
from dicom_node.audit import RemoteNode, Study
from dicom_node.audit_trail import AuditTrail
from dicom_node.cli import doctor
from dicom_node.cli.doctor import Diagnosis
from dicom_node.settings import NodeSettings
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
