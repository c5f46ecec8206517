"""What the standard's tables say of the attributes of an image IOD.

The tables are highdicom's copy of PS3.3 (`highdicom._standard_utils`), which is not a public
interface: this module is the only one that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from highdicom._standard_utils import (
    get_iod_module_map,
    get_module_attribute_map,
    get_sop_class_iod_map,
)

__all__ = [
    "functional_groups",
    "has_module",
    "mandatory_modules",
    "root_keywords",
    "type_two_keywords",
]

_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"


@cache
def _modules(sop_class_uid: str) -> Mapping[str, str]:
    """Usage (M, C, U) of each module of the IOD."""
    iod = get_sop_class_iod_map()[sop_class_uid]
    return {entry["key"]: entry["usage"] for entry in get_iod_module_map()[iod]}


def has_module(sop_class_uid: str, module: str) -> bool:
    """Whether the IOD of the class has the module."""
    return module in _modules(sop_class_uid)


def mandatory_modules(sop_class_uid: str) -> frozenset[str]:
    """The modules that every instance of the class has."""
    return frozenset(name for name, usage in _modules(sop_class_uid).items() if usage == "M")


@cache
def root_keywords(sop_class_uid: str, module: str) -> frozenset[str]:
    """The attributes at the root of one module of a storage class, by keyword.

    Raises KeyError for a module that the IOD does not have.
    """
    if module not in _modules(sop_class_uid):
        raise KeyError(module)
    attributes = get_module_attribute_map()[module]
    return frozenset(entry["keyword"] for entry in attributes if not entry["path"])


@cache
def type_two_keywords(sop_class_uid: str, module: str) -> frozenset[str]:
    """Root attributes of a module that shall be there, empty where unknown (PS3.5 7.4.3)."""
    attributes = get_module_attribute_map()[module]
    return frozenset(
        entry["keyword"] for entry in attributes if not entry["path"] and entry["type"] == "2"
    ) & root_keywords(sop_class_uid, module)


@cache
def functional_groups(sop_class_uid: str) -> Mapping[str, frozenset[str]]:
    """The functional group macros of a multi-frame class: keywords of the items, by sequence.

    Empty for a class without functional groups.
    """
    names = [name for name in _modules(sop_class_uid) if name.endswith("functional-groups")]
    found: dict[str, set[str]] = {}
    for name in names:
        for entry in get_module_attribute_map()[name]:
            path, keyword = entry["path"], entry["keyword"]
            if path in ([_SHARED], [_PER_FRAME]):
                found.setdefault(keyword, set())
            elif len(path) == 2 and path[0] in (_SHARED, _PER_FRAME):
                found.setdefault(path[1], set()).add(keyword)
    return {macro: frozenset(keywords) for macro, keywords in found.items()}
