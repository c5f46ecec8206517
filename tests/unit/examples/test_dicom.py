"""Phantoms as DICOM series: values come back, slices are in their places."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from examples.main_job.dicom import Scan, suv_to_bqml, write
from examples.main_job.series import read_folder

NOW = datetime(2026, 3, 4, 9, 30, tzinfo=UTC)


def _scan(modality: str, low: float, high: float) -> Scan:
    volume = np.random.default_rng(1).uniform(low, high, (3, 5, 7)).astype(np.float32)
    return Scan(modality, "phantom", volume, (4.0, 1.5, 2.0), NOW)


@pytest.mark.parametrize(
    ("scan", "unit", "step"),
    [
        (_scan("CT", -1000, 2000), 1.0, 0.5),
        (_scan("MR", 0, 1200), 1.0, 0.5),
        (_scan("PT", 0, 12), suv_to_bqml(), 12 / 32767),
    ],
    ids=["CT", "MR", "PT"],
)
def test_stored_values_are_the_volume_to_half_a_step(
    scan: Scan, unit: float, step: float, tmp_path: Path
) -> None:
    _, files = write(scan, tmp_path)
    for path, plane in zip(files, scan.volume, strict=True):
        dataset = dcmread(path)
        slope = float(dataset.get("RescaleSlope", 1))
        values = dataset.pixel_array * slope + float(dataset.get("RescaleIntercept", 0))
        assert np.abs(values / unit - plane).max() <= step * 1.001


def test_slices_run_from_head_to_feet_at_their_distance(tmp_path: Path) -> None:
    _, files = write(_scan("CT", -1000, 1000), tmp_path)
    heights = [float(dcmread(path).ImagePositionPatient[2]) for path in files]
    assert np.diff(heights).tolist() == [-4.0, -4.0]


def test_a_pet_slice_has_a_slope_of_its_own(tmp_path: Path) -> None:
    _, files = write(_scan("PT", 0, 12), tmp_path)
    assert len({float(dcmread(path).RescaleSlope) for path in files}) == len(files)


def test_a_folder_is_sorted_into_its_series(tmp_path: Path) -> None:
    uids = {write(_scan(modality, 0, 10), tmp_path / modality)[0] for modality in ("CT", "MR")}
    (tmp_path / "notes.txt").write_text("not an image", encoding="utf-8")
    found = read_folder(tmp_path)
    assert {source.series_instance_uid for source in found} == uids
    assert [len(source.files) for source in found] == [3, 3]
    assert all(source.truth is None for source in found)


def test_a_folder_without_series_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no DICOM series"):
        read_folder(tmp_path)
