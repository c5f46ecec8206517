"""Volumes that people hold as files: NumPy arrays and NIfTI images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from restoration.kspace import SAME_GRID, GridChange

NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class FileVolume:
    """An array [slice, row, column] and what its file says about space."""

    array: npt.NDArray[Any]
    spacing_mm: tuple[float, float, float] | None = None  #: slice, row and column distance
    affine: npt.NDArray[np.float64] | None = None


def read(source: Path, out: Path) -> FileVolume:
    """Read ``source``; ValueError when it is neither kind, ``out`` is another kind, or exists."""
    kind = _kind(source)
    if _kind(out) != kind:
        raise ValueError(f"{out} must be a {kind} file, as {source} is")
    if out.exists():
        raise ValueError(f"{out} exists; nothing is overwritten")
    return load(source)


def load(source: Path) -> FileVolume:
    """Read a .npy or a NIfTI file; ValueError when it is neither or cannot be read."""
    return _read_nifti(source) if _kind(source) == "NIfTI" else FileVolume(_read_npy(source))


def write(
    out: Path, like: FileVolume, array: npt.NDArray[np.float32], grid: GridChange = SAME_GRID
) -> None:
    """Write ``array`` as the kind of file that ``like`` was read from.

    ``grid`` is that of ``array`` over that of ``like``; a NIfTI file tells it by its affine.
    """
    if _kind(out) == "NIfTI":
        import nibabel

        # [slice, row, column] back to the file's [x, y, z]
        affine = None if like.affine is None else like.affine @ _index_change(grid)
        image = nibabel.Nifti1Image(np.ascontiguousarray(array.T), affine)  # type: ignore[no-untyped-call]
        nibabel.save(image, out)
        return
    with out.open("xb") as file:
        np.save(file, array, allow_pickle=False)


def _index_change(grid: GridChange) -> npt.NDArray[np.float64]:
    """From indices (x, y, z, 1) of the finer grid to those of the source."""
    change = np.diag([1 / grid.factor, 1 / grid.factor, 1.0, 1.0])
    change[:2, 3] = grid.shift[::-1]
    return change


def _kind(path: Path) -> str:
    if path.name.endswith(".npy"):
        return "NumPy"
    if path.name.endswith(NIFTI):
        return "NIfTI"
    raise ValueError(f"{path} is neither .npy nor .nii nor .nii.gz")


def _read_npy(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a NumPy array: {error}") from error
    return array


def _read_nifti(path: Path) -> FileVolume:
    import nibabel

    try:
        image: Any = nibabel.load(path)
        if image.get_data_dtype().itemsize == 1:
            raise ValueError("it is an 8-bit picture, not an image in physical units")
        array = np.asarray(image.dataobj, np.float32)
    except (OSError, ValueError, EOFError, nibabel.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path} cannot be read as NIfTI: {error}") from error
    if array.ndim != 3:
        raise ValueError(f"{path} must have three dimensions, not {array.ndim}")
    x, y, z = (float(size) for size in image.header.get_zooms())
    return FileVolume(np.ascontiguousarray(array.T), (z, y, x), image.affine)
