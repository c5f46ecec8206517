"""The spool: files that are durable before anyone is told so.

    incoming/<aa>/<sha256>.dcm         received bytes, named by their digest
    outgoing/<series>/<sop>.dcm        restored instances, named by their UIDs
    quarantine/<sha256>.dcm, .txt      what did not parse, and why
    review/<job>/                      report.html and montage.png for who reviews the result
    early/<series>/                    slices restored ahead: `dicom_node.early_results`
    temporary/                         files being written; never read

A file is written to `temporary`, flushed, renamed, and its folder flushed; so its name means that
its bytes are on stable storage. A received instance gets its name before the flush of its bytes, so
that one commit of the file system's journal takes both; file and folder are flushed together.
Its name is the digest of its bytes, and `secure` tells after a loss of power whether it says the
truth. A crash leaves at worst a temporary file or a received file that no row names.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from dicom_node.disk import Disk
from dicom_node.draft import Draft, alone, opened_folder, storage_errors
from dicom_node.errors import NotFoundError, PermanentError

# PS3.5 9.1 allows digits and dots only; nothing else may reach a path.
_UID = re.compile(r"[0-9.]{1,64}")
_AREAS = ("incoming", "outgoing", "quarantine", "review", "temporary")
_PIECE = 1 << 20


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

    def __init__(
        self,
        root: Path,
        *,
        min_free_bytes: int = 0,
        min_free_percent: float = 0,
        resume_factor: float = 1,
    ) -> None:
        self.root = root.resolve()
        self.disk = Disk(
            self.root,
            min_free_bytes=min_free_bytes,
            min_free_percent=min_free_percent,
            resume_factor=resume_factor,
        )
        # Unique among the processes that share the folder, and after a restart.
        self._token, self._numbers = secrets.token_hex(8), itertools.count()
        with storage_errors():
            for area in _AREAS:
                _make_folder(self.root / area)
            # Made beforehand, so that no write depends on an entry another thread has yet to flush.
            for number in range(256):
                (self.root / f"incoming/{number:02x}").mkdir(exist_ok=True)
            _flush_folder(self.root / "incoming")

    def has_room(self, extra_bytes: int = 0) -> bool:
        """Tell whether more may come, and the disk keeps its reserve with so many bytes more."""
        return self.disk.has_room(extra_bytes)

    def write(self, data: bytes | Iterable[bytes]) -> StoredFile:
        """Store a received instance under the digest of its bytes; again is no error."""
        with self.draft() as draft:
            for chunk in (data,) if isinstance(data, bytes) else data:
                draft.write((chunk,))
            return self.keep(draft)

    def draft(self) -> Draft:
        """Begin a file whose bytes come piece by piece."""
        return Draft(f"{self.root}/temporary/{self._token}-{next(self._numbers)}.part")

    def keep(self, draft: Draft) -> StoredFile:
        """Store a draft as a received instance."""
        sha256 = draft.sha256
        path = incoming_path(sha256)
        target = f"{self.root}/{path}"
        if not draft.link(target):
            # The file that is there may be acknowledged. It gives way to one that is durable
            # already, which also repairs one that was damaged on disk.
            with storage_errors(), alone(os.path.dirname(target)):
                draft.name(target)
                _flush_folder(os.path.dirname(target))
        return StoredFile(path, sha256, draft.size)

    def flush(self, paths: Iterable[str]) -> None:
        """Make the entries of stored files durable; once for each folder."""
        with storage_errors():
            for folder in {path.rpartition("/")[0] for path in paths}:
                _flush_folder(f"{self.root}/{folder}")

    def secure(self, path: str) -> bool:
        """Make a received file that was found durable; False where its bytes are not of its name.

        Such a file was cut short by a loss of power before anybody was told that it is stored.
        """
        digest = hashlib.sha256()
        file = self.resolve(path)
        with storage_errors(), file.open("rb") as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
            os.fsync(stream.fileno())
            _flush_folder(file.parent)
        return digest.hexdigest() == file.stem

    def write_outgoing(
        self, series_uid: str, sop_uid: str, data: bytes | Sequence[bytes], *, flushed: bool = True
    ) -> StoredFile:
        """Store a restored instance under its UIDs; the same bytes again are no error.

        Where it is not *flushed*, its name is durable with `flush`, for many files at once.

        Raises:
            PermanentError: When a UID is not one.
        """
        target = self._outgoing(series_uid, sop_uid)
        with self.draft() as draft:
            draft.write((data,) if isinstance(data, bytes) else data)
            return self._name(draft, lambda _: target, flushed=flushed)

    def give_out(self, path: str, series_uid: str, sop_uid: str) -> str:
        """Make a durable file of the spool a restored instance; its path, durable with `flush`.

        Raises:
            PermanentError: When a UID is not one.
            NotFoundError: When the file is gone.
        """
        target = self._outgoing(series_uid, sop_uid)
        with storage_errors():
            _make_folder(target.parent)
            try:
                (self.root / path).rename(target)
            except FileNotFoundError:
                raise NotFoundError("a file that was written ahead is gone") from None
        return target.relative_to(self.root).as_posix()

    def write_review(self, job_id: int, files: Mapping[str, bytes]) -> str:
        """Store the report on the result of a job, replacing an earlier one; its folder."""
        folder = f"review/{job_id:d}"
        for name, data in files.items():
            self._store(data, lambda _, name=name: self.root / folder / name)  # type: ignore[misc]
        return folder

    def quarantine(self, source: bytes | Draft | Path | str, reason: str) -> StoredFile:
        """Keep bytes or a draft, or move a file, out of the way with the reason beside it."""
        if isinstance(source, Draft):
            stored = self._name(source, self._set_aside)
        elif isinstance(source, bytes):
            stored = self._store(source, self._set_aside)
        else:
            with self.open(str(source)) as file:
                stored = self._store(iter(lambda: file.read(_PIECE), b""), self._set_aside)
        note = stored.path.removesuffix(".dcm") + ".txt"
        self._store(f"{reason}\n".encode(), lambda _: self.root / note)
        if isinstance(source, str | Path):
            self.delete(str(source))
        return stored

    def set_aside(self, path: str, reason: str) -> str:
        """Move a received file to the quarantine, durably; its path there.

        A file that somebody else has moved there already is no error.
        """
        source = self.resolve(path)
        target = self._set_aside(source.stem)
        note = target.relative_to(self.root).with_suffix(".txt")
        self._store(f"{reason}\n".encode(), lambda _: self.root / note)
        with storage_errors():
            try:
                source.rename(target)
            except FileNotFoundError:
                if not target.exists():
                    raise
            _flush_folder(target.parent)
            _flush_folder(source.parent)
        return target.relative_to(self.root).as_posix()

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
        with storage_errors():
            self.resolve(path).unlink(missing_ok=True)

    def remove(self, path: str, *, unless_named_after: float) -> bool:
        """Remove a file, and the note beside it, that the ledger has let go.

        A file that somebody has stored anew since `unless_named_after` (epoch seconds) stays, and
        so does one that was stored within a second of it.
        """
        file = self.resolve(path)
        with storage_errors():
            try:
                with alone(str(file.parent)):
                    # Naming a file changes its status, not the time of its bytes.
                    if file.stat().st_ctime > unless_named_after - 1.0:
                        return False
                    file.unlink()
            except FileNotFoundError:
                return False
            file.with_suffix(".txt").unlink(missing_ok=True)
            if path.startswith("outgoing/"):
                with suppress(OSError):  # other slices of the series are in it
                    file.parent.rmdir()
        return True

    def files(self, area: Literal["outgoing", "quarantine"]) -> Iterator[str]:
        """Yield the restored files, or those that were set aside."""
        for file in sorted((self.root / area).rglob("*.dcm")):
            yield file.relative_to(self.root).as_posix()

    def remove_temporary(self, older_than: float) -> int:
        """Remove temporary files last written before `older_than` (epoch seconds)."""
        removed = 0
        for file in (self.root / "temporary").iterdir():
            with suppress(FileNotFoundError):
                if file.stat().st_mtime < older_than:
                    file.unlink()
                    removed += 1
        return removed

    def _set_aside(self, sha256: str) -> Path:
        return self.root / f"quarantine/{sha256}.dcm"

    def _store(self, data: bytes | Iterable[bytes], target: Callable[[str], Path]) -> StoredFile:
        chunks = (data,) if isinstance(data, bytes) else data
        with self.draft() as draft:
            for chunk in chunks:
                draft.write((chunk,))
            return self._name(draft, target)

    def _outgoing(self, series_uid: str, sop_uid: str) -> Path:
        for uid in (series_uid, sop_uid):
            if not _UID.fullmatch(uid) or not uid.strip("."):
                raise PermanentError("not a UID: it may hold digits and dots only")
        return self.root / f"outgoing/{series_uid}/{sop_uid}.dcm"

    def _name(
        self, draft: Draft, target: Callable[[str], Path], *, flushed: bool = True
    ) -> StoredFile:
        sha256 = draft.sha256
        path = target(sha256)
        with storage_errors():
            _make_folder(path.parent)
        draft.name(path)
        with storage_errors():
            if flushed:
                _flush_folder(path.parent)
        return StoredFile(path.relative_to(self.root).as_posix(), sha256, draft.size)


def incoming_path(sha256: str) -> str:
    """The path in the spool of a received file whose bytes have that digest."""
    return f"incoming/{sha256[:2]}/{sha256}.dcm"


def _make_folder(folder: Path) -> None:
    """Make a folder whose entry in its parent is durable."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path | str) -> None:
    with opened_folder(folder) as descriptor:
        os.fsync(descriptor)
