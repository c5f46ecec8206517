"""The listener before any association: admission, deadlines, caps, and peers that mean no good."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import pytest

from dicom_node.access import ACCEPTED, Admission, Requestor, refuse
from dicom_node.errors import ConfigurationError
from dicom_node.listener import Connected, Listener, Policy, Port, Refusal
from tests.unit.dicom_node.sockets import Address, has_closed, peer, read_pdu, until
from tests.unit.dicom_node.test_request import request_pdu

REJECT, ABORT = 3, 7


@dataclass
class Door:
    """A listener and what came of its connections; served ones stay until *leave* is set."""

    answer: Callable[[Requestor], Admission] = lambda requestor: ACCEPTED
    served: list[Connected] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    leave: threading.Event = field(default_factory=threading.Event)
    listener: Listener = field(init=False)

    def serve(self, connected: Connected) -> None:
        self.served.append(connected)
        self.leave.wait(30)

    @property
    def address(self) -> Address:
        return self.listener.addresses[0]

    def why(self) -> list[str]:
        return [refusal.why for refusal in self.refused]


OpenDoor = Callable[..., Door]


@pytest.fixture
def open_door() -> Generator[OpenDoor]:
    with ExitStack() as stack:

        def start(door: Door | None = None, **policy: float) -> Door:
            door = door or Door()
            door.listener = Listener(
                [Port("127.0.0.1", 0)],
                Policy(**policy),  # type: ignore[arg-type]
                admit=lambda requestor: door.answer(requestor),
                serve=door.serve,
                refused=door.refused.append,
            )
            door.listener.start()
            stack.callback(door.listener.stop)
            stack.callback(door.leave.set)
            return door

        yield start


def test_an_admitted_peer_is_handed_over_with_its_request(open_door: OpenDoor) -> None:
    door = open_door()
    with peer(door.address) as connection:
        connection.sendall(request_pdu(calling=b"CT1\0"))
        (connected,) = until(lambda: door.served)
        assert connected.requestor == Requestor("CT1", "DIFFCODE", "127.0.0.1", None)
        assert connected.request.pdu == request_pdu(calling=b"CT1")
        assert connected.address == connection.getsockname()
        assert connected.socket.gettimeout() is None
        assert connected.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert (door.listener.pending, door.listener.serving) == (0, 1)


def test_what_follows_the_request_is_left_to_the_association(open_door: OpenDoor) -> None:
    door = open_door()
    with peer(door.address) as connection:
        connection.sendall(request_pdu() + b"next")
        (connected,) = until(lambda: door.served)
        assert connected.socket.recv(10) == b"next"


def test_the_connection_is_closed_when_its_association_has_ended(open_door: OpenDoor) -> None:
    door = open_door()
    door.leave.set()
    with peer(door.address) as connection:
        connection.sendall(request_pdu())
        assert connection.recv(1) == b""
    until(lambda: door.listener.serving == 0)


def test_a_rejected_peer_is_told_by_the_numbers_of_the_standard(open_door: OpenDoor) -> None:
    door = open_door(Door(answer=lambda requestor: refuse("not you", 1, 1, 3)))
    with peer(door.address) as connection:
        connection.sendall(request_pdu())
        assert read_pdu(connection) == bytes([REJECT, 0, 0, 0, 0, 4, 0, 1, 1, 3])
    (refusal,) = door.refused
    assert (refusal.why, refusal.calling_ae, refusal.address) == ("not you", "CT1", "127.0.0.1")
    assert door.served == []


@pytest.mark.parametrize(
    ("octets", "reason", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1, "it spoke HTTP"),
        (b"\x16\x03\x01\x00\xc8\x01" + bytes(200), 1, "it spoke TLS on the port without TLS"),
        (b"\x04\x00\x00\x00\x00\x04\x00\x00\x00\x00", 2, "before an association request"),
        (b"\x01\x00\xff\xff\xff\xff" + bytes(300), 6, "is longer than"),
        (
            b"\x01\x00\x00\x00\x00\x60" + b"\x00\x01" + bytes(66) + b"\x10\x00\x99\x99" + bytes(24),
            6,
            "malformed",
        ),
    ],
)
def test_noise_is_answered_by_an_abort_and_told_in_words(
    octets: bytes, reason: int, words: str, open_door: OpenDoor
) -> None:
    door = open_door()
    with peer(door.address) as connection:
        connection.sendall(octets)
        answer = read_pdu(connection)
    assert (answer[0], answer[8], answer[9]) == (ABORT, 2, reason)
    assert words in door.why()[0]


def test_a_malformed_request_is_aborted_at_once_and_never_served(open_door: OpenDoor) -> None:
    # Sound outside, its user information cut short inside; pynetdicom would wait with it.
    door = open_door(artim_s=60.0)
    cut = request_pdu()
    cut = cut[:-5] + b"\x03" + cut[-4:]
    with peer(door.address) as connection:
        connection.sendall(cut)
        answer = read_pdu(connection)
        # PS3.8 Table 9-26: the service provider, invalid-PDU-parameter value.
        assert (answer[0], answer[8], answer[9]) == (ABORT, 2, 6)
        assert door.listener.serving == 0
    assert "malformed" in door.why()[0]
    assert door.served == []
    until(lambda: door.listener.pending == 0)


def test_a_silent_peer_is_closed_at_its_deadline(open_door: OpenDoor) -> None:
    door = open_door(artim_s=0.05)
    with peer(door.address) as connection:
        assert connection.recv(1) == b""
    assert door.why() == ["no end of its association request in time; the connection was closed"]


def test_octets_that_trickle_in_do_not_move_the_deadline(open_door: OpenDoor) -> None:
    door = open_door(artim_s=0.3)
    with peer(door.address) as connection:
        sent = 0
        for octet in request_pdu():
            if has_closed(connection):
                break
            connection.setblocking(True)
            try:
                connection.send(bytes([octet]))
            except OSError:
                break
            sent += 1
            door.leave.wait(0.02)
        assert 1 < sent < len(request_pdu())
    assert "association request in time" in door.why()[0]


def test_peers_that_come_and_go_are_forgotten_and_not_told_of(open_door: OpenDoor) -> None:
    door = open_door()
    for _ in range(300):
        socket.create_connection(door.address).close()
    with peer(door.address) as connection:
        connection.sendall(request_pdu())
        until(lambda: door.served)
    until(lambda: door.listener.pending == 0)
    assert door.refused == []


def test_silent_peers_cost_no_thread_and_hold_up_nobody(open_door: OpenDoor) -> None:
    door = open_door()
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(peer(door.address))
        until(lambda: door.listener.pending == 60)
        assert threading.active_count() <= before  # of other tests one may have ended
        with peer(door.address) as connection:
            connection.sendall(request_pdu())
            until(lambda: door.served, limit_s=1)


def test_the_oldest_silent_connection_of_an_address_gives_way(open_door: OpenDoor) -> None:
    door = open_door(max_pending_per_address=2)
    with peer(door.address) as first, peer(door.address) as second:
        until(lambda: door.listener.pending == 2)
        with peer(door.address) as third:
            assert first.recv(1) == b""
            third.sendall(request_pdu())
            until(lambda: door.served)
            assert not has_closed(second)


def test_a_flood_drives_out_its_own_connections_and_no_others(open_door: OpenDoor) -> None:
    door = open_door(max_pending=8, max_pending_per_address=100)
    with ExitStack() as stack:
        other = stack.enter_context(peer(door.address, "127.0.0.2"))
        until(lambda: door.listener.pending == 1)
        for _ in range(20):
            stack.enter_context(peer(door.address, "127.0.0.3"))
        until(lambda: len(door.refused) == 13)
        assert {refusal.address for refusal in door.refused} == {"127.0.0.3"}
        other.sendall(request_pdu())
        (connected,) = until(lambda: door.served)
        assert connected.requestor.address == "127.0.0.2"


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"max_associations": 1}, "as many associations are open as are allowed"),
        ({"max_associations_per_address": 1}, "from one address"),
    ],
)
def test_more_associations_than_allowed_are_rejected_for_now(
    policy: dict[str, float], words: str, open_door: OpenDoor
) -> None:
    door = open_door(**policy)
    with peer(door.address) as first, peer(door.address) as second:
        first.sendall(request_pdu())
        until(lambda: door.served)
        second.sendall(request_pdu())
        # PS3.8 Table 9-21: transient, presentation, local limit exceeded.
        assert read_pdu(second)[7:] == bytes([2, 3, 2])
        assert words in door.why()[0]
        door.leave.set()
        until(lambda: door.listener.serving == 0)
    with peer(door.address) as third:
        third.sendall(request_pdu())
        until(lambda: len(door.served) == 2)


def test_a_cap_on_one_address_leaves_others_alone(open_door: OpenDoor) -> None:
    door = open_door(max_associations_per_address=1)
    with peer(door.address, "127.0.0.2") as first, peer(door.address, "127.0.0.3") as second:
        first.sendall(request_pdu())
        second.sendall(request_pdu())
        until(lambda: len(door.served) == 2)


def test_stopping_closes_the_port_and_the_pending_and_leaves_the_served(
    open_door: OpenDoor,
) -> None:
    door = open_door()
    address = door.address
    with peer(address) as served, peer(address) as silent:
        served.sendall(request_pdu())
        until(lambda: door.served and door.listener.pending == 1)
        door.listener.stop()
        assert silent.recv(1) == b""
        assert not has_closed(served)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    door.listener.stop()


def test_a_port_in_use_is_a_mistake_of_the_configuration() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        listener = Listener(
            [Port("127.0.0.1", taken.getsockname()[1])],
            Policy(),
            admit=lambda requestor: ACCEPTED,
            serve=lambda connected: None,
            refused=lambda refusal: None,
        )
        with pytest.raises(ConfigurationError, match=r"node\.host, node\.port: cannot listen"):
            listener.start()


def test_a_fault_of_whoever_is_told_does_not_end_the_listener(open_door: OpenDoor) -> None:
    def answer(requestor: Requestor) -> Admission:
        if requestor.calling_ae == "BAD":
            raise RuntimeError("a mistake of ours")
        return ACCEPTED

    door = open_door(Door(answer=answer))
    with peer(door.address) as connection:
        connection.sendall(request_pdu(calling=b"BAD"))
        assert connection.recv(1) == b""
    with peer(door.address) as connection:
        connection.sendall(request_pdu())
        until(lambda: door.served)
