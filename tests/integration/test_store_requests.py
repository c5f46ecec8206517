"""C-STORE on a connection that pynetdicom has lent, against peers that do not play along."""

from __future__ import annotations

import socket
import threading
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.events import Event

from dicom_node.association import Peer, connection_of
from dicom_node.storage_scu import Sendable, Sent, StoreLink, send_all
from dicom_node.upper_layer import CommandSet, abort_pdu, response_pdu
from tests.factories import make_series, write_series

#: Answers a request on the raw socket: (socket, context, message ID).
Answer = Callable[[socket.socket, int, int], None]


@contextmanager
def archive(handle: Callable[[Event], int], syntaxes: list[str], pdu: int) -> Generator[Peer]:
    """pynetdicom as the SCP, which the other end of our own octets is read by."""
    entity = AE(ae_title="ARCHIVE")
    entity.maximum_pdu_size = pdu
    entity.add_supported_context(CTImageStorage, syntaxes)
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, handle)]
    )
    assert server is not None
    try:
        yield Peer("ARCHIVE", "127.0.0.1", server.server_address[1], "NODE", dimse_timeout=5)
    finally:
        # Of an association that is about to end by itself, an abort is an event that pynetdicom's
        # own thread does not expect.
        for association in server.active_associations:
            association.join(timeout=5)
        server.shutdown()


def written(folder: Path, count: int) -> list[Sendable]:
    paths = write_series(make_series("CT", slices=count, rows=64), folder)
    return [Sendable.of(path) for path in paths]


def data_set(path: Path) -> bytes:
    whole = path.read_bytes()
    return whole[144 + int.from_bytes(whole[140:144], "little") :]


@pytest.mark.parametrize("pdu", [0, 4096, 16382])
def test_what_arrives_is_what_lies_on_disk(tmp_path: Path, pdu: int) -> None:
    got: list[bytes] = []

    def handle(event: Event) -> int:
        got.append(event.encoded_dataset(include_meta=False))
        return 0xB000 if len(got) == 2 else 0x0000

    items = written(tmp_path, 4)
    with archive(handle, [ExplicitVRLittleEndian], pdu) as peer:
        answers = list(send_all(peer, items))
    assert [one.status for one in answers] == [0, 0xB000, 0, 0]
    assert [one.outcome for one in answers] == ["delivered"] * 4
    assert got == [data_set(item.path) for item in items]


def test_a_peer_of_another_syntax_gets_the_same_values(tmp_path: Path) -> None:
    got: list[int] = []

    def handle(event: Event) -> int:
        event.dataset.file_meta = event.file_meta
        got.append(zlib.crc32(event.dataset.PixelData))
        return 0x0000

    (item,) = written(tmp_path, 1)
    with archive(handle, [ImplicitVRLittleEndian], 16382) as peer:
        (answer,) = send_all(peer, [item])
    assert answer.outcome == "delivered"
    pixels = 2 * 64 * 64
    assert got == [zlib.crc32(item.path.read_bytes()[-pixels:])]


def test_an_association_is_lent_and_given_back_series_after_series(tmp_path: Path) -> None:
    items = written(tmp_path, 6)
    with archive(lambda _: 0x0000, [ExplicitVRLittleEndian], 16382) as peer:
        link = StoreLink(peer)
        for start in (0, 2, 4):
            assert [one.status for one in link.send(items[start : start + 2])] == [0, 0]
        # Of one that has had enough, what is on its way is answered, and nothing else is begun.
        answers = link.send(items)
        first = next(answers)
        assert (first.status, first.more_follow) == (0, True)
        link.enough()
        assert [(one.status, one.more_follow) for one in answers] == [(0, False)]
        assert [one.status for one in link.send(items)] == [0] * 6
        assert link.opened == 1
        # An answer that nobody reads is not taken for that of another instance.
        answers = link.send(items)
        assert next(answers).status == 0
        answers.close()
        assert [one.status for one in link.send(items)] == [0] * 6
        assert link.opened == 2
        link.close()


def test_an_answer_is_told_while_the_next_instance_is_on_its_way(tmp_path: Path) -> None:
    items, came = written(tmp_path, 3), threading.Semaphore(0)

    def handle(event: Event) -> int:
        came.release()
        return 0x0000

    with archive(handle, [ExplicitVRLittleEndian], 16382) as peer:
        answers = send_all(peer, items)
        for item, following in zip(items, [*items[1:], None], strict=True):
            answer = next(answers)
            assert answer.sop_instance_uid == item.sop_instance_uid
            assert answer.more_follow == (following is not None)
            if item is items[0]:
                assert came.acquire(timeout=20)
            if following is not None:
                # It comes though nobody has asked for its answer yet.
                assert came.acquire(timeout=20)
        assert next(answers, None) is None


def answered_by(answer: Answer, tmp_path: Path) -> list[Sent]:
    """What comes of three instances where *answer* writes in the place of the archive."""
    stop = threading.Event()

    def handle(event: Event) -> int:
        connection = connection_of(event.assoc)
        assert connection is not None
        answer(connection, int(event.context.context_id or 0), event.message_id)
        stop.wait(30)  # its own answer must not come as well
        return 0x0000

    with archive(handle, [ExplicitVRLittleEndian], 16382) as peer:
        try:
            return list(send_all(peer, written(tmp_path, 3)))
        finally:
            stop.set()


def request(message_id: int, field: int = 1) -> CommandSet:
    return CommandSet(field, message_id, str(CTImageStorage), "1.2.3", True)


@pytest.mark.parametrize(
    "answer",
    [
        lambda c, context, number: c.sendall(abort_pdu(0)),
        lambda c, context, number: c.sendall(bytes((5, 0, 0, 0, 0, 4, 0, 0, 0, 0))),  # release
        lambda c, context, number: c.shutdown(socket.SHUT_RDWR),
        lambda c, context, number: c.sendall(response_pdu(context, request(number + 1), 0)),
        lambda c, context, number: c.sendall(response_pdu(context, request(number, 0x30), 0)),
        lambda c, context, number: c.sendall(b"\x04\x00\x7f\xff\xff\xff"),
        lambda c, context, number: c.sendall(b"\x04\x00\x00\x00\x00\x03\x00\x00\x00"),
        lambda c, context, number: c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        lambda c, context, number: None,  # nothing within the time-out
    ],
    ids=["abort", "release", "close", "number", "echo", "long", "short", "http", "silence"],
)
def test_what_is_no_answer_ends_the_association_and_the_instance_waits(
    tmp_path: Path, answer: Answer
) -> None:
    (only,) = answered_by(answer, tmp_path)
    assert (only.status, only.outcome) == (None, "retry")


def test_an_answer_in_single_octets_is_an_answer(tmp_path: Path) -> None:
    def slowly(connection: socket.socket, context: int, number: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for octet in response_pdu(context, request(number), 0xA700, "no room"):
            connection.sendall(bytes((octet,)))

    first, *_ = answered_by(slowly, tmp_path)
    assert (first.status, first.outcome, first.comment) == (0xA700, "retry", "no room")
