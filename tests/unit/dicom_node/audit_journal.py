"""Reading an audit journal in tests, and the schema of PS3.15 A.5.1."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lxml import etree

_SCHEMA = Path(__file__).parent / "audit_message.rng"


@cache
def schema() -> etree.RelaxNG:
    """The RELAX NG of PS3.15 A.5.1."""
    return etree.RelaxNG(etree.parse(_SCHEMA))


def parsed(xml: bytes) -> etree._Element:
    """A message that the schema accepts; AssertionError with its complaint otherwise."""
    message = etree.fromstring(xml)
    assert schema().validate(message), schema().error_log
    return message


def audit_messages(journal: Path) -> list[etree._Element]:
    """Every message of a journal, each accepted by the schema."""
    lines = journal.read_bytes().splitlines() if journal.exists() else []
    return [parsed(line.partition(b"\xef\xbb\xbf")[2]) for line in lines]


def audit_events(journal: Path) -> list[tuple[str, str]]:
    """The meaning of each message's Event ID, and its outcome."""
    found = []
    for message in audit_messages(journal):
        event = message.find("EventIdentification")
        assert event is not None
        kind = event.find("EventID")
        assert kind is not None
        found.append((str(kind.get("originalText")), str(event.get("EventOutcomeIndicator"))))
    return found
