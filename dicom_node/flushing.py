"""Flushes that are given to the kernel together, so that they wait for the disk once.

fsync of a new file, then of its folder, waits twice: the first commits the journal of the file
system with the bytes and the name, and the second, which finds nothing left to commit, still
tells the disk to empty its cache.  Asked at the same time both wait for the one commit.  Linux
takes several at once by its asynchronous I/O (io_submit(2), IOCB_CMD_FSYNC); where that cannot be
had, they follow one another.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

AT_ONCE = 16
"""So many descriptors are flushed together; more follow one another."""

# <linux/aio_abi.h>; the C library has no names for these calls.
_FSYNC = 2
_CALLS = {
    "x86_64": {"setup": 206, "getevents": 208, "submit": 209},
    "aarch64": {"setup": 0, "getevents": 4, "submit": 2},
}
# SYNC_FILE_RANGE_WAIT_BEFORE | _WRITE | _WAIT_AFTER
_WRITE_AND_WAIT = 7
# A file system or a kernel that does not know the call.
_UNKNOWN = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ESPIPE, errno.EPERM})


class _Request(ctypes.Structure):
    """struct iocb of a little-endian machine."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_int32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("descriptor", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("event_descriptor", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """struct io_event."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("request", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("more", ctypes.c_int64),
    )


class _Queue:
    """A queue of asynchronous requests of this process; for one thread at a time."""

    def __init__(self) -> None:
        """OSError where there are none."""
        calls = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
        if calls is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._calls = calls
        self._system: Any = ctypes.CDLL(None, use_errno=True).syscall
        self._system.restype = ctypes.c_long
        self._requests = (_Request * AT_ONCE)()
        self._addresses = (ctypes.POINTER(_Request) * AT_ONCE)(
            *(ctypes.pointer(request) for request in self._requests)
        )
        self._events = (_Event * AT_ONCE)()
        self._handle = ctypes.c_ulong(0)
        self._call("setup", ctypes.c_long(AT_ONCE), ctypes.byref(self._handle))

    def flush(self, descriptors: Sequence[int]) -> list[int]:
        """Flush at most `AT_ONCE`; for each the number of its error, or 0.

        OSError where none of them has been begun.
        """
        for index, descriptor in enumerate(descriptors):
            request = self._requests[index]
            request.data, request.opcode, request.descriptor = index, _FSYNC, descriptor
        begun = self._call("submit", self._handle, ctypes.c_long(len(descriptors)), self._addresses)
        results = [0] * begun
        waiting = begun
        # Nobody else may use the queue, or the descriptors, before all of them have ended.
        while waiting:
            try:
                least = ctypes.c_long(waiting)
                ended = self._call("getevents", self._handle, least, least, self._events, None)
            except InterruptedError:
                continue
            for event in self._events[:ended]:
                results[event.data] = -event.result
            waiting -= ended
        return results + [_flushed(each) for each in descriptors[begun:]]

    def _call(self, name: str, *arguments: Any) -> int:
        result = int(self._system(ctypes.c_long(self._calls[name]), *arguments))
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


# As many as threads have flushed at once. The kernel takes them back at the end of the process:
# taking one back earlier waits for all processors.
_idle: deque[_Queue] = deque()


def flush_together(descriptors: Sequence[int]) -> list[int]:
    """fsync of each open file or folder, all at once; for each the number of its error, or 0."""
    if not 1 < len(descriptors) <= AT_ONCE:
        return [_flushed(descriptor) for descriptor in descriptors]
    try:
        try:
            queue = _idle.pop()
        except IndexError:
            queue = _Queue()
        results = queue.flush(descriptors)
    except OSError:
        # None of them was begun: no such call here, no more queues, or that of a parent process.
        return [_flushed(descriptor) for descriptor in descriptors]
    _idle.append(queue)
    return [
        _flushed(descriptor) if result in _UNKNOWN else result
        for descriptor, result in zip(descriptors, results, strict=True)
    ]


def write_back(descriptor: int) -> None:
    """Wait until the bytes of a file have gone to the disk, whose cache may still hold them.

    The blocks of a new file are allotted then, so that a commit of the file system which begins
    now takes them.  Raises OSError where they cannot be written: a flush would not say it again.
    """
    if _sync_file_range is None:
        return
    if _sync_file_range(descriptor, 0, 0, _WRITE_AND_WAIT):
        number = ctypes.get_errno()
        if number not in _UNKNOWN:
            raise OSError(number, os.strerror(number))


def _flushed(descriptor: int) -> int:
    try:
        os.fsync(descriptor)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _find_sync_file_range() -> Any:
    found: Any = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


_sync_file_range: Any = _find_sync_file_range()
