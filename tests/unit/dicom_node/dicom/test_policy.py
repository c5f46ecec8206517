"""The header policy tables are complete, consistent with highdicom's IODs, and say what they do."""

from __future__ import annotations

import re

import pytest
from pydicom.datadict import tag_for_keyword

from dicom_node.dicom import policy
from dicom_node.dicom.header import RESTORABLE
from dicom_node.dicom.policy import Action

CLAUSE = re.compile(r"(PS3\.15 )?[A-Z]?\.?\d+(\.\d+)*")
CLASSES = [(uid, modality) for uid, modality in RESTORABLE.items()]


@pytest.mark.parametrize(("sop_class", "modality"), CLASSES)
def test_every_module_named_belongs_to_the_iod(sop_class: str, modality: str) -> None:
    for rule in policy.MODULES[modality]:
        assert policy.root_keywords(sop_class, rule.module), rule.module


@pytest.mark.parametrize(("sop_class", "modality"), CLASSES)
def test_every_mandatory_module_of_the_iod_is_named(sop_class: str, modality: str) -> None:
    from highdicom._standard_utils import get_iod_module_map, get_sop_class_iod_map

    entries = get_iod_module_map()[get_sop_class_iod_map()[sop_class]]
    mandatory = {entry["key"] for entry in entries if entry["usage"] == "M"}
    assert mandatory <= {rule.module for rule in policy.MODULES[modality]}


def test_a_module_that_the_iod_has_not_is_an_error() -> None:
    with pytest.raises(KeyError, match="pet-image"):
        policy.root_keywords(CLASSES[0][0], "pet-image")


def test_every_attribute_named_exists_and_cites_a_clause() -> None:
    for rule in policy.ATTRIBUTES:
        assert tag_for_keyword(rule.keyword) is not None, rule.keyword
        assert CLAUSE.fullmatch(rule.clause), rule
    for rules in policy.MODULES.values():
        assert all(CLAUSE.fullmatch(rule.clause) for rule in rules)


def test_no_attribute_has_two_rules_for_one_modality() -> None:
    for modality in policy.MODULES:
        named = [r.keyword for r in policy.ATTRIBUTES if modality in (r.modalities or (modality,))]
        assert len(named) == len(set(named))


@pytest.mark.parametrize(
    ("keyword", "ct", "mr", "pet"),
    [
        ("PatientName", "copy", "copy", "copy"),
        ("StudyInstanceUID", "copy", "copy", "copy"),
        ("FrameOfReferenceUID", "copy", "copy", "copy"),
        ("ImagePositionPatient", "copy", "copy", "copy"),
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
def test_each_attribute_goes_its_way(keyword: str, ct: str, mr: str, pet: str) -> None:
    for (sop_class, modality), wanted in zip(CLASSES, (ct, mr, pet), strict=True):
        assert policy.fate(sop_class, modality, keyword) is Action(wanted), modality
