"""DICOM files of a command line, by series."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dicom_node.errors import UnreadableInstanceError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Series = dict[str, tuple[Path, "Dataset"]]


def series_under(paths: Sequence[Path]) -> dict[str, Series]:
    """DICOM files by series and SOP Instance UID; a file that is none is named on stderr."""
    from dicom_node.dicom.header import instance_summary, read_header

    found: dict[str, Series] = {}
    for path in _files(paths):
        try:
            header = read_header(path)
            summary = instance_summary(header)
        except UnreadableInstanceError as error:
            click.echo(f"{path}: {error.message}", err=True)
            continue
        series = found.setdefault(summary.series_instance_uid, {})
        series[summary.sop_instance_uid] = (path, header)
    return found


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.is_file())
        else:
            yield path
