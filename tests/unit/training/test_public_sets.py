"""Collections as they are distributed, made small: their folders, names and headers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner
from pydicom.dataset import Dataset

from tests.unit.training.test_sources import write_slice
from training.cli.main import main
from training.manifest import Item, PreparedManifest
from training.phantoms import body_pet, brain_t2, chest_ct
from training.slices import PreparedSet


def ixi(folder: Path) -> Path:
    """IXI-T2.tar unpacked: one NIfTI per subject, named by subject, site, number and contrast."""
    folder.mkdir()
    names = ("IXI002-Guys-0828", "IXI012-HH-1211", "IXI013-HH-1212", "IXI015-HH-1258")
    for seed, name in enumerate(names, 1):
        head = brain_t2(12, 64, seed).volume.round().astype(np.int16)
        # Axes run right to left, posterior to anterior, feet to head.
        data = np.ascontiguousarray(head.transpose(2, 1, 0)[::-1, ::-1])
        affine = np.diag([0.9375, 0.9375, 1.25, 1.0])
        nibabel.Nifti1Image(data, affine).to_filename(folder / f"{name}-T2.nii.gz")
    return folder


def ldct(folder: Path) -> Path:
    """LDCT-and-Projection-data: patient / study / series, images and projections of two doses."""
    for seed, patient in enumerate(("C002", "L004", "N005"), 1):
        study = folder / "LDCT-and-Projection-data" / patient / f"12-23-2021-NA-NA-6246{seed}"
        full = chest_ct(2, 96, seed).volume.round().astype(np.int16)
        low = full + np.random.default_rng(seed).normal(0, 40, full.shape).astype(np.int16)
        for number, (name, volume) in enumerate(
            (("Full Dose Images", full), ("Low Dose Images", low)), 1
        ):
            for k, image in enumerate(volume):
                path = study / f"{number}.000000-{name}-3988{number}" / f"1-{k + 1:03}.dcm"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_slice(
                    path, image, 5.0 * k, PatientID=patient, SeriesDescription=name,
                    SeriesInstanceUID=f"1.2.3.{seed}.{number}", StudyInstanceUID=f"1.2.3.{seed}",
                    InstanceNumber=k + 1,
                )  # fmt: skip
        views = study / "3.000000-Full dose projections-24362" / "1-00001.dcm"
        views.parent.mkdir()
        write_slice(
            views, full[0], 0, PatientID=patient, SeriesDescription="Full dose projections",
            SeriesInstanceUID=f"1.2.3.{seed}.3", PixelSpacing=None,
        )  # fmt: skip
    (folder / "LDCT-and-Projection-data" / "LICENSE").write_text("see the collection's page\n")
    (folder / "metadata.csv").write_text("Series UID,Collection\n")
    return folder


def fdg(folder: Path) -> Path:
    """FDG-PET-CT-Lesions: patient / study / PET, CT and a segmentation."""
    for seed, patient in enumerate(("PETCT_0011f3deaf", "PETCT_01140d52d8"), 1):
        name = f"0{seed}-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-5465{seed}"
        study = folder / "FDG-PET-CT-Lesions" / patient / name
        tracer = Dataset()
        tracer.RadiopharmaceuticalStartTime = "120000.000000"
        tracer.RadionuclideTotalDose, tracer.RadionuclideHalfLife = 300e6, 6586.2
        pet = body_pet(2, 48, seed).volume
        padded = np.pad(pet, ((0, 0), (76, 76), (76, 76)))  # the scanner's field, mostly air
        # 75 kg; one hour of decay
        becquerel = padded * (300e6 * 2 ** (-3600 / 6586.2) / 75_000)
        common = {
            "PatientID": patient, "StudyInstanceUID": f"1.3.{seed}", "PixelSpacing": [4.07, 4.07]
        }  # fmt: skip
        for k, image in enumerate(becquerel):
            path = study / "1.000000-PET corr.-38835" / f"1-{k + 1:03}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_slice(
                path, (image / 2).round().astype(np.int16), 3.0 * k, "PT", RescaleSlope=2,
                SeriesInstanceUID=f"1.3.{seed}.1", SeriesDescription="PET corr.", Units="BQML",
                DecayCorrection="START", SeriesTime="130000", PatientWeight=75.0,
                RadiopharmaceuticalInformationSequence=[tracer], **common,
            )  # fmt: skip
        body = chest_ct(2, 96, seed).volume.round().astype(np.int16)
        for k, image in enumerate(body):
            path = study / "4.000000-GK p.v.3-80556" / f"1-{k + 1:03}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_slice(
                path, image, 3.0 * k, "CT", SeriesInstanceUID=f"1.3.{seed}.2",
                SeriesDescription="GK p.v.3", **common,
            )  # fmt: skip
        mask = study / "3.000000-Segmentation-67429" / "1-1.dcm"
        mask.parent.mkdir()
        write_slice(
            mask, body[0], 0, "CT", Modality="SEG", NumberOfFrames=2, BitsStored=1,
            SeriesInstanceUID=f"1.3.{seed}.3",
        )  # fmt: skip
    return folder


def prepared(source: Path, out: Path, *options: str) -> tuple[PreparedManifest, PreparedSet]:
    done = CliRunner().invoke(main, ["prepare", str(source), "--out", str(out), *options])
    assert done.exit_code == 0, done.stderr
    return PreparedManifest.read(out), PreparedSet.open(out)


def by_split(items: tuple[Item, ...]) -> dict[str, set[str]]:
    return {split: {i.subject for i in items if i.split == split} for split in ("train", "val")}


def test_ixi_is_prepared_from_its_nifti_files_split_by_subject(tmp_path: Path) -> None:
    manifest, data = prepared(
        ixi(tmp_path / "IXI-T2"), tmp_path / "set", "--task", "mri_sr", "--central-slices", "10",
        "--val-fraction", "0.25", "--licence", "IXI-T2=CC BY-SA 3.0",
    )  # fmt: skip
    splits = by_split(manifest.items)
    assert {len(splits["train"]), len(splits["val"])} == {3, 1}
    assert splits["train"] | splits["val"] == {"ixi002", "ixi012", "ixi013", "ixi015"}
    for item in manifest.items:
        assert (item.contrast, item.source, item.licence) == ("T2", "IXI-T2", "CC BY-SA 3.0")
        assert item.spacing_mm == pytest.approx((1.25, 0.9375, 0.9375))
        assert item.shape == (10, 64, 64)
    first = next(item for item in manifest.items if item.subject == "ixi002")
    _, hq = data.pair(first)
    expected = brain_t2(12, 64, 1).volume.round()[1:11] * np.float32(first.scale)
    np.testing.assert_allclose(hq, expected, rtol=1e-6)


def test_ldct_gives_its_real_pairs_and_leaves_the_projections(tmp_path: Path) -> None:
    manifest, data = prepared(
        ldct(tmp_path / "ldct"), tmp_path / "set", "--task", "ct_denoise", "--val-fraction", "0.34"
    )
    assert len(manifest.items) == 3
    assert {len(subjects) for subjects in by_split(manifest.items).values()} == {1, 2}
    for item in manifest.items:
        assert item.acquired_lq
        lq, hq = data.pair(item)
        assert hq.shape == (2, 96, 96)
        assert 30 < float(np.std(lq - hq)) < 45
    assert len(manifest.skipped) == 3  # the low-dose halves of the pairs
    assert all("never a reference" in line for line in manifest.skipped)


def test_fdg_pet_becomes_suv_in_the_box_of_the_body_with_simulated_fdg_beside_it(
    tmp_path: Path,
) -> None:
    manifest, data = prepared(
        fdg(tmp_path / "fdg"), tmp_path / "set", "--task", "pet_synthesis", "--val-fraction", "0.5"
    )
    real = [item for item in manifest.items if not item.simulated]
    simulated = [item for item in manifest.items if item.simulated]
    assert len(real) == len(simulated) == 2
    # A patient's real and simulated images are held out together.
    assert all(len(subjects) == 1 for subjects in by_split(manifest.items).values())
    for item in real:
        assert (item.task, item.units) == ("pet_synthesis", "SUV")
        assert max(item.shape[1:]) < 70  # the body and 8 pixels around, of a field of 200
    # SUV by weight and decay: the activity is that of the two phantoms.
    activity = sorted(float(data.pair(item)[1].sum()) for item in real)
    expected = sorted(float(body_pet(2, 48, seed).volume.sum()) for seed in (1, 2))
    assert activity == pytest.approx(expected, rel=0.05)


def test_a_licence_names_the_folder_it_is_for(tmp_path: Path) -> None:
    command = ["prepare", str(ixi(tmp_path / "IXI-T2")), "--out", str(tmp_path / "set")]
    done = CliRunner().invoke(main, [*command, "--licence", "CC BY-SA 3.0"])
    assert done.exit_code == 1
    assert "FOLDER=LICENCE" in done.stderr
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (ixi, ("--task", "mri_sr")),
        (ldct, ("--task", "ct_denoise")),
        (fdg, ("--task", "pet_synthesis", "--no-simulated-pet")),
    ],
    ids=["ixi", "ldct", "fdg"],
)
def test_the_manifest_has_a_checksum_of_every_file_and_no_identifier(
    tmp_path: Path, make: Callable[[Path], Path], options: tuple[str, ...]
) -> None:
    manifest, _ = prepared(make(tmp_path / "in"), tmp_path / "set", *options)
    for item in manifest.items:
        for kind in ("hq", "lq"):
            content = (tmp_path / "set" / getattr(item, kind)).read_bytes()
            assert hashlib.sha256(content).hexdigest() == item.sha256[kind]
    if make is not ixi:  # IXI's own numbers are pseudonyms that its demographics refer to
        text = json.dumps([item.subject for item in manifest.items])
        assert not any(name in text for name in ("C002", "L004", "PETCT_"))
