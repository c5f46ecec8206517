"""Header policy of derived instances as data: what each attribute of the source becomes.

One table of modules per storage class and one of attributes; `fate` reads them for any attribute.
An attribute takes the action of its own line, else that of its module, else it is dropped: what
no table names may describe other pixels than the restored ones.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from highdicom._standard_utils import (
    get_iod_module_map,
    get_module_attribute_map,
    get_sop_class_iod_map,
)

from dicom_node.dicom.suv import GE_PET_CREATOR, PHILIPS_PET_CREATOR

__all__ = [
    "ATTRIBUTES",
    "MODULES",
    "OVERLAY_GROUPS",
    "PRIVATE_KEPT",
    "Action",
    "AttributeRule",
    "ModuleRule",
    "PrivateRule",
    "fate",
    "root_keywords",
]


class Action(enum.Enum):
    """What a derived instance does with an attribute of its source."""

    COPY = "copy"  # value for value
    SET = "set"  # given by the derivation, whatever the source says
    RECOMPUTE = "recompute"  # computed from the restored pixels, where the source has it
    DROP = "drop"  # true of the source only


@dataclass(frozen=True)
class ModuleRule:
    """The action for the attributes of one module, and the clause of PS3.3 that defines it."""

    module: str  # as in the tables of PS3.3 A, lower case with hyphens
    action: Action
    clause: str


@dataclass(frozen=True)
class AttributeRule:
    """An attribute that goes another way than its module; modalities: where, empty for all."""

    keyword: str
    action: Action
    clause: str
    modalities: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrivateRule:
    """A private attribute that keeps SUV computable, found by creator, group and offset."""

    creator: str
    group: int
    offset: int
    meaning: str


_COPY, _SET, _RECOMPUTE, _DROP = Action.COPY, Action.SET, Action.RECOMPUTE, Action.DROP

_COMMON = (
    ModuleRule("patient", _COPY, "C.7.1.1"),
    ModuleRule("clinical-trial-subject", _COPY, "C.7.1.3"),
    ModuleRule("general-study", _COPY, "C.7.2.1"),
    ModuleRule("patient-study", _COPY, "C.7.2.2"),
    ModuleRule("clinical-trial-study", _COPY, "C.7.2.3"),
    ModuleRule("general-series", _COPY, "C.7.3.1"),
    ModuleRule("clinical-trial-series", _COPY, "C.7.3.2"),
    ModuleRule("frame-of-reference", _COPY, "C.7.4.1"),
    ModuleRule("general-acquisition", _COPY, "C.7.10.1"),
    ModuleRule("general-image", _COPY, "C.7.6.1"),
    ModuleRule("general-reference", _COPY, "C.12.4"),
    ModuleRule("image-plane", _COPY, "C.7.6.2"),
    ModuleRule("image-pixel", _COPY, "C.7.6.3"),
    ModuleRule("device", _COPY, "C.7.6.12"),
    ModuleRule("specimen", _COPY, "C.7.6.22"),
    ModuleRule("voi-lut", _COPY, "C.11.2"),
    ModuleRule("sop-common", _COPY, "C.12.1"),
    ModuleRule("common-instance-reference", _SET, "C.12.2"),
)

MODULES: Mapping[str, tuple[ModuleRule, ...]] = {
    "CT": (
        *_COMMON,
        ModuleRule("general-equipment", _SET, "C.7.5.1"),
        ModuleRule("synchronization", _COPY, "C.7.4.2"),
        ModuleRule("contrast-bolus", _COPY, "C.7.6.4"),
        ModuleRule("ct-image", _COPY, "C.8.2.1"),
        ModuleRule("multi-energy-ct-image", _COPY, "C.8.2.2"),
    ),
    "MR": (
        *_COMMON,
        ModuleRule("general-equipment", _SET, "C.7.5.1"),
        ModuleRule("contrast-bolus", _COPY, "C.7.6.4"),
        ModuleRule("mr-image", _COPY, "C.8.3.1"),
    ),
    "PT": (
        *_COMMON,
        # Vendors' SUV code looks for the scanner's name here; ours is in Contributing Equipment.
        ModuleRule("general-equipment", _COPY, "C.7.5.1"),
        ModuleRule("synchronization", _COPY, "C.7.4.2"),
        ModuleRule("pet-series", _COPY, "C.8.9.1"),
        ModuleRule("pet-isotope", _COPY, "C.8.9.2"),
        ModuleRule("pet-multi-gated-acquisition", _COPY, "C.8.9.3"),
        ModuleRule("nm-pet-patient-orientation", _COPY, "C.8.4.6"),
        ModuleRule("pet-image", _COPY, "C.8.9.4"),
        ModuleRule("acquisition-context", _COPY, "C.7.6.14"),
    ),
}
"""Modules of the CT, MR and PET Image IODs (PS3.3 A.3, A.4, A.21) by Modality."""


def _rules(action: Action, clause: str, keywords: str, *modalities: str) -> Iterable[AttributeRule]:
    return (AttributeRule(word, action, clause, modalities) for word in keywords.split())


ATTRIBUTES: tuple[AttributeRule, ...] = (
    *_rules(_SET, "C.12.1", "SOPClassUID SOPInstanceUID"),
    *_rules(_SET, "C.12.1", "InstanceCreationDate InstanceCreationTime"),
    *_rules(_SET, "C.12.1", "ContentQualification CodingSchemeIdentificationSequence"),
    *_rules(_SET, "C.12.1.1.5", "ContributingEquipmentSequence"),
    *_rules(_DROP, "C.12.1", "InstanceCreatorUID InstanceCoercionDateTime InstanceOriginStatus"),
    *_rules(_DROP, "C.12.1", "RelatedGeneralSOPClassUID OriginalSpecializedSOPClassUID"),
    *_rules(_DROP, "C.12.1", "SOPInstanceStatus SOPAuthorizationDateTime SOPAuthorizationComment"),
    *_rules(_DROP, "C.12.1", "AuthorizationEquipmentCertificationNumber BarcodeValue"),
    *_rules(_DROP, "C.12.1", "QueryRetrieveView ConversionSourceAttributesSequence"),
    *_rules(_DROP, "C.12.1", "OriginalAttributesSequence EncryptedAttributesSequence"),
    *_rules(_DROP, "C.12.1.1.3", "MACParametersSequence DigitalSignaturesSequence"),
    *_rules(_DROP, "PS3.15 E.3.10", "PrivateDataElementCharacteristicsSequence"),
    *_rules(_SET, "C.7.3.1", "SeriesInstanceUID SeriesNumber SeriesDescription"),
    *_rules(_DROP, "C.7.3.1", "SeriesDescriptionCodeSequence RelatedSeriesSequence"),
    *_rules(_DROP, "C.7.3.1", "ReferencedPerformedProcedureStepSequence"),
    *_rules(_DROP, "10.13", "PerformedProcedureStepStartDate PerformedProcedureStepStartTime"),
    *_rules(_DROP, "10.13", "PerformedProcedureStepEndDate PerformedProcedureStepEndTime"),
    *_rules(_DROP, "10.13", "PerformedProcedureStepID PerformedProcedureStepDescription"),
    *_rules(_DROP, "10.13", "PerformedProtocolCodeSequence CommentsOnThePerformedProcedureStep"),
    *_rules(_DROP, "C.7.3.1", "SmallestPixelValueInSeries LargestPixelValueInSeries"),
    *_rules(_SET, "C.7.6.1.1.2", "ImageType"),
    *_rules(_SET, "C.7.6.1", "ContentDate ContentTime"),
    *_rules(_DROP, "C.7.6.1.1.6", "IconImageSequence"),
    *_rules(_SET, "C.12.4", "DerivationDescription DerivationCodeSequence SourceImageSequence"),
    *_rules(_DROP, "C.12.4", "SourceInstanceSequence"),
    *_rules(_SET, "C.7.6.3", "PixelData"),
    *_rules(_RECOMPUTE, "C.7.6.3", "SmallestImagePixelValue LargestImagePixelValue"),
    *_rules(_DROP, "C.7.6.3", "PixelDataProviderURL ExtendedOffsetTable"),
    *_rules(_DROP, "C.7.6.3", "ExtendedOffsetTableLengths ColorSpace ICCProfile"),
    *_rules(_COPY, "C.7.5.1.1.2", "PixelPaddingValue"),
    # The institution stays where the patient was imaged, unless the configuration names another.
    *_rules(_COPY, "C.7.5.1", "InstitutionName InstitutionAddress InstitutionalDepartmentName"),
    # PS3.3 C.8.9.4: 16 bits stored, one slope for each slice, no intercept.
    *_rules(_SET, "C.8.9.4", "BitsAllocated BitsStored HighBit", "PT"),
    *_rules(_SET, "C.8.9.4.1.6", "RescaleSlope RescaleIntercept", "PT"),
    # It maps the stored values of the source, and the slope is a new one.
    *_rules(_DROP, "C.7.6.16.2.11", "RealWorldValueMappingSequence", "PT"),
    # Not in the MR Image IOD, and sent all the same: the values mean nothing without their scale.
    *_rules(_COPY, "C.11.1", "RescaleSlope RescaleIntercept RescaleType", "MR"),
    # Not in the MR Image IOD, and without it a diffusion image says nothing.
    *_rules(_COPY, "C.8.13.5.9", "DiffusionBValue DiffusionGradientOrientation", "MR"),
)
"""Attributes that do not follow their module."""

OVERLAY_GROUPS = range(0x6000, 0x6020, 2)
"""Overlay planes (PS3.3 C.9.2), copied where they have the grid of the image."""

PRIVATE_KEPT: Mapping[str, tuple[PrivateRule, ...]] = {
    "PT": (
        PrivateRule(GE_PET_CREATOR, 0x0009, 0x0D, "scan date and time"),
        PrivateRule(GE_PET_CREATOR, 0x0009, 0x38, "tracer activity"),
        PrivateRule(GE_PET_CREATOR, 0x0009, 0x39, "time of the activity measurement"),
        PrivateRule(GE_PET_CREATOR, 0x0009, 0x3B, "time of administration"),
        PrivateRule(GE_PET_CREATOR, 0x0009, 0x3C, "activity left after injection"),
        PrivateRule(GE_PET_CREATOR, 0x0009, 0x3D, "time of the measurement after injection"),
        PrivateRule(GE_PET_CREATOR, 0x0009, 0x3F, "half-life"),
        PrivateRule(PHILIPS_PET_CREATOR, 0x7053, 0x00, "SUV scale factor"),
        PrivateRule(PHILIPS_PET_CREATOR, 0x7053, 0x09, "activity concentration scale factor"),
        PrivateRule("SIEMENS MED PT", 0x0071, 0x22, "decay correction date and time"),
    ),
}
"""Private attributes that are kept, by Modality; every other one is dropped."""


@cache
def root_keywords(sop_class_uid: str, module: str) -> frozenset[str]:
    """The attributes at the root of one module of a storage class, by keyword.

    Raises KeyError for a module that the IOD does not have.
    """
    iod = get_sop_class_iod_map()[sop_class_uid]
    if module not in {entry["key"] for entry in get_iod_module_map()[iod]}:
        raise KeyError(module)
    attributes = get_module_attribute_map()[module]
    return frozenset(entry["keyword"] for entry in attributes if not entry["path"])


@cache
def _fates(sop_class_uid: str, modality: str) -> Mapping[str, Action]:
    by_module = {
        keyword: rule.action
        for rule in MODULES[modality]
        for keyword in root_keywords(sop_class_uid, rule.module)
    }
    own = {
        rule.keyword: rule.action
        for rule in ATTRIBUTES
        if not rule.modalities or modality in rule.modalities
    }
    return {**by_module, **own}


def fate(sop_class_uid: str, modality: str, keyword: str) -> Action:
    """What becomes of a public attribute of a CT, MR or PT source."""
    return _fates(sop_class_uid, modality).get(keyword, Action.DROP)
