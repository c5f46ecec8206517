"""The rule table: whom it lets in, and what a refused peer and our administrator are told."""

from __future__ import annotations

import pytest

from dicom_node.access import (
    AccessRules,
    Admission,
    Requestor,
    access_rules,
    admit,
    origin,
    plain_address,
)
from dicom_node.settings import NodeSettings

TLS = {"port": 2762, "certificate": "a.pem", "key": "k.pem", "ca": "ca.pem"}


def rules(*allow: dict[str, str], **association: object) -> AccessRules:
    """The rules of a configuration with these rows."""
    return access_rules(
        NodeSettings.model_validate({"association": {"allow": allow, **association}, "tls": TLS})
    )


def numbers(answer: Admission) -> tuple[int, int, int]:
    return answer.result, answer.source, answer.diagnostic


def test_without_rules_every_peer_is_admitted() -> None:
    assert admit(Requestor("CT1", "ANY", "192.0.2.1"), rules()).accepted


@pytest.mark.parametrize("title", ["DIFFCODE", "DIFFCODE        ", "DIFFCODE\0\0", "  DIFFCODE"])
def test_padding_of_an_ae_title_does_not_count(title: str) -> None:
    table = rules({"calling_ae": "CT1"}, require_called_ae_title=True)
    assert admit(Requestor("CT1 ", title, "192.0.2.1"), table).accepted


def test_an_ae_title_is_compared_in_the_case_that_it_is_written_in() -> None:
    # PS3.5 6.2: AE is case-sensitive.
    assert not admit(Requestor("ct1", "ANY", "192.0.2.1"), rules({"calling_ae": "CT1"})).accepted


@pytest.mark.parametrize("title", ["", "                ", "\0\0"])
def test_a_title_of_padding_alone_is_not_recognized(title: str) -> None:
    assert numbers(admit(Requestor(title, "ANY", "192.0.2.1"), rules())) == (1, 1, 3)
    assert numbers(admit(Requestor("CT1", title, "192.0.2.1"), rules())) == (1, 1, 7)


def test_a_wrong_called_ae_title_is_rejected_for_good_and_ours_are_named() -> None:
    answer = admit(Requestor("CT1", "OTHER", "192.0.2.1"), rules(require_called_ae_title=True))
    assert not answer.accepted
    # PS3.8 Table 9-21: permanent, service user, called AE title not recognized.
    assert numbers(answer) == (1, 1, 7)
    assert answer.standard_words == "rejected-permanent: called AE title not recognized"
    assert "DIFFCODE" in answer.why


def test_an_unlisted_calling_ae_title_is_rejected_for_good() -> None:
    answer = admit(Requestor("CT2", "ANY", "192.0.2.1"), rules({"calling_ae": "CT1"}))
    assert not answer.accepted
    assert numbers(answer) == (1, 1, 3)
    assert answer.why == "calling AE title 'CT2' is in no rule of association.allow"


def test_a_known_title_from_another_address_is_told_which_rule_came_nearest() -> None:
    table = rules({"address": "10.9.0.0/16"}, {"calling_ae": "CT1", "address": "10.1.2.3"})
    answer = admit(Requestor("CT1", "ANY", "10.1.2.4"), table)
    assert numbers(answer) == (1, 1, 1)
    assert "rule 1 of association.allow wants an address in 10.9.0.0/16" in answer.why


def test_all_that_a_rule_gives_must_match() -> None:
    table = rules({"calling_ae": "CT1", "address": "10.1.0.0/16", "certificate": "ct1.example"})
    good = Requestor("CT1", "ANY", "10.1.2.3", ("ct1.example",))
    assert admit(good, table).accepted
    for bad in (
        Requestor("CT2", "ANY", "10.1.2.3", ("ct1.example",)),
        Requestor("CT1", "ANY", "10.2.2.3", ("ct1.example",)),
        Requestor("CT1", "ANY", "10.1.2.3", ("ct2.example",)),
    ):
        assert not admit(bad, table).accepted


def test_any_one_rule_is_enough() -> None:
    table = rules({"calling_ae": "CT1"}, {"address": "10.1.0.0/16"})
    assert admit(Requestor("CT1", "ANY", "192.0.2.1"), table).accepted
    assert admit(Requestor("WHO", "ANY", "10.1.0.9"), table).accepted


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (None, "the peer came without TLS"),
        ((), "the peer showed none"),
        (("ct2.example",), "the peer's is of ct2.example"),
    ],
)
def test_a_certificate_that_does_not_match_is_explained(
    names: tuple[str, ...] | None, words: str
) -> None:
    table = rules({"certificate": "ct1.example"})
    answer = admit(Requestor("CT1", "ANY", "192.0.2.1", names), table)
    assert words in answer.why
    assert numbers(answer) == (1, 1, 1)


def test_a_certificate_name_is_compared_without_regard_to_case() -> None:
    peer = Requestor("CT1", "ANY", "192.0.2.1", ("CT1.Example",))
    assert admit(peer, rules({"certificate": "ct1.example"})).accepted


@pytest.mark.parametrize(
    ("address", "accepted"),
    [("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("10.2.0.1", False), ("fe80::1%eth0", False)],
)
def test_a_listed_network_is_matched_in_either_notation(address: str, accepted: bool) -> None:
    table = rules({"address": "10.1.0.0/16"})
    assert admit(Requestor("CT1", "ANY", address), table).accepted is accepted


def test_an_address_is_counted_under_one_name_in_either_notation() -> None:
    assert plain_address("::ffff:10.1.2.3") == plain_address("10.1.2.3") == "10.1.2.3"
    assert plain_address("fe80::1%eth0") == "fe80::1"


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
    ],
)
def test_a_host_with_many_ipv6_addresses_counts_as_one(address: str, counted: str) -> None:
    assert origin(address) == counted


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"association": {"allow": [{}]}}, "a rule gives"),
        ({"association": {"allow": [{"certificate": "x"}]}}, "set tls.port"),
        ({"tls": {"port": 2762}}, "needs tls.certificate"),
        ({"tls": {"port": 1, "certificate": "a", "key": "b"}}, "needs tls.ca"),
        ({"tls": {"only": True}}, "tls.only needs tls.port"),
        ({"association": {"extra_storage_classes": ["1..2"]}}, "is not a UID"),
        ({"audit": {"syslog": "http://host"}}, "udp://HOST:PORT"),
    ],
)
def test_a_table_that_cannot_work_is_a_mistake_of_the_configuration(
    section: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        NodeSettings.model_validate(section)
