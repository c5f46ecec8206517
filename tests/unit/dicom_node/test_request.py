"""A-ASSOCIATE-RQ as bytes: what is read, repaired, rejected and aborted."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom import build_context
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RJ, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, MaximumLengthNotification

from dicom_node.access import DIAGNOSTICS, Admission
from dicom_node.association import configure_protocol
from dicom_node.request import (
    APPLICATION_CONTEXT,
    HEADER_LENGTH,
    INVALID_PARAMETER,
    MAX_REQUEST,
    UNEXPECTED_PDU,
    UNRECOGNIZED_PDU,
    NotARequestError,
    abort_pdu,
    read_header,
    read_request,
    reject_pdu,
)

CT = "1.2.840.10008.5.1.4.1.1.2"

configure_protocol()


def request_pdu(*, calling: bytes = b"CT1", called: bytes = b"DIFFCODE", version: int = 1) -> bytes:
    """A request as pynetdicom encodes it, with its fixed fields replaced."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = APPLICATION_CONTEXT  # type: ignore[assignment]
    primitive.calling_ae_title, primitive.called_ae_title = "X", "Y"
    context = build_context(CT)
    context.context_id = 1
    primitive.presentation_context_definition_list = [context]
    length = MaximumLengthNotification()
    length.maximum_length_received = 16382
    primitive.user_information = [length]
    pdu = bytearray(A_ASSOCIATE_RQ(primitive).encode())
    pdu[6:8] = version.to_bytes(2, "big")
    pdu[10:26], pdu[26:42] = called.ljust(16), calling.ljust(16)
    return bytes(pdu)


def test_titles_and_application_context_are_read() -> None:
    request = read_request(request_pdu())
    assert (request.calling_ae, request.called_ae) == ("CT1", "DIFFCODE")
    assert request.application_context == APPLICATION_CONTEXT
    assert request.fault() is None


def test_a_sound_request_is_passed_on_octet_for_octet() -> None:
    pdu = request_pdu()
    assert read_request(pdu).pdu == pdu


@pytest.mark.parametrize(
    ("field", "title"),
    [
        (b"CT1\0\0\0\0\0\0\0\0\0\0\0\0\0", "CT1"),
        (b"  CT 1  ", "CT 1"),
        (b"lower case title", "lower case title"),
        (b"SIXTEEN_LETTERS_", "SIXTEEN_LETTERS_"),
        (b"M\xc3\xbcnchen", "M??nchen"),
        (b"A\\B\x07", "A?B?"),
        (b"", ""),
    ],
)
def test_an_odd_title_is_made_one_that_every_reader_takes(field: bytes, title: str) -> None:
    request = read_request(request_pdu(calling=field))
    assert request.calling_ae == title
    decoded = A_ASSOCIATE_RQ()
    if title:
        decoded.decode(request.pdu)
        assert decoded.calling_ae_title == title


def test_only_bit_0_of_the_protocol_version_counts() -> None:
    # PS3.8 9.3.2: "…this field shall be bit 0 … other bits are not significant".
    later = read_request(request_pdu(version=0x0003))
    assert later.fault() is None
    assert later.pdu[6:8] == b"\0\1"
    fault = read_request(request_pdu(version=0x0002)).fault()
    assert fault is not None
    assert (fault.result, fault.source, fault.diagnostic) == (1, 2, 2)


def test_another_application_context_is_rejected_for_good() -> None:
    pdu = request_pdu().replace(APPLICATION_CONTEXT.encode(), b"1.2.840.10008.3.1.1.9")
    fault = read_request(pdu).fault()
    assert fault is not None
    assert (fault.result, fault.source, fault.diagnostic) == (1, 1, 2)


@pytest.mark.parametrize(
    ("octets", "reason", "words"),
    [
        (b"\x16\x03\x01\x02\x00\x01", UNRECOGNIZED_PDU, "spoke TLS"),
        (b"GET / ", UNRECOGNIZED_PDU, "spoke HTTP"),
        (b"OPTION", UNRECOGNIZED_PDU, "spoke HTTP"),
        (b"\x00\x00\x00\x00\x00\x00", UNRECOGNIZED_PDU, "did not speak DICOM"),
        (b"\x04\x00\x00\x00\x00\x04", UNEXPECTED_PDU, "PDU of type 4 before"),
        (b"\x01\x00\xff\xff\xff\xff", INVALID_PARAMETER, "longer than"),
        (b"\x01\x00\x00\x00\x00\x08", INVALID_PARAMETER, "cut short"),
    ],
)
def test_what_is_no_request_is_told_apart_by_its_first_octets(
    octets: bytes, reason: int, words: str
) -> None:
    with pytest.raises(NotARequestError, match=words) as caught:
        read_header(octets)
    assert caught.value.reason == reason


def test_the_longest_request_that_is_read_is_bounded() -> None:
    header = b"\x01\x00" + MAX_REQUEST.to_bytes(4, "big")
    assert read_header(header) == MAX_REQUEST


@pytest.mark.parametrize("cut", [1, 3, 20])
def test_items_whose_lengths_do_not_add_up_are_malformed(cut: int) -> None:
    pdu = request_pdu()[:-cut]
    with pytest.raises(NotARequestError, match="malformed"):
        read_request(pdu)


def test_a_request_without_presentation_contexts_is_malformed() -> None:
    with pytest.raises(NotARequestError, match="no presentation context"):
        read_request(request_of(APPLICATION, USER))


HEAD = request_pdu()[:74]


def item(kind: int, value: bytes) -> bytes:
    """An item or sub-item (PS3.8 9.3.1)."""
    return struct.pack(">BxH", kind, len(value)) + value


def request_of(*items: bytes) -> bytes:
    """A request that holds these items and nothing else."""
    body = b"".join(items)
    return HEAD[:2] + struct.pack(">L", 68 + len(body)) + HEAD[6:] + body


def context_item(number: int = 1, *sub_items: bytes) -> bytes:
    return item(0x20, bytes((number, 0, 0, 0)) + b"".join(sub_items or (ABSTRACT, TRANSFER)))


APPLICATION = item(0x10, APPLICATION_CONTEXT.encode())
ABSTRACT, TRANSFER = item(0x30, CT.encode()), item(0x40, b"1.2.840.10008.1.2.1")
LENGTH, CLASS = item(0x51, bytes(4)), item(0x52, b"1.2.3.4")
USER = item(0x50, LENGTH + CLASS)


@pytest.mark.parametrize(
    "items",
    [
        (context_item(2), USER),
        (context_item(1, ABSTRACT), USER),
        (context_item(1, TRANSFER), USER),
        (context_item(1, ABSTRACT, ABSTRACT, TRANSFER), USER),
        (context_item(1, ABSTRACT, TRANSFER[:-3]), USER),
        (context_item(1, item(0x30, b""), TRANSFER), USER),
        (context_item(1, item(0x30, b"1" * 65), TRANSFER), USER),
        (context_item(1, item(0x30, b"1.2\xff"), TRANSFER), USER),
        (context_item(1), context_item(1), USER),
        (item(0x20, b"\1"), USER),
        (context_item(1),),
        (context_item(1), USER, USER),
        (APPLICATION, context_item(1), USER),
        (context_item(1), item(0x50, CLASS)),
        (context_item(1), item(0x50, LENGTH + CLASS[:-1])),
        (context_item(1), item(0x50, item(0x51, b"\0\0"))),
        (context_item(1), item(0x50, LENGTH + item(0x52, b"1" * 65))),
        (context_item(1), item(0x50, LENGTH + item(0x54, b"\0\1" + b"1" + b"\7\7"))),
        (context_item(1), item(0x50, LENGTH + item(0x58, b"\x09\0\0\1a\0\0"))),
    ],
)
def test_a_request_whose_items_are_malformed_inside_is_told_before_anyone_serves_it(
    items: tuple[bytes, ...],
) -> None:
    with pytest.raises(NotARequestError, match="malformed") as caught:
        read_request(request_of(APPLICATION, *items))
    assert caught.value.reason == INVALID_PARAMETER


def test_items_of_unrecognized_types_are_skipped_wherever_they_stand() -> None:
    # PS3.8 9.3.1; pynetdicom takes them for an error.
    plain = request_of(APPLICATION, context_item(1, ABSTRACT, TRANSFER), USER)
    strange = item(0x77, b"abc")
    odd = request_of(
        strange,
        APPLICATION,
        context_item(1, ABSTRACT, strange, TRANSFER),
        item(0x50, strange + LENGTH + CLASS),
    )
    assert read_request(odd).pdu == read_request(plain).pdu == plain


@pytest.mark.parametrize(
    ("name", "kept"), [(b"V" * 20, b"V" * 16), (b"V\xfc\\1", b"V??1"), (b"", b"")]
)
def test_an_odd_name_of_the_peer_s_software_does_not_turn_it_away(name: bytes, kept: bytes) -> None:
    request = request_of(APPLICATION, context_item(), item(0x50, LENGTH + item(0x55, name)))
    assert read_request(request).pdu.endswith(item(0x55, kept))


def test_padding_of_a_syntax_s_name_is_taken_away() -> None:
    padded = context_item(1, item(0x30, CT.encode() + b"\0"), TRANSFER)
    plain = request_of(APPLICATION, context_item(), USER)
    assert read_request(request_of(APPLICATION, padded, USER)).pdu == plain


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0x10, 0x20, 0x30, 0x40, *range(0x50, 0x5A)]), st.binary(max_size=24)
        ),
        max_size=6,
    ),
    st.sampled_from(["item", "context", "user"]),
)
def test_what_is_read_as_a_request_the_protocol_library_can_always_take(
    drawn: list[tuple[int, bytes]], place: str
) -> None:
    inside = b"".join(item(*each) for each in drawn)
    parts = {
        "item": (APPLICATION, context_item(), USER, inside),
        "context": (APPLICATION, context_item(1, ABSTRACT, TRANSFER, inside), USER),
        "user": (APPLICATION, context_item(), item(0x50, LENGTH + CLASS + inside)),
    }
    with suppress(NotARequestError):
        request = read_request(request_of(*parts[place]))
        if request.fault() is None:
            decoded = A_ASSOCIATE_RQ()
            decoded.decode(request.pdu)
            decoded.to_primitive()


@pytest.mark.parametrize(("source", "diagnostic"), DIAGNOSTICS)
def test_a_rejection_is_what_the_protocol_library_would_decode(
    source: int, diagnostic: int
) -> None:
    pdu = A_ASSOCIATE_RJ()
    pdu.decode(reject_pdu(Admission(False, "", 2, source, diagnostic)))
    assert (pdu.result, pdu.source, pdu.reason_diagnostic) == (2, source, diagnostic)


def test_an_abort_is_what_the_protocol_library_would_decode() -> None:
    pdu = A_ABORT_RQ()
    pdu.decode(abort_pdu(INVALID_PARAMETER))
    assert (pdu.source, pdu.reason_diagnostic) == (2, INVALID_PARAMETER)
    assert len(abort_pdu(0)) == HEADER_LENGTH + 4


@given(st.binary(min_size=6, max_size=6))
def test_any_six_octets_are_a_request_or_told_why_not(octets: bytes) -> None:
    with suppress(NotARequestError):
        assert 68 <= read_header(octets) <= MAX_REQUEST


@given(st.binary(max_size=400))
def test_any_rest_of_a_request_is_read_or_told_why_not(rest: bytes) -> None:
    with suppress(NotARequestError):
        request = read_request(request_pdu()[:74] + rest)
        assert len(request.pdu) <= 74 + len(rest)
        assert struct.unpack_from(">L", request.pdu, 2) == (len(request.pdu) - 6,)


@given(st.binary(min_size=16, max_size=16))
def test_any_title_is_made_one_that_the_protocol_library_takes(field: bytes) -> None:
    request = read_request(request_pdu(calling=field))
    if request.calling_ae:
        decoded = A_ASSOCIATE_RQ()
        decoded.decode(request.pdu)
        assert decoded.calling_ae_title == request.calling_ae
