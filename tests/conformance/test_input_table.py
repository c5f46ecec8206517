"""Every series of the shared data folder, and every series by code: derived, or the right reason.

Each row of docs/input-table.md is made again and compared. What is derived has the pixels of its
source, no error that its source does not have, and is read by other readers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_node.dicom.documents import OBJECT_CLASSES
from dicom_node.dicom.header import read_header
from dicom_node.inference import Engine
from tests.conformance import input_table
from tests.conformance.checks import (
    ends,
    no_new_errors,
    other_readers_take_it,
    pixels_are_the_source_s,
    sources_by_uid,
)
from tests.conformance.conftest import Errors, Validators
from tests.conformance.input_table import Row
from tests.conformance.journey import go_through
from tests.conformance.mutants import WITH_REPORTS
from tests.unit.dicom_node.bench import Gain

BY_CODE = input_table.by_code()
PAGE = Path(__file__).resolve().parents[2] / "docs" / "input-table.md"
WRITTEN = PAGE.read_text(encoding="utf-8")
FEW = 4
REAL = [
    line.split(" | ")[0].removeprefix("| ")
    for line in input_table.section(WRITTEN, "Real series").splitlines()[2:]
]


@pytest.fixture(scope="session")
def shared_dicom(shared_data: Path) -> Path:
    return shared_data / "dicom"


def test_the_table_names_every_folder_and_every_series_by_code(shared_dicom: Path) -> None:
    assert input_table.real_names(shared_dicom) == REAL
    lines = input_table.section(WRITTEN, "Series by code").splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(BY_CODE)


@pytest.mark.parametrize("name", REAL)
def test_a_real_series_becomes_what_the_table_says(
    shared_dicom: Path, identity: Engine, validators: Validators, tmp_path: Path, name: str
) -> None:
    row = input_table.real(shared_dicom, name, identity)
    (line,) = input_table.rows([row], with_kind=True)
    assert line in WRITTEN, "run `make input-table`"
    hold(row, validators, tmp_path)


@pytest.mark.parametrize("name", REAL)
def test_reports_on_a_real_series_have_no_error_that_its_images_have_not(
    shared_dicom: Path, validators: Validators, tmp_path: Path, name: str
) -> None:
    """What a report copies of patient and study may be wrong in the images already."""
    paths = sorted((shared_dicom / name).glob("*.dcm"))[:FEW]
    for outcome in go_through(paths, Gain(), WITH_REPORTS):
        before = sum((validators.errors(path) for path in outcome.sources), Errors())
        for made in outcome.made:
            if made.sop_class_uid in OBJECT_CLASSES:
                path = tmp_path / f"{made.sop_instance_uid}.dcm"
                path.write_bytes(made.data)
                assert not validators.errors(path) - before


@pytest.mark.parametrize("name", list(BY_CODE))
def test_a_series_by_code_becomes_what_the_table_says(
    identity: Engine, validators: Validators, tmp_path: Path, name: str
) -> None:
    row = input_table.coded(name, BY_CODE[name], tmp_path / "series", identity)
    (line,) = input_table.rows([row], with_kind=False)
    assert line in WRITTEN, "run `make input-table`"
    hold(row, validators, tmp_path)


def hold(row: Row, validators: Validators, folder: Path) -> None:
    """What is derived is held to its source."""
    for number, outcome in enumerate(row.outcomes):
        if not outcome.made:
            continue
        sources = sources_by_uid(outcome)
        for made in outcome.made:
            pixels_are_the_source_s(made, sources[made.source_sop_instance_uid])
        for made in ends(outcome):
            other_readers_take_it(made)
        paths = {str(read_header(path).SOPInstanceUID): path for path in outcome.sources}
        here = folder / f"outcome-{number}"
        here.mkdir()
        no_new_errors(ends(outcome), paths, validators, here)
