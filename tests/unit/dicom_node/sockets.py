"""Peers on loopback that do what real peers should not: silence, noise, half a request."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Generator
from typing import Any

Address = tuple[str, int]


def until(condition: Callable[[], Any], limit_s: float = 10.0) -> Any:
    """Wait for a true value; AssertionError when it does not come."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{condition} stayed false for {limit_s} s"
        time.sleep(0.002)
    return found


@contextlib.contextmanager
def peer(address: Address, source: str = "") -> Generator[socket.socket]:
    """A connection to *address*, from *source* where it is given; reads wait ten seconds."""
    connection = socket.create_connection(
        address, timeout=10, source_address=(source, 0) if source else None
    )
    with connection:
        yield connection


def read_pdu(connection: socket.socket) -> bytes:
    """The next PDU; what there is of it where the connection ends."""
    header = _read(connection, 6)
    return header + _read(connection, struct.unpack(">BxL", header)[1]) if header else b""


def _read(connection: socket.socket, wanted: int) -> bytes:
    octets = b""
    while len(octets) < wanted and (piece := connection.recv(wanted - len(octets))):
        octets += piece
    return octets


def has_closed(connection: socket.socket) -> bool:
    """Whether the other side has ended the connection; what it sent is thrown away."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
