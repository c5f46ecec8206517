"""The journal against real files: what it keeps, what it gives back, and what it must not."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dicom_node import journal as module
from dicom_node.draft import Draft
from dicom_node.journal import SEGMENTS, Journal
from dicom_node.spool import Spool

BLOCK = 4096
SEGMENT = 64 * BLOCK


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def open_journal(spool: Spool) -> Generator[Callable[..., Journal]]:
    """Open the journal of the spool and start it; what is left open is closed at the end."""
    with ExitStack() as stack:

        def start(size: int = SEGMENTS * SEGMENT) -> Journal:
            journal = Journal(spool, size)
            stack.callback(journal.close)
            journal.recover(never)
            journal.start()
            return journal

        yield start


def never(_: str) -> bool:
    """Nothing was let go."""
    return False


def received(spool: Spool, data: bytes) -> Draft:
    """A file that has its name and is not flushed."""
    draft = spool.draft()
    draft.write((data,))
    spool.keep(draft, flushed=False)
    return draft


def path_of(spool: Spool, draft: Draft) -> Path:
    return spool.resolve(module.incoming_path(draft.sha256))


def lose_power(journal: Journal) -> None:
    """End a journal as a crash does: nothing is settled, and the lock is gone."""
    with journal._changed:
        journal._full.clear()
        journal._current = None
        journal._ends = True
        journal._changed.notify_all()
    journal.close()


def hold_settling(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keep the journal from settling until the event is set."""
    go = threading.Event()
    plain = module.flush_file

    def waits(path: Path) -> None:
        go.wait(30)
        plain(path)

    monkeypatch.setattr(module, "flush_file", waits)
    return go


LOSSES: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_what_was_kept_comes_back_as_it_was_received(
    size: int, loss: str, spool: Spool, open_journal: Callable[..., Journal]
) -> None:
    data = [os.urandom(size) for _ in range(3)]
    first = open_journal()
    drafts = [received(spool, each) for each in data]
    assert first.append(drafts) == [True] * 3
    lose_power(first)
    LOSSES[loss](path_of(spool, drafts[1]))
    assert Journal(spool, 0).recover(never) == 1
    assert [path_of(spool, draft).read_bytes() for draft in drafts] == data


def test_a_journal_that_is_read_twice_writes_nothing_twice(
    spool: Spool, open_journal: Callable[..., Journal]
) -> None:
    first = open_journal()
    draft = received(spool, b"once")
    first.append([draft])
    lose_power(first)
    path_of(spool, draft).unlink()
    again = Journal(spool, SEGMENTS * SEGMENT)
    assert (again.recover(never), again.recover(never)) == (1, 0)
    again.close()


def test_a_file_that_the_node_removed_stays_away(
    spool: Spool, open_journal: Callable[..., Journal]
) -> None:
    first = open_journal()
    gone, moved = received(spool, b"purged"), received(spool, b"a conflict")
    assert first.append([gone, moved]) == [True, True]
    spool.set_aside(module.incoming_path(moved.sha256), "other bytes")
    path_of(spool, gone).unlink()
    lose_power(first)
    let_go = module.incoming_path(gone.sha256)
    assert Journal(spool, 0).recover(lambda path: path == let_go) == 0
    assert not path_of(spool, gone).exists()
    assert not path_of(spool, moved).exists()


def test_a_record_that_power_cut_off_is_no_file_and_hides_no_other(
    spool: Spool, open_journal: Callable[..., Journal]
) -> None:
    first = open_journal()
    drafts = [received(spool, bytes([number]) * 100) for number in range(3)]
    first.append(drafts)
    (segment,) = [s for s in (*first._full, first._current) if s is not None and s.records]
    torn = segment.records[1].offset
    lose_power(first)
    with segment.path.open("r+b") as stream:
        stream.seek(torn + 50)
        stream.write(b"torn")
    for draft in drafts:
        path_of(spool, draft).unlink()
    assert Journal(spool, 0).recover(never) == 2
    assert [path_of(spool, draft).exists() for draft in drafts] == [True, False, True]


def test_records_of_an_earlier_use_of_the_blocks_are_not_believed(
    spool: Spool, open_journal: Callable[..., Journal]
) -> None:
    first = open_journal()
    earlier = [received(spool, bytes([number]) * 100) for number in range(8)]
    first.append(earlier)
    first.close()
    second = open_journal()
    later = received(spool, b"\xff" * 100)
    second.append([later])
    lose_power(second)
    for draft in (*earlier, later):
        path_of(spool, draft).unlink()
    assert Journal(spool, 0).recover(never) == 1
    assert [path_of(spool, draft).exists() for draft in (*earlier, later)] == [False] * 8 + [True]


def test_closed_in_order_it_has_settled_all_and_gives_nothing_back(
    spool: Spool, open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    plain = module.flush_file

    def noted(path: Path) -> None:
        plain(path)
        flushed.append(path)

    monkeypatch.setattr(module, "flush_file", noted)
    journal = open_journal()
    drafts = [received(spool, bytes([number])) for number in range(3)]
    journal.append(drafts)
    journal.close()
    assert flushed == [path_of(spool, draft) for draft in drafts]
    path_of(spool, drafts[0]).unlink()
    assert Journal(spool, 0).recover(never) == 0


def test_it_keeps_nothing_while_all_segments_wait_to_be_settled_and_goes_on_afterwards(
    spool: Spool, open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = hold_settling(monkeypatch)
    journal = open_journal()
    large = SEGMENT - 2 * BLOCK
    kept = [journal.append([received(spool, os.urandom(large))])[0] for _ in range(SEGMENTS + 1)]
    assert kept == [True] * SEGMENTS + [False]
    go.set()
    until_kept = threading.Event()

    def again() -> None:
        while not journal.append([received(spool, os.urandom(large))])[0]:
            until_kept.wait(0.01)
        until_kept.set()

    sender = threading.Thread(target=again)
    sender.start()
    sender.join(30)
    assert until_kept.is_set()


@pytest.mark.parametrize("size", [SEGMENT, SEGMENT + 1])
def test_a_file_larger_than_a_segment_is_not_kept(
    size: int, spool: Spool, open_journal: Callable[..., Journal]
) -> None:
    journal = open_journal()
    small, large = received(spool, b"small"), received(spool, bytes(size))
    assert journal.append([small, large]) == [True, False]
    assert journal.largest < size


def test_of_two_processes_one_has_it(spool: Spool, open_journal: Callable[..., Journal]) -> None:
    first, second = open_journal(), open_journal()
    draft = received(spool, b"who keeps me")
    assert second.append([draft]) == [False]
    assert second.largest == 0
    assert first.append([draft]) == [True]


def test_without_a_size_it_gives_back_and_keeps_nothing(
    spool: Spool, open_journal: Callable[..., Journal]
) -> None:
    first = open_journal()
    draft = received(spool, b"kept while there was one")
    first.append([draft])
    lose_power(first)
    path_of(spool, draft).unlink()
    none = open_journal(0)
    assert path_of(spool, draft).read_bytes() == b"kept while there was one"
    assert none.append([draft]) == [False]
    assert list((spool.root / "journal").glob("*.seg")) == []


def test_a_disk_that_fails_ends_it_and_what_it_kept_before_is_settled(
    spool: Spool, open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal()
    before, after = received(spool, b"before"), received(spool, b"after")
    assert journal.append([before]) == [True]

    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fails)
        assert journal.append([after]) == [False]
    assert journal.append([after]) == [False]
    assert journal.largest == 0
    journal.close()
    path_of(spool, before).unlink()
    assert Journal(spool, 0).recover(never) == 0


def test_a_file_whose_flush_failed_is_written_again_from_the_journal(
    spool: Spool, open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second fsync would say that all is well: Linux takes the lost pages for clean."""
    calls: list[Path] = []

    def fails(path: Path) -> None:
        calls.append(path)
        os.truncate(path, 0)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module, "flush_file", fails)
    monkeypatch.setattr(module, "_SETTLED_AFTER_S", 0.01)
    journal = open_journal()
    draft = received(spool, b"pages that the disk refused")
    inode = path_of(spool, draft).stat().st_ino
    assert journal.append([draft]) == [True]
    assert settled(journal)
    assert calls == [path_of(spool, draft)]
    assert path_of(spool, draft).read_bytes() == b"pages that the disk refused"
    assert path_of(spool, draft).stat().st_ino != inode


def settled(journal: Journal) -> bool:
    """Wait until nothing rests on the journal alone."""
    done = threading.Event()
    for _ in range(3000):
        with journal._changed:
            if not journal._full and journal._current is None:
                return True
        done.wait(0.01)
    return False
