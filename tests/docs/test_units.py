"""The units under systemd/ are well formed, hardened, and each line of hardening has a reason."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = "/opt/dicom-node/bin/dicom-node"
ROLES = ("receive", "restore", "deliver")


@pytest.fixture
def units(tmp_path: Path, repository: Path) -> Path:
    """The units with a program that exists on this machine in place of the installed one."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("missing peer: systemd-analyze")
    for unit in [*repository.glob("systemd/*.service"), *repository.glob("systemd/*.target")]:
        text = unit.read_text(encoding="utf-8").replace(PROGRAM, "/bin/true")
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
    return tmp_path


def _analyze(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_systemd_finds_no_fault_in_any_unit(units: Path) -> None:
    names = sorted(path.name for path in units.iterdir())
    done = _analyze("verify", "--man=no", *names, folder=units)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "dicom-node" in line]


@pytest.mark.parametrize("role", ROLES)
def test_each_role_is_exposed_as_little_as_promised(units: Path, role: str) -> None:
    unit = f"dicom-node-{role}.service"
    done = _analyze("security", "--offline=true", "--threshold=20", unit, folder=units)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("role", ROLES)
def test_each_role_has_its_unit(repository: Path, role: str) -> None:
    text = (repository / f"systemd/dicom-node-{role}.service").read_text(encoding="utf-8")
    assert f"ExecStart={PROGRAM} serve -c /etc/dicom-node/node.toml --role {role}\n" in text


def test_the_target_starts_exactly_the_roles(repository: Path) -> None:
    text = (repository / "systemd/dicom-node.target").read_text(encoding="utf-8")
    wanted = re.findall(r"dicom-node-(\w+)\.service", text)
    assert sorted(wanted) == sorted(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_hardening_lines_stand_under_a_reason(repository: Path, role: str) -> None:
    text = (repository / f"systemd/dicom-node-{role}.service").read_text(encoding="utf-8")
    hardening = text.partition("# --- what the process")[2].partition("[Install]")[0]
    directives = [
        len([line for line in block.splitlines() if line and not line.startswith("#")])
        for block in re.split(r"\n(?=#)", hardening)[1:]
    ]
    assert sum(directives) >= 25
    assert max(directives) <= 6


def test_accounts_and_folders_parse(repository: Path, tmp_path: Path) -> None:
    programs = {"sysusers": "systemd-sysusers", "tmpfiles": "systemd-tmpfiles"}
    if not all(shutil.which(program) for program in programs.values()):
        pytest.skip("missing peer: systemd-sysusers, systemd-tmpfiles")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    for kind, program in programs.items():
        source = repository / f"systemd/dicom-node.{kind}"
        arguments = [program, f"--root={root}", str(source)]
        if kind == "tmpfiles":
            arguments.insert(1, "--create")
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
    assert "dicom-node" in (root / "etc/passwd").read_text(encoding="utf-8")
    assert (root / "var/lib/dicom-node").stat().st_mode & 0o777 == 0o700
