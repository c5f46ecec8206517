from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from training.volumes import read, write


def volume() -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    return np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)


def test_a_numpy_array_comes_back(tmp_path: Path) -> None:
    source, out = tmp_path / "in.npy", tmp_path / "out.npy"
    np.save(source, volume())
    held = read(source, out)
    write(out, held, volume() + 1)
    np.testing.assert_array_equal(held.array, volume())
    np.testing.assert_array_equal(np.load(out), volume() + 1)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_image_keeps_its_place_in_space(tmp_path: Path, suffix: str) -> None:
    source, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    affine = np.diag([0.5, 0.7, 3.0, 1.0])
    affine[:3, 3] = (-10, 5, 2)
    nibabel.save(nibabel.Nifti1Image(volume().T, affine), source)
    held = read(source, out)
    assert held.spacing_mm == pytest.approx((3.0, 0.7, 0.5))
    np.testing.assert_array_equal(held.array, volume())
    write(out, held, volume() * 2)
    image = nibabel.load(out)
    np.testing.assert_allclose(image.affine, affine)
    np.testing.assert_array_equal(np.asarray(image.dataobj), volume().T * 2)


def test_another_kind_of_output_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", volume())
    with pytest.raises(ValueError, match=r"out\.nii must be a NumPy file"):
        read(tmp_path / "in.npy", tmp_path / "out.nii")


def test_another_kind_of_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scan\.dcm is neither"):
        read(tmp_path / "scan.dcm", tmp_path / "out.npy")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    for name in ("in.npy", "out.npy"):
        np.save(tmp_path / name, volume())
    with pytest.raises(ValueError, match=r"out\.npy exists"):
        read(tmp_path / "in.npy", tmp_path / "out.npy")


@pytest.mark.parametrize("name", ["broken.npy", "broken.nii"])
def test_a_file_that_is_not_what_it_is_called_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read(tmp_path / name, tmp_path / f"out-{name}")


def test_a_nifti_of_four_dimensions_is_refused(tmp_path: Path) -> None:
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((2, 2, 2, 2), np.float32), np.eye(4)), tmp_path / "x.nii"
    )
    with pytest.raises(ValueError, match="three dimensions, not 4"):
        read(tmp_path / "x.nii", tmp_path / "y.nii")
