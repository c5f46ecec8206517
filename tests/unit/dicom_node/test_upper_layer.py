"""PDUs and commands of a storing association: bytes in, events out."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.dimse_messages import C_ECHO_RQ as EchoRequest
from pynetdicom.dimse_messages import C_STORE_RQ as StoreRequest
from pynetdicom.dimse_messages import C_STORE_RSP as StoreResponse
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.pdu import A_ABORT_RQ, A_RELEASE_RQ, P_DATA_TF

from dicom_node import upper_layer
from dicom_node.upper_layer import (
    Command,
    Data,
    Event,
    Limits,
    OtherPDU,
    Parser,
    ProtocolError,
    abort_pdu,
    answer_in,
    data_pdus,
    read_command,
    read_store_answer,
    response_pdu,
    store_request_pdu,
)

CT = "1.2.840.10008.5.1.4.1.1.2"
UID = "1.2.3.45"


def store_request(data_set: bytes, *, max_pdu: int = 16382, message_id: int = 7) -> bytes:
    """A C-STORE request as pynetdicom encodes it."""
    request = C_STORE()
    request.MessageID, request.Priority = message_id, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = CT, UID
    request.DataSet = BytesIO(data_set)
    message = StoreRequest()
    message.primitive_to_message(request)
    return encoded(message, max_pdu)


def echo_request() -> bytes:
    """A C-ECHO request as pynetdicom encodes it."""
    request = C_ECHO()
    request.MessageID, request.AffectedSOPClassUID = 3, "1.2.840.10008.1.1"
    message = EchoRequest()
    message.primitive_to_message(request)
    return encoded(message, 16382)


def encoded(message: StoreRequest | EchoRequest | StoreResponse, max_pdu: int) -> bytes:
    octets = b""
    for primitive in message.encode_msg(1, max_pdu):
        pdu = P_DATA_TF()
        pdu.from_primitive(primitive)
        octets += pdu.encode()
    return octets


def pdv(control: int, value: bytes, context_id: int = 1) -> bytes:
    return struct.pack(">LBB", len(value) + 2, context_id, control) + value


def p_data(*pdvs: bytes) -> bytes:
    body = b"".join(pdvs)
    return struct.pack(">BxL", 4, len(body)) + body


def events(octets: bytes, step: int = 1 << 20, limits: Limits | None = None) -> Iterator[Event]:
    """The events of octets that come in pieces of *step*; views are copied."""
    parser = Parser(limits or Limits())
    for at in range(0, len(octets), step):
        parser.push(octets[at : at + step])
        while (event := parser.next()) is not None:
            if isinstance(event, Data):
                event = event._replace(view=memoryview(bytes(event.view)))
            yield event
            if isinstance(event, OtherPDU):
                return


def message(found: list[Event]) -> tuple[Command, bytes]:
    """The one message of the events: its command and its data set."""
    command, *pieces = found
    assert isinstance(command, Command)
    data = [piece for piece in pieces if isinstance(piece, Data)]
    assert len(data) == len(pieces)
    assert [piece.last for piece in data] == [False] * (len(data) - 1) + [True]
    return command, b"".join(bytes(piece.view) for piece in data)


@pytest.mark.parametrize("step", [1, 2, 5, 6, 7, 13, 1000, 1 << 20])
@pytest.mark.parametrize("max_pdu", [128, 1000, 16382])
def test_a_store_request_comes_out_whatever_the_pieces(step: int, max_pdu: int) -> None:
    data_set = bytes(range(256)) * 20
    command, data = message(list(events(store_request(data_set, max_pdu=max_pdu), step)))
    assert command.context_id == 1
    assert command.command == upper_layer.CommandSet(1, 7, CT, UID, True)
    assert data == data_set


def test_several_pdvs_in_a_pdu_and_empty_ones_are_one_message() -> None:
    request = store_request(b"", max_pdu=16382)
    command = request[12 : 12 + struct.unpack(">L", request[6:10])[0] - 2]
    octets = (
        p_data(pdv(1, command[:20]), pdv(1, b""))
        + p_data(pdv(3, command[20:]), pdv(0, b"ab"), pdv(0, b""))
        + p_data()
        + p_data(pdv(0, b"cd"), pdv(2, b""))
    )
    for step in (1, 3, 1000):
        _, data = message(list(events(octets, step)))
        assert data == b"abcd"


def test_an_echo_between_two_instances_is_three_messages() -> None:
    octets = store_request(b"12") + echo_request() + store_request(b"34")
    found = [event for event in events(octets) if isinstance(event, Command)]
    assert [event.command.field for event in found] == [0x0001, 0x0030, 0x0001]
    assert not found[1].command.has_data_set


def test_a_release_and_an_abort_are_left_to_somebody_else() -> None:
    for pdu, kind in ((A_RELEASE_RQ(), 5), (A_ABORT_RQ(), 7)):
        if isinstance(pdu, A_ABORT_RQ):
            pdu.source = pdu.reason_diagnostic = 0
        parser = Parser(Limits())
        parser.push(pdu.encode() + b"rest")
        assert parser.next() == OtherPDU(kind, 4)
        assert parser.unread() == pdu.encode() + b"rest"


def test_an_abort_within_a_data_set_is_seen() -> None:
    octets = store_request(b"x" * 1000, max_pdu=256)[:-100]
    whole = octets[: octets.rfind(b"\x04\x00\x00\x00\x00")]
    assert list(events(whole + bytes((7, 0, 0, 0, 0, 4, 0, 0, 0, 0))))[-1] == OtherPDU(7, 4)


@pytest.mark.parametrize("step", [1, 10, 1 << 20])
def test_what_is_unread_can_be_read_again_from_the_command_on(step: int) -> None:
    tail = store_request(b"second", message_id=8)
    command = echo_request()[12:]
    octets = store_request(b"first") + p_data(pdv(3, command), pdv(3, command)) + tail
    parser, fields = Parser(Limits()), []
    rest = b""
    for at in range(0, len(octets), step):
        parser.push(octets[at : at + step])
        while (event := parser.next()) is not None:
            if isinstance(event, Command):
                fields.append(event.command.field)
                if event.command.field == 0x0030:
                    rest = parser.unread() + octets[at + step :]
                    break
        if rest:
            break
    assert fields == [0x0001, 0x0030]
    again = [event.command for event in events(rest) if isinstance(event, Command)]
    assert [(one.field, one.message_id) for one in again] == [(0x30, 3), (0x30, 3), (1, 8)]


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"\x08\0\0\0\0\x04\0\0\0\0", upper_layer.UNRECOGNIZED_PDU),
        (b"\x00\0\0\0\0\x04\0\0\0\0", upper_layer.UNRECOGNIZED_PDU),
        (b"\x01\0\0\0\0\x44", upper_layer.UNEXPECTED_PDU),
        (b"\x06\0\0\0\0\x04\0\0\0\0", upper_layer.UNEXPECTED_PDU),
        (b"\x05\0\0\0\0\x05\0\0\0\0\0", upper_layer.INVALID_PARAMETER),
        (b"\x04\0\xff\xff\xff\xff", upper_layer.INVALID_PARAMETER),
        (p_data(b"abc"), upper_layer.INVALID_PARAMETER),
        (p_data(b"\0\0\0\x01\x01\x03"), upper_layer.INVALID_PARAMETER),
        (p_data(b"\0\0\0\xff\x01\x03"), upper_layer.INVALID_PARAMETER),
        (p_data(pdv(3, b"", context_id=2)), upper_layer.INVALID_PARAMETER),
        (p_data(pdv(2, b"data")), upper_layer.INVALID_PARAMETER),
        (p_data(pdv(3, b"odd")), upper_layer.INVALID_PARAMETER),
        (p_data(pdv(3, b"\x08\0\x05\0\0\0\0\0")), upper_layer.INVALID_PARAMETER),
        (p_data(pdv(3, b"\0\0\0\1\xff\xff\xff\xff")), upper_layer.INVALID_PARAMETER),
        (p_data(pdv(3, b"\0\0\0\1\4\0\0\0\1\0\0\0")), upper_layer.INVALID_PARAMETER),
        (p_data(pdv(3, b"")), upper_layer.INVALID_PARAMETER),
        (p_data(pdv(3, b"\0\0\2\0\2\0\0\0\xff\xff")), upper_layer.INVALID_PARAMETER),
        (p_data(pdv(1, bytes(1 << 17))), upper_layer.INVALID_PARAMETER),
    ],
)
def test_what_the_standard_forbids_is_told_by_its_reason(octets: bytes, reason: int) -> None:
    for step in (1, 1 << 20):
        with pytest.raises(ProtocolError) as told:
            list(events(octets, step))
        assert told.value.reason == reason
    assert abort_pdu(reason)[8:] == bytes((2, reason))


def test_a_message_may_not_interrupt_another() -> None:
    first = store_request(b"x" * 1000, max_pdu=256)
    cut = first[: first.rfind(struct.pack(">BxL", 4, 256 - 0)[:2])]
    for intruder, reason in (
        (echo_request(), upper_layer.INVALID_PARAMETER),
        (A_RELEASE_RQ().encode(), upper_layer.UNEXPECTED_PDU),
    ):
        with pytest.raises(ProtocolError) as told:
            list(events(cut + intruder))
        assert told.value.reason == reason


@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_octets_give_events_or_a_protocol_error_alike_in_any_pieces(
    octets: bytes, step: int
) -> None:
    def outcome(by: int) -> tuple[list[tuple[object, ...]], int | None]:
        found: list[tuple[object, ...]] = []
        data = b""
        try:
            for event in events(octets, by):
                if isinstance(event, Data):
                    data += bytes(event.view)
                else:
                    found.append(tuple(event))
        except ProtocolError as error:
            return [*found, (data,)], error.reason
        return [*found, (data,)], None

    assert outcome(step) == outcome(1 << 20)


@pytest.mark.parametrize(("status", "comment"), [(0, ""), (0xA700, "no room"), (0xC000, "odd")])
@pytest.mark.parametrize("uid", [UID, UID + "6"])
def test_a_store_response_is_what_pynetdicom_would_send(
    status: int, comment: str, uid: str
) -> None:
    response = C_STORE()
    response.MessageIDBeingRespondedTo, response.Status = 7, status
    response.AffectedSOPClassUID, response.AffectedSOPInstanceUID = CT, uid
    if comment:
        response.ErrorComment = comment
    stock = StoreResponse()
    stock.primitive_to_message(response)
    request = upper_layer.CommandSet(1, 7, CT, uid, True)
    assert response_pdu(1, request, status, comment) == encoded(stock, 16382)


def test_uids_lose_their_padding_and_nothing_else() -> None:
    element = struct.pack("<HHL", 0, 0x1000, 6) + b"1.2.3\0"
    field = struct.pack("<HHLH", 0, 0x100, 2, 1)
    assert read_command(field + element).sop_instance_uid == "1.2.3"
    odd = struct.pack("<HHL", 0, 0x1000, 8) + b"../../x "
    assert read_command(field + odd).sop_instance_uid == "../../x"


@given(st.binary(min_size=1, max_size=5000), st.integers(20, 2000), st.integers(1, 3000))
def test_a_request_in_pieces_is_read_as_it_was_written(data: bytes, most: int, piece: int) -> None:
    parser = Parser(Limits())
    octets = store_request_pdu(5, 77, CT, UID)
    for start in range(0, len(data), piece):
        part = memoryview(data)[start : start + piece]
        pdus = data_pdus(5, part, most, last=start + piece >= len(data))
        octets += pdus
    parser.push(octets)
    begun = parser.next()
    assert isinstance(begun, Command)
    assert (begun.context_id, begun.command.field, begun.command.message_id) == (5, 1, 77)
    assert (begun.command.sop_class_uid, begun.command.sop_instance_uid) == (CT, UID)
    got, ended = b"", False
    while (event := parser.next()) is not None:
        assert isinstance(event, Data)
        assert not ended
        got, ended = got + bytes(event.view), event.last
    assert (got, ended) == (data, True)


def test_no_pdu_is_longer_than_the_peer_allows() -> None:
    octets, at, lengths = data_pdus(1, memoryview(bytes(1000)), 128, last=True), 0, []
    while at < len(octets):
        lengths.append(int.from_bytes(octets[at + 2 : at + 6], "big"))
        at += 6 + lengths[-1]
    assert max(lengths) == 128
    assert sum(lengths) == 1000 + 6 * len(lengths)


def test_an_answer_of_pynetdicom_is_understood() -> None:
    response = C_STORE()
    response.MessageIDBeingRespondedTo, response.Status = 77, 0xA700
    response.AffectedSOPClassUID, response.AffectedSOPInstanceUID = CT, UID
    response.ErrorComment = "no room"  # type: ignore[assignment]
    message = StoreResponse()
    message.primitive_to_message(response)
    command = bytearray()
    assert answer_in(encoded(message, 16382)[6:], command)
    assert read_store_answer(bytes(command)) == (77, 0xA700, "no room")


@pytest.mark.parametrize(
    "pdu",
    [
        b"\x00\x00\x00\x01\x01",  # less than the header of a PDV
        b"\x00\x00\x00\x09\x01\x03abc",  # longer than its PDU
        b"\x00\x00\x00\x05\x01\x02abc",  # of a data set
    ],
)
def test_what_is_no_part_of_an_answer_is_none(pdu: bytes) -> None:
    with pytest.raises(ProtocolError):
        answer_in(pdu, bytearray())


def test_a_request_is_no_answer() -> None:
    command = bytearray()
    assert answer_in(store_request_pdu(1, 7, CT, UID)[6:], command)
    with pytest.raises(ProtocolError, match="no answer"):
        read_store_answer(bytes(command))
