from __future__ import annotations

import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from dicom_node.errors import ConfigurationError
from dicom_node.settings import (
    AETitle,
    AssemblySettings,
    NodeSettings,
    default_toml,
    load,
    render_toml,
)

AE_TITLE: TypeAdapter[str] = TypeAdapter(AETitle)


@pytest.fixture
def node_toml(tmp_path: Path) -> Path:
    return tmp_path / "node.toml"


def _problems(path: Path, environ: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ or {})
    return caught.value.problems


def test_the_sample_file_is_generated_from_the_settings(repository: Path) -> None:
    assert (repository / "config/node.toml").read_text(encoding="utf-8") == default_toml()


def test_the_sample_file_holds_the_defaults() -> None:
    assert NodeSettings.model_validate(tomllib.loads(default_toml())) == NodeSettings()


def test_the_sample_file_names_every_key() -> None:
    def keys(model: type[BaseModel]) -> set[str]:
        inner = [
            keys(field.annotation)
            for field in model.model_fields.values()
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ]
        return set(model.model_fields).union(*inner)

    lines = default_toml().splitlines()
    present = {line.lstrip("#").partition(" = ")[0] for line in lines if " = " in line}
    titles = [line.strip("#[]") for line in lines if line.strip("#").startswith("[")]
    tables = {part for title in titles for part in title.split(".")}
    assert keys(NodeSettings) <= present | tables


def test_every_key_has_a_line_of_why() -> None:
    lines = default_toml().splitlines()
    for before, line in pairwise(lines):
        if " = " in line and not line.startswith("# "):
            assert before.startswith("# "), line


@pytest.mark.parametrize("other", [{"token"}, {"username", "password"}])
def test_the_commented_keys_of_the_sample_file_are_valid(node_toml: Path, other: set[str]) -> None:
    """All of them at once, but for the two ways to be known to a DICOMweb server."""
    lines = default_toml().splitlines()
    uncommented = "\n".join(
        line if line.startswith("# ") else line.removeprefix("#")
        for line in lines
        if line.startswith("# ") or line.removeprefix("#").partition(" = ")[0] not in other
    )
    node_toml.write_text(uncommented, encoding="utf-8")
    settings = load(node_toml, {})
    assert settings.destinations["pacs"].ae_title == "ORTHANC"
    assert settings.engine.threads == 4


def test_changes_are_rendered_and_read_back(node_toml: Path) -> None:
    pacs = {"ae_title": "PACS", "host": "10.0.0.9", "port": 104}
    changes = {"node": {"ae_title": 'A "B"', "port": 104}, "destinations": {"pacs": pacs}}
    node_toml.write_text(render_toml(changes), encoding="utf-8")
    settings = load(node_toml, {})
    assert (settings.node.ae_title, settings.node.port) == ('A "B"', 104)
    assert settings.destinations["pacs"].model_dump(include=set(pacs)) == pacs


def test_relative_paths_resolve_against_the_folder_of_the_file(node_toml: Path) -> None:
    node_toml.write_text('[node]\ndata_dir = "data"\n[engine]\nbundle = "./mine"\n')
    settings = load(node_toml, {})
    here = node_toml.parent
    assert settings.routes == here / "routes.toml"
    assert settings.spool.path == here / "data/spool"
    assert settings.ledger.url == f"sqlite:///{here}/data/ledger.sqlite"
    assert settings.engine.bundle == str(here / "mine")


def test_absolute_paths_and_names_stay(node_toml: Path) -> None:
    node_toml.write_text(
        'routes = "/etc/routes.toml"\n[spool]\npath = "/spool"\n'
        '[ledger]\nurl = "postgresql+psycopg://node@db/node"\n'
    )
    settings = load(node_toml, {})
    assert (settings.routes, settings.spool.path) == (Path("/etc/routes.toml"), Path("/spool"))
    assert settings.ledger.url == "postgresql+psycopg://node@db/node"
    assert settings.engine.bundle == "compact"


def test_without_a_file_the_defaults_resolve_against_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(None, {}).spool.path == tmp_path / "spool"


def test_all_problems_are_told_at_once_with_their_places(node_toml: Path) -> None:
    node_toml.write_text(
        '[node]\nprot = 3\nae_title = "abcdefghijklmnopqrs"\n[destinations.pacs]\nhots = "a"\n'
        'ae_title = "PACS"\nhost = "a"\nport = 4242\n'
        '[association]\nallow = [{ address = "10.0.0.1/33" }]\n'
    )
    environ = {
        "DICOM_NODE__DELIVERY__FACTOR": "x",
        "DICOM_NODE__DESTINATIONS__PACS__PORT": "99999",
    }
    assert _problems(node_toml, environ) == (
        f"{node_toml}: node.ae_title: an AE title has 1 to 16 characters",
        f"{node_toml}: node.prot: unknown key; did you mean port?",
        "environment DICOM_NODE__DESTINATIONS__PACS__PORT: destinations.pacs.port: "
        "Input should be less than or equal to 65535",
        f"{node_toml}: destinations.pacs.hots: unknown key; did you mean host?",
        f"{node_toml}: association.allow.0.address: '10.0.0.1/33' does not appear to be an IPv4 or "
        "IPv6 network",
        "environment DICOM_NODE__DELIVERY__FACTOR: delivery.factor: "
        "Input should be a valid number, unable to parse string as a number",
    )


@pytest.mark.parametrize(
    ("table", "what_may_be"),
    [
        ('[ledger]\nurl = "postgres://host/node"', "postgresql+psycopg://USER@HOST/NAME"),
        ('[engine]\ndevice = "gpu"', "auto, cpu, cuda or cuda:N"),
        ('[identity]\nuid_root = "1.02"', "numbers with dots between them"),
        ('[destinations."a b"]\nae_title = "A"\nhost = "h"\nport = 1', "letters, digits, hyphens"),
    ],
)
def test_a_value_of_the_wrong_form_is_told_in_words_what_may_be(
    node_toml: Path, table: str, what_may_be: str
) -> None:
    node_toml.write_text(table)
    (problem,) = _problems(node_toml)
    assert what_may_be in problem
    assert "pattern" not in problem


def test_a_problem_does_not_quote_a_password(node_toml: Path) -> None:
    node_toml.write_text('[ledger]\nurl = "mysql://node:SECRET@db/node"\n')
    (problem,) = _problems(node_toml)
    assert "ledger.url" in problem
    assert "SECRET" not in problem


def test_settings_do_not_print_a_password(node_toml: Path) -> None:
    node_toml.write_text('[ledger]\nurl = "postgresql+psycopg://node:SECRET@db/node"\n')
    assert "SECRET" not in repr(load(node_toml, {}))


def test_a_file_that_is_no_toml_is_told_with_its_line(node_toml: Path) -> None:
    node_toml.write_text("[node]\nport = \n")
    (problem,) = _problems(node_toml)
    assert problem.startswith(f"{node_toml}: ")
    assert "line 2" in problem


def test_a_file_that_is_not_there_is_told(node_toml: Path) -> None:
    assert _problems(node_toml) == (f"{node_toml}: No such file or directory",)


def test_a_wait_that_shrinks_is_refused(node_toml: Path) -> None:
    node_toml.write_text("[delivery]\nfirst_s = 60\nmax_s = 10\n")
    assert _problems(node_toml) == (f"{node_toml}: delivery: max_s is smaller than first_s",)


def test_the_environment_overrides_the_file_and_a_credential_both(
    node_toml: Path, tmp_path: Path
) -> None:
    node_toml.write_text('[node]\nport = 1\nae_title = "FILE"\nhost = "file"\n')
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "dicom_node__node__port").write_text("3\n")
    (folder / "other-secret").write_text("not ours")
    environ = {
        "DICOM_NODE__NODE__PORT": "2",
        "DICOM_NODE__NODE__AE_TITLE": "ENV",
        "CREDENTIALS_DIRECTORY": str(folder),
        "DICOM_NODE_CONFIG": "not a setting",
    }
    node = load(node_toml, environ).node
    assert (node.port, node.ae_title, node.host) == (3, "ENV", "file")


def test_the_environment_takes_lists_booleans_and_new_destinations(node_toml: Path) -> None:
    node_toml.write_text("[destinations.Pacs]\nae_title = 'P'\nhost = 'h'\nport = 104\n")
    settings = load(
        node_toml,
        {
            "DICOM_NODE__ASSOCIATION__ALLOW": (
                '[{ calling_ae = "CT1" }, { address = "10.1.0.0/16" }]'
            ),
            "DICOM_NODE__DELIVERY__COMMITMENT": "true",
            "DICOM_NODE__DESTINATIONS__PACS__PORT": "4242",
            "DICOM_NODE__DESTINATIONS__ARCHIVE": "{ ae_title = 'A', host = 'a', port = 1 }",
        },
    )
    assert [(rule.calling_ae, rule.address) for rule in settings.association.allow] == [
        ("CT1", None),
        (None, "10.1.0.0/16"),
    ]
    assert settings.delivery.commitment is True
    assert settings.destinations["Pacs"].port == 4242
    assert settings.destinations["archive"].ae_title == "A"


def test_an_unknown_variable_of_the_environment_is_told(node_toml: Path) -> None:
    node_toml.write_text("")
    assert _problems(
        node_toml, {"DICOM_NODE__NODES__PORT": "1", "DICOM_NODE__SPOOL__PATHS": "["}
    ) == (
        "environment DICOM_NODE__SPOOL__PATHS: spool.paths: unknown key; did you mean path?",
        "environment DICOM_NODE__NODES__PORT: nodes: unknown key; did you mean node?",
    )


@pytest.mark.parametrize("title", ["A", "DIFFCODE", "a b", "16 characters!!!", "  TRIMMED  "])
def test_an_ae_title_is_trimmed(title: str) -> None:
    assert AE_TITLE.validate_python(title) == title.strip()


@pytest.mark.parametrize(
    "title", ["", "   ", "17 characters...!", "A\\B", "A\tB", "A\nB", "Ä", "A\x00", "A\x7f", 104]
)
def test_a_wrong_ae_title_is_refused(title: object) -> None:
    with pytest.raises(ValidationError):
        AE_TITLE.validate_python(title)


@given(st.text(max_size=20))
def test_an_accepted_ae_title_fits_its_value_representation(title: str) -> None:
    try:
        accepted = AE_TITLE.validate_python(title)
    except ValidationError:
        return
    assert 1 <= len(accepted.encode("ascii")) <= 16
    assert accepted.isprintable()
    assert "\\" not in accepted


@pytest.mark.parametrize("root", ["2.25.", "1..2", "01.2", "1.02", "abc", "1" * 30])
def test_a_wrong_uid_root_is_refused(node_toml: Path, root: str) -> None:
    node_toml.write_text(f'[identity]\nuid_root = "{root}"\n')
    (problem,) = _problems(node_toml)
    assert "identity.uid_root" in problem


def test_the_quiet_time_may_differ_by_modality() -> None:
    assembly = AssemblySettings(quiet_s=10, quiet_by_modality_s={"PT": 60})
    assert (assembly.quiet_for("PT"), assembly.quiet_for("CT")) == (60, 10)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        NodeSettings().node.port = 1  # type: ignore[misc]
