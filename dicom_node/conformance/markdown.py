"""Markdown of a statement: paragraphs and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["paragraphs", "table", "yes"]


def paragraphs(*parts: str) -> str:
    """Parts with an empty line between each two, and an end of line."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; an empty one says so."""
    lines = [_line(headings), _line(["---"] * len(headings))]
    filled = [_line(row) for row in rows]
    return "\n".join([*lines, *(filled or [_line(["none", *[""] * (len(headings) - 1)])])])


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").strip() for cell in cells) + " |"


def yes(value: object) -> str:
    """Whether something is supported, as tables of PS3.2 have it."""
    return "Yes" if value else "No"
