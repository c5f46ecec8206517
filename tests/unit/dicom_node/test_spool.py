from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dicom_node import flushing
from dicom_node.errors import NotFoundError, PermanentError, SpoolFullError
from dicom_node.spool import Spool, StoredFile

HELLO = hashlib.sha256(b"hello").hexdigest()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _files(spool: Spool) -> list[str]:
    return sorted(
        file.relative_to(spool.root).as_posix() for file in spool.root.rglob("*") if file.is_file()
    )


def test_a_received_instance_lies_under_its_digest(spool: Spool) -> None:
    stored = spool.write(b"hello")
    assert stored == StoredFile(f"incoming/{HELLO[:2]}/{HELLO}.dcm", HELLO, 5)
    with spool.open(stored.path) as file:
        assert file.read() == b"hello"
    assert _files(spool) == [stored.path]


def test_pieces_make_the_same_file_as_the_whole(spool: Spool) -> None:
    assert spool.write([b"he", b"", b"llo"]) == spool.write(b"hello")


def test_the_same_bytes_again_are_one_file(spool: Spool) -> None:
    assert spool.write(b"hello") == spool.write(b"hello")
    assert len(_files(spool)) == 1


def test_the_same_bytes_from_many_threads_are_one_whole_file(spool: Spool) -> None:
    data = random.Random(1).randbytes(200_000)
    with ThreadPoolExecutor(8) as pool:
        stored = set(pool.map(lambda _: spool.write(data), range(32)))
    assert len(stored) == 1
    assert spool.resolve(stored.pop().path).read_bytes() == data


def test_a_damaged_file_is_repaired_by_the_same_bytes(spool: Spool) -> None:
    path = spool.resolve(spool.write(b"hello").path)
    path.write_bytes(b"hel")
    spool.write(b"hello")
    assert path.read_bytes() == b"hello"


def test_file_and_folder_are_flushed_before_the_write_returns(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = noted(monkeypatch)
    spool.write(b"hello")
    # The last flush is that of incoming/<aa>, whose parent is incoming.
    assert steps == ["link", "flush temporary and incoming"]


def test_a_name_that_is_taken_is_given_to_bytes_that_are_durable_already(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file there may be acknowledged: a loss of power must find it, or as good a one."""
    spool.write(b"hello")
    steps = noted(monkeypatch)
    spool.write(b"hello")
    assert steps == ["flush temporary", "rename", "flush incoming"]


def test_a_name_that_is_no_digest_is_given_to_bytes_that_are_durable_already(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = noted(monkeypatch)
    spool.write_outgoing("1.2", "1.3", b"hello")
    # Before it, the new folder is entered in its parent.
    assert steps[-3:] == ["flush temporary", "rename", "flush outgoing"]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every flush, link and rename from now on."""
    steps: list[str] = []
    flush, rename, link = os.fsync, os.rename, os.link
    together = flushing.flush_together

    def noting_flush(descriptor: int) -> None:
        steps.append(f"flush {_folder(descriptor)}")
        flush(descriptor)

    def noting_together(descriptors: Sequence[int]) -> list[int]:
        steps.append(f"flush {' and '.join(map(_folder, descriptors))}")
        return together(descriptors)

    def noting_rename(source: Path, target: Path) -> None:
        steps.append("rename")
        rename(source, target)

    def noting_link(source: Path, target: Path) -> None:
        link(source, target)
        steps.append("link")

    monkeypatch.setattr(os, "fsync", noting_flush)
    monkeypatch.setattr(flushing, "flush_together", noting_together)
    monkeypatch.setattr(os, "rename", noting_rename)
    monkeypatch.setattr(os, "link", noting_link)
    return steps


def _folder(descriptor: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name


def test_a_file_system_without_hard_links_stores_too(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unknown)
    stored = spool.write(b"hello")
    assert spool.resolve(stored.path).read_bytes() == b"hello"
    assert _files(spool) == [stored.path]


def test_bytes_that_cannot_be_made_durable_lose_their_name_again(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(flushing, "flush_together", lambda _: [errno.EIO, 0])
        with pytest.raises(SpoolFullError, match="Input/output error"):
            spool.write(b"hello")
    assert _files(spool) == []
    assert spool.write(b"hello").sha256 == HELLO


def test_a_name_is_not_taken_from_another_who_has_stored_the_same_bytes_meanwhile(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = flushing.flush_together

    def others_first(_: Sequence[int]) -> list[int]:
        monkeypatch.setattr(flushing, "flush_together", together)
        spool.write(b"hello")
        return [errno.EIO, 0]

    monkeypatch.setattr(flushing, "flush_together", others_first)
    with pytest.raises(SpoolFullError):
        spool.write(b"hello")
    assert _files(spool) == [f"incoming/{HELLO[:2]}/{HELLO}.dcm"]


def test_a_folder_that_cannot_be_flushed_is_trouble(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(flushing, "flush_together", lambda _: [0, errno.EIO])
        with pytest.raises(SpoolFullError, match="Input/output error"):
            spool.write(b"hello")
    assert spool.write(b"hello").sha256 == HELLO


def test_a_file_that_is_found_is_durable_and_what_its_name_says_or_not_taken(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spool.write(b"hello").path
    steps = noted(monkeypatch)
    assert spool.secure(path)
    assert steps == [f"flush {HELLO[:2]}", "flush incoming"]
    for cut in (b"hell", b""):
        spool.resolve(path).write_bytes(cut)
        assert not spool.secure(path)


def test_a_restored_instance_lies_under_its_uids(spool: Spool) -> None:
    stored = spool.write_outgoing("2.25.1", "2.25.2", b"hello")
    assert stored == StoredFile("outgoing/2.25.1/2.25.2.dcm", HELLO, 5)
    assert spool.write_outgoing("2.25.1", "2.25.2", b"hello") == stored
    assert spool.write_outgoing("2.25.1", "2.25.2", b"hello", flushed=False) == stored


def test_a_file_that_was_written_ahead_is_given_out_once(spool: Spool) -> None:
    (spool.root / "early").mkdir()
    ahead = spool.root / "early/2.25.2.dcm"
    ahead.write_bytes(b"hello")
    path = spool.give_out("early/2.25.2.dcm", "2.25.1", "2.25.2")
    assert path == "outgoing/2.25.1/2.25.2.dcm"
    assert (spool.root / path).read_bytes() == b"hello"
    assert not ahead.exists()
    with pytest.raises(NotFoundError):
        spool.give_out("early/2.25.2.dcm", "2.25.1", "2.25.2")
    with pytest.raises(PermanentError):
        spool.give_out(path, "2.25.1", "../2.25.2")


@pytest.mark.parametrize(
    "uid", ["../../x", "/etc/x", "1.2\x00", "1" * 65, "", "1.2/3", "..", ".", "1.2\n", "۱.۲"]
)
def test_what_is_no_uid_never_reaches_a_path(spool: Spool, uid: str) -> None:
    for series, instance in ((uid, "1.2"), ("1.2", uid)):
        with pytest.raises(PermanentError) as caught:
            spool.write_outgoing(series, instance, b"hello")
        assert uid not in str(caught.value) or uid in ("", ".")
    assert _files(spool) == []


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "incoming/../../x", "", ".", "elsewhere/x", "incoming/a/../.."]
)
def test_a_path_does_not_leave_the_spool(spool: Spool, path: str) -> None:
    with pytest.raises(PermanentError):
        spool.resolve(path)


def test_a_file_that_is_not_there_is_said_so(spool: Spool) -> None:
    with pytest.raises(NotFoundError):
        spool.open("incoming/aa/none.dcm")
    spool.delete("incoming/aa/none.dcm")


def test_a_deleted_file_is_gone(spool: Spool) -> None:
    path = spool.write(b"hello").path
    spool.delete(path)
    assert _files(spool) == []


def test_quarantined_bytes_are_kept_with_the_reason(spool: Spool) -> None:
    stored = spool.quarantine(b"hello", "the data set ends early")
    assert stored.path == f"quarantine/{HELLO}.dcm"
    note = spool.root / "quarantine" / f"{HELLO}.txt"
    assert note.read_text() == "the data set ends early\n"


def test_a_quarantined_file_leaves_its_place(spool: Spool) -> None:
    path = spool.write(b"hello").path
    stored = spool.quarantine(path, "pixel data do not decode")
    assert not spool.resolve(path).exists()
    assert spool.resolve(stored.path).read_bytes() == b"hello"


def test_orphans_are_received_files_that_nobody_knows(spool: Spool) -> None:
    known, orphan = spool.write(b"known").path, spool.write(b"orphan").path
    spool.write_outgoing("1.2", "1.3", b"outgoing")
    assert list(spool.orphans({known})) == [orphan]


def test_only_old_temporary_files_are_removed(spool: Spool) -> None:
    for name, at in (("old", 100), ("new", 300)):
        file = spool.root / "temporary" / name
        file.write_bytes(b"")
        os.utime(file, (at, at))
    assert spool.remove_temporary(older_than=200) == 1
    assert _files(spool) == ["temporary/new"]


def test_room_is_what_is_free_beyond_the_reserve(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    assert Spool(tmp_path).has_room()
    assert not Spool(tmp_path).has_room(2 * free)
    assert not Spool(tmp_path, min_free_bytes=2 * free).has_room()
    assert not Spool(tmp_path, min_free_percent=100).has_room()


def test_a_spool_that_is_gone_has_no_room(spool: Spool) -> None:
    shutil.rmtree(spool.root)
    assert not spool.has_room()


def test_a_full_disk_leaves_nothing_and_recovers_without_restart(small_disk: Path) -> None:
    spool = Spool(small_disk / "spool", min_free_bytes=100_000)
    kept = spool.write(b"k" * 300_000)
    assert spool.has_room(100_000)
    assert not spool.has_room(900_000)
    with pytest.raises(SpoolFullError, match="No space left"):
        spool.write(b"x" * 900_000)
    assert _files(spool) == [kept.path]
    spool.delete(kept.path)
    assert spool.write(b"x" * 600_000).size == 600_000


def test_a_read_only_disk_is_transient(small_disk: Path) -> None:
    spool = Spool(small_disk / "spool")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SpoolFullError, match="Read-only"):
        spool.write(b"hello")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert spool.write(b"hello").size == 5


def test_a_file_beyond_the_limit_of_the_process_leaves_nothing(spool: Spool) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SpoolFullError, match="too large"):
            spool.write(b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert _files(spool) == []


def test_a_disk_error_while_writing_leaves_nothing(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", fail)
        with pytest.raises(SpoolFullError, match="Input/output error"):
            spool.write(b"hello")
    assert _files(spool) == []
    assert spool.write(b"hello").sha256 == HELLO


def test_a_source_that_fails_leaves_nothing(spool: Spool) -> None:
    def source() -> Iterator[bytes]:
        yield b"hel"
        raise ValueError("the association ended")

    with pytest.raises(ValueError, match="ended"):
        spool.write(source())
    assert _files(spool) == []


_WRITER = """
import random, sys
from pathlib import Path
from dicom_node.spool import Spool

spool, source = Spool(Path(sys.argv[1])), random.Random(int(sys.argv[2]))
while True:
    print(spool.write(source.randbytes(source.randrange(1, 300_000))).path, flush=True)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_writer_leaves_only_whole_files(tmp_path: Path, attempt: int) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path), str(attempt)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline().strip() for _ in range(10 + attempt)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    writer.stdout.close()
    files = list((tmp_path / "incoming").rglob("*.dcm"))
    assert {file.relative_to(tmp_path).as_posix() for file in files} >= set(acknowledged)
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
