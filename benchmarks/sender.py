"""A C-STORE sender that costs little and times each instance: encoded beforehand, sent by sendall.

    python -m benchmarks.sender HOST PORT AET KIND COUNT dicom|raw

It writes "ready" once associated, waits for a line on standard input, sends, and writes one line
of JSON: seconds, octets and the latencies.  "raw" speaks to `benchmarks.limit` instead: a length,
the file, and one octet back.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Callable

from pynetdicom import AE, build_context
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
)

from benchmarks.images import KINDS, Instance, instances
from dicom_node.upper_layer import C_STORE_RQ, command_pdu

# What one message is sent as, piece after piece.
Message = list[bytes | memoryview]

_LARGEST_PDU = 131_072
_RELEASE = b"\x05\0\0\0\0\x04\0\0\0\0"


def main() -> None:
    """Send as the command line says."""
    host, port, title, kind, count, how = sys.argv[1:]
    chosen = KINDS[kind]
    made = instances(chosen, int(count))
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send: Callable[[Message], None]
        if how == "raw":
            messages: list[Message] = [[struct.pack(">L", len(one.file)), one.file] for one in made]
            send = _raw(connection)
        else:
            pdu = _associate(connection, title, chosen.sop_class, chosen.transfer_syntax)
            messages = [_encoded(one, pdu) for one in made]
            send = _dicom(connection)
        print("ready", flush=True)
        sys.stdin.readline()
        _run(messages, send)
        if how != "raw":
            connection.sendall(_RELEASE)
            connection.recv(10)


def _run(messages: list[Message], send: Callable[..., None]) -> None:
    latencies = []
    octets = sum(len(piece) for message in messages for piece in message)
    begun = time.perf_counter()
    for message in messages:
        started = time.perf_counter()
        send(message)
        latencies.append(time.perf_counter() - started)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "octets": octets, "latencies": latencies}), flush=True)


def _raw(connection: socket.socket) -> Callable[[Message], None]:
    def send(message: Message) -> None:
        for piece in message:
            connection.sendall(piece)
        if connection.recv(1) != b"\0":
            raise SystemExit("the raw server has not stored")

    return send


def _dicom(connection: socket.socket) -> Callable[[Message], None]:
    status = struct.pack("<HHLH", 0, 0x900, 2, 0)

    def send(message: Message) -> None:
        for piece in message:
            connection.sendall(piece)
        header = _exactly(connection, 6)
        answer = _exactly(connection, struct.unpack(">BxL", header)[1])
        if header[0] != 4 or status not in answer:
            raise SystemExit(f"not stored: {answer.hex()}")

    return send


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = connection.recv(count - len(received))
        if not piece:
            raise SystemExit("the receiver has closed the connection")
        received += piece
    return received


def _associate(connection: socket.socket, title: str, sop_class: str, syntax: str) -> int:
    """Negotiate one presentation context; the PDU length to send."""
    request = A_ASSOCIATE()
    request.application_context_name = "1.2.840.10008.3.1.1.1"
    request.calling_ae_title, request.called_ae_title = "BENCHMARK", title
    context = build_context(sop_class, syntax)
    context.context_id = 1
    request.presentation_context_definition_list = [context]
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = 16382
    implementation.implementation_class_uid = AE().implementation_class_uid
    request.user_information = [length, implementation]
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(request)
    connection.sendall(pdu.encode())
    header = _exactly(connection, 6)
    body = _exactly(connection, struct.unpack(">BxL", header)[1])
    if header[0] != 2:
        raise SystemExit("the association was rejected")
    answer = A_ASSOCIATE_AC()
    answer.decode(header + body)
    if answer.presentation_context[0].result != 0:
        raise SystemExit("the presentation context was rejected")
    told = answer.user_information
    return min(told.maximum_length or _LARGEST_PDU if told else _LARGEST_PDU, _LARGEST_PDU)


def _encoded(instance: Instance, max_pdu: int) -> Message:
    """The PDUs of a C-STORE request, in pieces that are sent one after another."""
    elements = (
        _element(0x02, _padded(instance.sop_class))
        + _element(0x100, struct.pack("<H", C_STORE_RQ))
        + _element(0x110, struct.pack("<H", 1))
        + _element(0x700, struct.pack("<H", 0))
        + _element(0x800, struct.pack("<H", 0))
        + _element(0x1000, _padded(instance.sop_instance))
    )
    group = _element(0, struct.pack("<L", len(elements)))
    pieces: Message = [command_pdu(1, group + elements)]
    step = max_pdu - 6
    values = [
        piece[at : at + step] for piece in instance.data_set() for at in range(0, len(piece), step)
    ]
    for value in values:
        last = 2 if value is values[-1] else 0
        pieces.append(struct.pack(">BxLLBB", 4, len(value) + 6, len(value) + 2, 1, last))
        pieces.append(value)
    # An image goes out by one call; of a large object the frames are not held apart.
    return [b"".join(pieces)] if instance.times == 1 else pieces


def _element(element: int, value: bytes) -> bytes:
    return struct.pack("<HHL", 0, element, len(value)) + value


def _padded(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)


if __name__ == "__main__":
    main()
