from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.unit.training.conftest import PackWriter, median_edge_residual
from training.medz import MAGIC, MedzError, read_items, read_volume


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (1, 9, 1), (3, 11, 6), (2, 5, 13)])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_what_the_published_predictor_codes_is_decoded_exactly(
    tmp_path: Path, write_pack: PackWriter, shape: tuple[int, int, int], dtype: type
) -> None:
    rng = np.random.default_rng(3)
    limits = np.iinfo(dtype)
    volume = rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)
    path = write_pack(tmp_path / "a.medz", [(volume, {"name": "x"})], median_edge_residual)
    decoded = read_volume(read_items(path)[0])
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, volume)


def test_items_are_listed_with_their_facts(tmp_path: Path, write_pack: PackWriter) -> None:
    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    path = write_pack(
        tmp_path / "a.medz", [(volume, {"name": "one"}), (volume[:1], {"name": "two", "kvp": 120})]
    )
    assert [(item.name, item.shape) for item in read_items(path)] == [
        ("one", (2, 3, 4)),
        ("two", (1, 3, 4)),
    ]
    assert read_items(path)[1].meta["kvp"] == 120


def test_a_damaged_stream_is_named(tmp_path: Path, write_pack: PackWriter) -> None:
    volume = np.random.default_rng(0).integers(0, 4000, (2, 20, 20)).astype(np.int16)
    path = write_pack(tmp_path / "a.medz", [(volume, {"name": "x"})])
    whole = path.read_bytes()
    for position in range(len(whole) - 700, len(whole), 70):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with pytest.raises(MedzError, match=r"a\.medz: item 'x' is corrupt"):
            read_volume(read_items(path)[0])


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_pack_that_ends_early_is_refused(
    tmp_path: Path, write_pack: PackWriter, share: float
) -> None:
    volume = np.random.default_rng(0).integers(0, 4000, (2, 20, 20)).astype(np.int16)
    path = write_pack(tmp_path / "a.medz", [(volume, {"name": "x"})])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(MedzError, match="corrupt"):
        read_volume(*read_items(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a MEDZ pack"),
        (b"PK\x03\x04 something", "not a MEDZ pack"),
        (MAGIC + b"\x01", "ends inside its header"),
        (MAGIC + b"\xff\x00\x00\x00{}", "ends inside its header"),
        (MAGIC + b"\x02\x00\x00\x00{]", "not JSON"),
        (MAGIC + b"\x02\x00\x00\x00[]", "not a JSON object"),
        (MAGIC + b"\x02\x00\x00\x00{}", "no list of items"),
        (MAGIC + b"\x0e\x00\x00\x00" + b'{"items":[{}]}', "lacks dtype"),
        (MAGIC + b"\x0d\x00\x00\x00" + b'{"items":[3]}', "not a JSON object"),
    ],
)
def test_a_file_that_is_no_pack_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "bad.medz"
    path.write_bytes(content)
    with pytest.raises(MedzError, match=reason) as caught:
        read_items(path)
    assert "bad.medz" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("shape", [0, 3, 3]), ("dtype", "float32")])
def test_an_item_of_another_kind_is_refused(
    tmp_path: Path, write_pack: PackWriter, key: str, value: object
) -> None:
    volume = np.zeros((1, 3, 3), np.int16)
    path = write_pack(tmp_path / "a.medz", [(volume, {"name": "x"})])
    text = path.read_bytes()
    old = b'"shape": [1, 3, 3]' if key == "shape" else b'"dtype": "int16"'
    new = b'"shape": [0, 3, 3]' if key == "shape" else b'"dtype": "f4   "'
    path.write_bytes(text.replace(old, new))
    with pytest.raises(MedzError, match="item 0"):
        read_items(path)


@pytest.mark.parametrize("name", ["val_ct_acrinflt013", "val_mr_t2_ms04", "val_pet_ibsi"])
def test_the_shared_packs_decode_to_their_hashes(shared_data: Path, name: str) -> None:
    items = read_items(shared_data / "train" / f"{name}.medz")
    assert items
    assert all(read_volume(item).shape == item.shape for item in items)
