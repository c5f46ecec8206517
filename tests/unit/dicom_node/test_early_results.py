"""Early results are there whole or not at all, are never trusted when damaged, and make way."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

import pytest

from dicom_node.disk import Disk, Marks, Space
from dicom_node.early_results import EarlyResults
from dicom_node.errors import SpoolFullError
from dicom_node.spool import Spool, StoredFile

KEY, OTHER = "ab" * 32, "cd" * 32
SERIES = "1.2.3"

HOLD_A_CLAIM = """
import sys, time
from pathlib import Path
from dicom_node.early_results import EarlyResults
from dicom_node.spool import Spool
with EarlyResults(Spool(Path(sys.argv[1]))).claimed("1.2.3", "ab" * 32) as claim:
    claim._path.write_bytes(b"half of a res")
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def results(spool: Spool) -> EarlyResults:
    return EarlyResults(spool)


def keep(results: EarlyResults, octets: bytes, series: str = SERIES, key: str = KEY) -> None:
    with results.claimed(series, key) as claim:
        assert claim is not None
        claim.keep(octets)


def files(spool: Spool) -> list[str]:
    folder = spool.root / "early"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_kept_is_read_back(results: EarlyResults, spool: Spool) -> None:
    octets = os.urandom(5000)
    assert results.read(SERIES, KEY) is None
    keep(results, octets)
    assert results.has(SERIES, KEY)
    assert results.read(SERIES, KEY) == octets
    assert results.read(SERIES, OTHER) is None
    assert files(spool) == [f"{SERIES}/{KEY}"]


@pytest.mark.parametrize("cut", [0, 10, 32, 500, 5031])
def test_one_that_was_cut_short_is_none_and_is_removed(
    results: EarlyResults, spool: Spool, cut: int
) -> None:
    keep(results, os.urandom(5000))
    os.truncate(spool.root / "early" / SERIES / KEY, cut)
    assert results.read(SERIES, KEY) is None
    assert not results.has(SERIES, KEY)


@pytest.mark.parametrize("place", [0, 31, 32, 2000])
def test_one_flipped_bit_is_found(results: EarlyResults, spool: Spool, place: int) -> None:
    keep(results, os.urandom(3000))
    path = spool.root / "early" / SERIES / KEY
    octets = bytearray(path.read_bytes())
    octets[place] ^= 0x10
    path.write_bytes(octets)
    assert results.read(SERIES, KEY) is None
    assert files(spool) == []


def test_two_do_not_make_the_same(results: EarlyResults, spool: Spool) -> None:
    with results.claimed(SERIES, KEY) as mine:
        with EarlyResults(spool).claimed(SERIES, KEY) as theirs:
            assert theirs is None
        with EarlyResults(spool).claimed(SERIES, OTHER) as another:
            assert another is not None
        assert mine is not None
        mine.keep(b"result")
    with results.claimed(SERIES, KEY) as again:
        assert again is None  # it is there
    assert files(spool) == [f"{SERIES}/{KEY}"]


def test_what_is_not_kept_leaves_nothing(results: EarlyResults, spool: Spool) -> None:
    with pytest.raises(RuntimeError), results.claimed(SERIES, KEY):
        raise RuntimeError("no memory")
    assert files(spool) == []


def test_a_killed_process_leaves_its_claim_to_the_next(results: EarlyResults, spool: Spool) -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_CLAIM, str(spool.root)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "held\n"
        with results.claimed(SERIES, KEY) as claim:
            assert claim is None
        maker.send_signal(signal.SIGKILL)
        maker.wait(20)
        assert files(spool) == [f"{SERIES}/{KEY}.part"]
        assert results.read(SERIES, KEY) is None
        keep(results, b"whole")
        assert results.read(SERIES, KEY) == b"whole"
    finally:
        maker.kill()
        maker.wait(20)
        if maker.stdout is not None:
            maker.stdout.close()


def test_series_that_nobody_has_in_hand_are_swept(results: EarlyResults, spool: Spool) -> None:
    for series in ("1.2.3", "1.2.4"):
        keep(results, b"result", series)
    (spool.root / "early/1.2.4" / f"{OTHER}.part").write_bytes(b"half")
    asked: list[set[str]] = []

    def in_hand(uids: Set[str]) -> Set[str]:
        asked.append(set(uids))
        return {"1.2.3"}

    removed = results.sweep(in_hand, older_than=0.0)
    assert asked == [{"1.2.3", "1.2.4"}]
    assert removed == 2
    assert files(spool) == [f"1.2.3/{KEY}"]
    assert not (spool.root / "early/1.2.4").exists()


def test_old_results_are_swept_though_their_series_is_open(
    results: EarlyResults, spool: Spool
) -> None:
    keep(results, b"old")
    keep(results, b"new", key=OTHER)
    os.utime(spool.root / "early" / SERIES / KEY, (1000.0, 1000.0))
    assert results.sweep(lambda uids: uids, older_than=2000.0) == 1
    assert files(spool) == [f"{SERIES}/{OTHER}"]


def test_a_spool_without_early_results_is_swept_without_a_question(results: EarlyResults) -> None:
    def unasked(_: object) -> set[str]:
        raise AssertionError("nothing to ask for")

    assert results.sweep(unasked, older_than=0.0) == 0


def test_the_upper_mark_of_the_disk_is_respected(
    results: EarlyResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Disk, "space", lambda self: Space(1000, Marks(low=300, high=600)))
    assert results.has_room(400)
    assert not results.has_room(401)

    def gone(self: Disk) -> Space:
        raise OSError

    monkeypatch.setattr(Disk, "space", gone)
    assert not results.has_room(0)


@pytest.mark.parametrize("series", ["../../etc", "", "..", "1.2/3", "not a uid"])
def test_a_series_uid_that_is_none_stays_in_the_folder(
    results: EarlyResults, spool: Spool, series: str
) -> None:
    keep(results, b"result", series)
    assert results.read(series, KEY) == b"result"
    (path,) = (spool.root / "early").glob("*/*")
    assert path.name == KEY
    results.remove(series, [KEY])
    assert list((spool.root / "early").iterdir()) == []


def test_a_series_that_ends_while_the_folder_is_swept_is_no_trouble(
    results: EarlyResults, spool: Spool
) -> None:
    keep(results, b"result")
    keep(results, b"left", series="1.2.4")

    def in_hand(uids: Set[str]) -> Set[str]:
        results.remove(SERIES, [KEY])
        return set()

    assert results.sweep(in_hand, older_than=0.0) == 1
    assert files(spool) == []


def test_a_whole_instance_is_durable_under_its_digest(spool: Spool, results: EarlyResults) -> None:
    digest = hashlib.sha256(b"headpixels").hexdigest()
    stored = results.store(SERIES, (b"head", b"pixels"))
    assert stored == StoredFile(f"early/{SERIES}/{digest}.dcm", digest, len(b"headpixels"))
    assert (spool.root / stored.path).read_bytes() == b"headpixels"
    assert list((spool.root / "temporary").iterdir()) == []
    results.remove(SERIES, [f"{digest}.dcm"])
    assert not (spool.root / "early" / SERIES).exists()


def test_other_bytes_of_an_instance_take_the_place_of_none(
    spool: Spool, results: EarlyResults
) -> None:
    mine = results.store(SERIES, (b"head", b"pixels"))
    theirs = EarlyResults(spool).store(SERIES, (b"head of other settings", b"pixels"))
    again = EarlyResults(spool).store(SERIES, (b"headpixels",))
    assert mine == again
    assert (spool.root / mine.path).read_bytes() == b"headpixels"
    assert (spool.root / theirs.path).read_bytes() == b"head of other settingspixels"


def test_a_whole_instance_without_room_is_said_so(spool: Spool, results: EarlyResults) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(SpoolFullError):
            results.store(SERIES, (bytes(4000),))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(spool) == []
