from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from training.manifest import FILE_NAME, Item, ManifestError, PreparedManifest

ITEM = Item(
    name="a",
    task="mri_sr",
    split="train",
    subject="s",
    source="x",
    licence="CC BY 4.0",
    units="a.u.",
    spacing_mm=(3.0, 0.5, 0.5),
    hq="a.hq.npy",
    lq="a.lq.npy",
    shape=(2, 16, 16),
    simulated=False,
    sha256={"hq": "0", "lq": "1"},
    contrast="T2",
    scale=1.5,
)
MANIFEST = PreparedManifest(seed=3, operators={"mri_sr": {"name": "n"}}, items=(ITEM,))


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = dataclasses.replace(MANIFEST, skipped=("b: noise",))
    written.write(tmp_path)
    assert PreparedManifest.read(tmp_path) == written


def test_fields_of_a_later_release_are_ignored(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    content["items"][0]["orientation"] = "axial"
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    assert PreparedManifest.read(tmp_path).items == (ITEM,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "not a prepared folder"),
        ("{", "not JSON"),
        ("[]", "version 1"),
        ('{"version": 2}', "version 1"),
        ('{"version": 1, "seed": 0, "operators": {}}', "incomplete"),
        ('{"version": 1, "seed": 0, "operators": {}, "items": [{}]}', "incomplete"),
        ('{"version": 1, "seed": 0, "operators": {}, "items": [], "more": 1}', "incomplete"),
    ],
)
def test_a_folder_without_a_sound_manifest_is_refused(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    if text is not None:
        (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ManifestError, match=reason):
        PreparedManifest.read(tmp_path)
