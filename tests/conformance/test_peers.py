"""Orthanc and DCMTK store, return and render what the node makes; dciodvfy finds no fault in it.

One derived series of each kind, with its report and its presentation states, goes to both by
C-STORE. What comes back is compared byte for byte.
"""

from __future__ import annotations

import subprocess
from collections.abc import Generator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from highdicom.sr import MeasurementReport, srread
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedSRStorage, GrayscaleSoftcopyPresentationStateStorage

from dicom_node.association import Peer
from dicom_node.settings import NodeSettings
from dicom_node.storage_scu import Sendable, send_all
from tests.conformance.checks import contradictions, frames_of, read, scales
from tests.conformance.conftest import Validators
from tests.conformance.journey import go_through
from tests.factories import make_series, write_series
from tests.integration.peers import (
    STORESCP,
    Orthanc,
    data_set_bytes,
    listens,
    reserve_port,
    running,
    running_orthanc,
    until,
)
from tests.multiframe import legacy_converted, make_enhanced
from tests.unit.dicom_node.bench import Gain

BOTH = NodeSettings.model_validate({"report": {"sr": True, "gsps": True}})
SR, GSPS = str(EnhancedSRStorage), str(GrayscaleSoftcopyPresentationStateStorage)
ROWS, COLUMNS = 96, 128
WINDOW = {"WindowCenter": "40", "WindowWidth": "400"}


def _kinds() -> dict[str, list[Dataset]]:
    shape: dict[str, Any] = {"slices": 3, "rows": ROWS, "columns": COLUMNS}
    return {
        "CT": make_series("CT", script="japanese", **shape),
        "MR": make_series("MR", script="cyrillic", series="mr", **shape),
        "PT": make_series("PT", script="korean", series="pt", **shape),
        "Enhanced MR": [make_enhanced("MR", study="enhanced", **shape)],
        "Legacy Converted CT": [legacy_converted("CT", study="converted", **shape)],
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The files that went in, by kind."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: write_series(made, folder / name) for name, made in _kinds().items()}


@pytest.fixture(scope="module")
def derived(
    sources: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Path]]:
    """What came of them, reports and presentation states included, by kind."""
    folder, found = tmp_path_factory.mktemp("derived"), {}
    for name, paths in sources.items():
        (outcome,) = go_through(paths, Gain(gain=12.0, diagnostics={"mean_drift": [1.0] * 3}), BOTH)
        assert outcome.state == "derived", outcome.said
        found[name] = [folder / f"{made.sop_instance_uid}.dcm" for made in outcome.made]
        for path, made in zip(found[name], outcome.made, strict=True):
            path.write_bytes(made.data)
    return found


def every(derived: dict[str, list[Path]]) -> list[Path]:
    return [path for paths in derived.values() for path in paths]


def of_class(derived: dict[str, list[Path]], *uids: str) -> list[Path]:
    return [path for path in every(derived) if str(read(path).SOPClassUID) in uids]


def images(derived: dict[str, list[Path]]) -> list[Path]:
    other = of_class(derived, SR, GSPS)
    return [path for path in every(derived) if path not in other]


# --- validators -----------------------------------------------------------------------------


def test_reports_and_presentation_states_have_no_error(
    derived: dict[str, list[Path]], validators: Validators
) -> None:
    objects = of_class(derived, SR, GSPS)
    assert len(of_class(derived, SR)) == len(derived)
    assert [
        (path.name, validators.errors(path)) for path in objects if validators.errors(path)
    ] == []


@pytest.mark.parametrize("part", [None, "", "CHEST", "BREAST", "KNEE"])
@pytest.mark.parametrize("side", [None, "", "R"])
def test_reports_of_any_body_part_have_no_error(
    tmp_path: Path, validators: Validators, part: str | None, side: str | None
) -> None:
    """Laterality is required of a paired body part alone (PS3.3 C.7.3.1)."""
    series = make_series("CT", slices=1, rows=8, BodyPartExamined=part, Laterality=side)
    (outcome,) = go_through(write_series(series, tmp_path / "source"), Gain(), BOTH)
    for made in outcome.made:
        if made.sop_class_uid in (SR, GSPS):
            path = tmp_path / f"{made.sop_instance_uid}.dcm"
            path.write_bytes(made.data)
            assert not validators.errors(path)


@pytest.mark.parametrize("name", list(_kinds()))
def test_source_images_reports_and_states_do_not_contradict_each_other(
    sources: dict[str, list[Path]],
    derived: dict[str, list[Path]],
    validators: Validators,
    name: str,
) -> None:
    # A converted image refers to classic ones that are gone; nothing of ours may add to that.
    before = contradictions(validators, sources[name])
    assert contradictions(validators, [*sources[name], *derived[name]]) <= before


def test_highdicom_reads_the_reports(derived: dict[str, list[Path]]) -> None:
    for path in of_class(derived, SR):
        document = srread(BytesIO(path.read_bytes()))
        assert isinstance(document.content, MeasurementReport)


@pytest.mark.dcmtk
def test_dcmtk_prints_the_reports(derived: dict[str, list[Path]]) -> None:
    for path in of_class(derived, SR):
        printed = _run("/usr/bin/dsrdump", "+Pl", path)
        assert "Imaging Measurement Report" in printed
        assert "weights sha256" in printed
        assert "slice 3" in printed


@pytest.mark.dcmtk
def test_dcmtk_finds_the_presentation_states_sound(derived: dict[str, list[Path]]) -> None:
    for path in of_class(derived, GSPS):
        assert "Test passed" in _run("/usr/bin/dcmpschk", path)


def _run(*command: str | Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# --- stored and returned --------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(
    derived: dict[str, list[Path]],
    orthanc_program: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[Orthanc]:
    """An Orthanc that has all of it."""
    with running_orthanc(orthanc_program, tmp_path_factory.mktemp("orthanc")) as orthanc:
        _send(derived, Peer("ORTHANC", "127.0.0.1", orthanc.dicom_port, "DIFFCODE"))
        yield orthanc


def _send(derived: dict[str, list[Path]], peer: Peer) -> None:
    sent = list(send_all(peer, [Sendable.of(path) for path in every(derived)]))
    assert [each.status for each in sent] == [0x0000] * len(every(derived))


@pytest.mark.orthanc
def test_orthanc_returns_every_data_set_as_it_was(
    derived: dict[str, list[Path]], archive: Orthanc, tmp_path: Path
) -> None:
    returned = archive.files()
    assert len(returned) == len(every(derived))
    for path in every(derived):
        back = tmp_path / path.name
        back.write_bytes(returned[path.stem])
        assert data_set_bytes(back) == data_set_bytes(path)


@pytest.mark.orthanc
@pytest.mark.dcmtk
def test_orthanc_returns_the_pixels_by_c_get(
    derived: dict[str, list[Path]], archive: Orthanc, tmp_path: Path
) -> None:
    for name in ("CT", "PT"):
        series = str(read(derived[name][0]).SeriesInstanceUID)
        folder = tmp_path / name
        folder.mkdir()
        keys = ["-k", "QueryRetrieveLevel=SERIES", "-k", f"SeriesInstanceUID={series}"]
        address = ["-aec", "ORTHANC", "127.0.0.1", str(archive.dicom_port)]
        _run("/usr/bin/getscu", "-S", *keys, "-od", folder, *address)
        back = {str(read(path).SOPInstanceUID): read(path) for path in folder.iterdir()}
        made = [path for path in derived[name] if read(path).SeriesInstanceUID == series]
        assert set(back) == {path.stem for path in made}
        for path in made:
            assert back[path.stem].PixelData == read(path).PixelData


@pytest.mark.dcmtk
def test_dcmtk_stores_every_data_set_as_it_was(
    derived: dict[str, list[Path]], tmp_path: Path
) -> None:
    folder, port = tmp_path / "storescp", reserve_port()
    folder.mkdir()
    command = [STORESCP, "--accept-all", "--bit-preserving", "-od", folder, str(port)]
    with running(command, tmp_path / "storescp.log"):
        until(lambda: listens(port), "storescp listens")
        _send(derived, Peer("STORESCP", "127.0.0.1", port, "DIFFCODE"))
    stored = sorted(data_set_bytes(path) for path in folder.iterdir())
    assert stored == sorted(data_set_bytes(path) for path in every(derived))


# --- rendered -------------------------------------------------------------------------------


def grey(dataset: Dataset, frame: int) -> NDArray[np.float64]:
    """A frame in its quantity, from 0 to 1 over its range."""
    slope, intercept = scales(dataset)[min(frame, len(scales(dataset)) - 1)]
    values = frames_of(dataset)[frame] * slope + intercept
    spread = float(np.ptp(values))
    return np.asarray((values - values.min()) / (spread or 1.0))


def alike(picture: NDArray[Any], expected: NDArray[np.float64]) -> float:
    """How a picture follows the values: correlation over all pixels."""
    assert picture.shape == expected.shape
    return float(np.corrcoef(picture.ravel(), expected.ravel())[0, 1])


@pytest.mark.orthanc
def test_orthanc_renders_every_image_first_and_last_slices_too(
    derived: dict[str, list[Path]], archive: Orthanc
) -> None:
    known = {
        archive.get(f"/instances/{each}/simplified-tags")["SOPInstanceUID"]: each
        for each in archive.get("/instances")
    }
    for path in images(derived):
        dataset = read(path)
        for frame in {0, len(frames_of(dataset)) - 1}:
            png = archive.raw(f"/instances/{known[path.stem]}/frames/{frame}/preview")
            picture = np.asarray(Image.open(BytesIO(png)).convert("L"), dtype=np.float64)
            assert alike(picture, grey(dataset, frame)) > 0.97


@pytest.mark.dcmtk
def test_dcmtk_renders_every_image(derived: dict[str, list[Path]], tmp_path: Path) -> None:
    for path in images(derived):
        dataset = read(path)
        for frame in {1, len(frames_of(dataset))}:
            target = tmp_path / "frame.png"
            # +Wm: the window is the range of the pixels.
            _run("/usr/bin/dcmj2pnm", "+on", "+Wm", "+F", str(frame), path, target)
            picture = np.asarray(Image.open(target).convert("L"), dtype=np.float64)
            assert alike(picture, grey(dataset, frame - 1)) > 0.99


@pytest.mark.dcmtk
def test_dcmtk_renders_images_through_their_presentation_states(
    derived: dict[str, list[Path]], tmp_path: Path
) -> None:
    by_uid = {path.stem: path for path in images(derived)}
    for path in of_class(derived, GSPS):
        image = read(path).ReferencedSeriesSequence[0].ReferencedImageSequence[0]
        shown = by_uid[str(image.ReferencedSOPInstanceUID)]
        target = tmp_path / "shown.pgm"
        _run("/usr/bin/dcmp2pgm", "-p", path, shown, target)
        picture = np.asarray(Image.open(target), dtype=np.float64)
        frame = int(np.ravel(image.get("ReferencedFrameNumber", 1))[0]) - 1
        assert np.ptp(picture) > 100
        assert alike(picture, grey(read(shown), frame)) > 0.9
