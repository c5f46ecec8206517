"""What is read from the library's tables of the standard; a new release of it must still say so."""

from __future__ import annotations

import pytest
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    PositronEmissionTomographyImageStorage,
)

from dicom_node.dicom import iods
from dicom_node.dicom.image_classes import CLASSES, Kind


def test_three_modalities_in_three_kinds_are_restored() -> None:
    assert len(CLASSES) == 9
    assert {(image.modality, image.kind) for image in CLASSES.values()} == {
        (modality, kind) for modality in ("CT", "MR", "PT") for kind in Kind
    }
    assert all(uid == image.uid for uid, image in CLASSES.items())
    assert [image.multiframe for image in CLASSES.values()].count(False) == 3


def test_mandatory_modules_are_those_of_the_iod() -> None:
    assert {"patient", "ct-image", "sop-common"} <= iods.mandatory_modules(CTImageStorage)
    assert "overlay-plane" not in iods.mandatory_modules(CTImageStorage)
    assert iods.has_module(CTImageStorage, "overlay-plane")
    assert not iods.has_module(CTImageStorage, "mr-image")


def test_only_the_root_of_a_module_is_listed() -> None:
    found = iods.root_keywords(PositronEmissionTomographyImageStorage, "pet-isotope")
    assert "RadiopharmaceuticalInformationSequence" in found
    assert "RadionuclideTotalDose" not in found
    with pytest.raises(KeyError, match="mr-image"):
        iods.root_keywords(CTImageStorage, "mr-image")


def test_type_two_attributes_are_known() -> None:
    assert iods.type_two_keywords(CTImageStorage, "patient") == {
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
    }


def test_functional_groups_name_the_attributes_of_their_items() -> None:
    groups = iods.functional_groups(EnhancedMRImageStorage)
    assert "EffectiveEchoTime" in groups["MREchoSequence"]
    assert groups["PlanePositionSequence"] == {"ImagePositionPatient"}
    assert "CodeValue" not in groups["DerivationImageSequence"]
    assert iods.functional_groups(CTImageStorage) == {}
    converted = iods.functional_groups(LegacyConvertedEnhancedPETImageStorage)
    assert {
        "UnassignedSharedConvertedAttributesSequence",
        "ConversionSourceAttributesSequence",
    } <= set(converted)
