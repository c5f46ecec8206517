"""The spool: files that are durable before anyone is told so.

    incoming/<aa>/<sha256>.dcm         received bytes, named by their digest
    outgoing/<series>/<sop>.dcm        restored instances, named by their UIDs
    quarantine/<sha256>.dcm, .txt      what did not parse, and why
    temporary/                         files being written; never read

A file appears under its name only when its bytes are on stable storage: written to
`temporary`, flushed, renamed, and the folder flushed. A crash leaves at worst a temporary file
or a complete file that no row names.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dicom_node.errors import NotFoundError, PermanentError, SpoolFullError

# PS3.5 9.1 allows digits and dots only; nothing else may reach a path.
_UID = re.compile(r"[0-9.]{1,64}")
_AREAS = ("incoming", "outgoing", "quarantine", "temporary")


@dataclass(frozen=True)
class StoredFile:
    """A durable file: path relative to the spool, digest of its bytes, size in bytes."""

    path: str
    sha256: str
    size: int


class Spool:
    """The folder of received, restored and quarantined files.

    Any number of threads and processes may use the same folder. Every failure to store raises
    `SpoolFullError` and leaves nothing visible.
    """

    def __init__(self, root: Path, *, min_free_bytes: int = 0, min_free_percent: float = 0) -> None:
        self.root = root.resolve()
        self._min_free_bytes = min_free_bytes
        self._min_free_percent = min_free_percent
        with _storage_errors():
            for area in _AREAS:
                _make_folder(self.root / area)
            # Made beforehand, so that no write depends on an entry another thread has yet to flush.
            for number in range(256):
                (self.root / f"incoming/{number:02x}").mkdir(exist_ok=True)
            _flush_folder(self.root / "incoming")

    def has_room(self, extra_bytes: int = 0) -> bool:
        """Tell whether the disk keeps its reserve when so many bytes more are written."""
        try:
            disk = os.statvfs(self.root)
        except OSError:
            return False
        reserve = max(
            self._min_free_bytes, disk.f_blocks * disk.f_frsize * self._min_free_percent / 100
        )
        return disk.f_bavail * disk.f_frsize - extra_bytes >= reserve

    def write(self, data: bytes | Iterable[bytes]) -> StoredFile:
        """Store a received instance under the digest of its bytes; again is no error."""
        return self._store(data, lambda sha256: f"incoming/{sha256[:2]}/{sha256}.dcm")

    def write_outgoing(self, series_uid: str, sop_uid: str, data: bytes) -> StoredFile:
        """Store a restored instance under its UIDs; the same bytes again are no error.

        Raises:
            PermanentError: When a UID is not one.
        """
        for uid in (series_uid, sop_uid):
            if not _UID.fullmatch(uid) or not uid.strip("."):
                raise PermanentError("not a UID: it may hold digits and dots only")
        return self._store(data, lambda _: f"outgoing/{series_uid}/{sop_uid}.dcm")

    def quarantine(self, source: bytes | Path | str, reason: str) -> StoredFile:
        """Keep bytes, or move a file of the spool, out of the way with the reason beside it."""
        data = source if isinstance(source, bytes) else self._read(source)
        stored = self._store(data, lambda sha256: f"quarantine/{sha256}.dcm")
        note = stored.path.removesuffix(".dcm") + ".txt"
        self._store(f"{reason}\n".encode(), lambda _: note)
        if not isinstance(source, bytes):
            self.delete(str(source))
        return stored

    def resolve(self, path: str | Path) -> Path:
        """Return the absolute path of a file of the spool.

        Raises:
            PermanentError: When the path leaves the spool.
        """
        parts = PurePosixPath(path).parts
        if not parts or parts[0] not in _AREAS or ".." in parts:
            raise PermanentError("the path leaves the spool")
        return self.root.joinpath(*parts)

    def open(self, path: str) -> BinaryIO:
        """Open a file of the spool for reading.

        Raises:
            NotFoundError: When it is not there.
        """
        try:
            return self.resolve(path).open("rb")
        except FileNotFoundError:
            raise NotFoundError(f"the spool has no file {path}") from None

    def orphans(self, known: Set[str]) -> Iterator[str]:
        """Yield the received files that are not among the `known` paths."""
        for file in sorted((self.root / "incoming").glob("??/*.dcm")):
            path = file.relative_to(self.root).as_posix()
            if path not in known:
                yield path

    def delete(self, path: str) -> None:
        """Remove a file of the spool; one that is gone already is no error."""
        with _storage_errors():
            self.resolve(path).unlink(missing_ok=True)

    def remove_temporary(self, older_than: float) -> int:
        """Remove temporary files last written before `older_than` (epoch seconds)."""
        removed = 0
        for file in (self.root / "temporary").iterdir():
            with suppress(FileNotFoundError):
                if file.stat().st_mtime < older_than:
                    file.unlink()
                    removed += 1
        return removed

    def _read(self, path: Path | str) -> bytes:
        with self.open(str(path)) as file:
            return file.read()

    def _store(self, data: bytes | Iterable[bytes], name: Callable[[str], str]) -> StoredFile:
        chunks = (data,) if isinstance(data, bytes) else data
        with _storage_errors(), self._temporary() as (descriptor, temporary):
            sha256, size = _write_durably(descriptor, chunks)
            path = name(sha256)
            target = self.root / path
            _make_folder(target.parent)
            # Renaming over an equal file also repairs one that was damaged on disk.
            temporary.rename(target)
            _flush_folder(target.parent)
        return StoredFile(path, sha256, size)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[int, Path]]:
        descriptor, name = tempfile.mkstemp(dir=self.root / "temporary", suffix=".part")
        try:
            yield descriptor, Path(name)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def _write_durably(descriptor: int, chunks: Iterable[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)
    return digest.hexdigest(), size


def _make_folder(folder: Path) -> None:
    """Make a folder whose entry in its parent is durable."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors() -> Iterator[None]:
    # Full, over quota, read-only, broken or out of descriptors: for a sender all of them mean
    # "keep the instance and try again" (PS3.4 B.2.3, 0xA700).
    try:
        yield
    except OSError as error:
        raise SpoolFullError(f"the spool cannot store: {error.strerror}") from error
