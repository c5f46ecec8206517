"""Headers that were read ahead are those that would be read, and never too many."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicom_node.dicom.header import read_header
from dicom_node.errors import UnreadableInstanceError
from dicom_node.headers_ahead import HeadersAhead
from tests.factories import make_series, write_series


def test_a_header_is_as_it_is_read_later(tmp_path: Path) -> None:
    ahead = HeadersAhead(10)
    for path in write_series(make_series("CT", slices=3), tmp_path):
        assert ahead.read("1.2", path) == read_header(path)
        assert ahead.read("1.2", path) is ahead.of("1.2")[path]
    assert len(ahead.taken("1.2")) == 3
    assert ahead.of("1.2") == ahead.taken("1.2") == {}


def test_the_series_that_came_first_makes_way(tmp_path: Path) -> None:
    ahead = HeadersAhead(4)
    paths = write_series(make_series("CT", slices=6), tmp_path)
    for number, path in enumerate(paths[:5]):
        ahead.read("1.2" if number < 3 else "1.3", path)
    assert (len(ahead.of("1.2")), len(ahead.of("1.3"))) == (0, 2)
    ahead.keep_only({"1.4"})
    assert ahead.of("1.3") == {}
    for path in paths[:4]:
        ahead.read("1.5", path)
    assert len(ahead.of("1.5")) == 4


def test_one_that_cannot_be_read_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "no.dcm"
    path.write_bytes(b"no DICOM")
    ahead = HeadersAhead(4)
    with pytest.raises(UnreadableInstanceError):
        ahead.read("1.2", path)
    assert ahead.of("1.2") == {}
