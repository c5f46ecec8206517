"""Multi-frame images made by code: Enhanced CT, MR and PET, and conversions of classic series.

The slices come from `tests.factories.make_series`, so every option of that goes in here too. The
same arguments make the same image, but for the times and UIDs that a conversion adds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from highdicom.legacy import (
    LegacyConvertedEnhancedCTImage,
    LegacyConvertedEnhancedMRImage,
    LegacyConvertedEnhancedPETImage,
)
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import (
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    ExplicitVRLittleEndian,
)

from tests.factories import encode, make_series, uid

__all__ = ["legacy_converted", "make_enhanced"]

_CONVERSIONS = {
    "CT": LegacyConvertedEnhancedCTImage,
    "MR": LegacyConvertedEnhancedMRImage,
    "PT": LegacyConvertedEnhancedPETImage,
}
_CLASSES = {
    "CT": EnhancedCTImageStorage,
    "MR": EnhancedMRImageStorage,
    "PT": EnhancedPETImageStorage,
}
_FRAME_TYPES = {
    "CT": "CTImageFrameTypeSequence",
    "MR": "MRImageFrameTypeSequence",
    "PT": "PETFrameTypeSequence",
}
_OF_IMAGE = (
    "SpecificCharacterSet",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientWeight",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyTime",
    "SeriesDate",
    "SeriesTime",
    "ContentDate",
    "ContentTime",
    "SeriesNumber",
    "SeriesDescription",
    "AcquisitionNumber",
    "Manufacturer",
    "ManufacturerModelName",
    "SoftwareVersions",
    "Modality",
    "PatientPosition",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "BodyPartExamined",
    "BurnedInAnnotation",
)

Change = Callable[[int, int, Dataset], None]


def legacy_converted(modality: Any, **options: Any) -> Dataset:
    """A classic series of `make_series` as one Legacy Converted Enhanced image."""
    if modality == "MR":
        options = {"WindowCenter": "500", "WindowWidth": "1000", **options}
    slices = make_series(modality, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = _CONVERSIONS[modality](
            slices,
            series_instance_uid=uid("converted series", modality),
            series_number=7,
            sop_instance_uid=uid("converted", modality),
            instance_number=1,
        )
    buffer = BytesIO()
    converted.save_as(buffer, enforce_file_format=True)
    return dcmread(BytesIO(buffer.getvalue()))


def make_enhanced(
    modality: Any,
    *,
    volumes: int = 1,
    change: Change | None = None,
    transfer_syntax: str = ExplicitVRLittleEndian,
    **options: Any,
) -> Dataset:
    """An Enhanced CT, MR or PET image.

    volumes: how many volumes lie in it, each of the slices of `make_series`; frames alternate
    between them, as scanners write echoes. change(volume, slice, groups) may alter the groups
    of a frame; without it the volumes are told apart by their temporal position.
    """
    classic = [
        sorted(
            make_series(modality, seed=seed, **options),
            key=lambda d: float(d.ImagePositionPatient[2]),
        )
        for seed in range(volumes)
    ]
    first = classic[0][0]
    image = _root(modality, first)
    image.SharedFunctionalGroupsSequence = [_shared(modality, first)]
    frames: list[Dataset] = []
    data: list[bytes] = []
    for i in range(len(classic[0])):
        for v, members in enumerate(classic):
            groups = _per_frame(members[i], i, v, volumes)
            if change is not None:
                change(v, i, groups)
            frames.append(groups)
            data.append(members[i].PixelData[: first.Rows * first.Columns * _bytes(first)])
    image.PerFrameFunctionalGroupsSequence = frames
    image.NumberOfFrames = len(frames)
    image.PixelData = b"".join(data)
    image["PixelData"].VR = "OW" if first.BitsAllocated == 16 else "OB"
    return encode(image, transfer_syntax)


def _bytes(dataset: Dataset) -> int:
    return int(dataset.BitsAllocated) // 8


def _root(modality: str, first: Dataset) -> Dataset:
    image = Dataset()
    for keyword in _OF_IMAGE:
        if keyword in first:
            image[keyword] = first[keyword]
    image.SOPClassUID = _CLASSES[modality]
    image.SOPInstanceUID = uid("enhanced", first.SOPInstanceUID)
    image.InstanceNumber = 1
    image.DeviceSerialNumber = "1234"
    image.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    image.AcquisitionDateTime = "20260102100005"
    image.AcquisitionDuration = 60.0
    image.PixelPresentation, image.VolumetricProperties = "MONOCHROME", "VOLUME"
    image.VolumeBasedCalculationTechnique = "NONE"
    image.ContentQualification = "PRODUCT"
    image.BurnedInAnnotation = "NO"
    image.LossyImageCompression = "00"
    image.PresentationLUTShape = "IDENTITY"
    image.AcquisitionContextSequence = []
    organisation = Dataset()
    organisation.DimensionOrganizationUID = uid("dimensions", modality)
    image.DimensionOrganizationSequence = [organisation]
    image.DimensionIndexSequence = [
        _dimension(organisation, word)
        for word in ("StackID", "InStackPositionNumber", "TemporalPositionIndex")
    ]
    {"CT": _ct_root, "MR": _mr_root, "PT": _pet_root}[modality](image, first)
    return image


def _dimension(organisation: Dataset, keyword: str) -> Dataset:
    item = Dataset()
    item.DimensionOrganizationUID = organisation.DimensionOrganizationUID
    item.DimensionIndexPointer = Tag(keyword)
    item.FunctionalGroupPointer = Tag("FrameContentSequence")
    return item


def _ct_root(image: Dataset, _: Dataset) -> None:
    image.MultienergyCTAcquisition = "NO"


def _mr_root(image: Dataset, _: Dataset) -> None:
    image.ComplexImageComponent, image.AcquisitionContrast = "MAGNITUDE", "T2"
    image.MagneticFieldStrength = 1.5
    image.KSpaceFiltering = "NONE"
    image.ResonantNucleus = "1H"
    image.ApplicableSafetyStandardAgency = "IEC"
    image.PulseSequenceName, image.MRAcquisitionType = "tse", "2D"
    image.EchoPulseSequence = "SPIN"
    for keyword in ("PhaseContrast", "EchoPlanarPulseSequence", "SaturationRecovery"):
        setattr(image, keyword, "NO")
    image.MultipleSpinEcho, image.TimeOfFlightContrast = "YES", "NO"
    image.SteadyStatePulseSequence = image.SpectrallySelectedSuppression = "NONE"
    image.OversamplingPhase = "NONE"
    image.GeometryOfKSpaceTraversal, image.SegmentedKSpaceTraversal = "RECTILINEAR", "SINGLE"
    image.RectilinearPhaseEncodeReordering = "LINEAR"
    image.NumberOfKSpaceTrajectories = 1


def _pet_root(image: Dataset, first: Dataset) -> None:
    isotope = first.RadiopharmaceuticalInformationSequence[0]
    isotope.RadiopharmaceuticalAgentNumber = 1
    isotope.RadiopharmaceuticalStartDateTime = "20260102090000"
    isotope.RadiopharmaceuticalRoute = "Intravenous"
    del isotope.RadiopharmaceuticalStartTime
    image.RadiopharmaceuticalInformationSequence = [isotope]
    image.TableMotion, image.TimeOfFlightInformationUsed = "NONE", "FALSE"
    image.DecayCorrected = image.AttenuationCorrected = image.ScatterCorrected = "YES"
    image.DeadTimeCorrected = image.RandomsCorrected = "YES"
    image.GantryMotionCorrected = image.PatientMotionCorrected = "NO"
    image.CountLossNormalizationCorrected = image.SensitivityCalibrated = "YES"
    image.NonUniformRadialSamplingCorrected = image.DetectorNormalizationCorrection = "YES"
    image.AttenuationCorrectionSource = "CT"
    image.AttenuationCorrectionTemporalRelationship = "SIMULTANEOUS"
    image.RandomsCorrectionMethod, image.ScatterCorrectionMethod = "DLYD", "Model based"
    image.CountsSource = "EMISSION"
    image.DecayCorrectionDateTime = "20260102100000"


def _shared(modality: str, first: Dataset) -> Dataset:
    shared = Dataset()
    kind = Dataset()
    kind.FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    kind.PixelPresentation, kind.VolumetricProperties = "MONOCHROME", "VOLUME"
    kind.VolumeBasedCalculationTechnique = "NONE"
    if modality == "MR":
        kind.ComplexImageComponent, kind.AcquisitionContrast = "MAGNITUDE", "T2"
    setattr(shared, _FRAME_TYPES[modality], [kind])
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = first.PixelSpacing, first.SliceThickness
    shared.PixelMeasuresSequence = [measures]
    orientation = Dataset()
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    shared.PlaneOrientationSequence = [orientation]
    anatomy, region = Dataset(), Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "69536005", "SCT", "Head"
    anatomy.AnatomicRegionSequence, anatomy.FrameLaterality = [region], "U"
    shared.FrameAnatomySequence = [anatomy]
    if modality == "CT":
        details, reconstruction = Dataset(), Dataset()
        details.KVP = first.get("KVP")
        reconstruction.ConvolutionKernel = first.get("ConvolutionKernel")
        shared.CTXRayDetailsSequence, shared.CTReconstructionSequence = [details], [reconstruction]
    if modality != "PT":
        shared.PixelValueTransformationSequence = [_scale(first)]
    return shared


def _per_frame(source: Dataset, i: int, volume: int, volumes: int) -> Dataset:
    groups = Dataset()
    content = Dataset()
    content.FrameAcquisitionDateTime = f"20260102{10 + volume}0005"
    content.FrameReferenceDateTime = content.FrameAcquisitionDateTime
    content.FrameAcquisitionDuration = 1000.0
    content.StackID, content.InStackPositionNumber = "1", i + 1
    content.TemporalPositionIndex = volume + 1
    content.DimensionIndexValues = [1, i + 1, volume + 1]
    groups.FrameContentSequence = [content]
    position = Dataset()
    position.ImagePositionPatient = source.ImagePositionPatient
    groups.PlanePositionSequence = [position]
    if source.Modality == "PT":
        groups.PixelValueTransformationSequence = [_scale(source)]
        groups.RealWorldValueMappingSequence = [_becquerels(source)]
    if source.Modality == "MR":
        echo = Dataset()
        echo.EffectiveEchoTime = float(source.EchoTime)
        groups.MREchoSequence = [echo]
    return groups


def _scale(source: Dataset) -> Dataset:
    item = Dataset()
    item.RescaleIntercept = source.get("RescaleIntercept", "0")
    item.RescaleSlope = source.get("RescaleSlope", "1")
    item.RescaleType = "HU" if source.Modality == "CT" else "US"
    return item


def _becquerels(source: Dataset) -> Dataset:
    item, unit = Dataset(), Dataset()
    unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = "Bq/ml", "UCUM", "Bq/ml"
    item.MeasurementUnitsCodeSequence = [unit]
    item.LUTExplanation = item.LUTLabel = "Activity"
    item.RealWorldValueSlope = float(source.RescaleSlope)
    item.RealWorldValueIntercept = 0.0
    kind = "SS" if source.PixelRepresentation else "US"
    limits = np.iinfo(np.int16 if source.PixelRepresentation else np.uint16)
    item.add_new("RealWorldValueFirstValueMapped", kind, int(limits.min))
    item.add_new("RealWorldValueLastValueMapped", kind, int(limits.max))
    return item
