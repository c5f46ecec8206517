"""Slices that were restored before their series was complete: files that may be lost at any time.

    early/<series>/<key>          one result: the digest of the rest, and the rest
    early/<series>/<key>-NAME     what belongs to it and is read by itself, in the same way
    early/<series>/<key>.part     being made; who makes it holds a lock on it
    early/<series>/<sha256>.dcm   a whole restored instance, durable: `dicom_node.rehearsal`

The key is the digest of all that the result rests on. Nothing else here is durable, and
no row names any of it: a result that is gone, or whose bytes are not those of its digest, is made
again by the job.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from dicom_node.draft import storage_errors
from dicom_node.observability import get_logger
from dicom_node.spool import Spool, StoredFile

_log = get_logger(__name__)

_DIGEST = 32
# PS3.5 9.1; nothing else may reach a path.
_UID = re.compile(r"[0-9.]{1,64}")
_PART = ".part"


class Claim:
    """The right to make one result; of all processes one has it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def keep(self, octets: bytes, beside: Mapping[str, bytes] | None = None) -> None:
        """Make the result visible, whole or not at all; OSError where it cannot be stored.

        Before it, what is to lie *beside* it, by the ends of the names: only who has the claim
        writes that, and what is cut short is known by its digest.
        """
        name = self._path.with_suffix("")
        for end, part in (beside or {}).items():
            with name.with_name(name.name + end).open("wb") as file:
                file.write(hashlib.sha256(part).digest())
                file.write(part)
        os.ftruncate(self._descriptor, 0)
        left = memoryview(hashlib.sha256(octets).digest() + octets)
        while left:
            left = left[os.write(self._descriptor, left) :]
        os.rename(self._path, name)


class EarlyResults:
    """The folder of early results; any number of processes may use it at once."""

    def __init__(self, spool: Spool) -> None:
        self._root = spool.root / "early"
        self._disk = spool.disk
        self._draft = spool.draft

    def has(self, series_uid: str, key: str) -> bool:
        """Whether a result is there, damaged or not."""
        return self._folder(series_uid).joinpath(key).exists()

    def read(self, series_uid: str, key: str) -> bytes | None:
        """The result, or None where there is none that can be trusted; a damaged one is removed."""
        path = self._folder(series_uid) / key
        try:
            with path.open("rb", buffering=0) as file:
                digest, octets = file.read(_DIGEST), file.readall()
        except OSError:
            return None
        if hashlib.sha256(octets).digest() == digest:
            return octets
        _log.warning("early result damaged", action="early_damaged", series_instance_uid=series_uid)
        path.unlink(missing_ok=True)
        return None

    def has_room(self, size: int) -> bool:
        """Whether the disk stays above its upper mark: no sender may be turned away for this."""
        try:
            space = self._disk.space()
        except OSError:
            return False
        return space.free - size >= space.marks.high

    @contextmanager
    def claimed(self, series_uid: str, key: str) -> Generator[Claim | None]:
        """Claim a result that is to be made; None where it is there or another makes it.

        What was not kept at the end leaves nothing; the lock ends with the process.
        """
        folder = self._folder(series_uid)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (key + _PART)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # Who had it may have ended between the two calls: the file has its own name then.
            if os.fstat(descriptor).st_nlink == 0 or not path.exists() or self.has(series_uid, key):
                path.unlink(missing_ok=True)
                yield None
                return
            try:
                yield Claim(path, descriptor)
            finally:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def store(self, series_uid: str, pieces: Sequence[bytes]) -> StoredFile:
        """Store a whole restored instance, for `Spool.give_out`; SpoolFullError as a spool's.

        Its name is the digest of its bytes: a process that makes others of the same instance, by
        settings that have changed since, takes nothing away from this one.
        """
        folder = self._folder(series_uid)
        with storage_errors(), self._draft() as draft:
            folder.mkdir(parents=True, exist_ok=True)
            draft.write(pieces)
            target = folder / f"{draft.sha256}.dcm"
            draft.name(target)
            path = target.relative_to(self._root.parent).as_posix()
            return StoredFile(path, draft.sha256, draft.size)

    def remove(self, series_uid: str, names: Iterable[str]) -> None:
        """Remove results that are of no use any more, by their keys or the names of their files."""
        folder = self._folder(series_uid)
        for name in names:
            with suppress(OSError):
                folder.joinpath(name).unlink(missing_ok=True)
        with suppress(OSError):  # others are in it, or it is gone
            folder.rmdir()

    def sweep(self, in_hand: Callable[[Set[str]], Set[str]], older_than: float) -> int:
        """Remove the results of series that are not in hand, and old ones; how many.

        *in_hand* tells which of the series that are given may still need them; *older_than* is in
        seconds since 1970 UTC.
        """
        if not self._root.is_dir():
            return 0
        folders = {folder.name: folder for folder in self._root.iterdir()}
        wanted = in_hand(folders.keys())
        removed = 0
        for name, folder in folders.items():
            with suppress(OSError):  # a job that ended meanwhile has removed it
                for path in list(folder.iterdir()):
                    with suppress(OSError):
                        if name not in wanted or path.stat().st_mtime < older_than:
                            path.unlink()
                            removed += 1
                folder.rmdir()
        return removed

    def _folder(self, series_uid: str) -> Path:
        if not _UID.fullmatch(series_uid) or not series_uid.strip("."):
            # A sender may write anything there: a name of our own is as good for a folder.
            series_uid = str(int(hashlib.sha256(series_uid.encode()).hexdigest()[:30], 16))
        return self._root / series_uid
