"""Reading headers: tolerant of what scanners send, silent about patients, strict about ends."""

from __future__ import annotations

import logging
import struct
import warnings
from pathlib import Path

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import (
    EnhancedMRColorImageStorage,
    EnhancedSRStorage,
    SecondaryCaptureImageStorage,
)

from dicom_node.dicom import header
from dicom_node.dicom.header import read_dataset
from dicom_node.dicom.sharing import Shared
from dicom_node.errors import UnreadableInstanceError
from tests.factories import make_series, write_series

PYDICOM_DATA = Path(pydicom.__file__).parent / "data"
OTHERS = sorted((PYDICOM_DATA / "test_files").rglob("*.dcm"))
CHARACTER_SETS = sorted((PYDICOM_DATA / "charset_files").glob("*.dcm"))


@pytest.fixture
def ct_file(tmp_path: Path) -> Path:
    return write_series(make_series("CT", slices=1), tmp_path)[0]


def element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
    return struct.pack("<HH2sH", group, number, vr, len(value)) + value


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        ("1.2.840.10008.1.1", True),
        ("2.25.329800735698586629295641978511506172918", True),
        ("1.2.03.4", True),  # forbidden by PS3.5 9.1 and sent by scanners in use
        ("1." + "2" * 62, True),
        ("1." + "2" * 63, False),
        ("", False),
        ("1..2", False),
        (".1", False),
        ("1.2.", False),
        ("../../etc", False),
        ("1.2\n", False),
        ("1.2\0", False),
        ("١.٢", False),
        (None, False),
    ],
)
def test_a_uid_is_digits_and_single_dots(value: object, valid: bool) -> None:
    assert header.valid_uid(value) is valid


def test_a_header_is_read_from_a_path_and_from_bytes_alike(ct_file: Path) -> None:
    from_path, from_bytes = header.read_header(ct_file), header.read_header(ct_file.read_bytes())
    assert from_path == from_bytes
    assert "PixelData" not in from_path
    assert from_path.Rows == 32


def test_a_header_names_its_instance(ct_file: Path) -> None:
    source = pydicom.dcmread(ct_file)
    summary = header.instance_summary(header.read_header(ct_file))
    assert summary.sop_instance_uid == source.SOPInstanceUID
    assert summary.series_instance_uid == source.SeriesInstanceUID
    assert summary.modality == "CT"
    assert summary.transfer_syntax_uid == source.file_meta.TransferSyntaxUID


@pytest.mark.parametrize(
    "keyword", ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]
)
def test_an_instance_without_an_identity_is_unreadable(ct_file: Path, keyword: str) -> None:
    dataset = header.read_header(ct_file)
    dataset[keyword].value = ""
    with pytest.raises(UnreadableInstanceError, match=f"{keyword} is absent"):
        header.instance_summary(dataset)


@pytest.mark.parametrize("content", [b"", b"GIF89a" * 50, b"\0" * 128 + b"DICM"])
def test_bytes_that_are_no_dicom_file_are_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableInstanceError):
        header.instance_summary(header.read_header(content, whole=True))


@pytest.mark.parametrize("left", [0.1, 0.5, 0.9, 0.999])
def test_a_data_set_that_ends_early_is_unreadable(ct_file: Path, left: float) -> None:
    content = ct_file.read_bytes()
    with pytest.raises(UnreadableInstanceError):
        header.instance_summary(header.read_header(content[: int(len(content) * left)], whole=True))


def test_a_missing_file_is_no_unreadable_instance(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        header.read_header(tmp_path / "none.dcm")


def test_nothing_of_a_header_reaches_warnings_or_logs(
    ct_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = element(0x0010, 0x0030, b"DA", b"SECRET**") + element(0x0010, 0x1010, b"AS", b"SECRET")
    content = ct_file.read_bytes()
    # Between the patient's weight (0010,1030) and the first element of the next group.
    at = content.index(struct.pack("<HH", 0x0018, 0x0015))
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        read = header.read_header(content[:at] + bad + content[at:])
    assert read.PatientBirthDate == "SECRET**"
    assert "SECRET" not in caplog.text


def test_an_error_names_no_value(ct_file: Path) -> None:
    content = ct_file.read_bytes().replace(b"Phantom^Test", b"Secret^Name!")[:600]
    with pytest.raises(UnreadableInstanceError) as raised:
        header.read_header(content, whole=True)
    assert "Secret" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_an_unknown_value_representation_does_not_lose_the_rest(ct_file: Path) -> None:
    content = ct_file.read_bytes()
    at = content.index(struct.pack("<HH", 0x0018, 0x0015))
    odd = element(0x0011, 0x0001, b"ZZ", b"what") + element(0x0011, 0x0002, b"ZZ", b"")
    read = header.read_header(content[:at] + odd + content[at:])
    assert read.Rows == 32


@pytest.mark.parametrize("path", CHARACTER_SETS, ids=lambda path: path.name)
def test_every_character_set_is_read_without_a_warning(path: Path) -> None:
    assert len(header.read_header(path)) > 0


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.name)
def test_a_file_of_another_project_is_read_or_unreadable(path: Path) -> None:
    try:
        read = header.read_header(path)
    except UnreadableInstanceError:
        return
    assert header.why_ignored(read) is None or header.why_ignored(read)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "secondary capture"),
        ({"SOPClassUID": EnhancedMRColorImageStorage}, "not an image that is restored"),
        ({"SOPClassUID": EnhancedSRStorage}, "not an image"),
        ({"SOPClassUID": "1.2.3.4.5"}, r"1\.2\.3\.4\.5"),
        ({"NumberOfFrames": 8}, "several frames"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "screen save"),
    ],
)
def test_what_is_not_restored_is_ignored_with_a_reason(
    changes: dict[str, object], reason: str
) -> None:
    import re

    dataset = make_series("CT", slices=1, **changes)[0]
    why = header.why_ignored(dataset)
    assert why is not None
    assert re.search(reason, why)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_an_acquired_slice_is_not_ignored(modality: str) -> None:
    assert header.why_ignored(make_series(modality, slices=1)[0]) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("007.812500e-01", 0.78125),  # as a SOMATOM PLUS 4 writes it
        ("000140 kV", None),
        ("***", None),
        ("1e999", None),
        ("nan", None),
        ("", None),
    ],
)
def test_a_number_is_a_finite_number_or_none(value: str, wanted: float | None) -> None:
    dataset = Dataset()
    with header.quiet_pydicom():
        dataset.add_new("KVP", "LO", value)
    assert header.number(dataset, "KVP") == wanted


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    spoiled=st.lists(st.tuples(st.integers(132, 1200), st.integers(0, 255)), max_size=20),
    length=st.integers(0, 4000),
)
def test_spoiled_bytes_end_in_a_header_or_in_unreadable(
    ct_file: Path, spoiled: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(ct_file.read_bytes())
    for place, value in spoiled:
        content[place] = value
    try:
        read = header.read_header(bytes(content[:length]), whole=True)
        header.instance_summary(read)
        header.why_ignored(read)
    except UnreadableInstanceError:
        pass


def test_headers_of_one_series_share_what_is_the_same_and_nothing_else(tmp_path: Path) -> None:
    paths = write_series(make_series("CT", slices=4, rows=16, script="japanese"), tmp_path)
    shared = Shared()
    together = [read_dataset(path, pixels=False, shared=shared) for path in paths]
    alone = [read_dataset(path, pixels=False) for path in paths]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == theirs
        assert [(each.tag, each.VR, repr(each.value)) for each in ours] == [
            (each.tag, each.VR, repr(each.value)) for each in theirs
        ]
    assert together[0]["PatientName"] is together[1]["PatientName"]
    assert together[0]["SOPInstanceUID"] is not together[1]["SOPInstanceUID"]
    del together[0].PatientName
    assert "PatientName" in together[1]
