"""The C library's memory: kept between steps instead of given back to the kernel.

A training step allocates and frees the same few hundred activations again and again. glibc maps
blocks above 128 KiB afresh each time, and the kernel clears every page of them: a tenth of the
time of a `compact` step on the CPU.
"""

from __future__ import annotations

import ctypes
import platform

# mallopt(3): parameters and the largest threshold that glibc accepts.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_FROM_HEAP = 32 << 20
_NEVER_TRIM = 2**31 - 1
_GROWTH = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process reuse freed blocks; whether the C library is one that can be asked.

    The resident memory stays at its peak. Has no part in any result.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = (
        (_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP),
        (_M_TRIM_THRESHOLD, _NEVER_TRIM),
        (_M_TOP_PAD, _GROWTH),
    )
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
