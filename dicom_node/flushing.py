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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

AT_ONCE = 16
"""So many descriptors are flushed together; more follow one another."""

# <linux/aio_abi.h>; the C library has no names for these calls.
_FSYNC = 2
_CALLS = {
    "x86_64": {"setup": 206, "getevents": 208, "submit": 209},
    "aarch64": {"setup": 0, "getevents": 4, "submit": 2},
}
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
        array = (_Request * AT_ONCE)()
        # Looked up once: each look into an array makes an object.
        self._requests = list(array)
        for index, request in enumerate(self._requests):
            request.data, request.opcode = index, _FSYNC
        self._addresses = (ctypes.POINTER(_Request) * AT_ONCE)(*map(ctypes.pointer, self._requests))
        self._events = (_Event * AT_ONCE)()
        handle = ctypes.c_ulong(0)
        _call(_function(calls["setup"], 2), AT_ONCE, ctypes.byref(handle))
        self._handle = handle.value
        self._submit = _function(calls["submit"], 3)
        self._getevents = _function(calls["getevents"], 5)

    def flush(self, descriptors: Sequence[int]) -> list[int]:
        """Flush at most `AT_ONCE`; for each the number of its error, or 0.

        OSError where none of them has been begun.
        """
        for request, descriptor in zip(self._requests, descriptors, strict=False):
            request.descriptor = descriptor
        begun = _call(self._submit, self._handle, len(descriptors), self._addresses)
        results = [0] * begun
        waiting = begun
        # Nobody else may use the queue, or the descriptors, before all of them have ended.
        while waiting:
            try:
                ended = _call(self._getevents, self._handle, waiting, waiting, self._events, None)
            except InterruptedError:
                continue
            for event in self._events[:ended]:
                results[event.data] = -event.result
            waiting -= ended
        return results + [_flushed(each) for each in descriptors[begun:]]


def _function(number: int, arguments: int) -> Callable[..., int]:
    """A system call of so many arguments, each an integer or an address."""
    system: Any = ctypes.CDLL(None, use_errno=True).syscall
    # Without them ctypes would pass an integer as 32 bits.
    system.argtypes = (ctypes.c_long, *(ctypes.c_void_p,) * arguments)
    system.restype = ctypes.c_long
    return partial(system, number)


def _call(function: Callable[..., int], *arguments: Any) -> int:
    result = function(*arguments)
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


def _flushed(descriptor: int) -> int:
    try:
        os.fsync(descriptor)
    except OSError as error:
        return error.errno or errno.EIO
    return 0
