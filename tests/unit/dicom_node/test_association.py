"""Associations: the table of contexts, the access rules and the proposals of the SCU."""

from __future__ import annotations

import pytest
from pynetdicom import AllStoragePresentationContexts
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor

from dicom_node.association import (
    MAX_CONTEXTS,
    STORAGE_CLASSES,
    STORAGE_COMMITMENT,
    TRANSFER_SYNTAXES,
    VERIFICATION,
    Peer,
    contexts_for,
    contexts_scp,
    transfer_syntaxes,
)
from dicom_node.settings import Destination, NodeSettings

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
J2K_LOSSLESS = "1.2.840.10008.1.2.4.90"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"


def proposed(abstract: str, *syntaxes: str) -> PresentationContext:
    context = PresentationContext()
    context.context_id = 1
    context.abstract_syntax = abstract  # type: ignore[assignment]
    context.transfer_syntax = list(syntaxes)  # type: ignore[assignment]
    return context


def answer(context: PresentationContext) -> PresentationContext:
    """What a peer that proposes this context is answered, by the acceptor's own negotiation."""
    results, _ = negotiate_as_acceptor([context], contexts_scp())
    return results[0]


def syntaxes_of(contexts: list[PresentationContext]) -> list[tuple[str, str]]:
    return [(str(c.abstract_syntax), str(c.transfer_syntax[0])) for c in contexts]


def test_every_storage_class_is_accepted_so_that_no_sender_blocks() -> None:
    known = {str(context.abstract_syntax) for context in AllStoragePresentationContexts}
    ours = {str(context.abstract_syntax) for context in contexts_scp()}
    assert known | {VERIFICATION, STORAGE_COMMITMENT} == ours
    assert set(STORAGE_CLASSES) == known


@pytest.mark.parametrize("row", TRANSFER_SYNTAXES)
def test_each_transfer_syntax_is_accepted_by_itself(row: object) -> None:
    uid = str(getattr(row, "uid"))  # noqa: B009
    result = answer(proposed(CT, uid))
    assert result.result == 0
    assert result.transfer_syntax == [uid]


def test_uncompressed_little_endian_is_chosen_where_a_peer_offers_a_choice() -> None:
    assert answer(proposed(CT, J2K_LOSSLESS, IMPLICIT, EXPLICIT)).transfer_syntax == [EXPLICIT]


def test_a_lossy_transfer_syntax_is_chosen_last() -> None:
    chosen = answer(proposed(CT, JPEG_BASELINE, J2K_LOSSLESS))
    assert chosen.transfer_syntax == [J2K_LOSSLESS]


def test_no_transfer_syntax_is_listed_twice() -> None:
    every = transfer_syntaxes()
    assert len(every) == len(set(every)) == len(TRANSFER_SYNTAXES)


def test_the_scu_proposes_what_it_sends_and_implicit_vr_as_a_last_resort() -> None:
    contexts = contexts_for([(CT, EXPLICIT), (CT, EXPLICIT), (MR, IMPLICIT)])
    assert syntaxes_of(contexts) == [(CT, EXPLICIT), (MR, IMPLICIT), (CT, IMPLICIT)]


def test_the_scu_offers_to_decompress_for_a_plain_peer() -> None:
    contexts = contexts_for([(CT, J2K_LOSSLESS)])
    assert syntaxes_of(contexts) == [(CT, J2K_LOSSLESS), (CT, EXPLICIT), (CT, IMPLICIT)]


def test_more_contexts_than_identifiers_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="128 exist"):
        contexts_for((uid, EXPLICIT) for uid in STORAGE_CLASSES[:MAX_CONTEXTS])


def test_a_destination_becomes_a_peer_with_its_own_limits_and_calling_title() -> None:
    destination = Destination(
        ae_title="PACS", host="pacs", port=104, timeout_s=5, calling_ae_title="NODE"
    )
    peer = Peer.of(destination, NodeSettings())
    assert peer.where == "PACS@pacs:104"
    assert (peer.calling_ae, peer.dimse_timeout, peer.acse_timeout) == ("NODE", 5, 5)
