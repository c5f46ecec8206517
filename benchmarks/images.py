"""Instances made by code: one encoded template for each kind, given new UIDs byte by byte."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
)

# Every UID of an instance has this length, so that it can be exchanged within the encoded bytes.
_UID_LENGTH = 44
_PLACEHOLDER = "2.25." + "1" * (_UID_LENGTH - 5)
_SERIES_PLACEHOLDER = "2.25." + "2" * (_UID_LENGTH - 5)


@dataclass(frozen=True)
class Kind:
    """What is sent."""

    name: str
    sop_class: str
    rows: int
    columns: int
    modality: str
    transfer_syntax: str = str(ExplicitVRLittleEndian)
    frames: int = 1


KINDS = {
    kind.name: kind
    for kind in (
        Kind("CT 512×512", str(CTImageStorage), 512, 512, "CT"),
        Kind("PET 192×192", str(PositronEmissionTomographyImageStorage), 192, 192, "PT"),
        Kind("MR 256×256", str(MRImageStorage), 256, 256, "MR"),
        Kind("CT JPEG-LS", str(CTImageStorage), 512, 512, "CT", str(JPEGLSLossless)),
        Kind("MR RLE", str(MRImageStorage), 256, 256, "MR", str(RLELossless)),
        Kind("Enhanced CT 600 MB", str(EnhancedCTImageStorage), 512, 512, "CT", frames=1200),
    )
}


@dataclass(frozen=True)
class Instance:
    """One instance ready to be sent: a PS3.10 file and where its data set begins."""

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    file: bytes
    offset: int
    repeated: int = 0  # so many octets at the end of the file stand there `times` times
    times: int = 1

    def data_set(self) -> Iterator[memoryview]:
        """The bytes that a C-STORE transfers, in pieces."""
        file = memoryview(self.file)
        yield file[self.offset : len(file) - self.repeated]
        for _ in range(self.times if self.repeated else 0):
            yield file[-self.repeated :]


def instances(kind: Kind, count: int) -> Iterator[Instance]:
    """So many instances of one new series; the pixels of all are the same."""
    template, offset = _encoded(kind)
    series = new_uid().encode()
    template = template.replace(_SERIES_PLACEHOLDER.encode(), series)
    places = _places(template, _PLACEHOLDER.encode())
    for _ in range(count):
        uid = new_uid()
        file = bytearray(template)
        for place in places:
            file[place : place + _UID_LENGTH] = uid.encode()
        instance = Instance(kind.sop_class, uid, kind.transfer_syntax, bytes(file), offset)
        yield instance if kind.frames == 1 else _repeated(instance, kind)


def _repeated(instance: Instance, kind: Kind) -> Instance:
    """The same with all its frames announced; they are made while they are sent."""
    frame = 2 * kind.rows * kind.columns
    file = bytearray(instance.file)
    # PS3.5 7.1.2: the 32 bits before the value of OW are its length.
    file[-frame - 4 : -frame] = (frame * kind.frames).to_bytes(4, "little")
    return replace(instance, file=bytes(file), repeated=frame, times=kind.frames)


def new_uid() -> str:
    """A UID of 44 characters that nothing else has."""
    # 39 digits after the root, the first of them not 0 (PS3.5 B.2).
    digits = str(uuid.uuid4().int).rjust(39, "7")[:39]
    return "2.25." + (digits if digits[0] != "0" else "7" + digits[1:])


def _places(data: bytes, word: bytes) -> list[int]:
    found, at = [], data.find(word)
    while at >= 0:
        found.append(at)
        at = data.find(word, at + 1)
    return found


def _encoded(kind: Kind) -> tuple[bytes, int]:
    dataset = _dataset(kind)
    if kind.transfer_syntax != ExplicitVRLittleEndian:
        dataset.compress(kind.transfer_syntax, generate_instance_uid=False)
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    # PS3.10 7.1: preamble, prefix, and Group Length of the meta information as the first element.
    return data, 144 + int.from_bytes(data[140:144], "little")


def dataset_of(kind: Kind, *, rows: int, columns: int) -> Dataset:
    """One image of a kind as a data set of another matrix, to be varied."""
    return _dataset(replace(kind, rows=rows, columns=columns))


def _dataset(kind: Kind) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SOPClassUID, dataset.SOPInstanceUID = kind.sop_class, _PLACEHOLDER
    dataset.StudyInstanceUID = "2.25." + "3" * (_UID_LENGTH - 5)
    dataset.SeriesInstanceUID = _SERIES_PLACEHOLDER
    dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = "20250101"
    dataset.StudyTime = dataset.SeriesTime = dataset.ContentTime = "120000"
    dataset.Modality, dataset.Manufacturer = kind.modality, "Benchmark"
    dataset.PatientName, dataset.PatientID = "Phantom^Benchmark", "BENCHMARK"
    dataset.SeriesDescription, dataset.InstanceNumber = "benchmark", 1
    dataset.ImagePositionPatient, dataset.SliceThickness = [-250, -250, 10], 1
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [500 / kind.rows, 500 / kind.columns]
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    # As much header again as a scanner sends: about a hundred elements of its own.
    block = dataset.private_block(0x0029, "BENCHMARK HEADER", create=True)
    for element in range(100):
        block.add_new(element, "LO", f"acquisition parameter {element}")
    if kind.frames > 1:
        dataset.NumberOfFrames = kind.frames
    _add_pixels(dataset, kind)
    return dataset


def _add_pixels(dataset: Dataset, kind: Kind) -> None:
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = kind.rows, kind.columns, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    rng = np.random.default_rng(1)
    y, x = np.mgrid[-1 : 1 : kind.rows * 1j, -1 : 1 : kind.columns * 1j]
    body = 1000.0 * (x**2 + y**2 < 0.8) + 200.0 * ((x - 0.3) ** 2 + y**2 < 0.05)
    frame = np.clip(body + rng.normal(0, 20, body.shape), 0, 4095).astype("<u2").tobytes()
    dataset.PixelData = frame
    dataset["PixelData"].VR = "OW"
