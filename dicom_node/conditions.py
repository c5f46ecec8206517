"""What a rule tests: a key, the values it has in one header, and an operator. Pure.

A key is a title of the association, a DICOM keyword (also within a sequence: ``Sequence.Keyword``),
a tag, a private tag with its creator, or a quantity that several attributes tell, with its unit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from dicom_node.dicom.header import numbers, texts
from dicom_node.dicom.quantities import ATTRIBUTE_UNITS, QUANTITIES, REFERENCES, convert

__all__ = [
    "OPERATORS",
    "TITLE_KEYS",
    "Condition",
    "Key",
    "Titles",
    "Value",
    "header_values",
    "in_unit",
]

Value = str | float

TITLE_KEYS = ("called_ae", "calling_ae", "address")
OPERATORS = ("equals", "regex", "range", "in", "not_in", "exists", "network")
_ALIASES = {"modality": "Modality"}
_NUMERIC = frozenset({"DS", "IS", "FL", "FD", "US", "SS", "UL", "SL", "UV", "SV"})
_BINARY = frozenset({"SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN"})
_TAG = re.compile(r"\(?([0-9A-Fa-f]{4}),\s*([0-9A-Fa-f]{4})\)?")
_PRIVATE = re.compile(r"\(?([0-9A-Fa-f]{4}),\s*\"([^\"]+)\",\s*([0-9A-Fa-f]{2})\)?")
# Long texts are for people; a pattern must not be run over a page of them.
_LONGEST_TEXT = 1024

Read = Callable[[Dataset], tuple[Value, ...]]


@dataclass(frozen=True)
class Titles:
    """Who sent a series and to which of our names: AE titles and the peer's network address."""

    calling_ae: str = ""
    called_ae: str = ""
    address: str = ""

    def value(self, key: str) -> tuple[Value, ...]:
        """The value that the rule key *key* tests, as a one-element tuple; empty when unknown."""
        text = str(getattr(self, key))
        return (text,) if text else ()


@dataclass(frozen=True)
class Key:
    """What a rule may test: its name, how it is read, whether it is a number, and its unit."""

    name: str
    numeric: bool | None  #: None: a private attribute, of which the rule's own value decides.
    unit: str | None
    read: Read
    needs_unit: bool = False

    @classmethod
    def of(cls, name: str) -> Key:
        """Look a key up; ValueError in words for a person where a rule cannot test it."""
        name = _ALIASES.get(name, name)
        if name in TITLE_KEYS:
            return cls(name, False, None, lambda header: ())
        if name in QUANTITIES:
            quantity = QUANTITIES[name]
            needs_unit = quantity.unit is not None
            return cls(name, quantity.numeric, quantity.unit, quantity.read, needs_unit)
        if found := _PRIVATE.fullmatch(name):
            group, creator, element = int(found[1], 16), found[2], int(found[3], 16)
            return cls(name, None, None, lambda header: _private(header, group, creator, element))
        if found := _TAG.fullmatch(name):
            name = keyword_for_tag(int(found[1] + found[2], 16)) or name
        return cls._of_keyword(name)

    @classmethod
    def _of_keyword(cls, name: str) -> Key:
        *sequences, keyword = name.split(".")
        for each in sequences:
            if tag_for_keyword(each) is None or dictionary_VR(each) != "SQ":
                raise ValueError(f"{each} is no DICOM sequence")
        if tag_for_keyword(keyword) is None:
            known = ", ".join((*TITLE_KEYS, *QUANTITIES))
            raise ValueError(f"is no DICOM keyword (and none of {known})")
        vr = dictionary_VR(keyword)
        if set(vr.split(" or ")) & _BINARY:
            raise ValueError(f"has VR {vr}, which a rule cannot test")
        unit = ATTRIBUTE_UNITS.get(keyword)
        return cls(name, _numeric_vr(vr), unit, lambda header: header_values(header, name))

    def values(self, titles: Titles, header: Dataset) -> tuple[Value, ...]:
        """All values of one header or association; none where it is absent, empty or unreadable."""
        return titles.value(self.name) if self.name in TITLE_KEYS else self.read(header)


def header_values(header: Dataset, keyword: str) -> tuple[Value, ...]:
    """All values of one attribute, by keyword or ``Sequence.Keyword``: float for numeric VRs,
    stripped text otherwise.

    An attribute that is absent, empty or does not parse has no values; one bad element of a
    vendor must not decide whether the rest of the header can be routed.
    """
    first, _, rest = keyword.partition(".")
    if rest:
        return tuple(v for item in _items(header, first) for v in header_values(item, rest))
    if _numeric_vr(dictionary_VR(first)):
        return numbers(header, first) or ()
    return tuple(value for value in texts(header, first) if value)


def _numeric_vr(vr: str) -> bool:
    return set(vr.split(" or ")) <= _NUMERIC


def _items(header: Dataset, keyword: str) -> Iterator[Dataset]:
    value = header.get(keyword)
    yield from value if isinstance(value, DicomSequence) else ()


def _private(header: Dataset, group: int, creator: str, element: int) -> tuple[Value, ...]:
    """A private attribute (PS3.5 7.8.1), text where its representation is not known."""
    try:
        value = header.private_block(group, creator)[element].value
    except (KeyError, ValueError):
        return ()
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace").strip("\0 ").split("\\")
    several = value if isinstance(value, list | tuple) or hasattr(value, "append") else [value]
    return tuple(text for each in several if (text := str(each).strip()))


@dataclass(frozen=True)
class Condition:
    """One test of one key; *operand* has the operator's own shape, in the key's unit."""

    key: Key
    operator: str
    operand: Any
    #: (value, unit) that `dose_fraction` is a share of.
    reference: tuple[float, str] | None = None

    def values(self, titles: Titles, header: Dataset) -> tuple[Value, ...]:
        """What the test looks at."""
        if self.reference is not None:
            value, unit = self.reference
            return tuple(float(f"{v / value:.6g}") for v in REFERENCES[unit](header))
        return self.key.values(titles, header)

    def holds(self, values: tuple[Value, ...]) -> bool:
        """True when any of *values* satisfies the test (``not_in``: when none is in the list)."""
        if self.operator == "exists":
            return bool(values) is self.operand
        if self.operator == "not_in":
            return not any(self._known(value) in self.operand for value in values)
        return any(self._accepts(self._known(value)) for value in values)

    def _known(self, value: Value) -> Value:
        """A private value as the number that the rule compares it with."""
        if self.key.numeric is None and _is_numeric(self.operand) and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return value
        return value

    def _accepts(self, value: Value) -> bool:
        if self.operator == "equals":
            return bool(value == self.operand)
        if self.operator == "in":
            return value in self.operand
        if self.operator == "regex":
            return re.search(self.operand, str(value)[:_LONGEST_TEXT]) is not None
        if self.operator == "network":
            return _lies_in(str(value), self.operand)
        low, high = self.operand
        return isinstance(value, float) and low <= value <= high

    @property
    def unit(self) -> str:
        """The unit behind a number, with the space before it; '' where there is none."""
        return f" {self.key.unit}" if self.key.unit else ""

    def __str__(self) -> str:
        """The condition as one reads it aloud: ``KVP in range 80..120 kV``."""
        name = self.key.name
        if self.reference is not None:
            name += f" of {self.reference[0]:g} {self.reference[1]}"
        if self.operator == "range":
            return f"{name} in range {self.operand[0]:g}..{self.operand[1]:g}{self.unit}"
        if self.operator == "exists":
            return f"{name} {'present' if self.operand else 'absent'}"
        if isinstance(self.operand, tuple):
            operand = str([_plain(each) for each in self.operand])
        else:
            operand = repr(_plain(self.operand))
        return f"{name} {self.operator.replace('_', ' ')} {operand}{self.unit}"

    def shown(self, values: tuple[Value, ...]) -> str:
        """Values as a person reads them, with the unit."""
        words = "\\".join(f"{v:g}" if isinstance(v, float) else v for v in values)
        return f"{words}{self.unit}" if words else "(absent)"


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_numeric(operand: Any) -> bool:
    parts = operand if isinstance(operand, tuple) else (operand,)
    return bool(parts) and all(isinstance(each, float) for each in parts)


def _lies_in(address: str, network: str) -> bool:
    try:
        return ip_address(address) in ip_network(network)
    except ValueError:
        return False


def in_unit(value: float, unit: str, key: Key) -> float:
    """A measured value in the key's unit; ValueError where the key has none or another kind."""
    if key.unit is None:
        raise ValueError(f"has no unit; write {value:g}")
    return convert(value, unit, key.unit)
