from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from restoration.tasks import RestorationTask
from tests.unit.training.conftest import PackWriter
from training.sources import Series, SourceError, discover

ALL = tuple(RestorationTask)
CT, MR, PET = RestorationTask.CT_DENOISE, RestorationTask.MRI_SR, RestorationTask.PET_SYNTHESIS
CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
}


def write_slice(
    path: Path, stored: npt.NDArray[np.int16], z: float, modality: str = "CT", **facts: Any
) -> Path:
    """One DICOM slice at z mm; ``facts`` are further attributes by keyword."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CLASSES[modality]
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SOPClassUID = CLASSES[modality]
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "1.2.3.4", "1.2.3"
    dataset.Modality, dataset.PatientID = modality, "SECRET-ID"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelSpacing = [0.5, 0.75]
    dataset.ImagePositionPatient = [0, 0, z]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    for keyword, value in facts.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = stored.astype("<i2").tobytes()
    path.parent.mkdir(exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def plane(value: int, shape: tuple[int, int] = (10, 12)) -> npt.NDArray[np.int16]:
    image = np.full(shape, value, np.int16)
    image[0, 0] = -1000
    return image


def nifti(path: Path, data: npt.NDArray[Any], affine: npt.NDArray[Any] | None = None) -> Path:
    affine = np.diag([0.5, 0.75, 3.0, 1.0]) if affine is None else affine
    nibabel.Nifti1Image(data, affine).to_filename(path)
    return path


def only(source: Path, tasks: tuple[RestorationTask, ...] = ALL) -> Series:
    (series,) = discover([source], tasks)
    return series


def test_a_pack_tells_its_facts(packs: Path) -> None:
    series = {each.name: each for each in discover([packs], ALL)}
    assert set(series) == {"ct-CT1", "ct-CT2", "mr-MR1", "mr-MR2", "mr-MR1-T1", "mr-MR2-T1",
                           "pet-PET1", "pet-PET2"}  # fmt: skip
    assert series["ct-CT2"].validation
    assert not series["ct-CT1"].validation
    assert series["ct-CT1"].noise_hu == 10.0
    assert series["mr-MR1-T1"].contrast == "T1"
    assert series["mr-MR1-T1"].subject == series["mr-MR1"].subject == "MR1"
    assert 0 < series["pet-PET1"].volume().max() < 30  # the slope is applied: SUV


def test_only_the_tasks_asked_for_are_found(packs: Path) -> None:
    assert {each.task for each in discover([packs], [PET])} == {PET}
    with pytest.raises(SourceError, match="ct_denoise"):
        discover([packs / "mr.medz"], [CT])


def test_dicom_slices_are_sorted_by_position_and_rescaled(tmp_path: Path) -> None:
    for name, z in (("c", 7.5), ("a", 0.0), ("b", 2.5), ("d", 5.0)):
        write_slice(tmp_path / "s" / f"{name}.dcm", plane(int(z * 10)), z, RescaleIntercept=-24)
    series = only(tmp_path / "s")
    assert series.task is CT
    assert series.spacing_mm == (2.5, 0.5, 0.75)
    assert series.positions == (0.0, 2.5, 5.0, 7.5)
    np.testing.assert_array_equal(series.volume()[:, 5, 5], [-24, 1, 26, 51])


def test_ct_padding_is_air_and_identifiers_stay_out(tmp_path: Path) -> None:
    image = plane(40)
    image[1] = -3024
    write_slice(tmp_path / "s" / "a", image, 0)
    series = only(tmp_path / "s")
    assert series.volume().min() == -1024
    assert "SECRET" not in repr((series.name, series.subject, series.source))


def test_oblique_slices_are_sorted_along_their_normal(tmp_path: Path) -> None:
    for k, x in enumerate((4.0, 0.0, 2.0)):
        write_slice(
            tmp_path / "s" / f"{k}.dcm", np.full((9, 9), x, np.int16), 0, "MR",
            ImagePositionPatient=[x, 0, 0], ImageOrientationPatient=[0, 1, 0, 0, 0, 1],
            SeriesDescription="t2_tse_sag",
        )  # fmt: skip
    series = only(tmp_path / "s")
    assert series.volume()[:, 5, 5].tolist() == [0, 2, 4]
    assert series.contrast == "T2"


def test_localizers_are_left_out(tmp_path: Path) -> None:
    write_slice(tmp_path / "s" / "a.dcm", plane(1), 0)
    write_slice(
        tmp_path / "s" / "b.dcm", plane(1), 0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    assert len(only(tmp_path / "s").positions) == 1


def pet_facts(**changes: Any) -> dict[str, Any]:
    tracer = Dataset()
    tracer.RadiopharmaceuticalStartTime = "235000.00"
    tracer.RadionuclideTotalDose = 370e6
    tracer.RadionuclideHalfLife = 6586.2
    return {
        "Units": "BQML",
        "DecayCorrection": "START",
        "SeriesTime": "005000",
        "PatientWeight": 74.0,
        "RadiopharmaceuticalInformationSequence": [tracer],
    } | changes


@pytest.mark.parametrize(
    ("changes", "suv"),
    [
        # 1000 Bq/ml · 74 000 g / (370 MBq · 2^(−3600/6586.2)), one hour across midnight
        ({}, 1000 * 74_000 / (370e6 * 2 ** (-3600 / 6586.2))),
        ({"DecayCorrection": "ADMIN"}, 0.2),
        ({"Units": "GML"}, 1000.0),
    ],
)
def test_pet_becomes_suv_by_body_weight(
    tmp_path: Path, changes: dict[str, Any], suv: float
) -> None:
    write_slice(tmp_path / "s" / "a.dcm", plane(1000), 0, "PT", **pet_facts(**changes))
    series = only(tmp_path / "s")
    assert series.task is PET
    assert series.volume()[0, 5, 5] == pytest.approx(suv, rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{"Units": "CNTS"}, {"PatientWeight": None}, {"SeriesTime": ""}]
)
def test_pet_that_does_not_convert_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_slice(tmp_path / "s" / "a.dcm", plane(1000), 0, "PT", **pet_facts(**changes))
    with pytest.raises(SourceError, match=r"a\.dcm.*SUV"):
        only(tmp_path / "s").volume()


def test_low_dose_series_are_recognised_by_their_description(tmp_path: Path) -> None:
    write_slice(tmp_path / "s" / "a.dcm", plane(1), 0, SeriesDescription="Low Dose Images")
    write_slice(
        tmp_path / "s" / "b.dcm", plane(1), 0, SeriesDescription="Full Dose Images",
        SeriesInstanceUID="1.2.3.5",
    )  # fmt: skip
    assert sorted(each.low_dose for each in discover([tmp_path], ALL)) == [False, True]


def test_nifti_comes_in_dicoms_orientation(tmp_path: Path) -> None:
    data = np.zeros((9, 10, 11), np.float32)  # right to left, posterior to anterior, feet to head
    data[8, 9, 10] = 5  # right, anterior, head in RAS+
    series = only(nifti(tmp_path / "IXI002-Guys-0828-T2.nii.gz", data))
    volume = series.volume()
    assert (series.task, series.contrast, series.subject) == (MR, "T2", "ixi002")
    assert series.spacing_mm == (3.0, 0.75, 0.5)
    assert volume.shape == (11, 10, 9)
    assert volume[10, 0, 0] == 5
    turned = nifti(tmp_path / "b-T2.nii", data, np.diag([-0.5, -0.75, 3.0, 1.0]))
    assert only(turned).volume()[10, 9, 8] == 5


@pytest.mark.parametrize(
    ("name", "task", "subject"),
    [
        ("sub-03_ses-1_T1w.nii", MR, "sub-03"),
        ("case7_flair.nii.gz", MR, "case7"),
        ("val_case8_ct.nii.gz", CT, "case8"),
        ("p1-SUV.nii", PET, "p1"),
    ],
)
def test_the_name_of_a_nifti_file_tells_its_task_and_subject(
    tmp_path: Path, name: str, task: RestorationTask, subject: str
) -> None:
    series = only(nifti(tmp_path / name, np.zeros((8, 8, 8), np.float32)))
    assert (series.task, series.subject) == (task, subject)
    assert series.validation == name.startswith("val_")


def test_a_nameless_nifti_needs_one_task(tmp_path: Path) -> None:
    path = nifti(tmp_path / "x1.nii", np.zeros((8, 8, 8), np.float32))
    assert only(path, (PET,)).task is PET
    with pytest.raises(SourceError, match="name one task"):
        discover([path], ALL)


def broken(folder: Path, kind: str) -> Path:  # one branch for each way to be unusable
    folder.mkdir()
    image = np.zeros((8, 8, 3), np.float32)
    if kind == "missing":
        return folder / "nothing"
    if kind == "picture":
        (folder / "slice.png").write_bytes(b"\x89PNG")
    elif kind == "8-bit nifti":
        nifti(folder / "a-T2.nii", image.astype(np.uint8))
    elif kind == "no nifti":
        (folder / "a-T2.nii").write_bytes(b"not a header")
    elif kind == "no dicom":
        (folder / "a.dcm").write_bytes(b"not DICOM" * 100)
    elif kind == "ultrasound":
        write_slice(folder / "a.dcm", plane(0), 0, "US")
    elif kind == "8-bit dicom":
        write_slice(folder / "a.dcm", plane(0), 0, BitsStored=8)
    elif kind == "multi-frame":
        write_slice(folder / "a.dcm", plane(0), 0, NumberOfFrames=2)
    elif kind == "sizes":
        write_slice(folder / "a.dcm", plane(0), 0)
        write_slice(folder / "b.dcm", plane(0, (9, 9)), 1)
    elif kind == "no pack":
        (folder / "a.medz").write_bytes(b"MEDZ9")
    elif kind == "other files":
        (folder / "readme.txt").write_text("nothing here")
    return folder


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "nothing does not exist"),
        ("empty", "holds no image series"),
        ("other files", "holds no image series"),
        ("picture", r"slice\.png is an 8-bit picture"),
        ("8-bit nifti", r"a-T2\.nii is an 8-bit picture"),
        ("no nifti", "not a readable NIfTI"),
        ("no dicom", "not a DICOM file"),
        ("ultrasound", r"a\.dcm: modality US"),
        ("8-bit dicom", "8-bit picture"),
        ("multi-frame", "multi-frame"),
        ("sizes", "different sizes"),
        ("no pack", r"a\.medz: not a MEDZ pack"),
    ],
)
def test_a_source_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, kind: str, reason: str
) -> None:
    with pytest.raises(SourceError, match=reason):
        discover([broken(tmp_path / "s", kind)], ALL)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (np.where(np.arange(512).reshape(8, 8, 8) == 77, np.nan, 1.0), "slice 5 holds NaN"),
        (np.ones((8, 8, 8)), "every value is 1.0"),
        (np.random.default_rng(0).random((6, 8, 8)), "below 8 x 8"),
        (np.random.default_rng(0).random((8, 8, 8, 2)), "4 dimensions"),
    ],
)
def test_an_image_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, data: npt.NDArray[Any], reason: str
) -> None:
    path = nifti(tmp_path / "a-T2.nii", data.astype(np.float32))
    with pytest.raises(SourceError, match=reason) as caught:
        only(path).volume()
    assert "a-T2.nii" in str(caught.value)


def test_values_below_zero_are_no_magnitude(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(40, 300, (8, 8, 8)).astype(np.int16)
    with pytest.raises(SourceError, match=r"a-T2\.nii: not an MR magnitude .* Is it a CT\?"):
        only(nifti(tmp_path / "a-T2.nii", data)).volume()


@pytest.mark.parametrize("facts", [
    {"Modality": "SEG", "BitsStored": 1}, {"SeriesDescription": "Low dose projections"},
    {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66"},
])  # fmt: skip
def test_what_lies_beside_the_images_of_a_study_is_left_out(
    tmp_path: Path, facts: dict[str, Any]
) -> None:
    write_slice(tmp_path / "s" / "a.dcm", plane(1), 0)
    write_slice(tmp_path / "s" / "b.dcm", plane(1), 5, SeriesInstanceUID="1.2.3.9", **facts)
    (tmp_path / "s" / "LICENSE").write_text("Creative Commons\n")
    assert only(tmp_path / "s").positions == (0.0,)


def test_ct_without_air_is_not_in_hu(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 255, (8, 8, 8)).astype(np.int16)
    with pytest.raises(SourceError, match="not CT in HU"):
        only(nifti(tmp_path / "a-ct.nii", data)).volume()


def test_a_pack_that_is_damaged_inside_is_refused_when_read(
    tmp_path: Path, write_pack: PackWriter
) -> None:
    volume = np.random.default_rng(0).integers(0, 900, (2, 16, 16)).astype(np.int16)
    meta = {"name": "x", "modality": "MR", "spacing_mm": [1, 1, 1]}
    path = write_pack(tmp_path / "a.medz", [(volume, meta)])
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(SourceError, match="corrupt"):
        only(path).volume()


@pytest.mark.parametrize("spacing", [None, [1, 2], [1, 0, 1]])
def test_a_pack_without_a_sound_spacing_is_refused(
    tmp_path: Path, write_pack: PackWriter, spacing: object
) -> None:
    meta = {"name": "x", "modality": "MR", "spacing_mm": spacing}
    path = write_pack(tmp_path / "a.medz", [(np.zeros((1, 9, 9), np.int16), meta)])
    with pytest.raises(SourceError, match="spacing_mm"):
        discover([path], ALL)


def test_real_series_of_each_modality_are_read(shared_data: Path) -> None:
    found = discover(
        [
            shared_data / "dicom" / name
            for name in ("ct_ge_crlm1006", "pet_ge_slope_per_slice", "mr_siemens_t2_tse")
        ],
        ALL,
    )
    volumes = {each.task: each.volume() for each in found}
    assert volumes[CT].shape == (8, 512, 512)
    assert volumes[CT].min() == -1024
    assert volumes[MR].shape == (8, 512, 384)
    assert volumes[PET].shape == (40, 128, 128)
    assert 1 < volumes[PET].max() < 60
