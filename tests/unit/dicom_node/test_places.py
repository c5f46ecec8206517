"""Where a key of a TOML text stands."""

from __future__ import annotations

import pytest

from dicom_node.settings.places import Places

TEXT = """# a comment
colour = "blue"

[[route]]
name = "one"  # said twice
[route.match]
ImageType = [
    "A",
    "B",
]
inline = { deep = { deeper = 1 } }
[[route]]
name = '''
over
lines'''
task = "x"
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("colour",), 2),
        (("route", 0), 4),
        (("route", 0, "name"), 5),
        (("route", 0, "match"), 6),
        (("route", 0, "match", "ImageType"), 7),
        (("route", 0, "match", "inline", "deep", "deeper"), 11),
        (("route", 1), 12),
        (("route", 1, "name"), 13),
        (("route", 1, "task"), 16),
        # what is not there is told by the nearest that is
        (("route", 1, "destinations"), 12),
        (("route", 0, "match", "ImageType", "range"), 7),
        (("absent",), None),
        ((), None),
    ],
)
def test_a_key_stands_where_it_is_written(path: tuple[str | int, ...], line: int | None) -> None:
    assert Places(TEXT).line(path) == line


def test_a_text_that_is_no_toml_has_the_lines_before_its_mistake() -> None:
    assert Places("a = 1\nb = \nc = 3").line(("a",)) == 1
    assert Places("a = 1\nb = \nc = 3").line(("c",)) is None
