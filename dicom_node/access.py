"""Whom the node lets in: one rule table, and the answer to an association request in words.

A pure decision (:func:`admit`) on what is known of a peer before any of its requests is served:
its titles, its address and the names in its certificate.  Each refusal carries the result, source
and diagnostic of PS3.8 Table 9-21 for the peer, and a sentence for the person who looks at ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from dicom_node.settings import AccessRule, NodeSettings

Network = IPv4Network | IPv6Network

#: PS3.8 Table 9-21: (source, diagnostic) of an A-ASSOCIATE-RJ in the standard's words.
DIAGNOSTICS: Final = {
    (1, 1): "no reason given",
    (1, 2): "application context name not supported",
    (1, 3): "calling AE title not recognized",
    (1, 7): "called AE title not recognized",
    (2, 1): "no reason given",
    (2, 2): "protocol version not supported",
    (3, 1): "temporary congestion",
    (3, 2): "local limit exceeded",
}

_PERMANENT, _TRANSIENT = 1, 2


@dataclass(frozen=True)
class Requestor:
    """Who asks for an association; titles as they came, padding included.

    *certificate_names* are those that its certificate proves: None without TLS, empty where it
    showed no certificate.
    """

    calling_ae: str
    called_ae: str
    address: str
    certificate_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Admission:
    """The answer to an association request: accepted, or PS3.8 Table 9-21's three numbers."""

    accepted: bool
    why: str
    result: int = 0
    source: int = 0
    diagnostic: int = 0

    @property
    def standard_words(self) -> str:
        """What the peer is told, in the words of Table 9-21."""
        known = DIAGNOSTICS.get((self.source, self.diagnostic), "reserved")
        kind = "permanent" if self.result == _PERMANENT else "transient"
        return f"rejected-{kind}: {known}"


ACCEPTED: Final = Admission(True, "accepted")
TOO_MANY: Final = (_TRANSIENT, 3, 2)


def refuse(why: str, result: int, source: int, diagnostic: int) -> Admission:
    """A rejection with its reason for people."""
    return Admission(False, why, result, source, diagnostic)


@dataclass(frozen=True)
class Rule:
    """One row of the table, ready to compare; what is None matches everyone."""

    calling_ae: str | None = None
    network: Network | None = None
    certificate: str | None = None

    @classmethod
    def of(cls, row: AccessRule) -> Rule:
        """The rule that a row of ``association.allow`` states."""
        network = ip_network(row.address) if row.address is not None else None
        return cls(row.calling_ae, network, row.certificate)

    def mismatches(self, calling: str, requestor: Requestor) -> list[str]:
        """What of the peer the rule does not match, in words; empty where it lets it in."""
        found = []
        if self.calling_ae is not None and calling != self.calling_ae:
            found.append(f"wants calling AE title {self.calling_ae!r}")
        if self.network is not None and not _within(requestor.address, self.network):
            found.append(f"wants an address in {self.network}")
        if self.certificate is not None and not _proves(requestor, self.certificate):
            found.append(f"wants a certificate of {self.certificate!r}{_shown(requestor)}")
        return found


@dataclass(frozen=True)
class AccessRules:
    """Whom the SCP accepts; an empty collection accepts everyone."""

    called: frozenset[str] = frozenset()
    allow: tuple[Rule, ...] = ()


def access_rules(settings: NodeSettings) -> AccessRules:
    """The access rules that ``[node]`` and ``[association]`` of the settings state."""
    given = settings.association
    ours = frozenset({settings.node.ae_title, *given.called_ae_titles})
    return AccessRules(
        called=ours if given.require_called_ae_title else frozenset(),
        allow=tuple(map(Rule.of, given.allow)),
    )


def normal_title(title: str) -> str:
    """An AE title without the padding that PS3.5 6.2 (and careless peers, NUL) put round it."""
    return title.strip(" \0")


def admit(requestor: Requestor, rules: AccessRules) -> Admission:
    """Accept or reject by titles, address and certificate.

    An unknown calling AE title is diagnostic 3; a known one from a wrong address or with a wrong
    certificate is diagnostic 1: Table 9-21 has no better, and a stranger need not be told more.
    """
    calling, called = normal_title(requestor.calling_ae), normal_title(requestor.called_ae)
    if not calling:
        return refuse("the calling AE title is empty", _PERMANENT, 1, 3)
    if not called:
        return refuse("the called AE title is empty", _PERMANENT, 1, 7)
    if rules.called and called not in rules.called:
        ours = ", ".join(sorted(rules.called))
        why = f"called AE title {called!r} is not one of ours ({ours})"
        return refuse(why, _PERMANENT, 1, 7)
    if not rules.allow:
        return ACCEPTED
    return _by_rules(calling, requestor, rules.allow)


def _by_rules(calling: str, requestor: Requestor, allow: tuple[Rule, ...]) -> Admission:
    misses = [rule.mismatches(calling, requestor) for rule in allow]
    if any(not miss for miss in misses):
        return ACCEPTED
    known = [n for n, rule in enumerate(allow) if rule.calling_ae in (None, calling)]
    if not known:
        why = f"calling AE title {calling!r} is in no rule of association.allow"
        return refuse(why, _PERMANENT, 1, 3)
    nearest = min(known, key=lambda number: len(misses[number]))
    why = (
        f"{calling!r} from {requestor.address}: rule {nearest + 1} of association.allow"
        f" {' and '.join(misses[nearest])}"
    )
    return refuse(why, _PERMANENT, 1, 1)


def plain_address(address: str) -> str:
    """An address as rules and counters know it: without zone, IPv4 where IPv6 maps it."""
    peer = ip_address(address.partition("%")[0])
    # A dual-stack listener sees an IPv4 peer as ::ffff:a.b.c.d.
    mapped = peer.ipv4_mapped if isinstance(peer, IPv6Address) else None
    return str(mapped or peer)


def origin(address: str) -> str:
    """What caps count as one peer: an IPv4 address, or the /64 of an IPv6 address.

    Of the latter one host has as many as it likes (RFC 8981).
    """
    plain = ip_address(plain_address(address))
    if isinstance(plain, IPv6Address) and not plain.is_loopback:
        return str(IPv6Network((plain, 64), strict=False))
    return str(plain)


def _within(address: str, network: Network) -> bool:
    return ip_address(plain_address(address)) in network


def _proves(requestor: Requestor, name: str) -> bool:
    return name.lower() in _lowered(requestor.certificate_names or ())


def _lowered(names: Iterable[str]) -> set[str]:
    return {name.lower() for name in names}


def _shown(requestor: Requestor) -> str:
    if requestor.certificate_names is None:
        return ", and the peer came without TLS"
    if not requestor.certificate_names:
        return ", and the peer showed none"
    return f", and the peer's is of {', '.join(requestor.certificate_names)}"
