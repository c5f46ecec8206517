"""A slice that stands alone becomes the same, bit by bit, with its volume and ahead of it."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restoration import slices
from restoration.fidelity import SliceMeasures
from restoration.restorer import Restoration, Restorer, SliceResult
from restoration.slices import encode_plane
from restoration.volumes import OnDemand, Volume

SEEDS = [5, 6, 7, 8]


def chest(slices: int = 4, size: int = 48, seed: int = 0) -> Volume:
    """A body of soft tissue with lungs of air, and noise, in HU."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    body = np.where(x**2 + y**2 < 0.8, 40.0, -1000.0)
    body = np.where((x - 0.4) ** 2 + y**2 < 0.1, -850.0, body)
    noise = np.random.default_rng(seed).normal(0, 25, (slices, size, size))
    return (body + noise).astype(np.float32)


@pytest.fixture
def restorer(bundle: Path) -> Restorer:
    return Restorer.open(bundle, device="cpu", precision="fp32")


def changed(restorer: Restorer, **changes: Any) -> Restorer:
    return Restorer(
        replace(restorer.manifest, **changes),
        restorer.network.model,
        restorer.device,
        restorer.network.limits,
        "fp32",
    )


def held(restorer: Restorer) -> Restorer:
    """Held to the low frequencies of each slice, as the shipped bundle holds CT."""
    return changed(restorer, low_frequency={"ct_denoise": (0.0, 3.0, 3.0)})


def ahead(restorer: Restorer, x: Volume, strength: float = 1.0) -> list[SliceResult]:
    return [
        restorer.restore_slice(plane, "ct_denoise", seed=seed, strength=strength)
        for plane, seed in zip(x, SEEDS, strict=True)
    ]


def judged(restorer: Restorer, x: Any, made: Restoration, strength: float) -> Any:
    found = restorer.assess(
        x, made, "ct_denoise", spacing=(2.0, 0.7, 0.7), seeds=SEEDS, strength=strength
    )
    return repr(found)  # NaN equals NaN by its name


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("is_held", [False, True])
def test_a_volume_of_slices_restored_before_is_bit_equal_to_one_restored_at_once(
    restorer: Restorer, strength: float, is_held: bool
) -> None:
    restorer = held(restorer) if is_held else restorer
    x = chest()
    whole = restorer.restore(x, "ct_denoise", seeds=SEEDS, strength=strength)
    before = ahead(restorer, x, strength)
    for known in ({0, 1, 2, 3}, {0, 3}, {2}, set[int]()):
        made = restorer.restore(
            x,
            "ct_denoise",
            seeds=SEEDS,
            strength=strength,
            kept=lambda i, known=known: before[i] if i in known else None,  # type: ignore[misc]
        )
        assert made.volume.tobytes() == whole.volume.tobytes()
        assert (made.diagnostics, made.flags) == (whole.diagnostics, whole.flags)
        assert made.measured.keys() == known
        assert judged(restorer, x, made, strength) == judged(restorer, x, whole, strength)


def test_the_order_in_which_slices_come_changes_no_bit(restorer: Restorer) -> None:
    restorer, x = held(restorer), chest(3)
    first: dict[int, bytes] = {}
    for order in itertools.permutations(range(3)):
        for index in order:
            result = restorer.restore_slice(x[index], "ct_denoise", seed=SEEDS[index])
            assert result.restored is not None
            made = result.encode() + encode_plane(result.restored)
            assert first.setdefault(index, made) == made


def test_slices_that_are_known_do_not_go_through_the_network_again(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = chest()
    before = ahead(restorer, x)
    told: list[tuple[int, int]] = []
    passed: list[int] = []
    start = restorer.network.start

    def counted(lq: Any, task: Any, seeds: Any) -> Any:
        passed.extend(seeds)
        return start(lq, task, seeds)

    monkeypatch.setattr(restorer.network, "start", counted)
    restorer.restore(
        x,
        "ct_denoise",
        seeds=SEEDS,
        kept=lambda i: None if i == 2 else before[i],
        progress=lambda done, total: told.append((done, total)),
    )
    assert passed == [SEEDS[2]]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_result_of_another_matrix_is_not_taken(restorer: Restorer) -> None:
    x = chest(1)
    other = restorer.restore_slice(chest(1, size=40)[0], "ct_denoise", seed=5)
    made = restorer.restore(x, "ct_denoise", seeds=[5], kept=lambda _: other)
    assert np.array_equal(made.volume, restorer.restore(x, "ct_denoise", seeds=[5]).volume)


def test_what_its_volume_enters_does_not_stand_alone(restorer: Restorer) -> None:
    assert restorer.stands_alone("ct_denoise")
    assert held(restorer).stands_alone("ct_denoise")
    assert not restorer.stands_alone("mri_sr")
    through = changed(restorer, low_frequency={"ct_denoise": (1.0, 3.0, 3.0)})
    assert not through.stands_alone("ct_denoise")
    consistent = changed(restorer, data_consistency={"ct_denoise": 1.0})
    assert not consistent.stands_alone("ct_denoise")
    with pytest.raises(ValueError, match="with its volume alone"):
        through.restore_slice(chest(1)[0], "ct_denoise", seed=5)
    with pytest.raises(ValueError, match="with its volume alone"):
        restorer.restore_slice(chest(1)[0], "mri_sr", seed=5)


def test_another_way_to_compute_is_another_basis(restorer: Restorer, bundle: Path) -> None:
    assert restorer.basis("ct_denoise") == changed(restorer).basis("ct_denoise")
    lower = Restorer.open(bundle, device="cpu", precision="bf16")
    assert len({each.basis("ct_denoise") for each in (restorer, held(restorer), lower)}) == 3


def test_octets_keep_every_bit_of_a_result() -> None:
    rng = random.Random(0)
    plane = np.frombuffer(rng.randbytes(4 * 35), np.float32).reshape(5, 7)
    small = np.array([[1e-40, -0.0]], np.float32)
    values = {"mean_drift": 0.1 + 0.2, "latent_distance": float("nan")}
    gates = {"noise_level": 1 / 3, "hu_bias_lung": float("nan")}
    measures = SliceMeasures(gates, small, small, (0.1, -2 / 3))
    for given in (SliceResult(plane, values), SliceResult(plane, values, measures)):
        again = SliceResult.decode(given.encode(), lambda: encode_plane(plane))
        assert again.restored is not None
        assert again.restored.tobytes() == plane.tobytes()
        assert repr(again.values) == repr(values)
        assert (again.measures is None) == (given.measures is None)
        assert again.encode() == given.encode()
    assert again.measures is not None
    assert again.measures.before.tobytes() == small.tobytes()
    assert again.measures.features == (0.1, -2 / 3)


def test_octets_that_are_no_result_are_an_error() -> None:
    good = SliceResult(np.zeros((3, 4), np.float32), {"mean_drift": 0.0}).encode()
    for octets in (b"", b"\x05", os.urandom(64), good[:-1], good + b"\0", good[:20]):
        with pytest.raises(ValueError, match="not a restored slice"):
            SliceResult.decode(octets, lambda: None)


def test_a_plane_that_is_not_of_its_shape_is_gone() -> None:
    octets = encode_plane(np.ones((3, 4), np.float32))
    facts = SliceResult(np.ones((3, 4), np.float32), {"mean_drift": 0.0}).encode()
    for damaged in (None, b"", octets[:-1], octets + b"\0"):
        assert SliceResult.decode(facts, lambda given=damaged: given).restored is None  # type: ignore[misc]


def test_nothing_but_what_is_asked_for_is_read_of_slices_that_are_kept(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the source's pixels nor the restored ones, for the result and its verdict."""
    restorer, x = held(restorer), chest()
    asked: list[int] = []
    whole = restorer.restore(x, "ct_denoise", seeds=SEEDS)
    expected = judged(restorer, x, whole, 1.0)
    known = [
        restorer.probe_slice(plane, made, "ct_denoise", seed=seed)
        for plane, made, seed in zip(x, ahead(restorer, x), SEEDS, strict=True)
    ]

    def plane(index: int) -> bytes | None:
        asked.append(index)
        return None if index == 3 else encode_plane(whole.planes[index])

    def read(index: int) -> Volume:
        asked.append(-1 - index)
        return x[index]

    kept = [
        SliceResult.decode(each.encode(), lambda i=i: plane(i))  # type: ignore[misc]
        for i, each in enumerate(known)
    ]
    planes = OnDemand(x.shape, read)
    for held_at_once in (2, 512):
        # What is measured is held of so many, and read again of the others.
        monkeypatch.setattr(slices, "_HELD", held_at_once)
        made = restorer.restore(planes, "ct_denoise", seeds=SEEDS, kept=lambda i: kept[i])
        assert judged(restorer, planes, made, 1.0) == expected
        assert asked == []
    assert np.array_equal(made.planes[1], whole.planes[1])
    assert asked == [1]
    # One that is gone meanwhile is made again.
    assert np.array_equal(made.planes[3], whole.planes[3])
    assert asked == [1, 3, -4]
    assert made.volume.tobytes() == whole.volume.tobytes()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_slice_that_was_probed_before_is_judged_alike_and_not_probed_again(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    restorer, x = held(restorer), chest()
    whole = restorer.restore(x, "ct_denoise", seeds=SEEDS, strength=strength)
    expected = judged(restorer, x, whole, strength)
    before = [
        restorer.probe_slice(plane, made, "ct_denoise", seed=seed, strength=strength)
        for plane, made, seed in zip(x, ahead(restorer, x, strength), SEEDS, strict=True)
    ]
    again = [
        SliceResult.decode(each.encode(), lambda plane=each.restored: encode_plane(plane))  # type: ignore[misc]
        for each in before
    ]
    monkeypatch.setattr(restorer.network, "start", None)  # not even one pass is left
    made = restorer.restore(
        x, "ct_denoise", seeds=SEEDS, strength=strength, kept=lambda i: again[i]
    )
    assert judged(restorer, x, made, strength) == expected
