"""Files and folders that are flushed together, with the kernel's help or without."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dicom_node import flushing
from dicom_node.flushing import AT_ONCE, flush_together


@pytest.fixture
def opened(tmp_path: Path) -> Generator[tuple[int, int]]:
    """A file with bytes that are not flushed, and its folder."""
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    os.write(file, bytes(300_000))
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield file, folder
    os.close(file)
    os.close(folder)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that are flushed by fsync, in order."""
    flushed: list[int] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        flushed.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    return flushed


def dirty(descriptor: int) -> int:
    """The pages of a file that wait to be written, by cachestat(2); -1 where there is none."""
    numbers = (ctypes.c_uint64 * 5)()
    whole = (ctypes.c_uint64 * 2)(0, 0)
    call = ctypes.CDLL(None, use_errno=True).syscall
    failed = call(ctypes.c_long(451), ctypes.c_uint(descriptor), whole, numbers, ctypes.c_uint(0))
    return -1 if failed else int(numbers[1] + numbers[2])


def test_a_file_and_its_folder_are_flushed(opened: tuple[int, int]) -> None:
    before = dirty(opened[0])
    assert flush_together(opened) == [0, 0]
    if before >= 0:
        assert before > 0
        assert dirty(opened[0]) == 0


def test_where_the_kernel_takes_several_at_once_it_is_asked_once(
    opened: tuple[int, int], one_by_one: list[int]
) -> None:
    try:
        queue = flushing._Queue()
    except OSError:
        pytest.skip("no asynchronous I/O here")
    assert queue.flush(opened) == [0, 0]
    assert flush_together(opened) == [0, 0]
    assert one_by_one == []


def test_where_it_does_not_they_follow_one_another(
    opened: tuple[int, int], one_by_one: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flushing, "_CALLS", {})
    flushing._idle.clear()
    assert flush_together(opened) == [0, 0]
    assert one_by_one == list(opened)


@pytest.mark.parametrize("bad_first", [True, False])
def test_one_that_cannot_be_flushed_is_told_and_the_other_is_flushed(
    opened: tuple[int, int], bad_first: bool
) -> None:
    closed = os.dup(opened[0])
    os.close(closed)
    given = (closed, opened[1]) if bad_first else (opened[1], closed)
    wanted = [errno.EBADF, 0] if bad_first else [0, errno.EBADF]
    assert flush_together(given) == wanted


def test_what_is_no_file_is_an_error_and_not_taken_for_flushed(opened: tuple[int, int]) -> None:
    reading, writing = os.pipe()
    try:
        assert flush_together((opened[0], writing)) == [0, errno.EINVAL]
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("count", [0, 1, AT_ONCE, AT_ONCE + 1])
def test_any_number_is_flushed(opened: tuple[int, int], count: int) -> None:
    assert flush_together([opened[0]] * count) == [0] * count


def test_threads_flush_at_the_same_time_each_on_a_queue_of_its_own(tmp_path: Path) -> None:
    def flushed(number: int) -> list[int]:
        file = os.open(tmp_path / str(number), os.O_CREAT | os.O_RDWR)
        folder = os.open(tmp_path, os.O_RDONLY)
        try:
            os.write(file, bytes(50_000))
            return flush_together((file, folder))
        finally:
            os.close(file)
            os.close(folder)

    flushing._idle.clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(flushed, range(64))) == [[0, 0]] * 64
    assert len(flushing._idle) <= 8


_FORKED = """
import os, sys
from dicom_node.flushing import flush_together
file = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
folder = os.open(os.path.dirname(sys.argv[1]), os.O_RDONLY)
assert flush_together((file, folder)) == [0, 0]
child = os.fork()
assert flush_together((file, folder)) == [0, 0]
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_flushes_too(tmp_path: Path) -> None:
    """The queue is its parent's, and its number may mean nothing, or something else."""
    command = [sys.executable, "-c", _FORKED, str(tmp_path / "file")]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
