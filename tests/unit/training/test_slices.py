from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from restoration.tasks import RestorationTask, normalise
from training.manifest import FILE_NAME, Item, ManifestError, PreparedManifest
from training.patches import Batch
from training.slices import PatchSampler, PreparedSet

CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS


def sampler(prepared: Path, **changes: Any) -> PatchSampler:
    options: dict[str, Any] = {"split": "train", "patch": 64, "per_task": 2, "seed": 5} | changes
    return PatchSampler(PreparedSet.open(prepared), **options)


def equal(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(getattr(first, field.name), getattr(second, field.name))
        for field in dataclasses.fields(Batch)
    )


def handmade(folder: Path, shapes: dict[str, tuple[int, int, int]], **facts: Any) -> PreparedSet:
    """A prepared folder of MR ramps: hq counts pixels, lq is hq + 1."""
    items = []
    for name, shape in shapes.items():
        hq = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 4000 + 60
        np.save(folder / f"{name}.hq.npy", hq)
        np.save(folder / f"{name}.lq.npy", hq + 1)
        items.append(
            Item(
                name=name,
                task=facts.get("task", "mri_sr"),
                split="train",
                subject=name,
                source="",
                licence="",
                units="a.u.",
                spacing_mm=(1.0, 1.0, 1.0),
                hq=f"{name}.hq.npy",
                lq=f"{name}.lq.npy",
                shape=shape,
                simulated=facts.get("simulated", {}).get(name, False),
                sha256={},
                contrast=facts.get("contrast", {}).get(name),
            )
        )
    PreparedManifest(seed=0, operators={}, items=tuple(items)).write(folder)
    return PreparedSet.open(folder)


def test_a_batch_depends_on_seed_rank_and_step_alone(prepared: Path) -> None:
    first, again = sampler(prepared), sampler(prepared)
    for step in (9, 2, 5):
        first.batch(step)
    assert equal(first.batch(3), again.batch(3))
    assert not equal(first.batch(3), first.batch(4))
    assert not equal(first.batch(3), sampler(prepared, seed=6).batch(3))
    assert not equal(first.batch(3), sampler(prepared, rank=1).batch(3))


def test_every_task_has_the_same_share_of_a_batch(prepared: Path) -> None:
    batch = sampler(prepared, per_task=3).batch(0)
    assert batch.task.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert batch.lq.shape == batch.hq.shape == batch.mask.shape == (9, 1, 64, 64)
    assert batch.lq.dtype == batch.hq.dtype == batch.mask.dtype == torch.float32
    assert batch.task.dtype == torch.int64


def test_patches_are_normalised_and_clipped_to_the_window(prepared: Path) -> None:
    for step in range(4):
        batch = sampler(prepared).batch(step)
        for image in (batch.lq, batch.hq):
            assert 0 <= float(image.min()) <= float(image.max()) <= 1


def test_a_patch_is_a_part_of_its_slice(tmp_path: Path) -> None:
    data = handmade(tmp_path, {"a": (3, 48, 56)})
    hq = np.array(data.pair(data.items()[0])[1])
    batch = PatchSampler(data, split="train", patch=32, per_task=4, seed=0, tasks=[MR]).batch(0)
    windows = np.lib.stride_tricks.sliding_window_view(normalise(hq, MR), (32, 32), axis=(1, 2))
    for patch in batch.hq[:, 0].numpy():
        assert np.isclose(windows, patch, atol=1e-6).all(axis=(3, 4)).any()
    torch.testing.assert_close(
        batch.lq - batch.hq, torch.full_like(batch.hq, 1 / 4095), atol=1e-6, rtol=0
    )
    assert bool((batch.mask == 1).all())


def test_an_image_below_the_patch_is_replicated_and_masked(tmp_path: Path) -> None:
    data = handmade(tmp_path, {"a": (1, 40, 72)})
    batch = PatchSampler(data, split="train", patch=64, per_task=1, seed=0, tasks=[MR]).batch(0)
    mask, hq = batch.mask[0, 0], batch.hq[0, 0]
    assert float(mask[:40].min()) == 1
    assert float(mask[40:].max()) == 0
    torch.testing.assert_close(hq[40:], hq[39:40].expand(24, 64))


def test_small_images_share_a_patch(tmp_path: Path) -> None:
    data = handmade(tmp_path, {"a": (5, 20, 30)})
    batch = PatchSampler(data, split="train", patch=64, per_task=1, seed=0, tasks=[MR]).batch(0)
    mask = batch.mask[0, 0]
    assert float(mask.sum()) == 4 * 20 * 30
    assert float(mask[:20, :30].min()) == float(mask[32:52, 32:62].min()) == 1
    assert float(mask[20:32].max()) == 0


def test_cells_that_do_not_divide_the_patch_leave_no_gap(tmp_path: Path) -> None:
    data = handmade(tmp_path, {"a": (5, 20, 30)})
    batch = PatchSampler(data, split="train", patch=104, per_task=2, seed=0, tasks=[MR]).batch(0)
    assert batch.mask.sum((1, 2, 3)).tolist() == [9 * 20 * 30] * 2
    assert float(batch.hq.min()) > 0


def test_flips_and_turns_are_drawn_for_the_tasks_named(tmp_path: Path) -> None:
    data = handmade(tmp_path, {"a": (1, 32, 32)})
    image = normalise(np.array(data.pair(data.items()[0])[1])[0], MR)
    options: dict[str, Any] = {"split": "train", "patch": 32, "per_task": 40, "seed": 0}
    flips = [image, image[:, ::-1]]
    turns = [np.rot90(image, k) for k in range(4)]
    for changes, expected in (
        ({}, [image]),
        ({"flip": ["mri_sr"]}, flips),
        ({"rotate": ["mri_sr"]}, turns),
        ({"flip": ["ct_denoise"], "rotate": ["pet_synthesis"]}, [image]),
    ):
        batch = PatchSampler(data, tasks=[MR], **options, **changes).batch(0)  # type: ignore[arg-type]
        seen = {
            index
            for patch in batch.hq[:, 0].numpy()
            for index, wanted in enumerate(expected)
            if np.allclose(patch, wanted)
        }
        assert seen == set(range(len(expected)))
        torch.testing.assert_close(batch.lq.mean(), batch.hq.mean() + 1 / 4095)


@pytest.mark.parametrize(
    ("facts", "share"),
    [
        ({"contrast": {"a": "T2", "b": "T1"}}, 3 / 4),
        ({"simulated": {"b": True}}, 2 / 3),
        ({}, 1 / 2),
    ],
)
def test_t2_and_real_references_are_drawn_more_often(
    tmp_path: Path, facts: dict[str, Any], share: float
) -> None:
    data = handmade(tmp_path, {"a": (2, 32, 32), "b": (2, 40, 32)}, **facts)
    draw = PatchSampler(data, split="train", patch=32, per_task=600, seed=1, tasks=[MR])
    (pool,) = draw._pools
    picks = [pool.pick(np.random.default_rng(k)).name for k in range(2000)]
    assert picks.count("a") / len(picks) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(("asked", "share"), [(0.0, 1 / 6), (0.5, 1 / 2), (0.8, 0.8)])
def test_simulated_whole_bodies_are_at_least_the_share_of_pet_that_is_asked_for(
    tmp_path: Path, asked: float, share: float
) -> None:
    shapes = {"real": (5, 32, 32), "simulated": (2, 32, 32)}
    data = handmade(tmp_path, shapes, task="pet_synthesis", simulated={"simulated": True})
    draw = PatchSampler(
        data, split="train", patch=32, per_task=1, seed=1, tasks=[PET], simulated_pet=asked
    )
    (pool,) = draw._pools
    picks = [pool.pick(np.random.default_rng(k)).name for k in range(2000)]
    assert picks.count("simulated") / len(picks) == pytest.approx(share, abs=0.04)


def test_a_share_of_simulated_pet_needs_some(tmp_path: Path) -> None:
    data = handmade(tmp_path, {"real": (1, 32, 32)}, task="pet_synthesis")
    options: dict[str, Any] = {"split": "train", "patch": 32, "per_task": 1, "seed": 1}
    with pytest.raises(ValueError, match=r"no simulated PET.*data\.simulated_pet"):
        PatchSampler(data, tasks=[PET], simulated_pet=0.5, **options)


def test_patches_of_background_are_drawn_again(tmp_path: Path) -> None:
    data = handmade(tmp_path, {"a": (1, 256, 256)})
    hq = np.zeros((1, 256, 256), np.float32)
    hq[:, :96, :96] = 1000
    np.save(tmp_path / "a.hq.npy", hq)
    batch = PatchSampler(data, split="train", patch=32, per_task=200, seed=0, tasks=[MR]).batch(0)
    filled = float((batch.hq.amax((1, 2, 3)) > 0).float().mean())
    once = 128**2 / 225**2  # crops that touch the object
    assert filled > 1.5 * once


def test_items_are_found_by_task_and_split(prepared: Path) -> None:
    data = PreparedSet.open(prepared)
    assert {item.subject for item in data.items("ct_denoise", "train")} == {"CT1"}
    assert {item.subject for item in data.items(CT, "val")} == {"CT2"}
    assert len(data.items()) == len(data.manifest.items)
    assert {item.contrast for item in data.items(MR, "val")} == {"T2", "T1"}


def test_pairs_are_memory_mapped_in_physical_units(prepared: Path) -> None:
    data = PreparedSet.open(prepared)
    lq, hq = data.pair(data.items(CT, "train")[0])
    assert isinstance(lq, np.memmap)
    assert lq.shape == hq.shape
    assert hq.min() < -900
    assert hq.max() > 300


def test_a_missing_file_or_a_wrong_shape_is_named(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    item = PreparedManifest.read(copy).items[0]
    np.save(copy / item.lq, np.zeros((1, 8, 8), np.float32))
    with pytest.raises(ManifestError, match="shape"):
        PreparedSet.open(copy).pair(item)
    (copy / item.lq).unlink()
    with pytest.raises(ManifestError, match=item.lq):
        PreparedSet.open(copy)
    (copy / FILE_NAME).unlink()
    with pytest.raises(ManifestError, match="not a prepared folder"):
        PreparedSet.open(copy)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patch": 60}, "multiple of 8"),
        ({"patch": 0}, "multiple of 8"),
        ({"per_task": 0}, "at least 1"),
        ({"split": "test"}, "no test items for mri_sr"),
        ({"tasks": ["xray"]}, "xray"),
    ],
)
def test_a_sampler_refuses_what_it_cannot_draw(
    prepared: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        sampler(prepared, **changes)
