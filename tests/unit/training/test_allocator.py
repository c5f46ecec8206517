from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

# Page faults of ten blocks of 16 MiB, written to and freed one after the other.
PROBE = """
import resource, sys
import torch
from training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):
    torch.ones(1 << 22).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 22).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", PROBE, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_are_used_again_without_new_pages() -> None:
    pages = (1 << 24) // resource.getpagesize()
    assert faults("keep") < pages  # of ten blocks, not one afresh
