"""The conformance statement says what is negotiated, answered and written (PS3.2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom.uid
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.sop_class import (
    ModalityWorklistInformationFind,
    PatientRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
)

from dicom_node.association import Peer, contexts_scp
from dicom_node.conformance import statement
from dicom_node.dicom.image_classes import CLASSES, Kind
from dicom_node.inference import Engine
from dicom_node.ledger.tables import open_ledger
from dicom_node.settings import NodeSettings
from dicom_node.spool import Spool
from dicom_node.storage_scp import StorageSCP
from dicom_node.storage_scu import Sendable, send_all
from tests.conformance.checks import read
from tests.conformance.journey import go_through
from tests.factories import make_series, write_series
from tests.integration.conftest import node_settings
from tests.integration.peers import Node, connected
from tests.multiframe import legacy_converted, make_enhanced

VERIFICATION, COMMITMENT = "1.2.840.10008.1.1", "1.2.840.10008.1.20.1"
STATEMENT = statement(NodeSettings())
RECEIVE = "3.3 Association acceptance: real-world activity *receive*"
DELIVER = "3.4 Association initiation: real-world activity *deliver*"


def section(heading: str, text: str = STATEMENT) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"(?m)^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", text, re.DOTALL)
    assert found is not None, heading
    return found[1]


def rows(text: str, number: int = 0) -> list[list[str]]:
    """The cells of the n-th table of a text, without its headings."""
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    lines = tables[number].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


CLASS_ROWS = rows(section("1.2 Storage SOP Classes"))
SYNTAX_ROWS = rows(section("1.3 Transfer syntaxes"))
STORED = [row[1] for row in CLASS_ROWS]
SYNTAXES = [row[1] for row in SYNTAX_ROWS]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Generator[Node]:
    """A receiving node on a real socket, with the settings that the statement is of."""
    folder = tmp_path_factory.mktemp("node")
    settings = node_settings(folder)
    ledger = open_ledger(settings.ledger.url)
    spool = Spool(folder / "spool")
    scp = StorageSCP(settings, spool, ledger)
    scp.start()
    yield Node(settings, spool, ledger, scp)
    scp.stop(2.0)
    ledger.dispose()


def negotiated(node: Node, offers: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """What the node accepts of contexts offered by a peer that is none of ours."""
    accepted: dict[str, list[str]] = {}
    wanted = list(offers)
    for start in range(0, len(wanted), 128):
        entity = AE(ae_title="ASKER")
        contexts = [build_context(uid, syntaxes) for uid, syntaxes in wanted[start : start + 128]]
        association = entity.associate("127.0.0.1", node.port, contexts, ae_title="DIFFCODE")
        assert association.is_established
        for context in association.accepted_contexts:
            found = accepted.setdefault(str(context.abstract_syntax), [])
            found.append(str(context.transfer_syntax[0]))
        association.release()
    return accepted


def test_every_class_of_the_statement_is_accepted_in_the_syntax_it_prefers(node: Node) -> None:
    found = negotiated(node, [(uid, SYNTAXES[::-1]) for uid in STORED])
    assert found == {uid: [SYNTAXES[0]] for uid in STORED}


def test_every_transfer_syntax_of_the_statement_is_accepted_and_no_other(node: Node) -> None:
    known = {str(uid) for uid in vars(pydicom.uid).values() if _is_transfer_syntax(uid)}
    image = str(next(iter(CLASSES)))
    found = negotiated(node, [(image, [syntax]) for syntax in sorted(known)])
    assert set(found[image]) == set(SYNTAXES)


def _is_transfer_syntax(uid: object) -> bool:
    return isinstance(uid, UID) and uid.is_transfer_syntax


def test_no_other_service_is_accepted(node: Node) -> None:
    said = {
        row[1]: row[3]
        for row in rows(section("3.3 Association acceptance: real-world activity *receive*"), 1)
    }
    assert {VERIFICATION, COMMITMENT} <= set(said)
    plain = [str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian)]
    others = (
        PatientRootQueryRetrieveInformationModelFind,
        StudyRootQueryRetrieveInformationModelMove,
        ModalityWorklistInformationFind,
    )
    asked = [VERIFICATION, COMMITMENT, *map(str, others)]
    found = negotiated(node, [(uid, plain) for uid in asked])
    assert set(found) == {VERIFICATION, COMMITMENT}


def test_a_c_store_is_answered_with_a_status_of_the_statement(node: Node, tmp_path: Path) -> None:
    said = {int(row[0], 16) for row in rows(section(RECEIVE), 3)}
    good, other = make_series("CT", slices=2)
    (path,) = write_series([good], tmp_path / "good")
    odd = Dataset()
    odd.update(other)
    odd.file_meta = other.file_meta
    odd.SeriesInstanceUID = "not a uid"
    (bad,) = write_series([odd], tmp_path / "bad")
    with connected(node.peer(), [path]) as association:
        stored = association.send_c_store(path).Status
        refused = association.send_c_store(bad).Status
    assert (stored, refused) == (0x0000, 0xC000)
    assert {stored, refused} <= said


def test_what_is_proposed_is_what_the_statement_says(tmp_path: Path) -> None:
    """The contexts of a real delivery, as the peer sees them."""
    said = {(row[1], row[2]) for row in rows(section(DELIVER), 1)}
    paths = [
        write_series(make_series(modality, slices=1), tmp_path / modality)[0]
        for modality in ("CT", "MR", "PT")
    ]
    with recording() as (port, proposed):
        peer = Peer("ARCHIVE", "127.0.0.1", port, "DIFFCODE")
        sent = list(send_all(peer, [Sendable.of(path) for path in paths]))
    assert [each.outcome for each in sent] == ["delivered"] * 3
    classic = {uid for uid, image in CLASSES.items() if image.kind is Kind.CLASSIC}
    assert proposed == {pair for pair in said if pair[0] in classic}


@contextmanager
def recording() -> Generator[tuple[int, set[tuple[str, str]]]]:
    """A storage SCP: its port, and the contexts that peers have proposed to it."""
    proposed: set[tuple[str, str]] = set()

    def note(event: Any) -> None:
        for context in event.assoc.requestor.primitive.presentation_context_definition_list:
            for syntax in context.transfer_syntax:
                proposed.add((str(context.abstract_syntax), UID(syntax).name))

    handlers: list[Any] = [(evt.EVT_REQUESTED, note), (evt.EVT_C_STORE, lambda event: 0x0000)]
    server = AE(ae_title="ARCHIVE").start_server(
        ("127.0.0.1", 0), block=False, contexts=contexts_scp(), evt_handlers=handlers
    )
    try:
        yield int(server.server_address[1]), proposed
    finally:
        server.shutdown()


MAKERS: dict[Kind, Callable[..., Any]] = {
    Kind.CLASSIC: lambda modality, **options: make_series(modality, **options)[0],
    Kind.ENHANCED: make_enhanced,
    Kind.LEGACY_CONVERTED: legacy_converted,
}
# Given only where the configuration or the source has them, or the volume calls for it.
SOMETIMES = frozenset({"StationName", "InstitutionName", "SharedFunctionalGroupsSequence"})


@pytest.mark.parametrize(("number", "uid"), list(enumerate(CLASSES, start=1)))
def test_attributes_are_written_as_the_annex_says(
    tmp_path: Path, identity: Engine, number: int, uid: str
) -> None:
    text = section(f"7.1.{number} {UID(uid).name}")
    empty = {word for row in rows(text, 0) for word in row[3].split(", ")}
    actions = {row[0]: row[3] for row in rows(text, 1)}
    dropped = set(re.findall(r"\w+", text.rpartition("Dropped: ")[2]))
    image = CLASSES[uid]
    source = MAKERS[image.kind](image.modality, slices=1, rows=16)
    (outcome,) = go_through(write_series([source], tmp_path / "source"), identity)
    assert outcome.state == "derived", outcome.said
    derived = read(outcome.made[0].data)
    for element in derived:
        keyword = element.keyword
        assert keyword not in dropped
        if keyword in actions:
            continue
        if keyword in empty and keyword not in source:
            assert element.is_empty, keyword
        else:
            assert element.value == source[keyword].value, keyword
    given = {name for name, action in actions.items() if action == "set" and "." not in name}
    in_groups = {name for name in given if name not in derived} - SOMETIMES
    written = {item.keyword for item in walk(derived)}
    assert in_groups <= written, in_groups - written


def walk(dataset: Dataset) -> Iterable[Any]:
    """Every element, those of items too."""
    return dataset.iterall()
