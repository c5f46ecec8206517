from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from restoration.tasks import RestorationTask
from training.degrade import CtNoiseInsertion
from training.manifest import Item, ManifestError, PreparedManifest
from training.patches import Batch
from training.resident import ResidentSet, redegraded
from training.slices import Pairs, PatchSampler, PreparedSet

CT = RestorationTask.CT_DENOISE


def batches(pairs: Pairs, steps: range) -> list[Batch]:
    drawn = PatchSampler(pairs, split="train", patch=64, per_task=2, seed=5, flip=["ct_denoise"])
    return [drawn.batch(step) for step in steps]


def equal(first: Batch, second: Batch) -> bool:
    names = (field.name for field in dataclasses.fields(Batch))
    return all(torch.equal(getattr(first, n).cpu(), getattr(second, n).cpu()) for n in names)


@pytest.fixture
def dataset(prepared: Path) -> PreparedSet:
    return PreparedSet.open(prepared)


def ct_item(dataset: PreparedSet) -> Item:
    (item,) = dataset.items(CT, "train")
    return item


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_patches_from_memory_are_those_from_the_disk(dataset: PreparedSet, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no accelerator")
    resident = ResidentSet(dataset, device)
    pairs = zip(batches(dataset, range(4)), batches(resident, range(4)), strict=True)
    assert all(equal(disk, memory) for disk, memory in pairs)
    assert resident.bytes > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_operator_on_the_device_makes_the_images_that_prepare_made(
    dataset: PreparedSet, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no accelerator")
    item = ct_item(dataset)
    lq, hq = (torch.from_numpy(np.array(volume)) for volume in dataset.pair(item))
    rng = np.random.default_rng([dataset.manifest.seed, zlib.crc32(item.name.encode())])
    made = redegraded(hq.to(device), item, CtNoiseInsertion(), rng).cpu()
    if device == "cpu":
        assert torch.equal(made, lq)
    else:
        assert float((made - lq).abs().max()) < 0.05  # HU; sums on a GPU have another order


def test_the_noise_of_ct_is_drawn_anew_after_so_many_steps_and_nothing_else(
    dataset: PreparedSet,
) -> None:
    fresh = ResidentSet(dataset, "cpu", fresh_every=2, seed=3)
    plain = batches(dataset, range(6))
    drawn = batches(fresh, range(6))
    for step, (first, second) in enumerate(zip(plain, drawn, strict=True)):
        ct = first.task == CT.index
        assert torch.equal(first.hq, second.hq)
        assert torch.equal(first.lq[~ct], second.lq[~ct])
        assert torch.equal(first.lq[ct], second.lq[ct]) == (step < 2)


def test_the_noise_of_a_step_follows_from_the_step_alone(dataset: PreparedSet) -> None:
    straight = batches(ResidentSet(dataset, "cpu", fresh_every=2, seed=3), range(6))
    resumed = batches(ResidentSet(dataset, "cpu", fresh_every=2, seed=3), range(5, 6))
    assert equal(straight[5], resumed[0])
    backwards = ResidentSet(dataset, "cpu", fresh_every=2, seed=3)
    batches(backwards, range(4, 5))
    assert equal(batches(backwards, range(1))[0], straight[0])


def test_fresh_noise_is_as_strong_as_that_of_prepare(dataset: PreparedSet) -> None:
    item = ct_item(dataset)
    lq, hq = (torch.from_numpy(np.array(volume)).float() for volume in dataset.pair(item))
    made = redegraded(hq, item, CtNoiseInsertion(), np.random.default_rng(11))
    before, after = (lq - hq).std(), (made - hq).std()
    assert float(after) == pytest.approx(float(before), rel=0.1)
    correlation = torch.corrcoef(torch.stack([(lq - hq).flatten(), (made - hq).flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.05


def test_an_operator_of_another_version_is_not_repeated(
    dataset: PreparedSet, prepared: Path
) -> None:
    operators = {"ct_denoise": {"name": "ct-noise-insertion", "version": 99, "params": {}}}
    other = dataclasses.replace(PreparedManifest.read(prepared), operators=operators)
    with pytest.raises(ManifestError, match="operator"):
        ResidentSet(PreparedSet(prepared, other), "cpu", fresh_every=1)
