from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from restoration.tasks import RestorationTask, intensity_scale
from tests.unit.training.conftest import PackWriter, pack_meta
from tests.unit.training.test_sources import write_slice
from training.degrade import truncate_kspace
from training.manifest import FILE_NAME, Item, PreparedManifest
from training.phantoms import brain_t2, chest_ct
from training.prepare import PrepareError, PrepareOptions, prepare, split_subjects
from training.slices import PreparedSet
from training.sources import SourceError, discover

CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS


def psnr(
    lq: npt.NDArray[np.generic], hq: npt.NDArray[np.generic], window: tuple[float, float]
) -> float:
    """Mean over slices of 10 log10(R²/MSE), both clipped, R the reference's range."""
    values = []
    for low, high in zip(lq.astype(float), hq.astype(float), strict=True):
        low, high = low.clip(*window), high.clip(*window)
        values.append(10 * np.log10(np.ptp(high) ** 2 / ((low - high) ** 2).mean()))
    return float(np.mean(values))


def by_name(folder: Path) -> dict[str, Item]:
    return {item.name: item for item in PreparedManifest.read(folder).items}


def test_every_series_becomes_a_pair_and_ct_also_carries_simulated_fdg(prepared: Path) -> None:
    items = by_name(prepared)
    assert set(items) == {"ct-CT1", "ct-CT1-fdg", "ct-CT2", "ct-CT2-fdg", "mr-MR1", "mr-MR1-T1",
                          "mr-MR2", "mr-MR2-T1", "pet-PET1", "pet-PET2"}  # fmt: skip
    assert items["ct-CT1-fdg"].task == "pet_synthesis"
    assert items["ct-CT1-fdg"].units == "SUV"
    assert items["ct-CT1-fdg"].simulated
    assert not items["ct-CT1"].simulated
    assert items["mr-MR1"].contrast == "T2"
    assert items["ct-CT1"].noise_hu == 10


def test_files_have_the_promised_shapes_types_and_hashes(prepared: Path) -> None:
    data = PreparedSet.open(prepared)
    for item in data.items():
        lq, hq = data.pair(item)
        assert lq.dtype == np.float32
        assert hq.dtype == (np.int16 if item.task == "ct_denoise" else np.float32)
        for kind in ("lq", "hq"):
            content = (prepared / getattr(item, kind)).read_bytes()
            assert hashlib.sha256(content).hexdigest() == item.sha256[kind]
    assert {path.name for path in prepared.iterdir()} == {
        FILE_NAME, *(name for item in data.items() for name in (item.hq, item.lq))
    }  # fmt: skip


def test_the_manifest_names_operators_and_licences(prepared: Path) -> None:
    content = json.loads((prepared / FILE_NAME).read_text())
    assert content["version"] == 1
    assert content["operators"]["ct_denoise"]["name"] == "ct-noise-insertion"
    assert content["operators"]["mri_sr"]["params"] == {"factor": 4.0}
    assert content["operators"]["pet_synthesis"]["params"]["drf"] == 12
    assert {item["licence"] for item in content["items"]} == {"Apache-2.0"}


def test_no_subject_is_in_both_splits(prepared: Path) -> None:
    splits: dict[str, set[str]] = {}
    for item in by_name(prepared).values():
        splits.setdefault(item.subject, set()).add(item.split)
    assert splits == {f"{task}{k}": {split} for task in ("CT", "MR", "PET")
                      for k, split in ((1, "train"), (2, "val"))}  # fmt: skip


def test_mr_is_scaled_as_the_node_will_scale_it(prepared: Path) -> None:
    data = PreparedSet.open(prepared)
    lq, hq = data.pair(by_name(prepared)["mr-MR1"])
    assert intensity_scale(np.asarray(lq), MR) == pytest.approx(1, rel=1e-5)
    assert psnr(lq, hq, (0, 4095)) < 35


def test_the_low_quality_images_are_worse_but_not_other_images(prepared: Path) -> None:
    data = PreparedSet.open(prepared)
    for item in data.items():
        lq, hq = (np.asarray(volume, np.float64) for volume in data.pair(item))
        assert np.corrcoef(lq.ravel(), hq.ravel())[0, 1] > 0.7
        assert lq.mean() == pytest.approx(hq.mean(), rel=0.06, abs=2)
        assert not np.array_equal(lq, hq)


def test_several_processes_make_the_same_folder(
    packs: Path, prepared: Path, tmp_path: Path
) -> None:
    done: list[int] = []
    prepare(
        [packs], tmp_path / "shared", seed=7, jobs=2,
        progress=lambda now, _total, _name: done.append(now),
    )  # fmt: skip
    first, shared = (
        (folder / FILE_NAME).read_bytes() for folder in (prepared, tmp_path / "shared")
    )
    assert shared == first
    assert done == list(range(1, len(done) + 1))


def test_a_fault_in_another_process_is_told_and_leaves_nothing(
    packs: Path, tmp_path: Path, write_pack: PackWriter
) -> None:
    phantom = brain_t2(2, 48, 1)
    meta = pack_meta(phantom, "EMPTY", "MR", contrast="T2")
    write_pack(tmp_path / "bad.medz", [(np.zeros((2, 48, 48), np.int16), meta)])
    with pytest.raises(SourceError, match="the image is empty"):
        prepare([packs / "ct.medz", tmp_path / "bad.medz"], tmp_path / "out", seed=7, jobs=2)
    assert not list(tmp_path.glob("out*"))


def test_pet_of_the_training_set_may_be_scanned_several_times(packs: Path, tmp_path: Path) -> None:
    prepare([packs], tmp_path / "out", seed=7, tasks=[PET], options=PrepareOptions(pet_draws=2))
    items = by_name(tmp_path / "out")
    assert set(items) == {"pet-PET1", "pet-PET1-scan2", "pet-PET2", "ct-CT1-fdg",
                          "ct-CT1-fdg-scan2", "ct-CT2-fdg"}  # fmt: skip
    data = PreparedSet.open(tmp_path / "out")
    (first, truth), (second, again) = (
        data.pair(items[name]) for name in ("pet-PET1", "pet-PET1-scan2")
    )
    noise = [np.asarray(lq - hq).ravel() for lq, hq in ((first, truth), (second, again))]
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.3  # 1 if it were the same noise
    assert items["pet-PET1-scan2"].subject == "PET1"
    with pytest.raises(ValueError, match="pet_draws"):
        PrepareOptions(pet_draws=0)


def test_the_result_depends_on_the_seed_and_not_on_what_else_is_prepared(
    packs: Path, prepared: Path, tmp_path: Path
) -> None:
    prepare([packs / "ct.medz"], tmp_path / "same", seed=7, tasks=[CT])
    prepare([packs / "ct.medz"], tmp_path / "other", seed=8, tasks=[CT])
    same, other, first = (
        by_name(folder)["ct-CT1"].sha256
        for folder in (tmp_path / "same", tmp_path / "other", prepared)
    )
    assert same == first
    assert other["hq"] == first["hq"]
    assert other["lq"] != first["lq"]


def test_tasks_splits_and_slices_can_be_limited(packs: Path, tmp_path: Path) -> None:
    options = PrepareOptions(splits=("val",), simulated_pet=False)
    prepare([packs], tmp_path / "val", seed=0, tasks=[MR, PET], options=options)
    assert set(by_name(tmp_path / "val")) == {"mr-MR2", "mr-MR2-T1", "pet-PET2"}
    options = PrepareOptions(max_slices=2)
    prepare([packs], tmp_path / "few", seed=0, tasks=[MR], options=options)
    shapes = {item.name: item.shape[0] for item in by_name(tmp_path / "few").values()}
    assert shapes == {"mr-MR1": 2, "mr-MR1-T1": 2, "mr-MR2": 3, "mr-MR2-T1": 2}


def test_progress_is_told_after_each_series(packs: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    prepare([packs / "mr.medz"], tmp_path / "out", seed=0, progress=lambda *news: told.append(news))
    assert told == [(1, 2, "mr-MR1"), (2, 2, "mr-MR1-T1")]


def test_an_existing_folder_is_never_touched(packs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(PrepareError, match="nothing is overwritten"):
        prepare([packs], out, seed=0)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(PrepareError, match="nothing is overwritten"):
        prepare([packs], out / "mine.txt", seed=0)


def test_an_empty_folder_may_be_filled(packs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare([packs / "mr.medz"], tmp_path / "out", seed=0)
    assert by_name(tmp_path / "out")


def test_a_failure_leaves_nothing_behind(
    packs: Path, tmp_path: Path, write_pack: PackWriter
) -> None:
    bad = write_pack(
        tmp_path / "bad.medz",
        [(np.full((2, 16, 16), 5, np.int16),
          {"name": "flat", "modality": "MR", "spacing_mm": [1, 1, 1]})],
    )  # fmt: skip
    with pytest.raises(SourceError, match="'flat': the image is empty"):
        prepare([packs / "mr.medz", bad], tmp_path / "out", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.medz"]


def chest_pack(path: Path, write_pack: PackWriter, names: list[str], noise: float) -> Path:
    chest = chest_ct(1, 128)
    volume = chest.volume.round().astype(np.int16)
    return write_pack(
        path, [(volume, pack_meta(chest, name, "CT", noise_hu=noise)) for name in names]
    )


def test_a_noisy_ct_is_no_reference(tmp_path: Path, write_pack: PackWriter) -> None:
    path = chest_pack(tmp_path / "a.medz", write_pack, ["x"], noise=45.0)
    with pytest.raises(PrepareError, match=r"noise 45\.0 HU is above"):
        prepare([path], tmp_path / "out", seed=0)


def test_a_ct_without_soft_tissue_is_left_out_with_the_reason(
    packs: Path, tmp_path: Path, write_pack: PackWriter
) -> None:
    lung = np.random.default_rng(0).integers(-950, -700, (1, 40, 40)).astype(np.int16)
    path = write_pack(
        tmp_path / "a.medz", [(lung, {"name": "x", "modality": "CT", "spacing_mm": [5, 2, 2]})]
    )
    manifest = prepare([path, packs / "ct.medz"], tmp_path / "out", seed=0, tasks=[CT])
    assert [item.name for item in manifest.items] == ["ct-CT1"]
    assert manifest.skipped == ("a-x: The image has too little soft tissue to measure its noise.",)


def test_unmarked_subjects_are_split_by_a_seeded_draw(
    tmp_path: Path, write_pack: PackWriter
) -> None:
    volume = np.random.default_rng(0).integers(0, 900, (1, 16, 16)).astype(np.int16)
    meta = {"modality": "MR", "spacing_mm": [1, 1, 1]}
    names = [f"s{k}" for k in range(10)]
    path = write_pack(tmp_path / "a.medz", [(volume, meta | {"name": name}) for name in names])
    options = PrepareOptions(val_fraction=0.3)
    drawn = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare([path], tmp_path / out, seed=seed, options=options)
        items = by_name(tmp_path / out).values()
        drawn.append({item.subject for item in items if item.split == "val"})
    assert [len(held_out) for held_out in drawn] == [3, 3, 3]
    assert drawn[0] == drawn[1] != drawn[2]


def test_milder_cuts_of_k_space_are_made_for_training_alone(packs: Path, tmp_path: Path) -> None:
    options = PrepareOptions(mr_factors=(2.0,))
    manifest = prepare([packs], tmp_path / "out", seed=0, tasks=[MR], options=options)
    items = by_name(tmp_path / "out")
    assert {name for name in items if name.endswith("-x2")} == {"mr-MR1-x2", "mr-MR1-T1-x2"}
    assert manifest.operators["mri_sr"]["params"] == {"factor": 4.0, "factors": [2.0, 4.0]}
    data = PreparedSet.open(tmp_path / "out")
    lq, hq = data.pair(items["mr-MR1-x2"])
    expected = truncate_kspace(hq / items["mr-MR1-x2"].scale, 2.0) * items["mr-MR1-x2"].scale
    np.testing.assert_allclose(lq, expected, rtol=1e-4, atol=0.01)


def test_the_draw_holds_out_subjects_of_every_task(tmp_path: Path, write_pack: PackWriter) -> None:
    values = np.random.default_rng(0).integers(0, 900, (1, 16, 16)).astype(np.int16)
    entries = [
        (values - 1000 * (modality == "CT"),
         {"name": f"{modality}{k}", "modality": modality, "spacing_mm": [1, 1, 1]})
        for modality, count in (("MR", 12), ("CT", 2), ("PT", 1)) for k in range(count)
    ]  # fmt: skip
    series = discover([write_pack(tmp_path / "a.medz", entries)], list(RestorationTask))
    split = split_subjects(series, seed=0, val_fraction=0.1)
    held_out = [subject[:2] for subject, part in split.items() if part == "val"]
    assert sorted(held_out) == ["CT", "MR"]  # one subject alone is for training


def test_a_subject_held_out_once_is_held_out_everywhere(
    tmp_path: Path, write_pack: PackWriter
) -> None:
    volume = np.random.default_rng(0).integers(0, 900, (1, 16, 16)).astype(np.int16)
    meta = {"name": "x", "patient": "p", "modality": "MR", "spacing_mm": [1, 1, 1]}
    write_pack(tmp_path / "val_a.medz", [(volume, meta)])
    write_pack(tmp_path / "b.medz", [(volume, meta), (volume, meta)])
    prepare([tmp_path / "val_a.medz", tmp_path / "b.medz"], tmp_path / "out", seed=0)
    items = by_name(tmp_path / "out")
    assert set(items) == {"a-x", "b-x", "b-x-2"}
    assert {item.split for item in items.values()} == {"val"}


def test_an_acquired_low_dose_series_is_the_input_of_its_full_dose_twin(tmp_path: Path) -> None:
    chest = chest_ct(2, 128).volume.round().astype(np.int16)
    noisy = chest + np.random.default_rng(0).normal(0, 40, chest.shape).astype(np.int16)
    for uid, description, volume in (
        ("1", "Full Dose Images", chest),
        ("2", "Low Dose Images", noisy),
    ):
        for k, image in enumerate(volume):
            write_slice(
                tmp_path / "ldct" / f"{uid}{k}.dcm", image, 5.0 * k,
                SeriesInstanceUID=f"1.2.3.{uid}", SeriesDescription=description,
            )  # fmt: skip
    manifest = prepare([tmp_path / "ldct"], tmp_path / "out", seed=0, tasks=[CT])
    (item,) = manifest.items
    assert item.acquired_lq
    lq, hq = PreparedSet.open(tmp_path / "out").pair(item)
    np.testing.assert_array_equal(hq, chest.clip(-1024))
    np.testing.assert_array_equal(lq, noisy.clip(-1024))
    assert len(manifest.skipped) == 1
    assert "never a reference" in manifest.skipped[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_validation_packs_are_as_hard_as_published_inputs(
    shared_data: Path, tmp_path: Path
) -> None:
    train = shared_data / "train"
    sources = [
        train / f"{name}.medz" for name in ("val_ct_covid", "val_mr_t2_ms04", "val_pet_ibsi")
    ]
    prepare(sources, tmp_path / "out", seed=0, options=PrepareOptions(simulated_pet=False))
    data = PreparedSet.open(tmp_path / "out")
    expected = {CT: ((-160, 240), 24, 32), MR: ((0, 4095), 26.5, 28.5), PET: ((0, 20), 17, 27)}
    for task, (window, low, high) in expected.items():
        pairs = [data.pair(item) for item in data.items(task)]
        slices = [len(hq) for _, hq in pairs]
        figures = [psnr(lq, hq, window) for lq, hq in pairs]
        assert low < np.average(figures, weights=slices) < high
