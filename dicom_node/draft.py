"""A file of the spool while it is written, and how files become durable: `dicom_node.spool`."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from dicom_node import flushing
from dicom_node.errors import SpoolFullError

# IOV_MAX of Linux is 1024.
_GATHERED = 512
# So much is written before the disk is told to begin with it, while the rest still comes. Telling
# it costs as much as a quarter of the copy, so an image is told of once.
_WRITTEN_BACK = 1 << 18
# A file system without hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})

Octets = bytes | bytearray | memoryview


class Draft:
    """A file that grows in `temporary`, hashed as it grows; to be used in a with statement.

    It is gone at the end unless one of the methods of `Spool` gave it a name.  Every failure to
    store raises `SpoolFullError`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._named = False
        self._written_back = 0
        self.size = 0
        with storage_errors():
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, pieces: Sequence[Octets]) -> None:
        """Append octets, and hash them; they may change once this returns."""
        with storage_errors():
            for at in range(0, len(pieces), _GATHERED):
                self._append(pieces[at : at + _GATHERED])
            self._begin_writing_back()
        # While the disk is at it.
        for piece in pieces:
            self._digest.update(piece)

    @property
    def sha256(self) -> str:
        """The digest of the bytes so far, in hexadecimal."""
        return self._digest.hexdigest()

    def name(self, target: str | Path) -> None:
        """Make the bytes durable and visible under a path; not yet the entry of its folder."""
        with storage_errors():
            os.fsync(self._descriptor)
            os.rename(self._path, target)
        self._named = True

    def link(self, target: str) -> bool:
        """Make the bytes visible under a path that is free, and durable with it; else False.

        A loss of power in between may leave other bytes under the path: it must be known by its
        name what they should be.
        """
        with storage_errors():
            try:
                os.link(self._path, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in _NO_LINKS:
                    return False
                raise
            self._flush_linked(target)
        return True

    def close(self) -> None:
        """Remove the file unless it has been named; again is no error."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        if not self._named:
            with suppress(OSError):
                os.unlink(self._path)

    def _flush_linked(self, target: str) -> None:
        """Make the bytes and the entry of their folder durable, or take the name back."""
        try:
            with opened_folder(os.path.dirname(target)) as folder:
                of_file, of_folder = flushing.flush_together((self._descriptor, folder))
            if of_file:
                raise OSError(of_file, os.strerror(of_file))
        except OSError:
            self._take_back(target)
            raise
        if of_folder:
            raise OSError(of_folder, os.strerror(of_folder))

    def _take_back(self, target: str) -> None:
        """Remove a name that was linked to bytes which cannot be made durable."""
        with suppress(OSError), alone(os.path.dirname(target)):
            # Somebody may have stored the same bytes there, and that they are durable.
            if os.stat(target).st_ino == os.fstat(self._descriptor).st_ino:
                os.unlink(target)

    def _begin_writing_back(self) -> None:
        """Let the disk begin with what has come, so that the flush finds less to do."""
        begun, waiting = self._written_back, self.size - self._written_back
        if waiting >= _WRITTEN_BACK:
            # Of dirty pages Linux drops nothing: it starts to write them and returns. Where it
            # cannot be had nothing is lost, and what the disk has to say the flush tells.
            with suppress(OSError):
                os.posix_fadvise(self._descriptor, begun, waiting, os.POSIX_FADV_DONTNEED)
            self._written_back = self.size

    def _append(self, pieces: Sequence[Octets]) -> None:
        wanted = sum(map(len, pieces))
        self.size += wanted
        if len(pieces) == 1:
            written = os.write(self._descriptor, pieces[0])
        else:
            written = os.writev(self._descriptor, pieces)
        if written < wanted:
            # A disk that fills writes a part first.
            rest = memoryview(b"".join(pieces))[written:]
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


@contextmanager
def opened_folder(folder: Path | str) -> Iterator[int]:
    """The descriptor of a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: str) -> Iterator[None]:
    """Keep out all threads and processes that would exchange or take back a name in a folder."""
    with opened_folder(folder) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


class _StorageErrors:
    """Without a state, so that one serves all; contextlib's would cost a generator each time."""

    __slots__ = ()

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Full, over quota, read-only, broken or out of descriptors: for a sender all of them mean
        # "keep the instance and try again" (PS3.4 B.2.3, 0xA700).
        if isinstance(error, OSError):
            raise SpoolFullError(f"the spool cannot store: {error.strerror}") from error


_storage_errors = _StorageErrors()


def storage_errors() -> _StorageErrors:
    """Let every failure of the disk in a with statement be a `SpoolFullError`."""
    return _storage_errors
