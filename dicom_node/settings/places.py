"""Where in a TOML file a key stands, for messages that a person can follow.

The parser of the standard library keeps no positions. It is asked instead: the line on which a key
stands is the first whose text, with all before it, is a document that has the key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property

__all__ = ["Places"]

Path = Sequence[str | int]


class Places:
    """The lines of the keys of one TOML text."""

    def __init__(self, text: str) -> None:
        """*text* is valid TOML; of another, only what stands before its mistake is found."""
        self._lines = text.splitlines()

    def line(self, path: Path) -> int | None:
        """The line, from 1, on which a key or the nearest table above it is written."""
        for length in range(len(path), 0, -1):
            for line, document in self._documents:
                if _has(document, path[:length]):
                    return line
        return None

    @cached_property
    def _documents(self) -> list[tuple[int, Mapping[str, object]]]:
        """Each statement's first line, with the document up to its last."""
        found: list[tuple[int, Mapping[str, object]]] = []
        before = 0
        for count in range(1, len(self._lines) + 1):
            try:
                document = tomllib.loads("\n".join(self._lines[:count]))
            except tomllib.TOMLDecodeError:
                continue
            found.append((before + 1, document))
            before = count
        return found


def _has(value: object, path: Path) -> bool:
    for key in path:
        in_table = isinstance(value, Mapping) and key in value
        if not in_table and not (isinstance(value, list) and key in range(len(value))):
            return False
        value = value[key]  # type: ignore[index]  # one of the two that were looked at
    return True
