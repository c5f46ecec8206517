"""What a validator says of the rejection note of a recalled series."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_node.dicom.rejection import Title
from tests.conformance.checks import contradictions
from tests.conformance.conftest import Validators
from tests.factories import make_series, write_series
from tests.unit.dicom_node.dicom.test_rejection import made


@pytest.mark.parametrize("title", ["quality", "safety"])
def test_dciodvfy_finds_no_error_in_a_rejection_note(
    title: Title, validators: Validators, tmp_path: Path
) -> None:
    note = tmp_path / "note.dcm"
    note.write_bytes(made(title)[0].data)
    assert validators.errors(note) == {}


def test_dcentvfy_finds_a_rejection_note_in_the_study_that_it_is_of(
    validators: Validators, tmp_path: Path
) -> None:
    sources = write_series(make_series("CT", slices=3, rows=16), tmp_path / "sources")
    note = tmp_path / "note.dcm"
    note.write_bytes(made(report=False)[0].data)
    assert contradictions(validators, [*sources, note]) <= contradictions(validators, sources)
