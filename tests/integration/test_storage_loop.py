"""The storage loop against the stock implementation: same octets in, same answers, files and rows.

Every script is played to two nodes, one for each value of ``association.storage_loop``.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.dsutils import split_dataset
from pynetdicom.pdu import A_ASSOCIATE_AC
from pynetdicom.transport import AssociationSocket

from dicom_node.association import STORAGE_COMMITMENT, contexts_for
from dicom_node.ledger.tables import open_ledger
from dicom_node.spool import Spool
from dicom_node.storage_scp import StorageSCP
from tests.integration.conftest import RECEIVE_PATHS, node_settings
from tests.integration.peers import CT, Node, ct_slice, data_set_bytes, until, write
from tests.integration.wire import (
    ABORT,
    ABORT_BY_USER,
    P_DATA,
    RELEASE,
    RELEASE_RP,
    VERIFICATION,
    Answer,
    Wire,
    echo_request,
    p_data,
    pdu,
    store_request,
)

#: Messages that are each answered by one PDU.
Script = Sequence[bytes]


@dataclass(frozen=True)
class Outcome:
    """What a peer sees and what the node keeps."""

    answers: list[Answer]
    files: dict[str, bytes]
    rows: list[dict[str, Any]]


_KEPT = (
    *("sop_instance_uid", "sop_class_uid", "series_instance_uid", "transfer_syntax_uid"),
    *("state", "reason", "path", "sha256", "size", "calling_ae", "called_ae", "modality"),
)


@pytest.fixture
def both(tmp_path: Path) -> Generator[dict[str, Node]]:
    """A node for each way to receive, by the names of RECEIVE_PATHS."""
    with ExitStack() as stack:
        nodes = {}
        for name, path in RECEIVE_PATHS.items():
            folder = tmp_path / name
            folder.mkdir()
            settings = node_settings(folder, association={**path, "dimse_timeout_s": 20.0})
            ledger = open_ledger(settings.ledger.url)
            stack.callback(ledger.dispose)
            spool = Spool(folder / "spool")
            scp = StorageSCP(settings, spool, ledger)
            scp.start()
            stack.callback(scp.stop, 2.0)
            nodes[name] = Node(settings, spool, ledger, scp)
        yield nodes


def played(
    node: Node, script: Script, contexts: Sequence[tuple[str, str]], *, at_once: int = 1 << 30
) -> Outcome:
    """Associate and send a script, message by message, each in pieces of some octets.

    A message waits for the answer to the one before: the stock path serves no more at a time.
    """
    with Wire(node.port) as wire:
        wire.associate(contexts)
        answers = []
        for message in script:
            for at in range(0, len(message), at_once):
                wire.send(message[at : at + at_once])
            answer = wire.answer()
            assert answer is not None, "the connection ended without an answer"
            answers.append(answer)
    until(node.all_released, "the association is closed in the ledger")
    rows = [{key: row[key] for key in _KEPT} for row in node.instances()]
    return Outcome(answers, kept(node), sorted(rows, key=str))


def kept(node: Node) -> dict[str, bytes]:
    """Every file of the spool by its path."""
    root = node.spool.root
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def same(
    both: dict[str, Node],
    script: Script,
    contexts: Sequence[tuple[str, str]] = ((CT, ExplicitVRLittleEndian),),
    **how: Any,
) -> Outcome:
    """Play a script to both nodes; what both made of it."""
    stock = played(both["stock"], script, contexts, **how)
    loop = played(both["loop"], script, contexts, **how)
    assert loop.answers == stock.answers
    assert loop.rows == stock.rows
    assert loop.files == stock.files
    return loop


def statuses(outcome: Outcome) -> list[int]:
    return [answer.status for answer in outcome.answers if answer.kind == P_DATA]


def image(number: int = 1) -> tuple[bytes, str]:
    """A small CT image as it is sent, and its UID."""
    dataset = ct_slice(number)
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    return data[144 + int.from_bytes(data[140:144], "little") :], str(dataset.SOPInstanceUID)


def store(data: bytes, uid: str, **how: Any) -> bytes:
    """A C-STORE request."""
    return b"".join(store_request(data, uid, **how))


def test_every_series_and_transfer_syntax_there_is(
    both: dict[str, Node], shared_data: Path
) -> None:
    rng = random.Random(4)
    for folder in sorted(path for path in (shared_data / "dicom").iterdir() if path.is_dir()):
        chosen: dict[tuple[str, str], list[Path]] = {}
        for path in sorted(folder.glob("*.dcm")):
            meta, _ = split_dataset(path)
            key = str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)
            chosen.setdefault(key, []).append(path)
        contexts = list(chosen)
        script = []
        for number, paths in enumerate(chosen.values()):
            for path in paths[:2]:
                meta, _ = split_dataset(path)
                request = store_request(
                    data_set_bytes(path),
                    str(meta.MediaStorageSOPInstanceUID),
                    sop_class_uid=str(meta.MediaStorageSOPClassUID),
                    context_id=2 * number + 1,
                    maximum_length=rng.choice([2048, 16_382, 131_066]),
                )
                script.append(b"".join(request))
        outcome = same(both, [*script, RELEASE], contexts)
        assert len(outcome.answers) == len(statuses(outcome)) + 1, folder
        assert outcome.answers[-1].kind == RELEASE_RP


@pytest.mark.parametrize("maximum_length", [32, 200, 1000, 16_382])
@pytest.mark.parametrize("at_once", [1 << 20, 997])
def test_fragments_of_any_size(both: dict[str, Node], maximum_length: int, at_once: int) -> None:
    data, uid = image()
    script = [store(data, uid, maximum_length=maximum_length), RELEASE]
    assert statuses(same(both, script, at_once=at_once)) == [0x0000]


def test_octets_that_come_one_by_one(both: dict[str, Node]) -> None:
    data, uid = image()
    assert statuses(same(both, [store(data, uid), RELEASE], at_once=1)) == [0x0000]


def test_a_command_in_pieces_empty_fragments_and_several_pdvs_in_a_pdu(
    both: dict[str, Node],
) -> None:
    data, uid = image()
    command = store_request(data, uid)[0][12:]
    halves = [p_data(1, 1, command[:31]), p_data(1, 1, b""), p_data(1, 3, command[31:])]
    values = [
        pdu(P_DATA, p_data(1, 0, data[:100])[6:] + p_data(1, 0, b"")[6:]),
        pdu(P_DATA, p_data(1, 0, data[100:150])[6:] + p_data(1, 0, data[150:])[6:]),
        p_data(1, 2, b""),
    ]
    assert statuses(same(both, [b"".join([*halves, *values]), RELEASE])) == [0x0000]


def test_echoes_between_instances(both: dict[str, Node]) -> None:
    contexts = [(CT, ExplicitVRLittleEndian), (VERIFICATION, ExplicitVRLittleEndian)]
    script: list[bytes] = []
    for number in (1, 2, 3):
        data, uid = image(number)
        script.append(store(data, uid, message_id=number))
        script.append(echo_request(message_id=100 + number, context_id=3))
    outcome = same(both, [*script, RELEASE], contexts)
    told = [int(a.response.MessageIDBeingRespondedTo) for a in outcome.answers[:-1]]
    assert told == [1, 101, 2, 102, 3, 103]


def test_the_same_again_other_bytes_and_a_refusal(both: dict[str, Node]) -> None:
    data, uid = image()
    other = data.replace(b"PHANTOM", b"ANOTHER")
    _, strange = image(7)
    script = [
        store(data, uid),
        store(data, uid),
        store(other, uid),
        store(data, strange),
        store(data[:-40], uid),
        store(data, "../../escape"),
        RELEASE,
    ]
    outcome = same(both, script)
    assert statuses(outcome) == [0, 0, 0, 0xA900, 0xC000, 0xC000]
    assert sorted(row["state"] for row in outcome.rows) == [
        *("conflict", "received", "rejected", "rejected", "rejected")
    ]


@pytest.mark.parametrize("end", [ABORT_BY_USER, b""], ids=["abort", "close"])
def test_an_association_that_ends_within_an_instance_keeps_those_before(
    both: dict[str, Node], end: bytes
) -> None:
    (first, first_uid), (second, second_uid) = image(1), image(2)
    whole = [store(first, first_uid)]
    broken = store_request(second, second_uid, maximum_length=200)[:-2]
    for name, node in both.items():
        with Wire(node.port) as wire:
            wire.associate()
            assert wire.store(whole) == 0, name
            wire.send(*broken, end)
        until(node.all_released, "the association is closed in the ledger")
        assert [row["state"] for row in node.instances()] == ["received"]
    until(
        lambda: kept(both["loop"]) == kept(both["stock"]) and len(kept(both["loop"])) == 1,
        "only what was acknowledged is kept",
    )


_DATA, _UID = image(1)
_COMMAND, *_VALUES = store_request(_DATA, _UID, maximum_length=200)


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"\x09\0\0\0\0\x04abcd", 1),
        (b"\x02\0\0\0\0\x04abcd", 2),
        (RELEASE_RP.to_bytes(1, "big") + RELEASE[1:], 2),
        (b"\x04\0\xff\xff\xff\xff", 6),
        (pdu(P_DATA, b"\0\0\0\x63\x01\x03"), 6),
        (_COMMAND + _VALUES[0] + RELEASE, 2),
        (_COMMAND + echo_request(), 6),
        (_VALUES[0], 6),
        (p_data(1, 3, b"no command set"), 6),
    ],
)
def test_what_the_standard_forbids_is_aborted_by_the_provider_with_its_reason(
    both: dict[str, Node], octets: bytes, reason: int
) -> None:
    outcome = played(both["loop"], [octets], [(CT, ExplicitVRLittleEndian)])
    assert [answer.kind for answer in outcome.answers] == [ABORT]
    # PS3.8 Table 9-26: source 2 is the service provider.
    assert outcome.answers[0].body == bytes((0, 0, 2, reason))
    assert (outcome.files, outcome.rows) == ({}, [])


def test_other_messages_are_served_by_the_stock_path_and_the_association_goes_on(
    both: dict[str, Node],
) -> None:
    """C-CANCEL, which storage ignores, and a C-ECHO on a storage context, then an instance."""
    data, uid = image()
    elements = ((0x100, 0x0FFF), (0x120, 1), (0x800, 0x0101))
    cancel = b"".join(struct.pack("<HHLH", 0, element, 2, value) for element, value in elements)
    script = [p_data(1, 3, cancel) + store(data, uid), RELEASE]
    assert statuses(same(both, script)) == [0x0000]
    again = [echo_request(context_id=1), store(data, uid), RELEASE]
    assert statuses(same(both, again)) == [0x0000, 0x0000]


@pytest.mark.parametrize("way", RECEIVE_PATHS)
def test_a_commitment_report_and_instances_share_an_association(
    way: str, start_node: Callable[..., Node], tmp_path: Path
) -> None:
    reports: list[str] = []

    def on_report(event: evt.Event) -> tuple[int, None]:
        reports.append(str(event.event_information.TransactionUID))
        return 0x0000, None

    node = start_node(
        association=RECEIVE_PATHS[way], handlers=[(evt.EVT_N_EVENT_REPORT, on_report)]
    )
    paths = [write(ct_slice(number), tmp_path / f"{number}.dcm") for number in (1, 2, 3)]
    entity = AE(ae_title="PACS")
    entity.acse_timeout = entity.dimse_timeout = 20
    association = entity.associate(
        "127.0.0.1",
        node.port,
        [
            *contexts_for([(CT, str(ExplicitVRLittleEndian))]),
            build_context(STORAGE_COMMITMENT, ExplicitVRLittleEndian),
        ],
        ext_neg=[build_role(STORAGE_COMMITMENT, scp_role=True)],
    )
    assert association.is_established
    information = Dataset()
    information.TransactionUID = "1.2.3.4"
    assert association.send_c_store(paths[0]).Status == 0
    answer, _ = association.send_n_event_report(
        information, 1, STORAGE_COMMITMENT, "1.2.840.10008.1.20.1.1"
    )
    assert answer.Status == 0
    assert [association.send_c_store(path).Status for path in paths[1:]] == [0, 0]
    association.release()
    assert association.is_released
    assert reports == ["1.2.3.4"]
    assert len(node.instances("received")) == 3


def test_a_peer_that_goes_silent_within_an_instance_is_left(
    start_node: Callable[..., Node],
) -> None:
    node = start_node(association={"dimse_timeout_s": 0.3, "network_timeout_s": 20.0})
    with Wire(node.port) as wire:
        wire.associate()
        wire.send(_COMMAND, _VALUES[0][:50])
        answers = list(wire.answers())
    assert [(answer.kind, answer.body) for answer in answers] == [(ABORT, bytes((0, 0, 2, 0)))]
    until(lambda: kept(node) == {}, "nothing is left of it")


def test_a_peer_that_says_nothing_is_left_after_the_network_time_out(
    start_node: Callable[..., Node],
) -> None:
    node = start_node(association={"network_timeout_s": 0.3})
    with Wire(node.port) as wire:
        wire.associate()
        assert [answer.kind for answer in wire.answers()] == [ABORT]


def test_a_long_association_that_is_given_back_is_not_taken_for_idle(
    start_node: Callable[..., Node],
) -> None:
    """Its release is answered though it took longer than the network time-out."""
    node = start_node(association={"network_timeout_s": 1.0})
    with Wire(node.port) as wire:
        wire.associate([(CT, ExplicitVRLittleEndian), (VERIFICATION, ExplicitVRLittleEndian)])
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            wire.send(echo_request(context_id=3))
            assert wire.answer() is not None
        wire.release()


def test_pynetdicom_is_as_the_handover_finds_it() -> None:
    """Which thread calls which handler, and that the DUL reads by `ready` and `recv` alone."""
    threads: dict[str, threading.Thread] = {}
    used: set[str] = set()

    class Noting(AssociationSocket):
        def __getattribute__(self, name: str) -> Any:
            if name in ("ready", "recv", "recv_into", "read"):
                used.add(name)
            return super().__getattribute__(name)

    def on_open(event: evt.Event) -> None:
        wrapper = event.assoc.dul.socket
        assert isinstance(wrapper, AssociationSocket)
        wrapper.__class__ = Noting

    def on_sent(event: evt.Event) -> None:
        if isinstance(event.pdu, A_ASSOCIATE_AC):
            threads["dul"] = event.assoc.dul
            threads["sent"] = threading.current_thread()

    def on_established(event: evt.Event) -> None:
        threads["established"] = threading.current_thread()
        event.assoc.dul._idle_timer.restart()

    entity = AE(ae_title="STOCK")
    entity.add_supported_context(VERIFICATION)
    server = entity.start_server(
        ("127.0.0.1", 0),
        block=False,
        evt_handlers=[
            (evt.EVT_CONN_OPEN, on_open),
            (evt.EVT_PDU_SENT, on_sent),
            (evt.EVT_ESTABLISHED, on_established),
        ],
    )
    try:
        with Wire(server.server_address[1]) as wire:
            wire.associate([(VERIFICATION, ExplicitVRLittleEndian)])
            wire.send(echo_request())
            assert wire.answer() is not None
            wire.release()
    finally:
        server.shutdown()
    assert threads["sent"] is threads["dul"]
    assert threads["established"] is not threads["dul"]
    assert used == {"ready", "recv"}
