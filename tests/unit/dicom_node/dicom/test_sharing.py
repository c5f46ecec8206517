"""Headers of one series hold what tells them apart, and nothing else."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from dicom_node.dicom.header import read_dataset
from dicom_node.dicom.sharing import Shared
from tests.factories import make_series, write_series


def code(meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "1", "99TEST", meaning
    return item


def referenced(number: int) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2.3", f"1.2.3.{number}"
    return item


def written(folder: Path, slices: int, *, undefined: bool = False) -> list[Path]:
    """Slices with a sequence that is the same in all, and one of each one's own."""
    series = make_series("CT", slices=slices, rows=16)
    for number, dataset in enumerate(series):
        dataset.ProcedureCodeSequence = Sequence([code("chest")])
        dataset.ReferencedImageSequence = Sequence([referenced(number)])
        for keyword in ("ProcedureCodeSequence", "ReferencedImageSequence"):
            dataset[keyword].is_undefined_length = undefined
    return write_series(series, folder)


def read(paths: list[Path], shared: Shared | None = None) -> list[Dataset]:
    common = Shared() if shared is None else shared
    return [read_dataset(path, pixels=False, shared=common) for path in paths]


@pytest.mark.parametrize("undefined", [True, False])
def test_a_sequence_is_one_where_it_says_the_same(tmp_path: Path, undefined: bool) -> None:
    paths = written(tmp_path, 3, undefined=undefined)
    first, *others = read(paths)
    for path, other in zip(paths[1:], others, strict=True):
        assert other["ProcedureCodeSequence"] is first["ProcedureCodeSequence"]
        assert other["ReferencedImageSequence"] is not first["ReferencedImageSequence"]
        assert other == read_dataset(path, pixels=False)


def test_a_sequence_is_read_as_its_own_data_set_says(tmp_path: Path) -> None:
    # The VR of the value is US or SS (PS3.6), by the Pixel Representation that stands outside.
    series = make_series("CT", slices=2, rows=16, transfer_syntax="1.2.840.10008.1.2")
    for dataset, signed in zip(series, (0, 1), strict=True):
        item = Dataset()
        item.add_new("SmallestImagePixelValue", "SS" if signed else "US", -1 if signed else 65535)
        dataset.PixelRepresentation = signed
        dataset.ReferencedImageSequence = Sequence([item])
    unsigned, signed = read(write_series(series, tmp_path))
    assert unsigned.ReferencedImageSequence[0].SmallestImagePixelValue == 65535
    assert signed.ReferencedImageSequence[0].SmallestImagePixelValue == -1


def test_a_header_that_is_changed_changes_alone(tmp_path: Path) -> None:
    first, second, third = read(written(tmp_path, 3))
    whole = len(second)
    second.add_new("PatientName", "PN", "Another")
    second.LossyImageCompression = "01"
    del second.StudyDate
    assert second.PatientName == "Another"
    assert "StudyDate" not in second
    assert len(second) == len(list(second)) == whole
    for other in (first, third):
        assert other.PatientName != "Another"
        assert "StudyDate" in other
        assert "LossyImageCompression" not in other
    with pytest.raises(KeyError):
        del second[0x00080020]
    assert second.get("StudyDate") is None


def test_headers_with_other_attributes_are_read_as_they_are(tmp_path: Path) -> None:
    paths = written(tmp_path, 4)
    for number, path in enumerate(paths):
        dataset = read_dataset(path)
        if number % 2:
            del dataset.PatientName
            dataset.ImageComments = "as a scanner adds now and then"
        dataset.save_as(path)
    for path, header in zip(paths, read(paths), strict=True):
        assert header == read_dataset(path, pixels=False)
        assert list(header.keys()) == sorted(header.keys())


def test_what_was_read_stays_when_what_is_shared_is_forgotten(tmp_path: Path) -> None:
    shared, paths = Shared(), written(tmp_path, 2)
    headers = read(paths, shared)
    assert len(shared) > 20
    shared.clear()
    assert len(shared) == 0
    assert headers == read(paths)
    assert {header.file_meta.TransferSyntaxUID for header in headers} == {"1.2.840.10008.1.2.1"}


def test_one_header_more_takes_a_few_kilobytes(tmp_path: Path) -> None:
    paths = written(tmp_path, 24)
    read(paths)  # what pydicom keeps of its dictionaries
    held = [traced_bytes(paths[:count]) for count in (12, 24)]
    assert (held[1] - held[0]) / 12 < 8000  # pydicom holds 40,000


def traced_bytes(paths: list[Path]) -> int:
    """What Python holds for the headers of these files."""
    gc.collect()
    tracemalloc.start()
    try:
        shared = Shared()
        headers = read(paths, shared)
        shared.clear()
        gc.collect()
        found, _ = tracemalloc.get_traced_memory()
        assert len(headers) == len(paths)
        return found
    finally:
        tracemalloc.stop()
