"""The journal of the receive role: bytes that are durable before the files that hold them are.

A new file survives a loss of power once the file system has committed its own journal, together
with whatever else anybody has changed on that disk.  Blocks that were written before only need
their data flushed.  So a received instance is copied to the end of such blocks, one flush serves
all that wait, and a thread of the journal flushes the files themselves a little later.  Then the
blocks are used again.

    journal/<number>.seg    records: a head of 4096 octets, then a file's bytes, to a whole 4096
    journal/lock            held by the one process that writes them

A record tells its bytes by their digest, which is also the name of their file in `incoming`: after
a loss of power `Journal.recover` writes again every file that is not there as it was received.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dicom_node.draft import flush_file
from dicom_node.errors import NodeError
from dicom_node.observability import get_logger
from dicom_node.spool import Spool, incoming_path

SEGMENTS = 4
"""While one is written and one is settled, others wait for either to be slow."""

# The unit in which a file system writes: a torn write of one record touches no other.
_BLOCK = 4096
_HEAD = struct.Struct("<8sQQ32s")  # magic, generation, size, SHA-256; then a CRC-32 of these
_CRC = struct.Struct("<L")
_MAGIC = b"DNJRNL\0\1"
_PIECE = 1 << 20
# Of what an idle node has received last, so long only the journal is durable.
_SETTLED_AFTER_S = 2.0

_log = get_logger(__name__)


class Source(Protocol):
    """A file that is written and has its name, but is not flushed."""

    @property
    def sha256(self) -> str:
        """The digest of its bytes, in hexadecimal."""

    @property
    def size(self) -> int:
        """Its size in bytes."""

    def read(self, buffer: memoryview, offset: int) -> int:
        """Fill *buffer* with its bytes from *offset* on; how many."""


@dataclass(frozen=True)
class Record:
    """One file in a segment: the digest of its bytes in hexadecimal, and where they lie."""

    generation: int
    sha256: str
    size: int
    offset: int


@dataclass
class _Segment:
    path: Path
    descriptor: int
    end: int = 0
    records: list[Record] = field(default_factory=list)
    #: Tells the records of one use of the blocks from those of the use before.
    generation: int = field(default_factory=lambda: secrets.randbits(64))
    #: Its files could not be flushed: they are written again from here.
    suspect: bool = False

    def reset(self) -> None:
        """Begin another use."""
        self.end, self.records, self.suspect = 0, [], False
        self.generation = secrets.randbits(64)


class Journal:
    """Appends the bytes of received files, and settles them; for any number of threads.

    Of the processes that share a spool one has the journal.  Where it cannot be had, is full of
    files that are not settled yet, or its disk fails, `append` says that it has not kept a file,
    which must be flushed itself then: nothing rests on the journal alone that it has not kept.
    """

    def __init__(self, spool: Spool, size: int) -> None:
        """*size* in bytes, all segments together; 0: recover what is there, and keep nothing."""
        self._spool = spool
        self._folder = spool.root / "journal"
        self._segment_size = size // SEGMENTS // _BLOCK * _BLOCK
        self._changed = threading.Condition()
        self._free: list[_Segment] = []
        self._full: list[_Segment] = []
        self._current: _Segment | None = None
        self._buffer = memoryview(bytearray(_PIECE))
        self._lock = _lock(self._folder)
        self._appends = self._ends = False
        self._thread: threading.Thread | None = None

    @property
    def largest(self) -> int:
        """The size in bytes of the largest file that is worth keeping twice; 0: keeps nothing."""
        return self._segment_size // 2 if self._appends else 0

    def recover(self, let_go: Callable[[str], bool]) -> int:
        """Write again each file that a loss of power took or cut short; how many.

        Files of which *let_go* says, by their path in the spool, that the node has removed them
        stay away, and so do those that were set aside.  Call once, before `start`.

        Raises:
            NodeError: a file cannot be stored; the journal is left as it is.
        """
        if self._lock is None:
            return 0
        written = 0
        for path in sorted(self._folder.glob("*.seg")):
            with path.open("rb") as stream:
                for record in _records(stream.fileno()):
                    written += self._made_good(stream.fileno(), record, let_go)
        return written

    def start(self) -> None:
        """Prepare the segments, and begin to settle; call after `recover`."""
        if self._lock is None:
            _log.info("journal in use by another process", action="journal_in_use")
            return
        try:
            self._prepare()
        except OSError as error:
            _log.warning("no journal", action="journal_failed", error=error.strerror)
            return
        if self._free:
            self._appends = True
            self._thread = threading.Thread(target=self._settle_all, name="journal", daemon=True)
            self._thread.start()

    def append(self, sources: Sequence[Source]) -> list[bool]:
        """Keep the bytes of files by one flush; for each whether it is durable now."""
        with self._changed:
            if not self._appends:
                return [False] * len(sources)
            try:
                kept = [self._write(source) for source in sources]
                for segment in {id(each): each for each in kept if each is not None}.values():
                    os.fdatasync(segment.descriptor)
            except OSError as error:
                _log.error("journal not written", action="journal_failed", error=error.strerror)
                self._give_up()
                return [False] * len(sources)
            self._changed.notify_all()
        return [segment is not None for segment in kept]

    def close(self) -> None:
        """Settle what was kept, and let another process have the journal."""
        with self._changed:
            self._ends = True
            self._give_up()
        if self._thread is not None:
            self._thread.join()
        for segment in (*self._free, *self._full):
            os.close(segment.descriptor)
        self._free, self._full = [], []
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # Appending, with the lock held.

    def _segment_for(self, size: int) -> _Segment | None:
        """The segment that takes a file of so many bytes next."""
        needed = _BLOCK + _padded(size)
        if needed > self._segment_size:
            return None
        if self._current is not None and self._current.end + needed > self._segment_size:
            self._roll()
        if self._current is None and self._free:
            self._current = self._free.pop()
        return self._current

    def _roll(self) -> None:
        """Hand the current segment to the thread that settles."""
        if self._current is not None:
            self._full.append(self._current)
            self._current = None
            self._changed.notify_all()

    def _write(self, source: Source) -> _Segment | None:
        """Append one file, not yet flushed, to the segment that is returned; None: no room."""
        segment = self._segment_for(source.size)
        if segment is None:
            return None
        record = Record(segment.generation, source.sha256, source.size, segment.end + _BLOCK)
        os.pwrite(segment.descriptor, _head(record), segment.end)
        done = 0
        while done < record.size:
            count = source.read(self._buffer[: min(record.size - done, _PIECE)], done)
            if not count:
                raise OSError(errno.EIO, "a received file is shorter than what came")
            os.pwrite(segment.descriptor, self._buffer[:count], record.offset + done)
            done += count
        segment.records.append(record)
        segment.end = record.offset + _padded(record.size)
        return segment

    def _give_up(self) -> None:
        """Append no more; what was kept before is settled."""
        self._appends = False
        self._roll()
        self._changed.notify_all()

    # Settling, in a thread of its own.

    def _settle_all(self) -> None:
        while (segment := self._next_full()) is not None:
            settled = self._settle(segment)
            with self._changed:
                if settled:
                    self._full.remove(segment)
                    self._free.append(segment)
                elif self._ends:
                    return
                else:
                    self._changed.wait(_SETTLED_AFTER_S)

    def _next_full(self) -> _Segment | None:
        """Wait for a segment to settle; None at the end."""
        with self._changed:
            while not self._full:
                if self._ends:
                    return None
                waits = None if self._current is None else _SETTLED_AFTER_S
                if not self._changed.wait(waits):
                    self._roll()
            return self._full[0]

    def _settle(self, segment: _Segment) -> bool:
        """Make the files of a segment durable by themselves, then forget it; whether they are."""
        try:
            for record in segment.records:
                if segment.suspect:
                    # Of pages that could not be written Linux thinks afterwards that they are
                    # clean: another fsync would say nothing.
                    self._write_again(segment.descriptor, record)
                else:
                    with suppress(FileNotFoundError):  # moved or removed, which is durable
                        flush_file(self._spool.resolve(incoming_path(record.sha256)))
            self._spool.flush({incoming_path(record.sha256) for record in segment.records})
            _forget(segment.descriptor)
        except (OSError, NodeError) as error:
            segment.suspect = True
            _log.error("received files not settled", action="journal_not_settled", error=str(error))
            return False
        segment.reset()
        return True

    def _write_again(self, descriptor: int, record: Record) -> None:
        if self._spool.resolve(incoming_path(record.sha256)).exists():
            self._spool.write(_bytes(descriptor, record))

    # Recovery.

    def _made_good(self, descriptor: int, record: Record, let_go: Callable[[str], bool]) -> bool:
        """See that the file of a record is there and durable; whether it had to be written."""
        path = incoming_path(record.sha256)
        if let_go(path) or self._spool.is_set_aside(record.sha256):
            return False
        if self._spool.resolve(path).exists() and self._spool.secure(path):
            return False
        digest = hashlib.sha256()
        for piece in _bytes(descriptor, record):
            digest.update(piece)
        if digest.hexdigest() != record.sha256:
            return False  # the loss of power came before its flush: nobody was told of it
        self._spool.write(_bytes(descriptor, record))
        return True

    def _prepare(self) -> None:
        """Make the segments, or take those that are there, written to their full size."""
        for number in range(SEGMENTS if self._segment_size else 0):
            path = self._folder / f"{number}.seg"
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
            self._free.append(_Segment(path, descriptor))
            if os.fstat(descriptor).st_size != self._segment_size:
                _blank(descriptor, self._segment_size)
            _forget(descriptor)
        wanted = {segment.path for segment in self._free}
        for path in set(self._folder.glob("*.seg")) - wanted:
            path.unlink()
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _lock(folder: Path) -> int | None:
    """The lock of the journal's folder; None where another process has it."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _head(record: Record) -> bytes:
    fields = _HEAD.pack(_MAGIC, record.generation, record.size, bytes.fromhex(record.sha256))
    return (fields + _CRC.pack(zlib.crc32(fields))).ljust(_BLOCK, b"\0")


def _records(descriptor: int) -> Iterator[Record]:
    """The records of one generation from the start of a segment on."""
    at, generation = 0, None
    while len(head := os.pread(descriptor, _HEAD.size + _CRC.size, at)) == _HEAD.size + _CRC.size:
        fields = head[: _HEAD.size]
        magic, found, size, digest = _HEAD.unpack(fields)
        if magic != _MAGIC or _CRC.unpack(head[_HEAD.size :])[0] != zlib.crc32(fields):
            return
        if generation not in (None, found):
            return  # of an earlier use of these blocks
        generation = found
        yield Record(found, digest.hex(), size, at + _BLOCK)
        at += _BLOCK + _padded(size)


def _bytes(descriptor: int, record: Record) -> Iterator[bytes]:
    at, end = record.offset, record.offset + record.size
    while at < end and (piece := os.pread(descriptor, min(_PIECE, end - at), at)):
        yield piece
        at += len(piece)


def _forget(descriptor: int) -> None:
    """Let a segment have no records."""
    os.pwrite(descriptor, bytes(_BLOCK), 0)
    os.fdatasync(descriptor)


def _blank(descriptor: int, size: int) -> None:
    """Write every block of a segment once: blocks that are only reserved need a commit each."""
    os.ftruncate(descriptor, 0)
    zeros = bytes(_PIECE)
    for at in range(0, size, _PIECE):
        os.pwrite(descriptor, zeros[: size - at], at)
    os.fsync(descriptor)
