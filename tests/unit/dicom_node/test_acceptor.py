"""What the acceptor uses of pynetdicom beyond its documentation, held by tests."""

from __future__ import annotations

import socket
import struct
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.association import Association

from dicom_node.acceptor import _RequestedSocket, ports
from dicom_node.access import Requestor
from dicom_node.errors import ConfigurationError
from dicom_node.listener import Connected
from dicom_node.request import read_request
from dicom_node.settings import NodeSettings
from tests.unit.dicom_node.certificates import Authority
from tests.unit.dicom_node.test_request import request_pdu

Ends = tuple[_RequestedSocket, socket.socket]


@pytest.fixture
def ends() -> Generator[Ends]:
    """The reader that pynetdicom is given, offering PDUs of 4096 bytes, and the peer's end."""
    ours, theirs = socket.socketpair()
    requestor = Requestor("CT1", "DIFFCODE", "127.0.0.1")
    where = ("127.0.0.1", 104)
    connected = Connected(ours, where, where, requestor, read_request(request_pdu()))
    association = Association(AE(), "acceptor")
    with closing(ours), closing(theirs):
        yield _RequestedSocket(association, connected, 4096), theirs


def read_pdu(reader: _RequestedSocket) -> bytes:
    """Read as pynetdicom does: six bytes, then as many as they say."""
    header = reader.recv(6)
    return bytes(header + reader.recv(struct.unpack(">BxL", header)[1]))


def test_the_request_is_delivered_first_though_nothing_is_on_the_wire(ends: Ends) -> None:
    reader, _ = ends
    assert reader.ready
    assert read_pdu(reader) == request_pdu()
    assert not reader.ready


def test_what_follows_comes_from_the_wire(ends: Ends) -> None:
    reader, theirs = ends
    read_pdu(reader)
    pdus = [struct.pack(">BxL", 4, length) + bytes(length) for length in (0, 10, 4096, 7)]
    theirs.sendall(b"".join(pdus))
    assert reader.ready
    assert [read_pdu(reader) for _ in pdus] == pdus


def test_a_pdu_longer_than_offered_becomes_one_of_unknown_type_and_the_end(ends: Ends) -> None:
    reader, theirs = ends
    read_pdu(reader)
    theirs.sendall(struct.pack(">BxL", 4, 4097) + bytes(4097))
    header = reader.recv(6)
    # PS3.8 9.3.1: types 1 to 7 are known; the state machine answers others with A-ABORT.
    assert header[0] == 0xFF
    assert not reader.ready


def test_a_length_within_a_pdu_is_not_taken_for_a_header(ends: Ends) -> None:
    reader, theirs = ends
    read_pdu(reader)
    body = struct.pack(">BxL", 4, 1 << 30)
    theirs.sendall(struct.pack(">BxL", 4, 6) + body)
    assert read_pdu(reader)[6:] == body


def test_the_node_listens_without_tls_with_it_or_on_both(tmp_path: Path) -> None:
    files = Authority.make(tmp_path).issue("node", "node.example")
    given = {"certificate": files.certificate, "key": files.key, "ca": files.ca, "port": 2762}

    def listens_on(**tls: object) -> list[tuple[int, bool]]:
        settings = NodeSettings.model_validate({"node": {"port": 104}, "tls": tls})
        return [(port.port, port.credentials is not None) for port in ports(settings)]

    assert listens_on() == [(104, False)]
    assert listens_on(**given) == [(104, False), (2762, True)]
    assert listens_on(**given, only=True) == [(2762, True)]


def test_a_certificate_that_is_missing_stops_the_start() -> None:
    given = {"port": 2762, "certificate": "/no/a.pem", "key": "/no/a.key", "ca": "/no/ca.pem"}
    with pytest.raises(ConfigurationError, match=r"tls\.certificate: /no/a\.pem: No such file"):
        ports(NodeSettings.model_validate({"tls": given}))
