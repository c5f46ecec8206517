"""Loading volumes into physical units: classic series, and multi-frame images part by part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread, dcmwrite
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import RLELossless

from dicom_node.dicom import pixels, volume
from dicom_node.dicom.header import quiet_pydicom
from dicom_node.dicom.volume import SeriesVolume, load_volumes
from dicom_node.errors import RefusedError, UnreadableInstanceError
from dicom_node.settings import PolicySettings
from tests.factories import make_series, phantom, write_series
from tests.multiframe import legacy_converted, make_enhanced
from tests.unit.dicom_node.dicom.conftest import TASKS

Load = Callable[[list[Dataset]], SeriesVolume]


def test_ct_is_loaded_in_hounsfield_units(load: Load) -> None:
    truth = phantom("CT", (5, 12, 20), seed=3)
    loaded = load(make_series("CT", physical=truth, spacing=(0.8, 1.1), slice_spacing=2.5))
    assert loaded.array.dtype == np.float32
    assert np.abs(loaded.array - truth).max() <= 0.5  # the stored step is 1 HU
    assert loaded.spacing == (2.5, 0.8, 1.1)
    assert loaded.scale.units == "HU"
    assert loaded.padding is None
    assert loaded.runs == (range(5),)
    assert all("PixelData" not in header for header in loaded.headers)


def test_pet_is_loaded_in_suv_with_a_slope_for_each_slice(load: Load) -> None:
    truth = phantom("PT", (4, 16, 16), seed=3)
    loaded = load(make_series("PT", physical=truth))
    per_bq = 70_000 / (350e6 * 2 ** (-3600 / 6586.2))
    assert len({rescale.slope for rescale in loaded.scale.rescales}) == 4
    assert loaded.scale.units == "SUV"
    assert np.abs(loaded.array - truth * per_bq).max() <= per_bq  # a stored step is below 1 Bq/ml


def test_mr_is_loaded_in_its_own_units(load: Load) -> None:
    truth = phantom("MR", (3, 16, 16), seed=3)
    loaded = load(make_series("MR", physical=truth, plane="oblique"))
    assert np.abs(loaded.array - truth).max() <= 0.5
    assert loaded.scale.units == "a.u."
    assert loaded.stored.dtype == np.uint16


def test_pet_without_suv_is_loaded_by_a_stored_scale(load: Load) -> None:
    loaded = load(make_series("PT", slices=3, Units="CNTS"))
    assert loaded.scale.units == "scaled"
    assert float(np.quantile(loaded.array, 0.999)) == pytest.approx(10.0, rel=1e-3)
    assert any("no SUV" in warning for warning in loaded.warnings)


def test_padding_is_marked(load: Load) -> None:
    loaded = load(make_series("CT", slices=3, padding=-2000))
    assert loaded.padding is not None
    assert (loaded.stored[loaded.padding] == -2000).all()


def test_a_gap_is_a_warning_and_makes_runs(load: Load) -> None:
    loaded = load(make_series("CT", slices=6, rows=8, missing=[2]))
    assert loaded.runs == (range(2), range(2, 5))
    assert loaded.warnings == ("slices are missing or unevenly spaced: runs of 2 + 3",)


def test_a_refused_volume_says_every_reason(tmp_path: Path, policy: PolicySettings) -> None:
    paths = write_series(
        make_series("CT", slices=2, plane="coronal", BurnedInAnnotation="YES"), tmp_path
    )
    with pytest.raises(RefusedError, match=r"burned.*; coronal"):
        volume.load(paths, "ct_denoise", policy)
    with pytest.raises(RefusedError, match="no instance"):
        volume.load([], "ct_denoise", policy)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("NumberOfFrames", b"1e400 "), ("PixelPaddingValue", b"1")],
)
def test_a_decisive_value_that_cannot_be_read_is_not_taken_for_absent(
    keyword: str, value: bytes, tmp_path: Path, policy: PolicySettings
) -> None:
    (path,) = write_series(make_series("CT", slices=1), tmp_path)
    with quiet_pydicom():
        dataset = dcmread(path)
        kind = dictionary_VR(keyword).partition(" or ")[0]
        raw = RawDataElement(Tag(keyword), kind, len(value), value, 0, False, True)
        dataset._dict[Tag(keyword)] = raw
        dcmwrite(path, dataset)
    with pytest.raises(UnreadableInstanceError, match=f"{keyword} has a value that is none"):
        next(load_volumes([path], "ct_denoise", policy))


def test_pixels_that_end_early_are_unreadable(tmp_path: Path, policy: PolicySettings) -> None:
    (path,) = write_series(make_series("CT", slices=1), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnreadableInstanceError):
        volume.load([path], "ct_denoise", policy)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("make", [make_enhanced, legacy_converted])
def test_a_multi_frame_image_is_loaded_as_the_classic_series_would_be(
    tmp_path: Path, policy: PolicySettings, modality: Any, make: Any
) -> None:
    shape = {"slices": 3, "rows": 9, "columns": 14, "spacing": (0.7, 1.2)}
    classic = volume.load(
        write_series(make_series(modality, **shape), tmp_path / "classic"), TASKS[modality], policy
    )
    paths = write_series([make(modality, **shape)], tmp_path / "one")
    (loaded,) = volume.load_volumes(paths, TASKS[modality], policy)
    assert np.array_equal(loaded.array, classic.array)
    assert np.array_equal(loaded.stored, classic.stored)
    assert np.allclose(loaded.affine, classic.affine)
    assert (loaded.spacing, loaded.scale.units) == (classic.spacing, classic.scale.units)
    assert loaded.scale.rescales == classic.scale.rescales
    assert loaded.source is not None
    assert "PixelData" not in loaded.source


def test_volumes_of_one_image_come_one_after_the_other(
    tmp_path: Path, policy: PolicySettings
) -> None:
    paths = write_series([make_enhanced("MR", slices=3, rows=8, volumes=2)], tmp_path)
    first, second = volume.load_volumes(paths, "mri_sr", policy)
    assert (first.frames, second.frames) == ((1, 3, 5), (2, 4, 6))
    truth = [phantom("MR", (3, 8, 8), seed) for seed in (0, 1)]
    assert np.abs(first.array - truth[0]).max() <= 0.5
    assert np.abs(second.array - truth[1]).max() <= 0.5


def test_only_one_frame_is_decoded_at_a_time(
    tmp_path: Path, policy: PolicySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, ...]] = []
    real = pixels.pixel_array

    def watched(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        decoded.append(found.shape)
        return found

    monkeypatch.setattr(pixels, "pixel_array", watched)
    image = make_enhanced("CT", slices=4, rows=8, transfer_syntax=RLELossless)
    list(volume.load_volumes(write_series([image], tmp_path), "ct_denoise", policy))
    assert decoded == [(8, 8)] * 4


def test_a_file_of_several_volumes_is_not_one(tmp_path: Path, policy: PolicySettings) -> None:
    paths = write_series([make_enhanced("MR", slices=2, rows=8, volumes=2)], tmp_path)
    with pytest.raises(RefusedError, match="several volumes"):
        volume.load(paths, "mri_sr", policy)
