"""Arrays in files without a name hold what arrays in memory hold, and their pages can be let go."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import RLELossless

from dicom_node.dicom import derived
from dicom_node.dicom.scratch import Scratch
from dicom_node.dicom.volume import load_volumes
from dicom_node.settings import PolicySettings
from tests.factories import make_series, write_series


def resident_file_kilobytes() -> int:
    (line,) = [
        each for each in Path("/proc/self/status").read_text().splitlines() if "RssFile" in each
    ]
    return int(line.split()[1])


@pytest.mark.parametrize("large", [1, 1 << 30])
def test_an_array_keeps_its_values_when_its_pages_are_let_go(tmp_path: Path, large: int) -> None:
    scratch = Scratch(tmp_path, large=large)
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 4096, (5, 40, 33), dtype=np.int16)
    array = scratch.empty(wanted.shape, wanted.dtype)
    for i, plane in enumerate(wanted):
        array[i] = plane
        scratch.release()
    assert array.dtype == wanted.dtype
    assert np.array_equal(array, wanted)
    assert list(tmp_path.iterdir()) == []  # it has no name, and is gone with the process


def test_planes_of_any_type_are_kept_beside_each_other(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, large=1000)
    rng = np.random.default_rng(1)
    planes = [
        rng.integers(0, 100, (7, 3 + i)).astype(kind)
        for i, kind in enumerate((np.int16, np.uint8, np.float32, np.uint16, np.float64, np.int8))
    ]
    kept = [scratch.keep(plane) for plane in planes for _ in range(9)]
    scratch.release()
    for i, plane in enumerate(planes):
        for copy in kept[9 * i : 9 * i + 9]:
            assert copy.dtype == plane.dtype
            assert np.array_equal(copy, plane)


def test_pages_that_are_let_go_are_no_longer_resident(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, large=1)
    array = scratch.empty((64, 1024, 256), np.float32)
    array[:] = 1.0
    full = resident_file_kilobytes()
    scratch.release()
    assert full - resident_file_kilobytes() > 0.9 * array.nbytes / 1024
    assert array[63, 1023, 255] == 1.0


def test_a_disk_without_room_leaves_the_array_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    array = Scratch(tmp_path, large=1).empty((3, 4), np.float32)
    array[:] = 2.0
    assert array.sum() == 24.0
    assert Scratch(tmp_path / "is not there", large=1).empty((2,), np.uint8).shape == (2,)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_a_volume_in_files_is_that_in_memory(tmp_path: Path, modality: str) -> None:
    options = {"padding": -2000} if modality == "CT" else {}
    sent = make_series(modality, slices=7, rows=24, transfer_syntax=RLELossless, **options)  # type: ignore[arg-type]
    paths = write_series(sent, tmp_path / "sent")
    task = {"CT": "ct_denoise", "MR": "mri_sr", "PT": "pet_synthesis"}[modality]
    (tmp_path / "work").mkdir()
    scratch = Scratch(tmp_path / "work", large=1)
    (in_memory,) = load_volumes(paths, task, PolicySettings())
    (in_files,) = load_volumes(paths, task, PolicySettings(), scratch)
    for name in ("stored", "array", "padding", "affine"):
        ours, theirs = getattr(in_files, name), getattr(in_memory, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
    assert (in_files.padding is not None) == (modality == "CT")
    assert in_files.headers == in_memory.headers
    assert not any("PixelData" in header for header in in_files.headers)
    changed = in_memory.array * np.float32(0.9)
    for ours, theirs in zip(
        derived.quantise(in_files, changed, scratch=scratch).frames,
        derived.quantise(in_memory, changed).frames,
        strict=True,
    ):
        assert np.array_equal(ours.stored, theirs.stored)
        assert (ours.rescale, ours.clamped) == (theirs.rescale, theirs.clamped)
