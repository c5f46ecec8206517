"""The first inputs of each target, made by code: what is right, and what bad peers send."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO

from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
)
from pynetdicom.dsutils import encode

from tests.fuzz.targets import INSTANCE, SYNTAXES
from tests.integration.peers import CT, ct_slice
from tests.integration.wire import (
    ABORT_BY_USER,
    RELEASE,
    association_request,
    echo_request,
    p_data,
    pdu,
    store_request,
)

_STORED = (SYNTAXES[0], SYNTAXES[1], SYNTAXES[2])
_BAD_UIDS = ("../../x", "/etc/x", "\0", "1" * 65, "", "1..2", "1.2.\\3")


def image(**changes: object) -> Dataset:
    """A CT slice of 4 × 4 under the UID that the targets' commands name."""
    dataset = ct_slice(1, SOPInstanceUID=INSTANCE, **changes)
    dataset.Rows = dataset.Columns = 4
    dataset.PixelData = bytes(range(32))
    return dataset


def encoded(dataset: Dataset, syntax: str) -> bytes:
    """A data set's bytes in an uncompressed or deflated transfer syntax."""
    implicit = syntax == ImplicitVRLittleEndian
    little = syntax != ExplicitVRBigEndian
    data = encode(dataset, implicit, little, deflated=syntax == DeflatedExplicitVRLittleEndian)
    assert data is not None
    return data


def data_sets() -> Iterator[tuple[str, bytes]]:
    """Data sets with the transfer syntax of each."""
    for syntax in (*_STORED, DeflatedExplicitVRLittleEndian):
        yield syntax, encoded(image(), syntax)
    yield JPEGLSLossless, encoded(_encapsulated(), ExplicitVRLittleEndian)
    for syntax in _STORED:
        yield syntax, encoded(_nested(undefined=True), syntax)
        yield syntax, encoded(_nested(undefined=False), syntax)
    plain = encoded(image(), ExplicitVRLittleEndian)
    for cut in (1, 7, 9, len(plain) - 1):
        yield ExplicitVRLittleEndian, plain[:cut]
    yield ExplicitVRLittleEndian, plain + bytes(6)
    yield from _attacks(plain)


def _attacks(plain: bytes) -> Iterator[tuple[str, bytes]]:
    # PS3.7 D.3.3 and PS3.10 7.1: group 0002 has no place in a data set.
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", 20) + b"1.2.840.10008.1.2.1\0"
    yield ExplicitVRLittleEndian, meta + plain
    # A truncated VR, a sequence that never ends, an item without a sequence, a length of 4 GiB.
    yield ExplicitVRLittleEndian, struct.pack("<HH", 8, 8) + b"C\0\4\0ABCD"
    loop = struct.pack("<HH2sHL", 0x40, 0x275, b"SQ", 0, 0xFFFFFFFF)
    yield ExplicitVRLittleEndian, plain + loop
    yield ExplicitVRLittleEndian, (loop + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)) * 80
    yield ExplicitVRLittleEndian, struct.pack("<HHL", 0xFFFE, 0xE000, 4) + b"ABCD"
    yield ExplicitVRLittleEndian, struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OW", 0, 0xFFFFFFFE)
    unknown = struct.pack("<HH2sHL", 0x11, 0x10, b"UN", 0, 0xFFFFFFFF)
    yield ExplicitVRLittleEndian, unknown + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0) + plain
    # A deflated bomb: 1 MiB of zeros in a kilobyte.
    engine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    yield DeflatedExplicitVRLittleEndian, engine.compress(plain + bytes(1 << 20)) + engine.flush()
    for uid in _BAD_UIDS:
        value = uid.encode() + b"\0" * (len(uid) % 2)
        element = struct.pack("<HH2sH", 8, 0x18, b"UI", len(value)) + value
        yield ExplicitVRLittleEndian, plain.replace(_uid_element(), element)


def _uid_element() -> bytes:
    value = INSTANCE.encode() + b"\0" * (len(INSTANCE) % 2)
    return struct.pack("<HH2sH", 8, 0x18, b"UI", len(value)) + value


def _encapsulated() -> Dataset:
    dataset = image()
    dataset.PixelData = encapsulate([b"\xff\xd8fragment", b"\xff\xd8other!"])
    dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB"
    return dataset


def _nested(*, undefined: bool) -> Dataset:
    dataset, item, inner = image(), Dataset(), Dataset()
    inner.CodeValue, inner.CodeMeaning = "113040", "Lossy"
    item.Manufacturer, item.PurposeOfReferenceCodeSequence = "Maker", Sequence([inner])
    dataset.ContributingEquipmentSequence = Sequence([item, Dataset()])
    dataset["ContributingEquipmentSequence"].is_undefined_length = undefined
    item.is_undefined_length_sequence_item = undefined
    return dataset


def streams() -> Iterator[bytes]:
    """What a requestor sends on an established association."""
    data = encoded(image(), ExplicitVRLittleEndian)
    whole = b"".join(store_request(data, INSTANCE))
    yield whole
    yield b"".join(store_request(data, INSTANCE, maximum_length=128)) + RELEASE
    yield echo_request() + whole + echo_request(message_id=2) + RELEASE
    yield whole[:-20] + ABORT_BY_USER
    yield whole[:40]
    command = whole[12 : 12 + int.from_bytes(whole[6:10], "big") - 2]
    # A context that was never agreed, an even one, data before its command, a PDV too long for
    # its PDU, one of no length, an unknown PDU, one of the wrong time, a 64 KiB item.
    yield p_data(99, 3, command)
    yield p_data(2, 3, command)
    yield p_data(1, 2, data)
    yield pdu(4, struct.pack(">LBB", 9999, 1, 3) + command)
    yield pdu(4, struct.pack(">LBB", 0, 1, 3))
    yield pdu(4, b"") + pdu(4, struct.pack(">LBB", 2, 1, 1)) + whole
    yield pdu(9, b"\0" * 4)
    yield association_request()
    yield pdu(4, struct.pack(">LBB", 0xFFFF, 1, 0) + bytes(64))
    yield p_data(1, 1, command[:20]) + p_data(1, 3, command[20:]) + p_data(1, 2, data)


def commands() -> Iterator[bytes]:
    """Command sets."""
    for octets in (b"".join(store_request(b"", INSTANCE)), echo_request()):
        yield octets[12:]
    command = echo_request()[12:]
    yield command[:-1]
    yield command + struct.pack("<HHL", 0, 0x1000, 0xFFFFFFFF)
    yield command + struct.pack("<HHL", 8, 0x18, 2) + b"1\0"
    for uid in _BAD_UIDS:
        value = uid.encode() + b"\0" * (len(uid) % 2)
        yield command + struct.pack("<HHL", 0, 0x1000, len(value)) + value


def files() -> Iterator[bytes]:
    """PS3.10 files."""
    for dataset in (image(), _nested(undefined=True)):
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        yield buffer.getvalue()
    yield bytes(128) + b"DICM"
    yield encoded(image(), ImplicitVRLittleEndian)


def _chosen() -> Iterator[tuple[int, bytes]]:
    return ((SYNTAXES.index(syntax), data) for syntax, data in data_sets())


def _associations() -> list[bytes]:
    """Inputs of the association targets: see `tests.fuzz.association._octets`."""
    raw = [bytes((0, 0, 0)) + request for request in _requests()]
    agreed = [bytes((1, 0, 0)) + stream for stream in streams()]
    stored = [bytes((2, 4, number)) + data for number, data in _chosen()]
    return [*raw, *agreed, *stored]


def _requests() -> Iterator[bytes]:
    """Association requests, and what else may come first on a port."""
    good = association_request()
    yield good + RELEASE
    yield good[:50]
    yield good[:2] + struct.pack(">L", 1 << 31) + good[6:]
    yield good.replace(b"1.2.840.10008.3.1.1.1", b"1.2.840.10008.3.1.1.9")
    yield good[:74] + b"\x10\0\xff\xff" + bytes(64)
    yield good + good
    yield b"GET / HTTP/1.1\r\nHost: node\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)
    yield RELEASE + ABORT_BY_USER


def requests() -> Iterator[bytes]:
    """A-ASSOCIATE-RQs without what `targets.fuzz_request` puts round them."""
    syntaxes = [str(syntax) for syntax in SYNTAXES]
    for contexts in ([(CT, syntaxes[0])], [(CT, syntax) for syntax in syntaxes]):
        pdu = association_request(contexts)
        whole = pdu[6:42] + pdu[74:]
        yield whole
        # PS3.7 D.3.3.3 to D.3.3.7: window, role, both extended negotiations, identity.
        uid = struct.pack(">H", len(CT)) + CT.encode()
        sub_items = [
            (0x53, b"\0\1\0\1"),
            (0x54, uid + b"\1\0"),
            (0x55, b"FUZZ"),
            (0x56, uid + bytes(6)),
            (0x57, uid + uid + b"\0\0"),
            (0x58, b"\2\0\0\1a\0\1b"),
        ]
        further = b"".join(
            struct.pack(">BxH", *(kind, len(body))) + body for kind, body in sub_items
        )
        # The user information is the last item: it grows by what is put behind it.
        at = whole.rindex(b"\x50\0")
        length = len(whole) - at - 4 + len(further)
        yield whole[:at] + struct.pack(">BxH", 0x50, length) + whole[at + 4 :] + further


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "request": lambda: [*requests()],
    "pdu": lambda: [bytes((7,)) + stream for stream in streams()],
    "command": lambda: [*commands()],
    "stream": lambda: [bytes((number, 5)) + data for number, data in _chosen()],
    "instance": lambda: [bytes((number,)) + data for number, data in _chosen()],
    "file": lambda: [*files()],
    "stock": _associations,
    "loop": _associations,
}
