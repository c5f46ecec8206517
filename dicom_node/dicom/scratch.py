"""Arrays of a volume that need not be in memory: mapped files that the kernel takes pages back of.

A long series must not take more memory than a short one. Small arrays are plain memory; of large
ones only the slices in hand stay resident where `release` is called between slices.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Scratch"]

# Bytes from which an array goes into a file.
_LARGE = 1 << 26


class Scratch:
    """Makes the arrays of one job; they live as long as something refers to them."""

    def __init__(self, folder: Path | None = None, *, large: int = _LARGE) -> None:
        """Files are made in *folder* without a name, arrays of *large* bytes on; None: no files."""
        self._folder = folder
        self._large = large
        self._maps: list[mmap.mmap] = []
        self._chunk: npt.NDArray[np.uint8] | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of any values; in memory where the disk has no room for it."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        mapped = self._mapped(size) if self._folder is not None and size >= self._large else None
        if mapped is None:
            return np.empty(shape, kind)
        return np.ndarray(shape, kind, buffer=mapped)

    def keep(self, plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A copy of an array, beside those that were kept before."""
        size = plane.nbytes
        if self._chunk is None or self._used + size > len(self._chunk):
            self._chunk, self._used = self.empty((max(self._large, size),), np.uint8), 0
        kept = self._chunk[self._used : self._used + size].view(plane.dtype).reshape(plane.shape)
        # What follows begins at a multiple of the largest item.
        self._used += -(-size // 16) * 16
        kept[...] = plane
        return kept

    def release(self) -> None:
        """Let the kernel have the pages of all files; their values stay."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def _mapped(self, size: int) -> mmap.mmap | None:
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # A file with holes would end the process where the disk fills up later.
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError:
            return None
        self._maps.append(mapped)
        return mapped
