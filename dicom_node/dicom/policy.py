"""Header policy of derived instances as data: what each attribute of the source becomes.

`table` gives one line for each attribute of an IOD: the module or macro that it belongs to, the
action, the clause of PS3.3, and for what is not copied the function of `values` that makes it.
`derived` writes what the table says and nothing else: an attribute that no line names may
describe other pixels than the restored ones, and is dropped.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from dicom_node.dicom import iods
from dicom_node.dicom.image_classes import CLASSES, ImageClass, Kind
from dicom_node.dicom.suv import GE_PET_CREATOR, PHILIPS_PET_CREATOR, SIEMENS_PET_CREATOR

__all__ = [
    "OVERLAY_GROUPS",
    "PRIVATE_KEPT",
    "Action",
    "PrivateRule",
    "Rule",
    "fate",
    "table",
]


class Action(enum.Enum):
    """What a derived instance does with an attribute of its source."""

    COPY = "copy"  # value for value
    SET = "set"  # given by the derivation, whatever the source says
    RECOMPUTE = "recompute"  # computed anew, where the source has it
    DROP = "drop"  # true of the source only


_COPY, _SET, _RECOMPUTE, _DROP = Action.COPY, Action.SET, Action.RECOMPUTE, Action.DROP


@dataclass(frozen=True)
class Rule:
    """One line of a table. A path is a keyword, or Macro.Keyword inside a functional group."""

    path: str
    action: Action
    clause: str  # of PS3.3, or of another part that is named
    module: str = ""  # as in the tables of PS3.3 A, lower case with hyphens
    by: str = ""  # the function of `values` that makes it; '' for copy and drop
    empty: bool = False  # type 2 of a mandatory module: written empty where the source lacks it


@dataclass(frozen=True)
class PrivateRule:
    """A private attribute that keeps SUV computable, found by creator, group and offset."""

    creator: str
    group: int
    offset: int
    meaning: str


@dataclass(frozen=True)
class _Module:
    name: str
    clause: str
    action: Action = _COPY


@dataclass(frozen=True)
class _Exception:
    """Attributes that go another way than their module; empty sets: in every IOD."""

    action: Action
    clause: str
    keywords: str  # Keyword or Keyword:function, separated by spaces
    modalities: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()

    def concerns(self, image: ImageClass) -> bool:
        return (not self.modalities or image.modality in self.modalities) and (
            not self.kinds or image.kind in self.kinds
        )

    def rules(self) -> Iterator[Rule]:
        for word in self.keywords.split():
            path, _, by = word.partition(":")
            yield Rule(path, self.action, self.clause, by=by)


_CLASSIC = (Kind.CLASSIC,)
_ENHANCED = (Kind.ENHANCED,)
_CONVERTED = (Kind.LEGACY_CONVERTED,)
_MULTIFRAME = (*_ENHANCED, *_CONVERTED)

_EVERY_IOD = (
    _Module("patient", "C.7.1.1"),
    _Module("clinical-trial-subject", "C.7.1.3"),
    _Module("general-study", "C.7.2.1"),
    _Module("patient-study", "C.7.2.2"),
    _Module("clinical-trial-study", "C.7.2.3"),
    _Module("general-series", "C.7.3.1"),
    _Module("clinical-trial-series", "C.7.3.2"),
    _Module("frame-of-reference", "C.7.4.1"),
    _Module("synchronization", "C.7.4.2"),
    _Module("enhanced-patient-orientation", "C.7.6.30"),
    _Module("acquisition-context", "C.7.6.14"),
    _Module("device", "C.7.6.12"),
    _Module("specimen", "C.7.6.22"),
    _Module("image-pixel", "C.7.6.3"),
    _Module("sop-common", "C.12.1"),
    _Module("common-instance-reference", "C.12.2", _DROP),
)
_EVERY_CLASSIC = (
    _Module("general-acquisition", "C.7.10.1"),
    _Module("general-image", "C.7.6.1"),
    _Module("general-reference", "C.12.4"),
    _Module("image-plane", "C.7.6.2"),
    _Module("voi-lut", "C.11.2"),
    _Module("contrast-bolus", "C.7.6.4"),
    _Module("ct-image", "C.8.2.1"),
    _Module("multi-energy-ct-image", "C.8.2.2"),
    _Module("mr-image", "C.8.3.1"),
    _Module("pet-series", "C.8.9.1"),
    _Module("pet-isotope", "C.8.9.2"),
    _Module("pet-multi-gated-acquisition", "C.8.9.3"),
    _Module("nm-pet-patient-orientation", "C.8.4.6"),
    _Module("pet-image", "C.8.9.4"),
)
_EVERY_MULTIFRAME = (
    _Module("ct-series", "C.8.15.1"),
    _Module("mr-series", "C.8.13.6"),
    _Module("enhanced-pet-series", "C.8.22.1"),
    _Module("contrast-bolus", "C.7.6.4"),
    _Module("enhanced-contrast-bolus", "C.7.6.4b"),
    _Module("intervention", "C.7.6.13"),
    _Module("multi-frame-dimension", "C.7.6.17"),
    _Module("cardiac-synchronization", "C.7.6.18.1"),
    _Module("respiratory-synchronization", "C.7.6.18.2"),
    _Module("bulk-motion-synchronization", "C.7.6.18.3"),
    _Module("enhanced-ct-image", "C.8.15.2"),
    _Module("enhanced-multi-energy-ct-acquisition", "C.8.15.4"),
    _Module("enhanced-mr-image", "C.8.13.1"),
    # Required of ORIGINAL and MIXED images, and of a DERIVED one "may be present otherwise": either
    # way conforms. It goes because dciodvfy, which sites validate with, counts it as an error; a
    # test says when it no longer does. Timing and contrast stay, in the functional groups.
    _Module("mr-pulse-sequence", "C.8.13.4", _DROP),
    _Module("enhanced-pet-isotope", "C.8.22.2"),
    _Module("enhanced-pet-acquisition", "C.8.22.3"),
    _Module("enhanced-pet-image", "C.8.22.4"),
    _Module("enhanced-pet-corrections", "C.8.22.5"),
    *(
        _Module(f"{kind}{image}-image-multi-frame-functional-groups", "C.7.6.16")
        for kind in ("enhanced-", "legacy-converted-enhanced-")
        for image in ("ct", "mr", "pet")
    ),
)
# Equipment is ours where the scanner's name would claim our pixels (PS3.3 C.12.1.1.5). In PET it
# stays: vendors' SUV code looks for the scanner's name there; ours is in Contributing Equipment.
_EQUIPMENT = {
    "CT": (
        _Module("general-equipment", "C.7.5.1", _DROP),
        _Module("enhanced-general-equipment", "C.7.5.2", _DROP),
    ),
    "PT": (
        _Module("general-equipment", "C.7.5.1"),
        _Module("enhanced-general-equipment", "C.7.5.2"),
    ),
}
_EQUIPMENT["MR"] = _EQUIPMENT["CT"]

_EXCEPTIONS: tuple[_Exception, ...] = (
    # SOP Common
    _Exception(_SET, "C.12.1", "SOPClassUID:sop_class_uid SOPInstanceUID:sop_instance_uid"),
    _Exception(_SET, "C.12.1", "InstanceCreationDate:date InstanceCreationTime:time"),
    _Exception(_SET, "C.12.1", "ContentQualification:content_qualification"),
    _Exception(_SET, "C.12.1", "CodingSchemeIdentificationSequence:coding_schemes"),
    _Exception(_SET, "C.12.1", "InstanceNumber:instance_number"),
    _Exception(_SET, "C.12.1.1.5", "ContributingEquipmentSequence:contributing_equipment"),
    _Exception(_DROP, "C.12.1", "InstanceCreatorUID InstanceCoercionDateTime InstanceOriginStatus"),
    _Exception(_DROP, "C.12.1", "RelatedGeneralSOPClassUID OriginalSpecializedSOPClassUID"),
    _Exception(_DROP, "C.12.1", "SOPInstanceStatus SOPAuthorizationDateTime"),
    _Exception(_DROP, "C.12.1", "SOPAuthorizationComment BarcodeValue QueryRetrieveView"),
    _Exception(_DROP, "C.12.1", "AuthorizationEquipmentCertificationNumber"),
    _Exception(_DROP, "C.12.1", "ConversionSourceAttributesSequence", kinds=_CLASSIC),
    _Exception(_DROP, "C.12.1", "OriginalAttributesSequence EncryptedAttributesSequence"),
    _Exception(_DROP, "C.12.1.1.3", "MACParametersSequence DigitalSignaturesSequence"),
    _Exception(_DROP, "PS3.15 E.3.10", "PrivateDataElementCharacteristicsSequence"),
    # General Series
    _Exception(_SET, "C.7.3.1", "SeriesInstanceUID:series_instance_uid"),
    _Exception(_SET, "C.7.3.1", "SeriesNumber:series_number SeriesDescription:series_description"),
    _Exception(_DROP, "C.7.3.1", "SeriesDescriptionCodeSequence RelatedSeriesSequence"),
    _Exception(_DROP, "C.7.3.1", "ReferencedPerformedProcedureStepSequence"),
    _Exception(_DROP, "10.13", "PerformedProcedureStepStartDate PerformedProcedureStepStartTime"),
    _Exception(_DROP, "10.13", "PerformedProcedureStepEndDate PerformedProcedureStepEndTime"),
    _Exception(_DROP, "10.13", "PerformedProcedureStepID PerformedProcedureStepDescription"),
    _Exception(_DROP, "10.13", "PerformedProtocolCodeSequence"),
    _Exception(_DROP, "10.13", "CommentsOnThePerformedProcedureStep"),
    _Exception(_DROP, "C.7.3.1", "SmallestPixelValueInSeries LargestPixelValueInSeries"),
    # General Equipment; the institution stays where the patient was imaged, unless configured
    _Exception(_SET, "C.7.5.1", "Manufacturer:manufacturer", ("CT", "MR")),
    _Exception(_SET, "C.7.5.1", "ManufacturerModelName:model_name", ("CT", "MR")),
    _Exception(_SET, "C.7.5.1", "SoftwareVersions:software_versions", ("CT", "MR")),
    _Exception(_SET, "C.7.5.1", "InstitutionName:institution_name", ("CT", "MR")),
    _Exception(_SET, "C.7.5.1", "StationName:station_name", ("CT", "MR")),
    _Exception(_SET, "C.7.5.2", "DeviceSerialNumber:serial_number", ("CT", "MR"), _MULTIFRAME),
    _Exception(_COPY, "C.7.5.1", "InstitutionAddress InstitutionalDepartmentName"),
    _Exception(_COPY, "C.7.5.1.1.2", "PixelPaddingValue"),
    # Image
    _Exception(_SET, "C.7.6.1.1.2", "ImageType:image_type", kinds=_CLASSIC),
    _Exception(_SET, "C.8.16.1", "ImageType:image_type_of_frames", kinds=_MULTIFRAME),
    _Exception(_SET, "C.7.6.1", "ContentDate:date ContentTime:time"),
    _Exception(_DROP, "C.7.6.1.1.6", "IconImageSequence"),
    _Exception(_SET, "C.12.4", "DerivationDescription:derivation_description", kinds=_CLASSIC),
    _Exception(_SET, "C.12.4", "DerivationCodeSequence:derivation_codes", kinds=_CLASSIC),
    _Exception(_SET, "C.12.4", "SourceImageSequence:source_images", kinds=_CLASSIC),
    _Exception(_DROP, "C.12.4", "SourceInstanceSequence", kinds=_CLASSIC),
    _Exception(_SET, "C.12.2", "ReferencedSeriesSequence:referenced_series"),
    # Image Pixel
    _Exception(_SET, "C.7.6.3", "PixelData:pixel_data"),
    _Exception(
        _RECOMPUTE,
        "C.7.6.3",
        "SmallestImagePixelValue:smallest_value LargestImagePixelValue:largest_value",
    ),
    _Exception(_DROP, "C.7.6.3", "PixelDataProviderURL ExtendedOffsetTable"),
    _Exception(_DROP, "C.7.6.3", "ExtendedOffsetTableLengths ColorSpace ICCProfile"),
    # The grid of an MR image may become finer
    _Exception(_RECOMPUTE, "C.7.6.3", "Rows:rows Columns:columns", ("MR",)),
    _Exception(_RECOMPUTE, "10.7.1.3", "PixelSpacing:pixel_spacing", ("MR",), _CLASSIC),
    _Exception(_RECOMPUTE, "C.7.6.2.1.1", "ImagePositionPatient:image_position", ("MR",), _CLASSIC),
    # PET: 16 bits stored, one slope for each slice, no intercept
    _Exception(
        _SET,
        "C.8.9.4",
        "BitsAllocated:bits_allocated BitsStored:bits_stored HighBit:high_bit",
        ("PT",),
    ),
    _Exception(
        _SET,
        "C.8.9.4.1.6",
        "RescaleSlope:rescale_slope RescaleIntercept:rescale_intercept",
        ("PT",),
        _CLASSIC,
    ),
    # It maps the stored values of the source, and the slope is a new one.
    _Exception(_DROP, "C.7.6.16.2.11", "RealWorldValueMappingSequence", ("PT",), _CLASSIC),
    # Not in the MR Image IOD, and sent all the same: values mean nothing without their scale, and
    # a diffusion image says nothing without its b-value.
    _Exception(_COPY, "C.11.1", "RescaleSlope RescaleIntercept RescaleType", ("MR",), _CLASSIC),
    _Exception(
        _COPY, "C.8.13.5.9", "DiffusionBValue DiffusionGradientOrientation", ("MR",), _CLASSIC
    ),
    # Multi-frame
    _Exception(_SET, "C.7.6.16", "NumberOfFrames:number_of_frames", kinds=_MULTIFRAME),
    _Exception(
        _RECOMPUTE, "C.7.6.16", "SharedFunctionalGroupsSequence:shared_groups", kinds=_MULTIFRAME
    ),
    _Exception(
        _SET, "C.7.6.16", "PerFrameFunctionalGroupsSequence:per_frame_groups", kinds=_MULTIFRAME
    ),
    _Exception(
        _SET, "C.8.16.1", "SourceImageEvidenceSequence:source_image_evidence", kinds=_MULTIFRAME
    ),
    _Exception(
        _RECOMPUTE,
        "C.7.6.16.2.2.4",
        "ConcatenationUID:concatenation_uid"
        " SOPInstanceUIDOfConcatenationSource:concatenation_source",
        kinds=_MULTIFRAME,
    ),
    _Exception(_DROP, "C.7.6.16", "RepresentativeFrameNumber", kinds=_MULTIFRAME),
    _Exception(_DROP, "C.7.6.16", "EncapsulatedPixelDataValueTotalLength", kinds=_MULTIFRAME),
    _Exception(_SET, "C.7.6.16.2.6", "DerivationImageSequence:derivation_image", kinds=_MULTIFRAME),
    _Exception(
        _SET, "C.8.15.3.1", "CTImageFrameTypeSequence.FrameType:frame_type", ("CT",), _MULTIFRAME
    ),
    _Exception(
        _SET, "C.8.13.5.1", "MRImageFrameTypeSequence.FrameType:frame_type", ("MR",), _MULTIFRAME
    ),
    _Exception(
        _SET, "C.8.22.5.1", "PETFrameTypeSequence.FrameType:frame_type", ("PT",), _MULTIFRAME
    ),
    _Exception(
        _SET,
        "C.7.6.16.2.9",
        "PixelValueTransformationSequence:pixel_value_transformation",
        ("PT",),
        _MULTIFRAME,
    ),
    _Exception(
        _RECOMPUTE,
        "C.7.6.16.2.11",
        "RealWorldValueMappingSequence:real_world_values",
        ("PT",),
        _MULTIFRAME,
    ),
    _Exception(
        _RECOMPUTE,
        "C.7.6.16.2.1",
        "PixelMeasuresSequence.PixelSpacing:pixel_spacing",
        ("MR",),
        _MULTIFRAME,
    ),
    _Exception(
        _RECOMPUTE,
        "C.7.6.16.2.3",
        "PlanePositionSequence.ImagePositionPatient:image_position",
        ("MR",),
        _MULTIFRAME,
    ),
    # What the classic table keeps of what a conversion could not place.
    _Exception(
        _RECOMPUTE,
        "C.7.6.16.2.25",
        "UnassignedSharedConvertedAttributesSequence:unassigned_shared"
        " UnassignedPerFrameConvertedAttributesSequence:unassigned_per_frame",
        kinds=_CONVERTED,
    ),
)

_MACRO_CLAUSES = {"CT": "C.8.15.3", "MR": "C.8.13.5", "PET": "C.8.22.5", "Multi": "C.8.15.4"}

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
        # Siemens Biograph TruePoint 6.7 DICOM Conformance Statement.
        PrivateRule(SIEMENS_PET_CREATOR, 0x0071, 0x22, "decay correction date and time"),
    ),
}
"""Private attributes that are kept, by Modality; every other one is dropped."""


@cache
def table(sop_class_uid: str) -> Mapping[str, Rule]:
    """The header policy of one storage class, by path; what it does not name is dropped.

    Raises KeyError for a class that is not restored.
    """
    image = CLASSES[sop_class_uid]
    lines = {rule.path: rule for rule in (*_of_modules(image), *_of_macros(image))}
    for exception in _EXCEPTIONS:
        if exception.concerns(image):
            for rule in exception.rules():
                lines[rule.path] = _in_module(rule, lines.get(rule.path))
    # A functional group that is not copied is made, or dropped, as a whole.
    return {
        path: rule
        for path, rule in lines.items()
        if "." not in path or lines[path.partition(".")[0]].action is _COPY
    }


def _in_module(rule: Rule, general: Rule | None) -> Rule:
    macro = rule.path.partition(".")[0] if "." in rule.path else ""
    module = general.module if general is not None else macro
    return Rule(rule.path, rule.action, rule.clause, module, rule.by)


def _of_modules(image: ImageClass) -> Iterator[Rule]:
    own = _EVERY_MULTIFRAME if image.multiframe else _EVERY_CLASSIC
    mandatory = iods.mandatory_modules(image.uid)
    for module in (*_EVERY_IOD, *own, *_EQUIPMENT[image.modality]):
        if not iods.has_module(image.uid, module.name):
            continue
        empty = iods.type_two_keywords(image.uid, module.name)
        for keyword in sorted(iods.root_keywords(image.uid, module.name)):
            required = keyword in empty and module.name in mandatory and module.action is _COPY
            yield Rule(keyword, module.action, module.clause, module.name, empty=required)


def _of_macros(image: ImageClass) -> Iterable[Rule]:
    """Each functional group as a whole, and each attribute of its item."""
    for macro, keywords in iods.functional_groups(image.uid).items():
        prefix = next((word for word in _MACRO_CLAUSES if macro.startswith(word)), "")
        clause = _MACRO_CLAUSES.get(prefix, "C.7.6.16.2")
        yield Rule(macro, _COPY, clause, macro)
        for keyword in sorted(keywords):
            yield Rule(f"{macro}.{keyword}", _COPY, clause, macro)


def fate(sop_class_uid: str, path: str) -> Action:
    """What becomes of a public attribute of a restorable source."""
    rule = table(sop_class_uid).get(path)
    return Action.DROP if rule is None else rule.action
