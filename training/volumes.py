"""Volumes that people hold as files: NumPy arrays and NIfTI images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
    return _read_nifti(source) if kind == "NIfTI" else FileVolume(_read_npy(source))


def write(out: Path, like: FileVolume, array: npt.NDArray[np.float32]) -> None:
    """Write ``array`` as the kind of file that ``like`` was read from."""
    if _kind(out) == "NIfTI":
        import nibabel

        # [slice, row, column] back to the file's [x, y, z]
        image = nibabel.Nifti1Image(np.ascontiguousarray(array.T), like.affine)  # type: ignore[no-untyped-call]
        nibabel.save(image, out)
        return
    with out.open("xb") as file:
        np.save(file, array, allow_pickle=False)


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
        array = np.asarray(image.dataobj, np.float32)
    except (OSError, ValueError, EOFError, nibabel.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path} cannot be read as NIfTI: {error}") from error
    if array.ndim != 3:
        raise ValueError(f"{path} must have three dimensions, not {array.ndim}")
    x, y, z = (float(size) for size in image.header.get_zooms())
    return FileVolume(np.ascontiguousarray(array.T), (z, y, x), image.affine)
