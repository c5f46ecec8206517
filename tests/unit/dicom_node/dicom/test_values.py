"""Every line of the policy at work: a source that has every attribute, and what becomes of each.

The sources are phantoms with each attribute that the standard's tables know put in beside what
makes them images, and some that no table knows. Nothing may be in the result that the policy does
not name, and each line must have done what it says.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from dicom_node.dicom import derived, iods, policy, volume
from dicom_node.dicom.geometry import Resampling
from dicom_node.dicom.image_classes import CLASSES, ImageClass, Kind
from dicom_node.dicom.policy import Action
from dicom_node.settings import IdentitySettings, PolicySettings
from tests.factories import make_series, uid, write_series
from tests.multiframe import legacy_converted, make_enhanced
from tests.unit.dicom_node.dicom.conftest import TASKS, build, derive

every_class = pytest.mark.parametrize(
    "image", list(CLASSES.values()), ids=lambda image: f"{image.modality} {image.kind.value}"
)
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# Any other value of these would be another image, or none that is restored.
KEPT = frozenset(
    {
        "SpecificCharacterSet",
        "Modality",
        "SOPClassUID",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "PixelData",
        "NumberOfFrames",
        "BurnedInAnnotation",
        "LossyImageCompression",
        "ModalityLUTSequence",
        "RescaleType",
        "Units",
        "SUVType",
        "PixelPresentation",
        "VolumeBasedCalculationTechnique",
        "ComplexImageComponent",
        "PixelPaddingValue",
        "PixelPaddingRangeLimit",
        "ImageType",
        "PlanarConfiguration",
        "MonoenergeticEnergyEquivalent",
    }
)
VALUES: dict[str, Any] = {
    "AE": "AET", "AS": "030Y", "AT": 0x00100010, "CS": "X", "DA": "20200101", "DS": "3.5",
    "DT": "20200101101010", "FD": 2.5, "FL": 2.5, "IS": "7", "LO": "text", "LT": "text",
    "OB": b"\0\1", "OD": b"\0" * 8, "OF": b"\0" * 4, "OL": b"\0" * 4, "OV": b"\0" * 8,
    "OW": b"\0\1", "PN": "A^B", "SH": "text", "SL": 5, "SS": 5, "ST": "text", "SV": 5,
    "TM": "101010", "UC": "text", "UI": "1.2.3", "UL": 5, "UN": b"\0\1", "UR": "http://x",
    "US": 5, "UT": "text", "UV": 5,
}  # fmt: skip


def filler(keyword: str) -> Any:
    vr = dictionary_VR(keyword).split(" or ")[0]
    if vr == "SQ":
        item = Dataset()
        item.CodeMeaning = "inside"
        return [item]
    return VALUES[vr]


def put(dataset: Dataset, keyword: str) -> None:
    if keyword in KEPT or keyword in dataset:
        return
    vr = dictionary_VR(keyword).split(" or ")[0]
    dataset.add_new(keyword, vr, filler(keyword))


def plain(image: ImageClass) -> list[Dataset]:
    shape: dict[str, Any] = {"slices": 2, "rows": 8, "columns": 10}
    if image.kind is Kind.CLASSIC:
        return make_series(image.modality, **shape)  # type: ignore[arg-type]
    make = make_enhanced if image.kind is Kind.ENHANCED else legacy_converted
    return [make(image.modality, **shape)]


def full(image: ImageClass) -> list[Dataset]:
    """Sources that have every attribute their class may have, and more."""
    datasets = plain(image)
    paths = policy.table(image.uid)
    for dataset in datasets:
        for path in paths:
            if "." not in path and path not in iods.functional_groups(image.uid):
                put(dataset, path)
        put(dataset, "PatientComments" if "PatientComments" not in paths else "RetrieveAETitle")
        dataset.add_new("InstitutionName", "LO", "Site")
        dataset.private_block(0x0011, "SOMEBODY", create=True).add_new(0x01, "LO", "private")
        for i in range(int(dataset.get("NumberOfFrames", 0)) if image.multiframe else 0):
            fill_groups(image, dataset, i)
    return datasets


def fill_groups(image: ImageClass, dataset: Dataset, i: int) -> None:
    shared = dataset.SharedFunctionalGroupsSequence[0]
    groups = dataset.PerFrameFunctionalGroupsSequence[i]
    for macro, keywords in iods.functional_groups(image.uid).items():
        holder = shared if macro in shared or macro.startswith("UnassignedShared") else groups
        if macro not in holder:
            setattr(holder, macro, [Dataset()])
        for item in holder[macro].value:
            for keyword in keywords:
                # A table of real world values would stand in the way of the line.
                if keyword != "RealWorldValueLUTData":
                    put(item, keyword)
            item.private_block(0x0011, "SOMEBODY", create=True).add_new(0x01, "LO", "private")


def made_from(datasets: list[Dataset], folder: Path) -> list[Dataset]:
    identity = IdentitySettings.model_validate({"equipment": {"station_name": "NODE1"}})
    paths = write_series(datasets, folder)
    volumes = volume.load_volumes(paths, TASKS[datasets[0].Modality], PolicySettings())
    made = build([derived.quantise(v, v.array * 0.9) for v in volumes], identity=identity)
    return [pydicom.dcmread(BytesIO(each.data)) for each in made]


def by_path(dataset: Dataset, multiframe: bool) -> dict[str, Any]:
    """Public elements by the paths of the policy; groups of the shared and the first frame."""
    found = {element.keyword: element for element in dataset if not element.tag.is_private}
    for groups in GROUPS if multiframe else ():
        for item in (dataset.get(groups) or ())[:1]:
            for macro in item:
                found[macro.keyword] = macro
                for element in macro.value[0] if isinstance(macro.value, DicomSequence) else ():
                    found[f"{macro.keyword}.{element.keyword}"] = element
    return found


@every_class
def test_each_line_does_what_it_says_and_nothing_else_is_written(
    image: ImageClass, tmp_path: Path
) -> None:
    sources = full(image)
    made = made_from(sources, tmp_path / "full")
    number = made[0].InstanceNumber
    source = next(each for each in sources if each.InstanceNumber == number)
    before, after = by_path(source, image.multiframe), by_path(made[0], image.multiframe)
    table = policy.table(image.uid)
    for path, rule in table.items():
        macro = path.partition(".")[0]
        whole = "." in path or path in iods.functional_groups(image.uid)
        if whole and macro not in before:
            continue
        if rule.action is Action.COPY and path in before:
            if path in after and not _is_sequence(before[path]):
                assert (after[path].value or "") == (before[path].value or ""), path
            assert path in after, path
        elif rule.action is Action.DROP:
            assert path not in after, path
        elif rule.action is Action.SET or path in before:
            assert path in after, path
    for path in after:
        macro = path.partition(".")[0]
        rule = table.get(path) or table[macro]
        assert rule.action is not Action.DROP, path
        assert path in table or table[macro].by, path


def _is_sequence(element: Any) -> bool:
    return isinstance(element.value, DicomSequence)


@every_class
def test_the_source_had_something_in_every_line(image: ImageClass) -> None:
    """Otherwise the test above would prove nothing of the lines that met no attribute."""
    found = by_path(full(image)[0], image.multiframe)
    missing = {
        path
        for path, rule in policy.table(image.uid).items()
        if path not in found
        and rule.action in (Action.COPY, Action.DROP)
        and path.rpartition(".")[2] not in KEPT
        and path.rpartition(".")[2] != "RealWorldValueLUTData"
    }
    assert missing == set()


@every_class
def test_no_private_attribute_survives_anywhere(image: ImageClass, tmp_path: Path) -> None:
    for made in made_from(full(image), tmp_path / "full"):
        assert [e.tag for e in made.iterall() if e.tag.is_private] == []


@every_class
def test_a_bare_source_gets_every_type_2_attribute_empty(image: ImageClass, tmp_path: Path) -> None:
    sources = plain(image)
    for dataset in sources:
        for keyword in ("PatientName", "AccessionNumber", "ReferringPhysicianName", "StudyID"):
            del dataset[keyword]
    for made in made_from(sources, tmp_path / "bare"):
        for keyword in ("PatientName", "AccessionNumber", "ReferringPhysicianName", "StudyID"):
            assert made[keyword].is_empty


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal", "oblique"])
@pytest.mark.parametrize("shift", [0.0, None])
def test_a_finer_grid_covers_the_same_field(
    tmp_path: Path, factor: int, plane: str, shift: float | None
) -> None:
    """Corner to corner within 1e-4 mm; the first sample where the operator puts it."""
    sources = make_series("MR", slices=2, rows=9, columns=14, spacing=(1.3, 1.7), plane=plane)
    loaded = volume.load(write_series(sources, tmp_path), "mri_sr", PolicySettings())
    offset = -(factor - 1) / (2 * factor) if shift is None else shift  # box filter or Fourier
    by = Resampling(factor, (offset, offset))
    finer = np.repeat(np.repeat(loaded.array, factor, axis=1), factor, axis=2)
    for made, header in zip(derive(loaded, finer, resampling=by), loaded.headers, strict=True):
        image = pydicom.dcmread(BytesIO(made.data))
        assert (image.Rows, image.Columns) == (9 * factor, 14 * factor)
        for size, spacing, old_size, old in zip(
            (image.Rows, image.Columns), image.PixelSpacing, (9, 14), header.PixelSpacing,
            strict=True,
        ):  # fmt: skip
            assert size * float(spacing) == pytest.approx(old_size * float(old), abs=1e-4)
        assert list(image.ImageOrientationPatient) == list(header.ImageOrientationPatient)
        assert image.FrameOfReferenceUID == header.FrameOfReferenceUID
        assert image.SliceThickness == header.SliceThickness
        moved = place(image, 0, 0) - place(header, offset, offset)
        assert np.abs(moved).max() <= 1e-4
        if shift is None:  # a box operator keeps the outer corners where they were
            corner = place(image, -0.5, -0.5) - place(header, -0.5, -0.5)
            far = place(image, image.Rows - 0.5, image.Columns - 0.5) - place(header, 8.5, 13.5)
            assert np.abs(corner).max() <= 1e-4
            assert np.abs(far).max() <= 1e-4
        else:  # zero filling keeps each old sample on a new one
            last = place(image, 8 * factor, 13 * factor) - place(header, 8, 13)
            assert np.abs(last).max() <= 1e-4
        assert image.SourceImageSequence[0].SpatialLocationsPreserved == "NO"
        assert [c.CodeValue for c in image.DerivationCodeSequence] == ["113085", "AISR"]


def place(image: Dataset, row: float, column: float) -> Any:
    """PS3.3 C.7.6.2.1-1."""
    cosines = np.asarray([float(v) for v in image.ImageOrientationPatient])
    rows, columns = (float(v) for v in image.PixelSpacing)
    origin = np.asarray([float(v) for v in image.ImagePositionPatient])
    return origin + cosines[:3] * columns * column + cosines[3:] * rows * row


def test_spatial_resampling_is_claimed_only_where_the_grid_changed(tmp_path: Path) -> None:
    loaded = volume.load(
        write_series(make_series("MR", slices=1), tmp_path), "mri_sr", PolicySettings()
    )
    image = pydicom.dcmread(BytesIO(derive(loaded)[0].data))
    assert [code.CodeValue for code in image.DerivationCodeSequence] == ["AISR"]
    assert image.SourceImageSequence[0].SpatialLocationsPreserved == "YES"
    assert image.PixelSpacing == loaded.headers[0].PixelSpacing


def test_an_overlay_does_not_follow_onto_a_finer_grid(tmp_path: Path) -> None:
    source = make_series("MR", slices=1, rows=16)
    for element, value in ((0x0010, 16), (0x0011, 16)):
        source[0].add_new((0x6000, element), "US", value)
    source[0].add_new((0x6000, 0x3000), "OW", b"\xff" * 32)
    loaded = volume.load(write_series(source, tmp_path), "mri_sr", PolicySettings())
    finer = np.repeat(np.repeat(loaded.array, 2, axis=1), 2, axis=2)
    image = pydicom.dcmread(BytesIO(derive(loaded, finer, resampling=Resampling(2))[0].data))
    assert (0x6000, 0x3000) not in image


def test_parts_of_a_concatenation_stay_together(tmp_path: Path) -> None:
    """PS3.3 C.7.6.16.2.2.4: one UID for the parts, offsets and numbers as they were."""
    made = []
    for part in (1, 2):
        image = make_enhanced("CT", slices=2, rows=8)
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = uid("part", part)
        image.ConcatenationUID = "1.2.3"
        image.SOPInstanceUIDOfConcatenationSource = "1.2.4"
        image.InConcatenationNumber, image.InConcatenationTotalNumber = part, 2
        image.ConcatenationFrameOffsetNumber = 2 * (part - 1)
        made += made_from([image], tmp_path / str(part))
    first, second = made
    assert first.ConcatenationUID == second.ConcatenationUID != "1.2.3"
    assert first.SOPInstanceUIDOfConcatenationSource == second.SOPInstanceUIDOfConcatenationSource
    assert [image.InConcatenationNumber for image in made] == [1, 2]
    assert [image.ConcatenationFrameOffsetNumber for image in made] == [0, 2]
    assert first.SOPInstanceUID != second.SOPInstanceUID
