"""What a C-STORE status means for the sender."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_node.errors import UnreadableInstanceError
from dicom_node.storage_scu import Outcome, Sendable, classify_status, files_under


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0x0000, "delivered"),  # success
        (0x0111, "delivered"),  # duplicate: it is there
        (0xB000, "delivered"),  # coercion of data elements
        (0xB006, "delivered"),  # elements discarded
        (0xB007, "delivered"),  # data set does not match SOP Class, stored all the same
        (0xA700, "retry"),  # out of resources
        (0xA7FF, "retry"),
        (0x0110, "retry"),  # processing failure
        (0x0213, "retry"),  # resource limitation
        (None, "retry"),  # abort or time-out
        (0xA900, "dead"),  # data set does not match SOP Class
        (0xC000, "dead"),  # cannot understand
        (0xCFFF, "dead"),
        (0x0122, "dead"),  # SOP Class not supported
        (0x0124, "dead"),  # not authorised
        (0x0117, "dead"),  # invalid SOP Instance
    ],
)
def test_a_status_is_stored_passing_or_final(status: int | None, outcome: Outcome) -> None:
    assert classify_status(status) == outcome


def test_a_file_that_is_no_dicom_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no DICOM here")
    with pytest.raises(UnreadableInstanceError, match="not a DICOM file"):
        Sendable.of(path)


def test_folders_are_searched_in_order_and_files_taken_as_named(tmp_path: Path) -> None:
    for name in ("b/2", "b/1", "a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = files_under([tmp_path / "b", tmp_path / "a"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["b/1", "b/2", "a"]
