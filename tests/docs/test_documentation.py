"""The documentation says what the program does: pages, versions, links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import dicom_node


@pytest.fixture(scope="module")
def reference(repository: Path) -> ModuleType:
    """docs/reference.py as a module."""
    spec = importlib.util.spec_from_file_location("reference", repository / "docs/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    [
        "docs/cli.md",
        "docs/configuration.md",
        "config/node.toml",
        "docs/conformance-statement.md",
        "docs/states.md",
    ],
)
def test_a_made_page_is_what_the_program_would_make(
    reference: ModuleType, repository: Path, page: str
) -> None:
    path = repository / page
    assert path.read_text(encoding="utf-8") == reference.pages()[path], "run `make reference`"


def test_every_command_has_a_heading(reference: ModuleType, repository: Path) -> None:
    text = (repository / "docs/cli.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"(?m)^#+ (.+)$", text))
    assert {name for name, _ in reference.commands()} <= headings


def test_every_promised_command_exists(reference: ModuleType) -> None:
    promised = """
        dicom-node init, dicom-node serve, dicom-node check-config, dicom-node doctor,
        dicom-node echo, dicom-node send, dicom-node conformance, dicom-node restore,
        dicom-node route explain,
        dicom-node jobs list, dicom-node jobs show, dicom-node jobs retry, dicom-node jobs hold,
        dicom-node jobs release, dicom-node jobs cancel, dicom-node series list,
        dicom-node series show, dicom-node series force, dicom-node deliveries list,
        dicom-node deliveries show, dicom-node deliveries retry, dicom-node watch,
        dicom-node instances list, dicom-node instances show, dicom-node stats,
        dicom-node recall, dicom-node purge, dicom-node completion,
        diffcode prepare, diffcode train codebook, diffcode train diffusion,
        diffcode train restoration, diffcode codebook build, diffcode codebook inspect,
        diffcode evaluate, diffcode bundle, diffcode restore
    """
    wanted = {" ".join(name.split()) for name in promised.split(",")}
    assert wanted <= {name for name, _ in reference.commands()}


def test_every_command_says_what_it_does(reference: ModuleType) -> None:
    assert [name for name, command in reference.commands() if not command.help] == []


def test_the_changelog_begins_with_this_version(repository: Path) -> None:
    text = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"(?m)^## \[(\S+)\]", text)
    assert versions[0] == dicom_node.__version__


def _pages(repository: Path) -> list[Path]:
    return [*repository.glob("*.md"), *repository.glob("docs/**/*.md")]


def test_every_link_between_pages_leads_somewhere(repository: Path) -> None:
    broken = [
        f"{page.name}: {target}"
        for page in _pages(repository)
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_make_target_that_is_named_exists(repository: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (repository / "Makefile").read_text()))
    named = {
        target
        for page in _pages(repository)
        for target in re.findall(r"(?m)(?:`|^    )make ([a-z-]+)", page.read_text(encoding="utf-8"))
    }
    assert named <= targets


def test_every_path_that_is_named_exists(repository: Path) -> None:
    pattern = r"`((?:dicom_node|restoration|training|tests|config|systemd|examples|docs)/[\w./-]*)`"
    missing = [
        f"{page.name}: {path}"
        for page in _pages(repository)
        for path in re.findall(pattern, page.read_text(encoding="utf-8"))
        if not (repository / path).exists()
    ]
    assert missing == []
