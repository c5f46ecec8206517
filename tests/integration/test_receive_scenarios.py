"""Scenarios in which receivers have failed before, on both ways to receive.

T1 and T2 are in test_receive_faults.py and test_receive_killed.py, T7 in tests/fuzz, the soak of
T13 in test_receive_soak.py; the TLS half of T6 is in test_tls.py. T3 with one content is in
test_receive.py, T9 in derived instances in tests/unit/dicom_node/dicom/test_derived.py.
"""

from __future__ import annotations

import json
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_node.assembler import Assembler
from dicom_node.cli.starter import DEFAULT_ROUTES
from dicom_node.ledger import reports
from dicom_node.routing import load_routes
from dicom_node.storage_scu import echo
from tests.conftest import ManualClock
from tests.factories import make_series, write_series
from tests.integration.conftest import RECEIVE_PATHS, node_settings
from tests.integration.peers import (
    ROOT,
    Node,
    Peer,
    connected,
    ct_slice,
    data_set_bytes,
    statuses,
    until,
    write,
)
from tests.integration.receiver import Receiver, Template, receiver_template
from tests.integration.wire import (
    ABORT,
    P_DATA,
    Wire,
    association_request,
    p_data,
    store_request,
)

QUIET_S = 10.0
MEBIBYTE = 1 << 20


@pytest.fixture(params=RECEIVE_PATHS)
def receive_path(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Both ways to receive must do all of this."""
    return RECEIVE_PATHS[request.param]


@pytest.fixture
def template(receive_path: dict[str, Any], tmp_path: Path) -> Generator[Template]:
    """A receive process, whose memory and log can be looked at."""
    settings = node_settings(
        tmp_path,
        association={**receive_path, "acse_timeout_s": 5.0},
        spool={"path": tmp_path / "spool", "min_free_bytes": 0, "min_free_percent": 0},
        routes=tmp_path / "routes.toml",
    )
    settings.routes.write_text(DEFAULT_ROUTES)
    with receiver_template(settings, tmp_path) as made:
        yield made


def at(port: int, calling: str = "CT1") -> Peer:
    """A node of this machine as a sender configures it."""
    return Peer("DIFFCODE", "127.0.0.1", port, calling)


# T3 ------------------------------------------------------------------------------------------


def test_t3_one_uid_with_four_contents_from_four_associations_at_once_keeps_one(
    node_scp: Node, tmp_path: Path
) -> None:
    paths = [
        write(ct_slice(1, PatientID=f"P{number}"), tmp_path / f"{number}.dcm")
        for number in range(4)
    ]
    together, answers = threading.Barrier(4), list[list[int]]()

    def send(path: Path) -> None:
        with connected(node_scp.peer(), [path]) as association:
            together.wait(20)
            answers.append(statuses(association, [path]))

    threads = [threading.Thread(target=send, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [[0x0000]] * 4
    rows = node_scp.instances()
    assert sorted(row["state"] for row in rows) == ["conflict"] * 3 + ["received"]
    (kept,) = node_scp.stored()
    assert {kept, *map(data_set_bytes, node_scp.quarantined())} == set(map(data_set_bytes, paths))


# T4 and T5 -----------------------------------------------------------------------------------


@pytest.fixture
def timed(
    start_node: Callable[..., Node], clock: ManualClock, tmp_path: Path
) -> tuple[Node, Assembler]:
    """A node and its assembler under a clock that the test moves."""
    node = start_node(clock=clock, assembly={"quiet_s": QUIET_S})
    (tmp_path / "routes.toml").write_text(DEFAULT_ROUTES)
    routes = load_routes(tmp_path / "routes.toml", [])
    return node, Assembler(node.settings, node.spool, node.ledger, routes)


def bring(node: Node, paths: list[Path]) -> None:
    """Send over an association of its own, until the ledger knows of its end."""
    with connected(node.peer("CT1"), paths) as association:
        assert set(statuses(association, paths)) == {0x0000}
    until(node.all_released, "the association is closed in the ledger")


def sources(node: Node) -> list[int]:
    """How many instances each job has, oldest job first."""
    return [int(job["instances"]) for job in reversed(reports.jobs(node.ledger))]


def test_t4_a_series_over_three_associations_three_seconds_apart_is_one_job(
    timed: tuple[Node, Assembler], clock: ManualClock, tmp_path: Path
) -> None:
    node, assembler = timed
    paths = write_series(make_series("CT", slices=6, rows=16), tmp_path / "series")
    for part in (paths[:2], paths[2:4], paths[4:]):
        bring(node, part)
        assert assembler.tick(clock.advance(3.0)) == 0
    assert assembler.tick(clock.advance(QUIET_S)) == 1
    assert sources(node) == [6]


def test_t4_a_part_that_comes_after_the_quiet_time_is_a_job_of_the_late_slices_alone(
    timed: tuple[Node, Assembler], clock: ManualClock, tmp_path: Path
) -> None:
    node, assembler = timed
    paths = write_series(make_series("CT", slices=6, rows=16), tmp_path / "series")
    bring(node, paths[:4])
    assert assembler.tick(clock.advance(QUIET_S + 1)) == 1
    bring(node, paths)
    assert assembler.tick(clock.advance(QUIET_S + 1)) == 1
    assert sources(node) == [4, 2]
    (series,) = reports.series(node.ledger)
    assert series["state"] == "complete"


def test_t5_a_sender_that_aborts_midway_and_resumes_makes_no_duplicate_and_a_whole_series(
    timed: tuple[Node, Assembler], clock: ManualClock, tmp_path: Path
) -> None:
    node, assembler = timed
    paths = write_series(make_series("CT", slices=6, rows=16), tmp_path / "series")
    with connected(node.peer("CT1"), paths) as association:
        assert set(statuses(association, paths[:4])) == {0x0000}
        association.abort()
    until(node.all_released, "the association is closed in the ledger")
    assert assembler.tick(clock.advance(QUIET_S / 2)) == 0
    bring(node, paths)
    assert assembler.tick(clock.advance(QUIET_S)) == 1
    assert [row["state"] for row in node.instances()] == ["received"] * 6
    assert sources(node) == [6]


def test_t5_a_gap_that_the_sender_fills_later_turns_an_incomplete_series_complete(
    timed: tuple[Node, Assembler], clock: ManualClock, tmp_path: Path
) -> None:
    node, assembler = timed
    # The factory shuffles the slices; a gap is one that is missing between two others.
    sent = sorted(
        make_series("CT", slices=6, rows=16), key=lambda each: each.ImagePositionPatient[2]
    )
    paths = write_series(sent, tmp_path / "series")
    bring(node, [*paths[:3], *paths[4:]])
    assembler.tick(clock.advance(QUIET_S))
    (series,) = reports.series(node.ledger)
    assert series["state"] == "incomplete"
    bring(node, paths)
    assembler.tick(clock.advance(QUIET_S))
    (series,) = reports.series(node.ledger)
    assert (series["state"], series["instances"]) == ("complete", 6)


def test_a_clock_that_jumps_loses_nothing(
    start_node: Callable[..., Node], clock: ManualClock, tmp_path: Path
) -> None:
    node = start_node(clock=clock)
    paths = [write(ct_slice(number), tmp_path / f"{number}.dcm") for number in range(1, 6)]
    with connected(node.peer(), paths) as association:
        for path, jump in zip(paths, (0.0, -86_400.0, 3e8, -3e8, -1.7e9), strict=True):
            clock.advance(jump)
            assert statuses(association, [path]) == [0x0000]
    until(node.all_released, "the association is closed in the ledger")
    assert [row["state"] for row in node.instances()] == ["received"] * 5


# T6 ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_t6_strangers_of_every_kind_hold_up_nobody_and_leave_nothing_behind(
    template: Template,
) -> None:
    receiver, port = template.start(), template.port
    # Once through, so that what is loaded at first use counts as usual.
    for wire in strangers(port, probes=200):
        wire.socket.close()
    until(lambda: echo(at(port)).ok, "an answer")
    usual = used(receiver)
    with ExitStack() as held:
        for wire in strangers(port, probes=10_000):
            held.enter_context(wire)
        answers = [echo(at(port)) for _ in range(5)]
        assert all(answer.ok for answer in answers)
        assert max(answer.seconds for answer in answers) < 1.0
    until(
        lambda: receiver.threads() <= usual[1] + 2 and receiver.descriptors() <= usual[2] + 2,
        "their threads and descriptors are gone",
    )
    assert receiver.resident_bytes() - usual[0] < 8 * MEBIBYTE


def used(receiver: Receiver) -> tuple[int, int, int]:
    """Resident bytes, threads and descriptors of a process."""
    return receiver.resident_bytes(), receiver.threads(), receiver.descriptors()


def strangers(port: int, *, probes: int) -> list[Wire]:
    """Peers that hold a connection and never finish, after many that only knock."""
    for _ in range(probes):
        socket.create_connection(("127.0.0.1", port)).close()
    silent = [Wire(port) for _ in range(30)]
    talking = [
        (b"GET / HTTP/1.1\r\nHost: node\r\n\r\n",),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",),
        (association_request()[:60],),
        (b"\x01",),
    ]
    for words in talking:
        wire = Wire(port)
        wire.send(*words)
        silent.append(wire)
    half_open = Wire(port)
    half_open.send(association_request()[:20])
    half_open.socket.shutdown(socket.SHUT_WR)
    return [*silent, half_open]


def test_a_peer_that_sends_a_byte_at_a_time_is_left_at_the_deadline_of_the_message(
    start_node: Callable[..., Node],
) -> None:
    node = start_node(association={"dimse_timeout_s": 0.4, "network_timeout_s": 0.4})
    with Wire(node.port) as wire:
        wire.associate()
        octets = b"".join(store_request(bytes(4000), f"{ROOT}.1"))
        started, trickled = time.monotonic(), 0
        try:
            for octet in octets:
                wire.send(bytes((octet,)))
                trickled += 1
                # The pace of the sender, well within the time-out of each read.
                if wire.closed_within(0.02):
                    break
        except ConnectionError:
            pass
        assert trickled < len(octets)
        assert time.monotonic() - started < 20
    assert node.instances() == []


@pytest.mark.parametrize("cut", [3, 6, 11, 40, -1], ids=lambda at: f"after {at} octets")
def test_half_a_pdu_and_silence_is_left_in_time_and_what_came_before_is_kept(
    cut: int, start_node: Callable[..., Node]
) -> None:
    node = start_node(association={"dimse_timeout_s": 0.3, "network_timeout_s": 0.3})
    with Wire(node.port) as wire:
        wire.associate()
        assert wire.store(request_for(ct_slice(1))) == 0x0000
        wire.send(b"".join(request_for(ct_slice(2)))[:cut])
        assert all(answer.kind == ABORT for answer in wire.answers())
    until(node.all_released, "the association is closed in the ledger")
    assert [row["state"] for row in node.instances()] == ["received"]
    assert list((node.spool.root / "temporary").iterdir()) == []


def request_for(dataset: Dataset, **changes: Any) -> list[bytes]:
    """The C-STORE of a data set."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    # PS3.10 7.1: preamble, prefix, and Group Length of the meta information as first element.
    start = 144 + int.from_bytes(data[140:144], "little")
    return store_request(data[start:], str(dataset.SOPInstanceUID), **changes)


# T7: the rest is in tests/fuzz ----------------------------------------------------------------


def test_t7_file_meta_information_within_the_data_set_is_refused(node_scp: Node) -> None:
    # Stored, it would stand behind the real one: pydicom would take its transfer syntax.
    dataset = ct_slice(1)
    meta = _element(2, 0x10, b"UI", b"1.2.840.10008.1.2\0")
    with Wire(node_scp.port) as wire:
        wire.associate()
        uid = str(dataset.SOPInstanceUID)
        assert wire.store(store_request(meta + _data_set(dataset), uid)) == 0xC000
        assert wire.store(store_request(_data_set(dataset), uid)) == 0x0000
    assert sorted(row["state"] for row in node_scp.instances()) == ["received", "rejected"]


def test_t7_a_second_uid_behind_the_pixels_is_refused(node_scp: Node) -> None:
    dataset = ct_slice(1)
    uid = str(dataset.SOPInstanceUID)
    other = _element(8, 0x18, b"UI", b"1.2.3\0")
    with Wire(node_scp.port) as wire:
        wire.associate()
        assert wire.store(store_request(_data_set(dataset) + other, uid)) == 0xC000


# pynetdicom's thread ends by an exception.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_t7_a_command_set_that_does_not_parse_ends_the_association_in_the_ledger_too(
    node_scp: Node,
) -> None:
    with Wire(node_scp.port) as wire:
        wire.associate()
        assert wire.store(request_for(ct_slice(1))) == 0x0000
        # Of a C-ECHO-RQ the Command Field alone.
        wire.send(p_data(1, 3, struct.pack("<HHLH", 0, 0x100, 2, 0x30)))
        assert all(answer.kind == ABORT for answer in wire.answers())
    until(node_scp.all_released, "the association is closed in the ledger")


# T8 ------------------------------------------------------------------------------------------

ATTACKS = ["../../escape", "/etc/escape", "1.2\0.3", "1" * 65, "", "1..2", "1.2.3/../4", "-1.2"]


@pytest.mark.parametrize("uid", ATTACKS, ids=[repr(uid)[:16] for uid in ATTACKS])
def test_t8_a_uid_that_is_none_is_refused_wherever_it_stands_and_never_logged(
    uid: str,
    start_node: Callable[..., Node],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # pynetdicom gives a command without its UID no answer at all, so the stock path waits.
    node_scp = start_node(association={"network_timeout_s": 1.0})
    before = set(tmp_path.rglob("*escape*"))
    good = request_for(ct_slice(1))
    placeholder = ct_slice(1).SOPInstanceUID
    statuses_seen = []
    for told, held in ((uid, placeholder), (placeholder, uid), (uid, uid)):
        with Wire(node_scp.port) as wire:
            wire.associate()
            wire.send(*with_uids(placeholder, told, held))
            answer = wire.answer()
            if answer is not None and answer.kind == P_DATA:
                statuses_seen.append(answer.status)
    assert all(
        status in (0xA900, 0x0115, 0x0117) or status & 0xF000 == 0xC000 for status in statuses_seen
    )
    assert statuses_seen
    for keyword in ("SeriesInstanceUID", "StudyInstanceUID"):
        dataset = ct_slice(2)
        with Wire(node_scp.port) as wire:
            wire.associate()
            mark = str(dataset[keyword].value)
            octets = b"".join(request_for(dataset))
            assert mark.encode() in octets
            assert wire.store([_swapped(dataset, keyword, uid)]) & 0xF000 == 0xC000
    with Wire(node_scp.port) as wire:
        wire.associate()
        assert wire.store(good) == 0x0000
    assert set(tmp_path.rglob("*escape*")) == before
    assert {row["state"] for row in node_scp.instances()} <= {"received", "rejected"}
    printed = capsys.readouterr()
    assert not uid or uid not in printed.out + printed.err


def with_uids(placeholder: str, told: str, held: str) -> list[bytes]:
    """A C-STORE whose command set says *told* where its data set holds *held*."""
    command = b"".join(request_for(ct_slice(1)))
    length = int.from_bytes(command[6:10], "big") - 2
    body, rest = command[12 : 12 + length], _data_set(ct_slice(1))
    body = _replaced(body, struct.pack("<HHL", 0, 0x1000, _even(placeholder)), placeholder, told)
    group = struct.pack("<HHLL", 0, 0, 4, len(body) - 12)
    rest = _replaced(
        rest, b"\x08\x00\x18\x00UI" + struct.pack("<H", _even(placeholder)), placeholder, held
    )
    return [p_data(1, 3, group + body[12:]), p_data(1, 2, rest)]


def _swapped(dataset: Dataset, keyword: str, uid: str) -> bytes:
    """A C-STORE whose data set holds *uid* under a keyword, as no library would write it."""
    element = dataset[keyword]
    tag = struct.pack("<HH", element.tag.group, element.tag.elem)
    value = str(element.value)
    data = _replaced(_data_set(dataset), tag + b"UI" + struct.pack("<H", _even(value)), value, uid)
    return b"".join(store_request(data, str(dataset.SOPInstanceUID)))


def _data_set(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    return data[144 + int.from_bytes(data[140:144], "little") :]


def _even(value: str) -> int:
    return len(value) + len(value) % 2


def _replaced(octets: bytes, header: bytes, value: str, other: str) -> bytes:
    """An element's value and length changed; its header ends with the length."""
    size = 4 if header[4:6].isalpha() is False else 2
    old = header + value.encode() + b"\0" * (len(value) % 2)
    assert octets.count(old) == 1
    new = other.encode() + b"\0" * (len(other) % 2)
    return octets.replace(old, header[:-size] + len(new).to_bytes(size, "little") + new)


# T9 ------------------------------------------------------------------------------------------

NAMES = {
    "latin": (b"ISO_IR 100", "Müller^Änne".encode("latin-1")),
    "cyrillic": (b"ISO_IR 144", "Люкceмбypг".encode("iso8859-5")),
    "unicode": (b"ISO_IR 192", "Wang^XiaoDong=王^小东".encode()),
    "japanese": (b"\\ISO 2022 IR 87", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"),
    "single code extension": (b"ISO 2022 IR 100", "Müller^Änne".encode("latin-1")),
    "single cyrillic extension": (b"ISO 2022 IR 144", "Люкceмбypг".encode("iso8859-5")),
    "two extensions": (b"ISO 2022 IR 100\\ISO 2022 IR 144", b"M\xfcller=\x1b-L\xbb\xee\xda"),
    "wrong declaration": (b"ISO_IR 192", "Müller^Änne".encode("latin-1")),
    "UTF-8 declared as Latin": (b"ISO_IR 100", "Müller^王".encode()),
    "escapes declared as Latin": (b"ISO_IR 100", b"Yamada=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"),
    "nothing declared": (b"", "Müller^Änne".encode("latin-1")),
    "unknown": (b"ISO_IR 999", b"M\xfcller"),
}


@pytest.mark.parametrize("script", NAMES)
def test_t9_a_name_in_any_character_set_is_kept_byte_for_byte(script: str, node_scp: Node) -> None:
    declared, name = NAMES[script]
    data = _data_set(ct_slice(1))
    before = b"\x08\x00\x16\x00UI"
    data = data.replace(before, _element(8, 5, b"CS", declared) + before, 1)
    old = _element(0x10, 0x10, b"PN", b"Phantom^Test")
    assert old in data
    data = data.replace(old, _element(0x10, 0x10, b"PN", name))
    with Wire(node_scp.port) as wire:
        wire.associate()
        assert wire.store(store_request(data, str(ct_slice(1).SOPInstanceUID))) == 0x0000
    assert node_scp.stored() == {data}


def _element(group: int, number: int, vr: bytes, value: bytes) -> bytes:
    value += b" " * (len(value) % 2)
    return struct.pack("<HH2sH", group, number, vr, len(value)) + value


# T13 -----------------------------------------------------------------------------------------


def large_request(size: int, number: int = 1) -> Iterator[bytes]:
    """A C-STORE of one CT image with *size* bytes of pixels, never held as a whole."""
    uid = f"{ROOT}.5.{number}"
    head = _data_set(ct_slice(1, SOPInstanceUID=uid))
    cut = head.index(b"\xe0\x7f\x10\x00OW")
    pixels = struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OW", 0, size)
    # Of a request with some data set the command alone: it says that one follows.
    yield store_request(b"\0\0", uid, message_id=number)[0]
    yield p_data(1, 0, head[:cut] + pixels)
    piece = bytes(range(256)) * 500
    left = size
    while left:
        part = piece[: min(left, len(piece))]
        left -= len(part)
        yield p_data(1, 2 if not left else 0, part)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_t13_an_object_of_600_megabytes_needs_no_memory_of_its_size(tmp_path: Path) -> None:
    settings = node_settings(
        tmp_path,
        association=RECEIVE_PATHS["loop"],
        spool={"path": tmp_path / "spool", "min_free_bytes": 0, "min_free_percent": 0},
        routes=tmp_path / "routes.toml",
    )
    settings.routes.write_text(DEFAULT_ROUTES)
    size = 600 * 10**6
    with receiver_template(settings, tmp_path) as template:
        receiver = template.start()
        with Wire(template.port, limit_s=120) as wire:
            wire.associate()
            assert wire.store(request_for(ct_slice(2))) == 0x0000
            idle = receiver.resident_bytes()
            for octets in large_request(size):
                wire.send(octets)
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 0x0000
        assert receiver.highest_bytes() - idle <= 20 * MEBIBYTE
        assert receiver.highest_bytes() <= 150 * MEBIBYTE
        assert receiver.end() == 0
    kept = max((tmp_path / "spool/incoming").glob("??/*.dcm"), key=lambda path: path.stat().st_size)
    assert kept.stat().st_size > size
    kept.unlink()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_t13_a_series_of_a_thousand_slices_is_answered_evenly_and_without_growth(
    template: Template, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver, seconds = template.start(), list[float]()
    with Wire(template.port) as wire:
        wire.associate()
        for number in range(1, 1001):
            started = time.monotonic()
            wire.send(*large_request(2 * 512 * 512, number))
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 0x0000
            seconds.append(time.monotonic() - started)
            if number == 50:
                idle = receiver.resident_bytes()
        wire.release()
    growth = receiver.resident_bytes() - idle
    cuts = statistics.quantiles(seconds, n=100)
    with capsys.disabled():
        print(
            f"\n1000 slices of 512 x 512: {1000 / sum(seconds):.0f}/s, p50 {1000 * cuts[49]:.1f} "
            f"ms, p99 {1000 * cuts[98]:.1f} ms, memory {receiver.resident_bytes() / MEBIBYTE:.0f} "
            f"MiB (growth {growth / MEBIBYTE:+.1f})"
        )
    assert growth <= 20 * MEBIBYTE
    assert cuts[49] < 1.0
    receiver.end()
    for path in (template.settings.spool.path / "incoming").glob("??/*.dcm"):
        path.unlink()


# T20 -----------------------------------------------------------------------------------------


def test_t20_patients_are_named_in_the_spool_and_the_audit_journal_and_nowhere_else(
    template: Template, tmp_path: Path
) -> None:
    receiver, secret = template.start(), "SECRETNAME"
    spoilt = ct_slice(1, PatientName=f"{secret}^A", PatientID=secret, PatientBirthDate="19700101")
    whole = _data_set(spoilt)
    uid = str(spoilt.SOPInstanceUID)
    with Wire(template.port) as wire:
        wire.associate()
        assert wire.store(store_request(whole, uid)) == 0x0000
        assert wire.store(store_request(whole, uid)) == 0x0000
        assert wire.store(store_request(whole + _element(0x7FE1, 1, b"LO", b"x"), uid)) == 0x0000
        assert wire.store(store_request(whole[:-9], uid)) == 0xC000
        assert wire.store(store_request(whole, f"{uid}.9")) == 0xA900
        wire.send(*store_request(whole, uid)[:1], b"\x04\x00\xff\xff\xff\xff")
    with Wire(template.port) as wire:
        wire.send(association_request(calling="X" * 16), whole)
    assert echo(at(template.port)).ok
    assert receiver.end() == 0
    named = {
        path.relative_to(tmp_path).parts[0]
        for path in tmp_path.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    }
    assert named <= {"spool", "audit.log"}
    assert "spool" in named
    assert all(json.loads(line) for line in template.log.read_text().splitlines())
