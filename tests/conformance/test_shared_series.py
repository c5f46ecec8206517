"""Every series of the shared data folder: a derived series, or the right reason for none.

Each folder is gone through as the node goes through what it receives: read, judge, divide, load,
derive. Pixels come back bit-exact when nothing was restored, and a derived object has no error
that its source does not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.dicom import division, volume
from dicom_node.dicom.derived import DerivedInstance
from dicom_node.dicom.header import (
    instance_summary,
    quiet_pydicom,
    read_header,
    why_ignored,
)
from dicom_node.dicom.volume import SeriesVolume
from dicom_node.errors import PermanentError, RefusedError, UnreadableInstanceError
from dicom_node.settings import PolicySettings
from tests.conformance.conftest import Validators
from tests.unit.dicom_node.dicom.conftest import TASKS, derive

POLICY = PolicySettings()

# Folder → what becomes of it: "derived" with the instances of each volume, or the reason.
EXPECTED: dict[str, list[str]] = {
    "ct_enhanced_multiframe": ["ignored: a multi-frame image"],
    "ct_ge_crlm1006": ["derived 8"],
    "ct_ge_missing_slice": ["derived 4, runs of 3 + 1"],
    "ct_ge_petct_lowdose": ["derived 10"],
    "ct_ge_tilt_varspacing": ["derived 5", "derived 5"],
    "ct_philips_exam_summary": ["ignored: a secondary capture"],
    "ct_philips_localizer": ["ignored: a localizer"],
    "ct_philips_tilt_phantom": ["derived 6"],
    "ct_siemens_j2k": ["rejected: SOPClassUID is absent"],
    "ct_siemens_odd_strings": ["derived 1", "derived 1", "derived 1"],
    "ct_siemens_tilt": ["derived 4"],
    "ct_toshiba_mpr": ["derived 1", "refused: ImageType MPR", "refused: ImageType MPR"],
    "ct_ts_variants": ["derived 1"] * 8,
    "mr_enh_hyperfine": ["ignored: a multi-frame image"],
    "mr_enh_philips": ["ignored: a multi-frame image"],
    "mr_enh_siemens": ["ignored: a multi-frame image"],
    "mr_ge": ["derived 4"],
    "mr_hitachi_iso2022": ["derived 4"],
    "mr_mixed_orientation": ["refused: slices of several orientations"],
    "mr_multiecho_one_series": ["derived 6", "derived 6"],
    "mr_philips_implicit": ["derived 4"],
    "mr_siemens_haste_coronal": ["derived 8"],
    "mr_siemens_mprage": ["derived 4"],
    "mr_siemens_t2_tse": ["derived 8, runs of 6 + 2"],
    "mr_toshiba_t2_abdomen": ["derived 5"],
    "mr_ts_j2k": ["derived 4"],
    "mr_ts_jpeg_lossless": ["derived 4"],
    "mr_ts_jpegls": ["derived 4"],
    "mr_ts_rle": ["derived 4"],
    "mr_two_slices": ["derived 2"],
    "mr_uih_t1": ["derived 4 of 160"],
    "pet_ge_slope_per_slice": ["derived 40 of 267"],
    "pet_gml_nonsquare": ["derived 92"],
}


@dataclass(frozen=True)
class Outcome:
    """What became of one volume or instance; paths of the sources by SOP Instance UID."""

    said: str
    series: SeriesVolume | None = None
    paths: dict[str, Path] | None = None


def go_through(folder: Path) -> Iterator[Outcome]:
    """Every outcome of one folder, in an order that does not depend on the file system."""
    series: dict[str, dict[str, Path]] = {}
    reasons: dict[str, None] = {}
    for path in sorted(folder.glob("*.dcm")):
        try:
            header = read_header(path, whole=True)
            summary = instance_summary(header)
        except UnreadableInstanceError as error:
            reasons[f"rejected: {error.message}"] = None
            continue
        if ignored := why_ignored(header):
            reasons[f"ignored: {ignored}"] = None
            continue
        series.setdefault(summary.series_instance_uid, {})[summary.sop_instance_uid] = path
    yield from map(Outcome, reasons)
    for paths in series.values():
        yield from restore(paths)


def restore(paths: dict[str, Path]) -> Iterator[Outcome]:
    headers = [read_header(path) for path in paths.values()]
    task = TASKS[headers[0].Modality]
    for group in division.group_volumes(headers, POLICY.split_by):
        try:
            members = [paths[uid] for uid in group.sop_instance_uids]
            loaded = volume.load(members, task, POLICY)
        except RefusedError as error:
            yield Outcome(f"refused: {error.message}")
            continue
        yield Outcome(f"derived {len(members)}{said(group.note)}", loaded, paths)


def said(note: str | None) -> str:
    if note is None:
        return ""
    announced = re.match(r"\d+( of )the (\d+)", note)
    return "".join(announced.groups()) if announced else f", {note.split(': ')[-1]}"


@pytest.fixture(scope="session")
def shared_dicom(shared_data: Path) -> Path:
    return shared_data / "dicom"


def test_the_table_names_every_folder(shared_dicom: Path) -> None:
    folders = {path.name for path in shared_dicom.iterdir() if path.is_dir()}
    assert folders == set(EXPECTED)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_real_series_is_derived_or_left_with_the_right_reason(
    shared_dicom: Path,
    validators: Validators,
    written: Callable[[Iterable[bytes]], list[Path]],
    name: str,
) -> None:
    outcomes = list(go_through(shared_dicom / name))
    found = sorted(outcome.said for outcome in outcomes)
    for outcome, wanted in zip(found, sorted(EXPECTED[name]), strict=True):
        assert outcome.startswith(wanted)
    for outcome in outcomes:
        if outcome.series is None or outcome.paths is None:
            continue
        made = derive(outcome.series)
        assert_bit_exact(made, outcome.paths)
        # Slices of one series differ in few attributes; first, middle and last stand for all.
        ends = {made[i].source_sop_instance_uid for i in (0, len(made) // 2, len(made) - 1)}
        sources = [outcome.paths[uid] for uid in sorted(ends)]
        assert_no_new_errors(sources, validators, written)


def assert_bit_exact(made: list[DerivedInstance], paths: dict[str, Path]) -> None:
    """The pixels of an unrestored volume are those that pydicom reads from the sources."""
    for instance in made:
        with quiet_pydicom():
            source = pydicom.dcmread(paths[instance.source_sop_instance_uid]).pixel_array
            assert np.array_equal(pydicom.dcmread(BytesIO(instance.data)).pixel_array, source)
        assert instance.clamped == 0


def assert_no_new_errors(
    paths: list[Path],
    validators: Validators,
    written: Callable[[Iterable[bytes]], list[Path]],
) -> None:
    """Restored slices have no error, and contradict nothing, that their sources do not."""
    by_uid = {str(read_header(path).SOPInstanceUID): path for path in paths}
    loaded = volume.load(paths, TASKS[read_header(paths[0]).Modality], POLICY)
    made = derive(loaded, loaded.array * 0.98)
    plain = [inflated(by_uid[instance.source_sop_instance_uid]) for instance in made]
    files = written([*plain, *(instance.data for instance in made)])
    sources, derived = files[: len(made)], files[len(made) :]
    for source, path in zip(sources, derived, strict=True):
        new = validators.errors(path) - validators.errors(source)
        assert not new
    before = contradictions(validators, sources)
    assert contradictions(validators, [*sources, *derived]) <= before


def inflated(path: Path) -> bytes:
    """The file; a deflated one in plain encoding, since the validators inflate nothing."""
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        if not dataset.file_meta.TransferSyntaxUID.is_deflated:
            return path.read_bytes()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        buffer = BytesIO()
        dataset.save_as(buffer)
    return buffer.getvalue()


def contradictions(validators: Validators, paths: list[Path]) -> set[str]:
    """Errors between objects, without file names.

    A warning says that one object lacks what another has empty: derived objects have every
    type 2 attribute, and sources often do not.
    """
    lines = validators.contradictions(paths)
    return {re.sub(r"<[^<>]*[.]dcm>", "<file>", line) for line in lines if line[:5] == "Error"}


def test_the_refused_and_the_rejected_are_permanent_errors() -> None:
    assert issubclass(RefusedError, PermanentError)
    assert issubclass(UnreadableInstanceError, PermanentError)
