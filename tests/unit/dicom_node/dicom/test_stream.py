"""A data set is followed to its last byte, whatever its transfer syntax."""

from __future__ import annotations

import contextlib
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

from dicom_node.dicom.stream import MAX_DEPTH, MAX_KEPT, Scanner, check_whole
from dicom_node.errors import UnreadableInstanceError

PIXEL_DATA = (0x7FE0, 0x0010)
SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless]


def image(*, encapsulated: bool = False) -> Dataset:
    """A data set with nested sequences of both kinds of length, and 7 × 5 pixels at its end."""
    inner = Dataset()
    inner.CodeValue = "113072"
    item = Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3"
    item.PurposeOfReferenceCodeSequence = Sequence([inner])
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.SourceImageSequence = Sequence([item, Dataset()])
    dataset["SourceImageSequence"].is_undefined_length = True
    item.is_undefined_length_sequence_item = True
    dataset.LargestImagePixelValue = 7
    dataset["LargestImagePixelValue"].VR = "US"
    dataset.Rows, dataset.Columns = 7, 5
    if encapsulated:
        dataset.PixelData = encapsulate([b"\xff\x4f" + bytes(30)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    else:
        dataset.PixelData = bytes(range(70))
        dataset["PixelData"].VR = "OW"
    return dataset


def encode(dataset: Dataset, syntax: str) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR = syntax == ImplicitVRLittleEndian
    buffer.is_little_endian = syntax != ExplicitVRBigEndian
    write_dataset(buffer, dataset)
    return buffer.getvalue()


def encoded(syntax: str) -> bytes:
    return encode(image(encapsulated=syntax == JPEG2000Lossless), syntax)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_whole_data_set_gives_its_tags(syntax: str) -> None:
    tags = check_whole(encoded(syntax), syntax)
    assert tags == {(0x0008, 0x0016), (0x0008, 0x2112), (0x0028, 0x0010), (0x0028, 0x0011)} | {
        (0x0028, 0x0107),
        PIXEL_DATA,
    }


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_data_set_cut_anywhere_ends_early_or_lacks_its_pixels(syntax: str) -> None:
    data = encoded(syntax)
    for cut in range(len(data)):
        try:
            tags = check_whole(data[:cut], syntax)
        except UnreadableInstanceError:
            continue
        assert PIXEL_DATA not in tags, f"cut at {cut} of {len(data)}"


def test_a_deflated_data_set_is_inflated_and_its_cut_found() -> None:
    engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = engine.compress(encoded(ExplicitVRLittleEndian)) + engine.flush()
    assert PIXEL_DATA in check_whole(data, DeflatedExplicitVRLittleEndian)
    for cut in range(len(data)):
        with pytest.raises(UnreadableInstanceError):
            check_whole(data[:cut], DeflatedExplicitVRLittleEndian)


def test_a_deflated_data_set_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_node.dicom.stream.MAX_INFLATED", 1 << 16)
    engine = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = engine.compress(bytes(1 << 20)) + engine.flush()
    with pytest.raises(UnreadableInstanceError, match="beyond"):
        check_whole(bomb, DeflatedExplicitVRLittleEndian)


def test_an_unknown_sequence_of_undefined_length_is_read_as_implicit_vr() -> None:
    """PS3.5 6.2.2 note 4, as PACS write private sequences that they do not know."""
    item = encode(image(), ImplicitVRLittleEndian)
    unknown = (
        struct.pack("<HH2sHL", 0x0009, 0x1010, b"UN", 0, 0xFFFFFFFF)
        + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
        + item
        + struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
        + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    )
    assert check_whole(unknown, ExplicitVRLittleEndian) == {(0x0009, 0x1010)}


def test_padding_at_the_end_of_a_file_is_no_element() -> None:
    assert PIXEL_DATA in check_whole(encoded(ExplicitVRLittleEndian) + bytes(6), SYNTAXES[1])


def test_sequences_nested_without_end_are_refused() -> None:
    level = struct.pack("<HHL", 0x0040, 0xA730, 0xFFFFFFFF)
    level += struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    with pytest.raises(UnreadableInstanceError, match="nested too deep"):
        check_whole(level * (MAX_DEPTH + 2), ImplicitVRLittleEndian)


@given(st.binary(max_size=300), st.sampled_from([*SYNTAXES, DeflatedExplicitVRLittleEndian]))
def test_arbitrary_bytes_are_read_or_refused_and_nothing_else(data: bytes, syntax: str) -> None:
    with contextlib.suppress(UnreadableInstanceError):
        check_whole(data, syntax)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("step", [1, 3, 8, 50, 10_000])
def test_wanted_values_come_out_whatever_the_pieces(syntax: str, step: int) -> None:
    sop_class, sequence = (0x0008, 0x0016), (0x0008, 0x2112)
    data = encoded(syntax)
    scanner = Scanner(syntax, [sop_class, sequence], noted=[PIXEL_DATA])
    for at in range(0, len(data), step):
        scanner.feed(data[at : at + step])
    found = scanner.finish()
    assert found.tags == {sop_class, sequence, PIXEL_DATA}
    assert set(found.values) == {sop_class, sequence}
    assert (found.values[sop_class] or b"").rstrip(b"\0") == b"1.2.840.10008.5.1.4.1.1.2"
    items = found.values[sequence] or b""
    # What stands between the element's header and the next element, delimiter included.
    assert items
    assert items in data
    assert b"1.2.3" in items
    assert b"113072" in items
    assert items[-8:-4] in (b"\xfe\xff\xdd\xe0", b"\xff\xfe\xe0\xdd")


def test_a_wanted_value_that_is_too_large_is_told_of_and_not_kept() -> None:
    dataset = image()
    tag = (0x0042, 0x0011)
    for more, kept in ((0, True), (2, False)):
        dataset.add_new(tag, "OB", bytes(MAX_KEPT + more))
        data = encode(dataset, ExplicitVRLittleEndian)
        scanner = Scanner(ExplicitVRLittleEndian, [tag], noted=[])
        for at in range(0, len(data), 4096):
            scanner.feed(data[at : at + 4096])
        assert (scanner.finish().values[tag] is not None) is kept


def test_more_elements_than_allowed_are_refused_and_are_not_remembered() -> None:
    element = struct.pack("<HH2sH", 0x0009, 0x1001, b"SH", 0)
    Scanner(ExplicitVRLittleEndian, noted=[], max_elements=50).feed(element * 50)
    with pytest.raises(UnreadableInstanceError, match="more elements"):
        Scanner(ExplicitVRLittleEndian, noted=[], max_elements=50).feed(element * 51)
