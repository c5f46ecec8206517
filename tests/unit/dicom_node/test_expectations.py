"""A site's own expectations: what they compare, and what a wrong file of them is told."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from dicom_node.errors import ConfigurationError
from dicom_node.expectations import load_expectations, mismatches
from dicom_node.routing import Routes, parse_routes
from tests.factories import make_series, write_series

TABLE = """
[[route]]
name = "low-dose"
task = "ct_denoise"
destinations = ["pacs"]
priority = 4
strength = 0.5
hours = { open = "19:00-07:00", zone = "Europe/Berlin" }
[route.match]
calling_ae = "CT1"
kvp = { max = "110 kV" }
RadiopharmaceuticalInformationSequence.RadionuclideTotalDose = { exists = false }
"""


def routes() -> Routes:
    return parse_routes(tomllib.loads(TABLE), ["pacs"])


def check(path: Path, text: str) -> list[str]:
    path.write_text(text)
    (expectation,) = load_expectations(path)
    return mismatches(expectation, expectation.decision(routes()))


GIVEN = """
[[expect]]
name = "evening"
calling_ae = "CT1"
at = 2026-01-28T20:00:00+01:00
header = { Modality = "CT", KVP = 100, PixelSpacing = [0.7, 0.7] }
"""


def test_what_is_as_expected_has_no_mismatch(tmp_path: Path) -> None:
    wanted = (
        'route = "low-dose"\ntask = "ct_denoise"\ndestinations = ["pacs"]\npriority = 4\n'
        'strength = 0.5\nwaits = false\nreason = ""\n'
    )
    assert check(tmp_path / "fixture.toml", GIVEN + wanted) == []


@pytest.mark.parametrize(
    ("wanted", "mismatch"),
    [
        ('route = "none"', "route: expected 'none', got 'low-dose'"),
        ('task = "ignore"', "task: expected 'ignore', got 'ct_denoise'"),
        ("destinations = []", "destinations: expected [], got ['pacs']"),
        ("strength = 1.0", "strength: expected 1.0, got 0.5"),
        ("waits = true", "waits: expected True, got False"),
    ],
)
def test_a_mismatch_says_what_was_expected_and_what_came(
    tmp_path: Path, wanted: str, mismatch: str
) -> None:
    assert check(tmp_path / "fixture.toml", GIVEN + wanted) == [mismatch]


def test_the_time_decides_whether_it_waits(tmp_path: Path) -> None:
    noon = GIVEN.replace("T20:00:00", "T12:00:00")
    assert check(tmp_path / "fixture.toml", noon + "waits = true") == []


def test_a_file_may_be_the_header_and_values_change_it(tmp_path: Path) -> None:
    write_series(make_series("CT", slices=1, KVP="120"), tmp_path / "in")
    text = '[[expect]]\nname = "x"\ncalling_ae = "CT1"\nfile = "in/0001.dcm"\n'
    assert check(tmp_path / "fixture.toml", text + 'route = "none"') == []
    changed = text + 'header = { KVP = 100 }\nroute = "low-dose"'
    assert check(tmp_path / "fixture.toml", changed) == []


def test_a_sequence_is_a_list_of_tables(tmp_path: Path) -> None:
    dosed = GIVEN.replace(
        "KVP = 100",
        "KVP = 100, RadiopharmaceuticalInformationSequence = [{ RadionuclideTotalDose = 2e8 }]",
    )
    assert check(tmp_path / "fixture.toml", dosed + 'route = "none"') == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ":1: expect: there is none"),
        ("[expect]\nname = 'x'", ":1: expect: must be [[expect]] tables"),
        ("colour = 1\n[[expect]]\nname='x'\nheader={}\ntask='ignore'", ":1: colour: unknown key"),
        (GIVEN, ":3: expect[0].name: expects nothing"),
        ("[[expect]]\nname = 'x'\ntask = 'ignore'", ":2: expect[0].name: gives neither"),
        (GIVEN + "rout = 'x'\nroute = 'x'", ":7: expect[0].rout: unknown key"),
        (
            "[[expect]]\nheader = { Modalty = 'CT' }\ntask = 'ignore'",
            ":2: expect[0].header: Modalty is no DICOM keyword",
        ),
        ("[[expect]]\nfile = 'absent.dcm'\ntask = 'ignore'", ":2: expect[0].file: "),
        ("[[expect]]\nheader = {}\nat = 'noon'\ntask = 'ignore'", ":3: expect[0].at: "),
    ],
)
def test_a_wrong_file_of_expectations_names_the_line_and_the_key(
    tmp_path: Path, text: str, place: str
) -> None:
    path = tmp_path / "fixture.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_expectations(path)
    assert f"{path}{place}" in str(caught.value)
