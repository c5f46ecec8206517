"""A model that returns its input: what comes out has the pixels, HU and SUV that went in.

The model is a bundle on the engine that the node uses; the way is the worker's. A second model
that adds to every pixel shows what may not be touched whatever a network does.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from dicom_node.dicom.suv import suv_factor
from dicom_node.inference import Engine
from tests.conformance.checks import (
    frames_of,
    pixels_are_the_source_s,
    read,
    scales,
    source_frames,
    sources_by_uid,
)
from tests.conformance.journey import Outcome, go_through
from tests.factories import make_series, write_series
from tests.multiframe import legacy_converted, make_enhanced
from tests.unit.dicom_node.bench import Gain

SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
)
FORMATS: dict[str, dict[str, Any]] = {
    "CT signed 16": {},
    "CT unsigned 16": {"signed": False},
    "CT unsigned 12": {"signed": False, "bits_stored": 12},
    "CT signed 12": {"bits_stored": 12},
    "CT slope 0.25": {"slope": 0.25},
    "MR unsigned 16": {},
    "MR signed 16": {"signed": True},
    "MR unsigned 8": {"bits_stored": 8},
    "MR rescaled": {"slope": 0.1, "intercept": -5.0},
    "PT signed 16": {},
    "PT one slope": {"slope_per_slice": False, "slope": 3.25},
    "PT unsigned 16": {"signed": False},
}


def derived(datasets: list[Dataset], folder: Path, engine: Engine) -> Outcome:
    (outcome,) = go_through(write_series(datasets, folder), engine)
    assert outcome.state == "derived", outcome.said
    return outcome


def hold(outcome: Outcome) -> None:
    sources = sources_by_uid(outcome)
    assert len(outcome.made) == len(sources)
    for made in outcome.made:
        pixels_are_the_source_s(made, sources[made.source_sop_instance_uid])


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name.split(",")[0])
def test_pixels_survive_every_transfer_syntax(
    tmp_path: Path, identity: Engine, modality: Any, syntax: str
) -> None:
    series = make_series(modality, slices=2, rows=32, columns=40, transfer_syntax=syntax)
    hold(derived(series, tmp_path, identity))


# Each a series of two slices: two images, or one of two frames.
KINDS: dict[str, Callable[..., list[Dataset]]] = {
    "classic": make_series,
    "enhanced": lambda modality, **shape: [make_enhanced(modality, **shape)],
    "legacy converted": lambda modality, **shape: [legacy_converted(modality, **shape)],
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL])
def test_pixels_survive_high_throughput_jpeg_2000(
    tmp_path: Path, identity: Engine, modality: Any, syntax: str, kind: str
) -> None:
    """Encoded by OpenJPH, decoded by us."""
    imagecodecs = pytest.importorskip("imagecodecs")
    series = KINDS[kind](modality, slices=2, rows=32, columns=40)
    for dataset in series:
        frames = frames_of(dataset)
        coded = [imagecodecs.htj2k_encode(frame, reversible=True) for frame in frames]
        dataset.PixelData = encapsulate(coded)
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    hold(derived(series, tmp_path, identity))


@pytest.mark.dcmtk
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize(("process", "syntax"), [("+e1", JPEGLosslessSV1), ("+el", JPEGLossless)])
def test_pixels_survive_jpeg_lossless(
    tmp_path: Path, identity: Engine, modality: Any, process: str, syntax: str, kind: str
) -> None:
    """Encoded by DCMTK, decoded by us."""
    # dcmcjpeg takes the range of the values for the bits that are stored: unsigned is plain.
    series = KINDS[kind](modality, slices=2, signed=False)
    plain = write_series(series, tmp_path / "plain")
    folder = tmp_path / "encoded"
    folder.mkdir()
    for path in plain:
        command = ["/usr/bin/dcmcjpeg", process, "+un", str(path), str(folder / path.name)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    (outcome,) = go_through(folder.glob("*.dcm"), identity)
    first = next(iter(sources_by_uid(outcome).values()))
    assert first.file_meta.TransferSyntaxUID == syntax
    hold(outcome)


@pytest.mark.parametrize("name", list(FORMATS))
def test_pixels_survive_every_format(tmp_path: Path, identity: Engine, name: str) -> None:
    modality: Any = name.split()[0]
    hold(derived(make_series(modality, slices=2, **FORMATS[name]), tmp_path, identity))


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("make", [make_enhanced, legacy_converted])
def test_frames_survive(tmp_path: Path, identity: Engine, modality: Any, make: Any) -> None:
    outcome = derived([make(modality, slices=3, rows=24)], tmp_path, identity)
    (made,) = outcome.made
    assert source_frames(read(made.data)) == [1, 2, 3]
    hold(outcome)


def test_frames_of_several_volumes_keep_their_places(tmp_path: Path, identity: Engine) -> None:
    image = make_enhanced("MR", slices=3, rows=24, volumes=2)
    outcome = derived([image], tmp_path, identity)
    assert source_frames(read(outcome.made[0].data)) == [1, 2, 3, 4, 5, 6]
    hold(outcome)


# --- SUV ------------------------------------------------------------------------------------


def suv_by_the_book(header: Dataset) -> float:
    """SUVbw per Bq/ml: the QIBA rule for BQML, decay corrected to the series' time."""
    item = header.RadiopharmaceuticalInformationSequence[0]
    day = header.SeriesDate
    injected = datetime.strptime(day + item.RadiopharmaceuticalStartTime[:6], "%Y%m%d%H%M%S")
    started = datetime.strptime(day + header.SeriesTime[:6], "%Y%m%d%H%M%S")
    half_lives = (started - injected).total_seconds() / float(item.RadionuclideHalfLife)
    return (
        1000 * float(header.PatientWeight) / (float(item.RadionuclideTotalDose) * 0.5**half_lives)
    )


def test_suv_is_the_same_from_the_source_s_and_from_the_derived_header(
    tmp_path: Path, identity: Engine
) -> None:
    outcome = derived(make_series("PT", slices=3), tmp_path, identity)
    sources = sources_by_uid(outcome)
    for made in outcome.made:
        source, header = sources[made.source_sop_instance_uid], read(made.data)
        expected = suv_by_the_book(source)
        assert suv_by_the_book(header) == pytest.approx(expected, rel=1e-6)
        for each in (source, header):
            assert suv_factor([each]).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"Units": "GML", "slope_per_slice": False, "slope": 0.001},
        {"Units": "BQML", "DecayCorrection": "ADMIN"},
        {"script": "korean"},
    ],
)
def test_suv_of_other_units_is_the_same_too(
    tmp_path: Path, identity: Engine, options: dict[str, Any]
) -> None:
    outcome = derived(make_series("PT", slices=2, **options), tmp_path, identity)
    sources = sources_by_uid(outcome)
    for made in outcome.made:
        before = suv_factor([sources[made.source_sop_instance_uid]]).value
        after = suv_factor([read(made.data)]).value
        assert before is not None
        assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize(("offset", "factor"), [(0x00, "0.0005"), (0x09, "1.7")])
def test_suv_of_counts_is_the_same_by_the_vendor_s_factor(
    tmp_path: Path, identity: Engine, offset: int, factor: str
) -> None:
    series = make_series("PT", slices=2, Units="CNTS")
    for dataset in series:
        block = dataset.private_block(0x7053, "Philips PET Private Group", create=True)
        block.add_new(offset, "DS", factor)
    outcome = derived(series, tmp_path, identity)
    before = suv_factor([next(iter(sources_by_uid(outcome).values()))]).value
    assert before is not None
    for made in outcome.made:
        assert suv_factor([read(made.data)]).value == pytest.approx(before, rel=1e-6)


# --- what no network may touch --------------------------------------------------------------


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_padding_is_untouched_and_nothing_restored_becomes_padding(
    tmp_path: Path, modality: Any
) -> None:
    """The network shifts air into the padding's range; the file says so nowhere."""
    padding = (-1100, -1090) if modality == "CT" else (3, 6)
    series = make_series(
        modality, slices=2, padding=padding[0], padding_limit=padding[1], signed=True
    )
    gain = -71.0 if modality == "CT" else 4.0
    outcome = derived(series, tmp_path, Gain(gain=gain))
    sources = sources_by_uid(outcome)
    for made in outcome.made:
        source, result = sources[made.source_sop_instance_uid], read(made.data)
        before, after = frames_of(source), frames_of(result)
        padded = (before >= padding[0]) & (before <= padding[1])
        assert padded.any()
        np.testing.assert_array_equal(after[padded], before[padded])
        assert not ((after[~padded] >= padding[0]) & (after[~padded] <= padding[1])).any()


def test_hounsfield_units_of_air_are_untouched_by_a_network_that_leaves_them(
    tmp_path: Path, identity: Engine
) -> None:
    outcome = derived(make_series("CT", slices=2, slope=0.5), tmp_path, identity)
    for made in outcome.made:
        result = read(made.data)
        ((slope, intercept),) = scales(result)
        hounsfield = frames_of(result) * slope + intercept
        assert (slope, intercept) == (0.5, -1024.0)
        corner = hounsfield[0, :2, :2]
        assert np.all(np.abs(corner + 1000.0) < 150.0)
    hold(outcome)


def test_what_the_stored_range_clamps_is_counted(tmp_path: Path) -> None:
    series = make_series("CT", slices=1, bits_stored=12, signed=False)
    outcome = derived(series, tmp_path, Gain(gain=1e5))
    assert outcome.made[0].clamped > 0
    assert frames_of(read(outcome.made[0].data)).max() == 4095
