"""The spool: files that are durable before anyone is told so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class StoredFile:
    """A durable file: path relative to the spool, digest of its bytes, size in bytes."""

    path: str
    sha256: str
    size: int


class Spool:
    """The folder of received, restored and quarantined files."""

    def __init__(self, root: Path, *, min_free_bytes: int = 0, min_free_percent: float = 0) -> None:
        self.root = root

    def has_room(self, extra_bytes: int = 0) -> bool:
        """Tell whether the disk keeps its reserve when so many bytes more are written."""
        raise NotImplementedError

    def write(self, data: bytes | Iterable[bytes]) -> StoredFile:
        """Store a received instance under the digest of its bytes."""
        raise NotImplementedError

    def write_outgoing(self, series_uid: str, sop_uid: str, data: bytes) -> StoredFile:
        """Store a restored instance under its UIDs."""
        raise NotImplementedError

    def quarantine(self, source: bytes | Path | str, reason: str) -> StoredFile:
        """Keep bytes, or move a file of the spool, out of the way with the reason beside it."""
        raise NotImplementedError

    def resolve(self, path: str) -> Path:
        """Return the absolute path of a file of the spool."""
        raise NotImplementedError

    def open(self, path: str) -> BinaryIO:
        """Open a file of the spool for reading."""
        raise NotImplementedError

    def orphans(self, known: Set[str]) -> Iterator[str]:
        """Yield the received files that are not known to the ledger."""
        raise NotImplementedError

    def delete(self, path: str) -> None:
        """Remove a file of the spool; one that is gone already is no error."""
        raise NotImplementedError
