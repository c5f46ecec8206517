"""Mutated data sets: each ends in a refusal, or in a restored image that is its source's.

An image would be wrong where its pixels, under a model that returns its input, or its place in
space are not those of the file as another reader sees it. Every mutant follows from the name of
its source, its number and the seed, and from no mutant before it.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import dcmwrite
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from dicom_node.dicom.header import quiet_pydicom
from dicom_node.settings import NodeSettings
from tests.conformance.checks import pixels_are_the_source_s, read, source_frames, sources_by_uid
from tests.conformance.journey import Outcome, go_through
from tests.factories import make_series
from tests.multiframe import make_enhanced
from tests.unit.dicom_node.bench import Gain

SEED = int(os.environ.get("DICOM_NODE_TEST_SEED", "1"))
PLAIN = NodeSettings()
WITH_REPORTS = NodeSettings.model_validate({"report": {"sr": True, "gsps": True}})
# The objects that go with a series cost several times what its images do: they go with some.
WITH_A_NEIGHBOUR, WITH_OBJECTS = 4, 16
_STRIDE = 97  # prime: it reaches all of the sweep
STATES = {"derived", "refused", "ignored", "rejected", "failed", "held"}

SOURCES: Mapping[str, Callable[[], list[Dataset]]] = {
    "CT": lambda: make_series("CT", slices=2, rows=8, padding=-2000),
    "MR": lambda: make_series("MR", slices=2, rows=8, transfer_syntax=ImplicitVRLittleEndian),
    "MR RLE": lambda: make_series("MR", slices=2, rows=8, transfer_syntax=RLELossless),
    "CT J2K": lambda: make_series("CT", slices=2, rows=32, transfer_syntax=JPEG2000Lossless),
    "PT": lambda: make_series("PT", slices=2, rows=8),
    "Enhanced CT": lambda: [make_enhanced("CT", slices=2, rows=8)],
    "Enhanced PT": lambda: [make_enhanced("PT", slices=2, rows=8)],
}

Mutation = Callable[[random.Random, bytes], bytes]


def flipped(rng: random.Random, data: bytes) -> bytes:
    """A few bytes with another value, behind the preamble."""
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        spoiled[rng.randrange(132, len(spoiled))] = rng.randrange(256)
    return bytes(spoiled)


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(132, len(data))]


def spliced(rng: random.Random, data: bytes) -> bytes:
    """A piece of the file once more in another place."""
    start, place = rng.randrange(132, len(data)), rng.randrange(132, len(data))
    piece = data[start : start + rng.randrange(1, 64)]
    return data[:place] + piece + data[place:]


def without_an_element(rng: random.Random, data: bytes) -> bytes:
    dataset = read(data)
    del dataset[rng.choice([element.tag for element in dataset])]
    return _encoded(dataset, data)


ODD_VALUES = (
    b"", b" ", b"0", b"-1", b"1", b"65535", b"999999999999", b"1e400", b"nan", b"1\\2\\3\\4\\5\\6",
    b"\\", b"ORIGINAL", b"\xff\xff", b"\x00\x00", b"1.2.3", b"../../x", b"\xff" * 70,
)  # fmt: skip


def with_an_odd_value(rng: random.Random, data: bytes) -> bytes:
    """An element with a value that its VR may not allow."""
    dataset = read(data)
    element = rng.choice([each for each in dataset if each.VR not in ("SQ", "OW", "OB")])
    value = rng.choice(ODD_VALUES)
    value += b" " * (len(value) % 2)
    return _replaced(dataset, element.tag, element.VR, value, data)


# What the result hangs on: these go wrong more often than chance would have it.
DECISIVE = (
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "SamplesPerPixel", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept",
    "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "PixelPaddingValue",
    "NumberOfFrames", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "Units",
    "ImageType", "SpecificCharacterSet", "PlanarConfiguration",
)  # fmt: skip


ODD_NUMBERS = tuple(
    number.to_bytes(2, "little") for number in (0, 1, 2, 7, 8, 12, 15, 16, 17, 32, 65535)
)
SWEEP = tuple(
    (keyword, value)
    for keyword in DECISIVE
    for value in (
        ODD_NUMBERS if dictionary_VR(keyword).partition(" or ")[0] in ("US", "SS") else ODD_VALUES
    )
)
"""Each decisive attribute with each odd value."""


def with_an_odd_decisive_value(rng: random.Random, data: bytes) -> bytes:
    return swept(data, *rng.choice(SWEEP))


def swept(data: bytes, keyword: str, value: bytes) -> bytes:
    """With a given value of a decisive attribute, in the top level of the data set."""
    kind = dictionary_VR(keyword).partition(" or ")[0]
    padded = value + b" " * (len(value) % 2)
    return _replaced(read(data), Tag(keyword), kind, padded, data)


def without_a_decisive_element(rng: random.Random, data: bytes) -> bytes:
    dataset = read(data)
    present = [keyword for keyword in (*DECISIVE, "PixelData") if keyword in dataset]
    del dataset[rng.choice(present)]
    return _encoded(dataset, data)


MUTATIONS: tuple[Mutation, ...] = (
    flipped,
    truncated,
    spliced,
    without_an_element,
    without_a_decisive_element,
    with_an_odd_value,
    with_an_odd_decisive_value,
)


def _replaced(dataset: Dataset, tag: Any, kind: str, value: bytes, data: bytes) -> bytes:
    implicit = dataset.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    raw = RawDataElement(Tag(tag), kind, len(value), value, 0, implicit, True)
    dataset._dict[Tag(tag)] = raw
    return _encoded(dataset, data)


def _encoded(dataset: Dataset, unchanged: bytes) -> bytes:
    """The data set as a file; the file as it was where it cannot be written so."""
    buffer = BytesIO()
    try:
        with quiet_pydicom():
            dcmwrite(buffer, dataset)
    except Exception:
        return unchanged
    return buffer.getvalue()


@cache
def whole(name: str) -> tuple[bytes, ...]:
    """The files of a source before anything happened to them."""
    return tuple(map(_file, SOURCES[name]()))


def _file(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def mutant(name: str, number: int, seed: int = SEED) -> list[bytes]:
    """A series of which one file is mutated, the same for the same arguments.

    By chance, but for every other of the first mutants: these are the sweep, in a scattered order,
    so that no run of some length leaves one out. Of classic images every fourth mutant has its
    neighbour beside it, which it may not touch; the others stand alone, since the neighbour costs
    as much as the mutant.
    """
    rng = random.Random(f"{seed} {name} {number}")
    files = list(whole(name))
    spoiled = rng.randrange(len(files))
    turn, by_chance = divmod(number, 2)
    if by_chance or turn >= len(SWEEP):
        files[spoiled] = rng.choice(MUTATIONS)(rng, files[spoiled])
    else:
        files[spoiled] = swept(files[spoiled], *SWEEP[turn * _STRIDE % len(SWEEP)])
    return files if number % WITH_A_NEIGHBOUR == 0 else [files[spoiled]]


def put_through(name: str, number: int, folder: Path, seed: int = SEED) -> Counter[str]:
    """Send one mutant the whole way, its files in *folder*; how many outcomes had each state.

    Raises AssertionError where an outcome is none that the node knows, or an image is wrong.
    """
    for i, data in enumerate(mutant(name, number, seed)):
        (folder / f"{i}.dcm").write_bytes(data)
    settings = WITH_REPORTS if number % WITH_OBJECTS == 0 else PLAIN
    states: Counter[str] = Counter()
    for outcome in go_through(folder.glob("*.dcm"), Gain(gain=0.0), settings):
        assert outcome.state in STATES
        assert outcome.said or outcome.state == "derived"
        assert bool(outcome.made) == (outcome.state == "derived")
        hold(outcome)
        states[outcome.state] += 1
    return states


def hold(outcome: Outcome) -> None:
    """The images of an outcome have the pixels and the place of their sources."""
    if not outcome.made:
        return
    sources = sources_by_uid(outcome)
    for made in outcome.made:
        result = read(made.data)
        if result.Modality in ("SR", "PR"):
            continue
        source = sources[made.source_sop_instance_uid]
        pixels_are_the_source_s(made, source)
        assert places(result, source_frames(result)) == places(source, source_frames(result))


def places(dataset: Dataset, frames: list[int]) -> list[str]:
    """Position, orientation and spacing of each frame, wherever the IOD has them."""
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        return [_place(dataset, dataset, dataset)]
    shared = dataset.SharedFunctionalGroupsSequence[0]
    numbers = frames if len(groups) >= max(frames) else range(1, len(groups) + 1)
    return [
        _place(
            *(
                (groups[n - 1].get(macro) or shared.get(macro) or [Dataset()])[0]
                for macro in (
                    "PlanePositionSequence",
                    "PlaneOrientationSequence",
                    "PixelMeasuresSequence",
                )
            )
        )
        for n in numbers
    ]


def _place(position: Dataset, orientation: Dataset, measures: Dataset) -> str:
    return repr(
        (
            position.get("ImagePositionPatient"),
            orientation.get("ImageOrientationPatient"),
            measures.get("PixelSpacing"),
        )
    )
