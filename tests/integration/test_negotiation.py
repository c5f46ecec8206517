"""What a sender may ask in negotiation, and what it is answered (PS3.7 D.3, PS3.8 9)."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE, build_context, build_role
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import (
    AsynchronousOperationsWindowNegotiation,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)

from dicom_node.association import configure_protocol
from dicom_node.errors import ConfigurationError
from dicom_node.ledger import intake
from dicom_node.storage_scu import echo, send_files
from tests.integration.conftest import RECEIVE_PATHS
from tests.integration.peers import (
    CT,
    Node,
    connected,
    ct_slice,
    reserve_port,
    run_sender,
    statuses,
    until,
    write,
)
from tests.unit.dicom_node.audit_journal import audit_events
from tests.unit.dicom_node.sockets import peer, read_pdu
from tests.unit.dicom_node.test_request import request_pdu

ECHOSCU = "/usr/bin/echoscu"
PRIVATE = "1.2.840.113619.4.26"
ACCEPT, REJECT, P_DATA, ABORT = 2, 3, 4, 7
Items = list[Any]


@contextmanager
def associated(
    node: Node, items: Items, calling: str = "CT1", abstract: str = CT
) -> Generator[Association]:
    """An association that negotiates *items* besides one storage context."""
    configure_protocol()
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 20
    association = entity.associate(
        "127.0.0.1",
        node.port,
        [build_context(abstract)],
        ae_title="DIFFCODE",
        ext_neg=items,
    )
    assert association.is_established
    try:
        yield association
    finally:
        association.release()


def test_one_operation_at_a_time_is_answered_where_more_are_asked_for(node_scp: Node) -> None:
    window = AsynchronousOperationsWindowNegotiation()
    window.maximum_number_operations_invoked = 0  # unlimited
    window.maximum_number_operations_performed = 8
    with associated(node_scp, [window]) as association:
        assert association.acceptor.asynchronous_operations == (1, 1)


# PS3.4 Table B.3-1: level of support, of digital signature support, and element coercion, each with
# a reserved byte behind it. An SCU alone says 3, 0 and 2, as GDCM does by default.
SCU_ONLY = bytes((3, 0, 0, 0, 2, 0))


def support(sop_class_uid: str, information: bytes = SCU_ONLY) -> SOPClassExtendedNegotiation:
    asked = SOPClassExtendedNegotiation()
    asked.sop_class_uid = sop_class_uid
    asked.service_class_application_information = information
    return asked


@pytest.mark.parametrize("information", [SCU_ONLY, bytes((2, 0, 3, 0, 1, 0)), b"\1", bytes(9)])
def test_storage_is_said_to_keep_every_bit_whatever_the_sender_says_of_itself(
    information: bytes, node_scp: Node
) -> None:
    with associated(node_scp, [support(CT, information)]) as association:
        answered = association.acceptor.sop_class_extended
    # PS3.4 Table B.3-2: a level 2 SCP, signatures preserved bit by bit (level 3), no coercion.
    level, _, signatures, _, coercion, _ = answered[CT]
    assert (level, signatures, coercion) == (2, 3, 0)
    assert answered == {CT: bytes((2, 0, 3, 0, 0, 0))}


def test_extended_negotiation_is_answered_for_what_is_stored_and_for_nothing_else(
    start_node: Callable[..., Node],
) -> None:
    node = start_node(association={"extra_storage_classes": [PRIVATE]})
    asked = [support(uid) for uid in (PRIVATE, "1.2.840.10008.1.1", "1.2.3.4.5")]
    with associated(node, asked, abstract=PRIVATE) as association:
        assert set(association.acceptor.sop_class_extended) == {PRIVATE}


@dataclass(frozen=True)
class Identity:
    kind: int
    primary: bytes
    secondary: bytes = b""

    def item(self) -> UserIdentityNegotiation:
        item = UserIdentityNegotiation()
        item.user_identity_type = self.kind
        item.primary_field = self.primary
        if self.secondary:
            item.secondary_field = self.secondary
        item.positive_response_requested = self.kind > 2
        return item


@pytest.mark.parametrize(
    "identity",
    [Identity(1, b"operator"), Identity(2, b"operator", b"SECRET"), Identity(4, b"<SECRET/>")],
)
def test_a_user_identity_is_tolerated_without_a_response_and_never_logged(
    identity: Identity, node_scp: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    with associated(node_scp, [identity.item()]) as association:
        # PS3.7 D.3.3.7: an acceptor that does not support it accepts without a response.
        assert association.acceptor.user_identity is None
    told = capsys.readouterr().out
    assert "user identity not checked" in told
    assert "SECRET" not in told
    assert "operator" not in told


def test_roles_that_we_do_not_take_are_not_answered_and_the_default_holds(node_scp: Node) -> None:
    both: SCP_SCU_RoleSelectionNegotiation = build_role(CT, scu_role=True, scp_role=True)
    with associated(node_scp, [both]) as association:
        # PS3.7 D.3.3.4: without a response the requestor is SCU and the acceptor SCP.
        assert association.acceptor.role_selection == {}
        (context,) = association.accepted_contexts
        assert context.as_scu
        assert not context.as_scp


@pytest.mark.parametrize("path", RECEIVE_PATHS)
def test_a_private_storage_class_is_stored_where_it_is_listed(
    path: str, start_node: Callable[..., Node], tmp_path: Path
) -> None:
    listed = {"extra_storage_classes": [PRIVATE], **RECEIVE_PATHS[path]}
    node = start_node(association=listed)
    file = write(ct_slice(1, SOPClassUID=PRIVATE), tmp_path / "private.dcm")
    with connected(node.peer(), [file]) as association:
        assert statuses(association, [file]) == [0x0000]
    assert [row["state"] for row in node.instances()] == ["ignored"]


def test_a_private_storage_class_that_is_not_listed_is_refused_in_negotiation(
    node_scp: Node,
) -> None:
    configure_protocol()
    entity = AE(ae_title="CT1")
    association = entity.associate(
        "127.0.0.1", node_scp.port, [build_context(CT), build_context("1.2.3.4.5")]
    )
    try:
        (refused,) = association.rejected_contexts
        assert refused.abstract_syntax == "1.2.3.4.5"
        assert refused.result == 3  # PS3.8 Table 9-18: abstract syntax not supported
    finally:
        association.release()


@pytest.mark.dcmtk
@pytest.mark.parametrize("title", ["lower case", "SIXTEEN_LETTERS_", "CT 1", "a.b-c/d", "1"])
def test_echoscu_is_answered_under_any_title(title: str, node_scp: Node) -> None:
    run_sender([ECHOSCU, "-aet", title, "-aec", title, "127.0.0.1", str(node_scp.port)])


@pytest.mark.parametrize(
    "title", [b"CT1\0\0\0\0\0\0\0\0\0\0\0\0\0", b"\tCT1", b"M\xfcnchen", b"A\\B"]
)
def test_a_title_that_breaks_the_rules_does_not_break_the_association(
    title: bytes, node_scp: Node
) -> None:
    with peer(("127.0.0.1", node_scp.port)) as connection:
        connection.sendall(request_pdu(calling=title))
        assert read_pdu(connection)[0] == ACCEPT
    until(node_scp.all_released, "the association has ended")


def test_the_address_of_a_rule_is_enough_for_a_rejection_by_the_numbers(
    start_node: Callable[..., Node],
) -> None:
    node = start_node(association={"allow": [{"calling_ae": "CT1", "address": "10.1.2.3"}]})
    with peer(("127.0.0.1", node.port)) as connection:
        connection.sendall(request_pdu())
        assert read_pdu(connection) == bytes([REJECT, 0, 0, 0, 0, 4, 0, 1, 1, 1])


@pytest.mark.parametrize("path", RECEIVE_PATHS)
def test_a_pdu_longer_than_offered_is_aborted_and_not_read(
    path: str, start_node: Callable[..., Node]
) -> None:
    node = start_node(association={"max_pdu": 16384, **RECEIVE_PATHS[path]})
    with peer(("127.0.0.1", node.port)) as connection:
        connection.sendall(request_pdu())
        assert read_pdu(connection)[0] == ACCEPT
        # A gigabyte is announced; a server that believed it would try to make room for it.
        connection.sendall(struct.pack(">BxL", P_DATA, 1 << 30) + bytes(100))
        answer = read_pdu(connection)
        assert (answer[0], answer[8]) == (ABORT, 2)
        assert connection.recv(1) == b""
    assert echo(node.peer()).ok


@pytest.mark.parametrize("path", RECEIVE_PATHS)
@pytest.mark.parametrize("octets", [b"\xff" * 64, b"\x01" + bytes(80), b"\x04\x00\x00\x00\x00\x00"])
def test_noise_on_an_association_ends_it_and_nothing_else(
    octets: bytes, path: str, start_node: Callable[..., Node]
) -> None:
    node = start_node(association={**RECEIVE_PATHS[path], "acse_timeout_s": 1.0})
    with peer(("127.0.0.1", node.port)) as connection:
        connection.sendall(request_pdu())
        assert read_pdu(connection)[0] == ACCEPT
        connection.sendall(octets)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    until(node.all_released, "the association has ended")
    assert echo(node.peer()).ok
    assert audit_events(node.settings.audit.journal) == []


@pytest.mark.parametrize("path", RECEIVE_PATHS)
def test_malformed_requests_are_aborted_at_once_and_hold_no_place(
    path: str, start_node: Callable[..., Node]
) -> None:
    # Two places, and time-outs so long that a held one would still be held at the end.
    limits = {"max_associations": 2, "max_associations_per_address": 2, "acse_timeout_s": 300.0}
    node = start_node(association={**RECEIVE_PATHS[path], **limits})
    sound = request_pdu()
    # Its last sub-item, the maximum length of four octets, is said to have three.
    malformed = sound[:-5] + b"\x03" + sound[-4:]
    with ExitStack() as held:
        for _ in range(6):
            connection = held.enter_context(peer(("127.0.0.1", node.port)))
            connection.sendall(malformed)
            # PS3.8 Table 9-26: invalid-PDU-parameter value, by the service provider.
            assert read_pdu(connection) == bytes([ABORT, 0, 0, 0, 0, 4, 0, 0, 2, 6])
            assert echo(node.peer()).ok


def test_a_fault_of_ours_ends_the_association_and_leaves_no_thread(
    start_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = threading.Event()

    def fail(association: Association) -> None:
        assert accepted.wait(10)
        raise RuntimeError("a mistake of ours")

    node = start_node(association=RECEIVE_PATHS["stock"])
    before = set(threading.enumerate())
    monkeypatch.setattr(Association, "_run_reactor", fail)
    with peer(("127.0.0.1", node.port)) as connection:
        connection.sendall(request_pdu())
        assert read_pdu(connection)[0] == ACCEPT
        accepted.set()
        assert connection.recv(1) == b""
    monkeypatch.undo()
    until(lambda: set(threading.enumerate()) <= before, "no thread is left")
    assert echo(node.peer()).ok


def test_a_sender_over_ipv6_is_admitted_and_recorded_under_its_address(
    start_node: Callable[..., Node], tmp_path: Path
) -> None:
    port = reserve_port()
    try:
        node = start_node(
            node={"host": "::1", "port": port, "data_dir": tmp_path},
            association={"allow": [{"address": "::1"}]},
        )
    except ConfigurationError:
        pytest.skip("this machine has no IPv6")
    to = replace(node.peer(), host="::1")
    file = write(ct_slice(1), tmp_path / "1.dcm")
    assert send_files([file], to).ok
    (progress,) = intake.series_progress(node.ledger)
    assert progress.address == "::1"


def test_a_rejection_that_comes_at_once_is_heard_as_what_it_is(
    start_node: Callable[..., Node],
) -> None:
    node = start_node(association={"allow": [{"calling_ae": "CT1"}]})
    # Of a quick rejection pynetdicom's requestor loses one in twenty or so.
    for _ in range(60):
        assert "rejected permanently: our calling AE title" in echo(node.peer("CT2")).words
