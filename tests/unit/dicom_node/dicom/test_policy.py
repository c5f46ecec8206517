"""The header policy tables are complete, agree with the IODs, and say what they do."""

from __future__ import annotations

import re

import pytest
from pydicom.datadict import tag_for_keyword

from dicom_node.dicom import iods, policy
from dicom_node.dicom.image_classes import CLASSES, Kind
from dicom_node.dicom.policy import Action
from dicom_node.dicom.values import VALUES

CLAUSE = re.compile(r"(PS3\.15 )?[A-Z]?\.?\d+(\.\d+)*[a-z]?")
MADE = (Action.SET, Action.RECOMPUTE)
every_class = pytest.mark.parametrize("uid", list(CLASSES), ids=lambda uid: uid.split(".1.1.")[-1])


@every_class
def test_every_mandatory_module_of_the_iod_has_its_lines(uid: str) -> None:
    table = policy.table(uid)
    for module in iods.mandatory_modules(uid):
        assert iods.root_keywords(uid, module) <= set(table), module


@every_class
def test_every_functional_group_of_the_iod_has_its_line(uid: str) -> None:
    assert set(iods.functional_groups(uid)) <= set(policy.table(uid))
    assert bool(iods.functional_groups(uid)) is CLASSES[uid].multiframe


@every_class
def test_every_line_names_an_attribute_and_cites_a_clause(uid: str) -> None:
    for path, rule in policy.table(uid).items():
        assert path == rule.path
        for keyword in path.split("."):
            assert tag_for_keyword(keyword) is not None, keyword
        assert CLAUSE.fullmatch(rule.clause), rule


@every_class
def test_what_is_made_names_its_function_and_nothing_else_does(uid: str) -> None:
    for rule in policy.table(uid).values():
        assert (rule.by in VALUES) is (rule.action in MADE), rule


def test_every_function_is_named_by_a_line() -> None:
    named = {rule.by for uid in CLASSES for rule in policy.table(uid).values()}
    assert named - {""} == set(VALUES)


@every_class
def test_an_attribute_inside_a_group_that_is_made_has_no_line_of_its_own(uid: str) -> None:
    table = policy.table(uid)
    for path in table:
        macro, _, keyword = path.partition(".")
        assert not keyword or table[macro].action is Action.COPY


def test_a_class_that_is_not_restored_has_no_table() -> None:
    with pytest.raises(KeyError):
        policy.table("1.2.840.10008.5.1.4.1.1.7")


def test_a_module_that_the_iod_has_not_is_an_error() -> None:
    with pytest.raises(KeyError, match="pet-image"):
        iods.root_keywords("1.2.840.10008.5.1.4.1.1.2", "pet-image")


def fates(path: str, kind: Kind) -> tuple[str, ...]:
    uids = [image.uid for image in CLASSES.values() if image.kind is kind]
    return tuple(policy.fate(uid, path).value for uid in uids)  # CT, MR, PT


@pytest.mark.parametrize(
    ("keyword", "ct", "mr", "pet"),
    [
        ("PatientName", "copy", "copy", "copy"),
        ("StudyInstanceUID", "copy", "copy", "copy"),
        ("FrameOfReferenceUID", "copy", "copy", "copy"),
        ("ImagePositionPatient", "copy", "recompute", "copy"),
        ("SeriesDate", "copy", "copy", "copy"),
        ("WindowCenter", "copy", "copy", "copy"),
        ("PixelPaddingValue", "copy", "copy", "copy"),
        ("LossyImageCompression", "copy", "copy", "copy"),
        ("SOPInstanceUID", "set", "set", "set"),
        ("SeriesInstanceUID", "set", "set", "set"),
        ("ImageType", "set", "set", "set"),
        ("ContributingEquipmentSequence", "set", "set", "set"),
        ("SmallestImagePixelValue", "recompute", "recompute", "recompute"),
        ("IconImageSequence", "drop", "drop", "drop"),
        ("DigitalSignaturesSequence", "drop", "drop", "drop"),
        ("PerformedProcedureStepID", "drop", "drop", "drop"),
        ("Manufacturer", "set", "set", "copy"),
        ("RescaleSlope", "copy", "copy", "set"),
        ("BitsStored", "copy", "copy", "set"),
        ("KVP", "copy", "drop", "drop"),
        ("EchoTime", "drop", "copy", "drop"),
        ("DiffusionBValue", "drop", "copy", "drop"),
        ("RadiopharmaceuticalInformationSequence", "drop", "drop", "copy"),
        ("RealWorldValueMappingSequence", "copy", "copy", "drop"),
        ("NumberOfFrames", "drop", "drop", "drop"),
    ],
)
def test_each_attribute_of_a_classic_image_goes_its_way(
    keyword: str, ct: str, mr: str, pet: str
) -> None:
    assert fates(keyword, Kind.CLASSIC) == (ct, mr, pet)


@pytest.mark.parametrize("kind", [Kind.ENHANCED, Kind.LEGACY_CONVERTED])
@pytest.mark.parametrize(
    ("path", "ct", "mr", "pet"),
    [
        ("PatientName", "copy", "copy", "copy"),
        ("DimensionIndexSequence", "copy", "copy", "copy"),
        ("NumberOfFrames", "set", "set", "set"),
        ("SharedFunctionalGroupsSequence", "recompute", "recompute", "recompute"),
        ("SourceImageEvidenceSequence", "set", "set", "set"),
        ("ConcatenationUID", "recompute", "recompute", "recompute"),
        ("IconImageSequence", "drop", "drop", "drop"),
        ("DerivationImageSequence", "set", "set", "set"),
        ("DerivationDescription", "drop", "drop", "drop"),
        ("FrameContentSequence.DimensionIndexValues", "copy", "copy", "copy"),
        ("PlanePositionSequence.ImagePositionPatient", "copy", "recompute", "copy"),
        ("PixelValueTransformationSequence", "copy", "copy", "set"),
        ("CTImageFrameTypeSequence.FrameType", "set", "drop", "drop"),
        ("MRImageFrameTypeSequence.FrameType", "drop", "set", "drop"),
        ("PETFrameTypeSequence.FrameType", "drop", "drop", "set"),
        ("DeviceSerialNumber", "set", "set", "copy"),
    ],
)
def test_each_attribute_of_a_multi_frame_image_goes_its_way(
    kind: Kind, path: str, ct: str, mr: str, pet: str
) -> None:
    assert fates(path, kind) == (ct, mr, pet)
