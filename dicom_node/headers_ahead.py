"""Headers of what has come, read before they are asked for: reading one takes 5 ms."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

from pydicom.dataset import Dataset

from dicom_node.dicom.sharing import Shared
from dicom_node.dicom.volume import read_slice_header

# Elements that headers of a series have in common, or may yet.
_MOST_SHARED = 4000


class HeadersAhead:
    """The headers of series by file, so many in all; each takes some 6 kB."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._of: dict[str, tuple[dict[Path, Dataset], Shared]] = {}

    def read(self, series_uid: str, path: Path) -> Dataset:
        """Read a header and keep it; errors as for `volume.read_slice_header`.

        Where there are too many, those of the series that came first are let go.
        """
        headers, shared = self._of.setdefault(series_uid, ({}, Shared()))
        if path in headers:
            return headers[path]
        if len(shared) > _MOST_SHARED:
            shared.clear()
        header = headers[path] = read_slice_header(path, shared)
        self._count += 1
        while self._count > self._most and self._of:
            self.taken(next(iter(self._of)))
        return header

    def of(self, series_uid: str) -> Mapping[Path, Dataset]:
        """Those of a series; they are to be read, not written."""
        return self._of[series_uid][0] if series_uid in self._of else {}

    def keep_only(self, series_uids: Set[str]) -> None:
        """Let the headers of all other series go."""
        for gone in self._of.keys() - series_uids:
            self.taken(gone)

    def taken(self, series_uid: str) -> Mapping[Path, Dataset]:
        """Those of a series, which are not kept any more."""
        headers, _ = self._of.pop(series_uid, ({}, None))
        self._count -= len(headers)
        return headers
