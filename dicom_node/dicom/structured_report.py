"""The report of one restoration: an Enhanced SR by TID 1500 (PS3.16), one per job.

Who restored what with which weights, and what each slice measured: a reader of the archive finds
it without our ledger. Only the images' own identifiers go in; nothing here is a finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    CodedConcept,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    ImageContentItem,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
    UIDRefContentItem,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from dicom_node.dicom import documents, provenance
from dicom_node.dicom.documents import Reference, Restoration, RestoredImage
from dicom_node.dicom.header import PRIVATE_SCHEME, text
from dicom_node.settings import IdentitySettings, ReportSettings

__all__ = ["CONCEPTS", "MEASURES", "SERIES_ROLES", "VERDICTS", "GateValue", "enhanced_sr"]


@dataclass(frozen=True)
class GateValue:
    """What one gate or guard measured.

    unit: UCUM. verdict: pass, warn, hold or refuse; None where the value is not judged. slice:
    index from 0 in the order of the restored slices, which is that of instances and their
    frames; None for the whole job.
    """

    name: str
    value: float
    verdict: str | None = None
    slice: int | None = None
    unit: str = "1"


MEASURES: dict[str, tuple[str, str]] = {
    "mean_drift": ("NETWORKDRIFT", "Change of the slice mean by the network, before it is held"),
    "delivered_drift": ("DELIVEREDDRIFT", "Change of the slice mean in the delivered pixels"),
    "residual_ratio": ("RESIDUALRATIO", "Spread of the change over spread of the input"),
    "latent_distance": ("LATENTDISTANCE", "Distance of the latent from the codebook"),
    "intensity_scale": ("INTENSITYSCALE", "Factor from physical units to the model's window"),
    "support_rows": ("SUPPORTROWS", "Measured share of k-space along rows"),
    "support_columns": ("SUPPORTCOLUMNS", "Measured share of k-space along columns"),
    "class_logit_mri_sr": ("LOGITMRISR", "Task classifier, MR super-resolution"),
    "class_logit_ct_denoise": ("LOGITCTDENOISE", "Task classifier, CT denoising"),
    "class_logit_pet_synthesis": ("LOGITPETSYNTH", "Task classifier, PET restoration"),
    "finite": ("NOTFINITE", "Pixels that are not finite"),
    "range": ("BEYONDRANGE", "Values beyond those of the input"),
    "low_frequency": ("LOWFREQUENCY", "Change of the low frequencies"),
    "gain": ("CONTRASTGAIN", "Change of contrast"),
    "hu_bias_air": ("BIASAIR", "Change of the mean of air"),
    "hu_bias_lung": ("BIASLUNG", "Change of the mean of lung"),
    "hu_bias_fat": ("BIASFAT", "Change of the mean of fat"),
    "hu_bias_soft": ("BIASSOFT", "Change of the mean of soft tissue"),
    "hu_bias_bone": ("BIASBONE", "Change of the mean of bone"),
    "whiteness": ("WHITENESS", "Correlation of what was taken away"),
    "edge_correlation": ("EDGECORRELATION", "Correlation of the change with edges"),
    "structure": ("STRUCTUREMOVED", "Strongest blob of the change"),
    "residual_energy": ("RESIDUALENERGY", "Spread of the change over the noise of the input"),
    "network_drift": ("NETWORKMEAN", "Change of the slice mean by the network"),
    "network_energy": ("NETWORKENERGY", "Spread of the network's change over that of the input"),
    "activity": ("ACTIVITYCHANGE", "Change of the total activity"),
    "local_activity": ("LOCALACTIVITYCHANGE", "Largest change of the activity around a voxel"),
    "hot_suv": ("HOTSUVMEAN", "Change of the mean SUV of hot regions"),
    "hot_suv_small": ("HOTSUVMEANSMALL", "Change of the mean SUV of small hot regions"),
    "hot_peak": ("HOTSUVPEAK", "Change of the peak SUV of hot regions"),
    "data_consistency": ("DATACONSISTENCY", "Change of the acquired k-space"),
    "noise_level": ("NOISELEVEL", "Noise of the input"),
    "intensity": ("INTENSITYLEVEL", "Level of the values of the input"),
    "units": ("UNITSDOUBT", "Whether the values of the input are those of its units"),
    "echo": ("ECHO", "Strongest double contour of the input"),
    "sharpness": ("SHARPNESS", "Distance of the input from the training towards a sharper kernel"),
    "cleanness": ("CLEANNESS", "Distance of the input from the training towards full quality"),
    "empty_band": ("EMPTYBAND", "Measured share of k-space"),
    "ghosting": ("GHOSTING", "Distance of the input from scans without motion"),
    "texture": ("TEXTURE", "Distance of the texture of the input from those of the training"),
    "restored_before": ("RESTOREDBEFORE", "Correlation of the input with the added detail"),
    "likeness": ("LIKENESS", "Distance of the input from those of the training"),
    "domain": ("OUTSIDEDOMAIN", "Facts of the acquisition outside the domain"),
    "routing": ("ROUTINGMARGIN", "Preference of the classifier for the task"),
    "latent": ("LATENTGATE", "Distance of the latent from the codebook, judged"),
    "reference": ("REFERENCEGATE", "Distance of the result from the reference image"),
    "continuity": ("CONTINUITY", "Change between neighbouring slices"),
    "slice_order": ("SLICEORDER", "Likeness to the own slice against its neighbours"),
    "idempotence": ("IDEMPOTENCE", "Change of the result when it is restored again"),
    "perturbation": ("PERTURBATION", "Change of the result over that of a disturbed input"),
    "weights": ("WEIGHTSCHANGED", "Changes of the weights in memory"),
    "guard": ("GUARDSTRIPPED", "Guards of the engine that did not hold"),
}
"""Code Value and Code Meaning of what is measured; another name gets a code from itself."""

VERDICTS: dict[str, tuple[str, str]] = {
    "pass": ("GATEPASS", "Within the limit"),
    "warn": ("GATEWARN", "Past the limit, a warning"),
    "hold": ("GATEHOLD", "Past the limit, held for a person"),
    "refuse": ("GATEREFUSE", "Past the limit, refused"),
}
"""Code Value and Code Meaning of each verdict."""

SERIES_ROLES = {
    "source": ("SOURCESERIES", "Series before restoration"),
    "restored": ("RESTOREDSERIES", "Series after restoration"),
}
"""Code Value and Code Meaning of the two series that a report is about."""

CONCEPTS = {
    "role": ("SERIESROLE", "Role of the series"),
    "restored": ("RESTOREDIMAGE", "Image after restoration"),
    "pixels": ("PIXELSHA256", "SHA-256 of the restored pixel data"),
}
"""Code Value and Code Meaning of the other concepts of a report."""

# PS3.16 CID 82 and 85: Code Meaning by UCUM; an annotation, as {pixels}, is its own.
_UNITS = {
    "1": "no units",
    "%": "Percent",
    "[hnsf'U]": "Hounsfield unit",
    "{SUVbw}g/ml": "Standardized Uptake Value body weight",
}
# PS3.16 CID 100: the examination that the images are of, as far as the modality tells.
_PROCEDURES = {
    "CT": codes.LN.CTUnspecifiedBodyRegion,
    "MR": codes.LN.MRIUnspecifiedBodyRegion,
    "PT": codes.LN.PETUnspecifiedBodyRegion,
}
_SH_LENGTH = 16
_CONTAINS = RelationshipTypeValues.CONTAINS
_CONTEXT = RelationshipTypeValues.HAS_ACQ_CONTEXT


def enhanced_sr(
    images: Sequence[RestoredImage],
    gates: Iterable[GateValue],
    restoration: Restoration,
    identity: IdentitySettings,
    settings: ReportSettings,
    *,
    uids: tuple[str, str],
    pixels_sha256: str,
) -> EnhancedSR:
    """The report on *images*, in the volume's order.

    uids: of the report's series and of the report. pixels_sha256: of the images' pixel data, one
    after the other.
    """
    header = images[0].header
    content = _content(images, tuple(gates), restoration, identity, uids[1])
    content.ContentSequence.extend(_remarks(restoration, pixels_sha256))
    study = text(header, "StudyInstanceUID")
    references = [*(each.source for each in images), *(each.reference for each in images)]
    report = EnhancedSR(
        evidence=[documents.stand_in(study, reference) for reference in references],
        content=content,
        series_instance_uid=uids[0],
        series_number=documents.series_number(header, settings.series_number_offset),
        sop_instance_uid=uids[1],
        instance_number=1,
        manufacturer=identity.equipment.manufacturer,
        is_complete=True,
        is_final=True,
    )
    documents.finish(report, header, restoration, identity, description="restoration report")
    return report


def _content(
    images: Sequence[RestoredImage],
    gates: tuple[GateValue, ...],
    restoration: Restoration,
    identity: IdentitySettings,
    uid: str,
) -> Dataset:
    """The content tree: TID 1500 with one measurement group for the volume and for each slice."""
    device = provenance.device_uid(identity.uid_root, restoration.model)
    algorithm = _algorithm(restoration, identity)
    slices = [(image, frame) for image in images for frame in range(image.frames)]
    modality = text(images[0].header, "Modality")
    measured = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=_device(device, identity)),
        procedure_reported=_PROCEDURES[modality],
        imaging_measurements=[
            _group("volume", None, gates, algorithm, identity, uid),
            *(
                _group(f"slice {i + 1}", i, gates, algorithm, identity, uid, _source(*place))
                for i, place in enumerate(slices)
            ),
        ],
    )
    (root,) = measured
    # TID 1500 row 8: the library stands before the measurements.
    root.ContentSequence.insert(len(root.ContentSequence) - 1, _library(images, modality))
    return root


def _device(uid: str, identity: IdentitySettings) -> ObserverContext:
    return ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=uid,
            manufacturer_name=identity.equipment.manufacturer,
            model_name=identity.equipment.model_name,
        ),
    )


def _algorithm(restoration: Restoration, identity: IdentitySettings) -> AlgorithmIdentification:
    """The model by TID 4019: name, version, and the digests that pin it down."""
    model = restoration.model
    return AlgorithmIdentification(
        name=model.name,
        version=model.version,
        parameters=[
            f"task {restoration.task}",
            f"weights sha256 {model.sha256}",
            f"parameters sha256 {restoration.parameters_hash}",
            f"strength {restoration.strength:g}",
        ],
        family=codes.DCM.ArtificialIntelligence,
        manufacturer=identity.equipment.manufacturer,
    )


def _group(
    label: str,
    number: int | None,
    gates: tuple[GateValue, ...],
    algorithm: AlgorithmIdentification,
    identity: IdentitySettings,
    uid: str,
    sources: Sequence[SourceImageForMeasurementGroup] = (),
) -> MeasurementsAndQualitativeEvaluations:
    """TID 1501: the values of one slice, or of the volume, with the images they were taken on."""
    own = [gate for gate in gates if gate.slice == number]
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=provenance.derived_uid(identity.uid_root, "tracking", uid, label), identifier=label
        ),
        # Once, with the volume: it is the same for every slice.
        algorithm_id=algorithm if number is None else None,
        measurements=[
            Measurement(_named(gate.name), float(f"{gate.value:.9g}"), _unit(gate.unit))
            for gate in own
            if math.isfinite(gate.value)
        ],
        qualitative_evaluations=[
            QualitativeEvaluation(_named(gate.name), _private(VERDICTS[gate.verdict]))
            for gate in own
            if gate.verdict is not None
        ],
        source_images=sources or None,
    )


def _source(image: RestoredImage, frame: int) -> list[SourceImageForMeasurementGroup]:
    """The slice before and after, which the values compare."""
    classic = not image.source_frames
    before = None if classic else [image.source_frames[frame]]
    after = None if classic else [frame + 1]
    return [
        SourceImageForMeasurementGroup(each.sop_class_uid, each.sop_instance_uid, frames)
        for each, frames in ((image.source, before), (image.reference, after))
    ]


def _library(images: Sequence[RestoredImage], modality: str) -> ContainerContentItem:
    """TID 1600: the images before and after restoration, each series a group of its own."""
    library = ContainerContentItem(
        codes.DCM.ImageLibrary, template_id="1600", relationship_type=_CONTAINS
    )
    groups: list[ContentItem] = [
        _library_group("source", _distinct(image.source for image in images), modality),
        _library_group("restored", _distinct(image.reference for image in images), modality),
    ]
    library.ContentSequence = ContentSequence(groups)
    return library


def _library_group(
    role: str, references: Sequence[Reference], modality: str
) -> ContainerContentItem:
    source = CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)
    name = source if role == "source" else _private(CONCEPTS["restored"])
    group = ContainerContentItem(codes.DCM.ImageLibraryGroup, relationship_type=_CONTAINS)
    items: list[ContentItem] = [
        CodeContentItem(codes.DCM.Modality, _modality(modality), _CONTEXT),
        CodeContentItem(_private(CONCEPTS["role"]), _private(SERIES_ROLES[role]), _CONTEXT),
        UIDRefContentItem(codes.DCM.SeriesInstanceUID, references[0].series_instance_uid, _CONTEXT),
        *(
            ImageContentItem(
                name,
                each.sop_class_uid,
                each.sop_instance_uid,
                relationship_type=_CONTAINS,
            )
            for each in references
        ),
    ]
    group.ContentSequence = ContentSequence(items)
    return group


def _distinct(references: Iterable[Reference]) -> list[Reference]:
    return list(dict.fromkeys(references))


def _modality(modality: str) -> CodedConcept:
    known = {
        "CT": codes.DCM.ComputedTomography,
        "MR": codes.DCM.MagneticResonance,
        "PT": codes.DCM.PositronEmissionTomography,
    }
    return CodedConcept.from_code(known[modality])


def _remarks(restoration: Restoration, pixels_sha256: str) -> Iterator[TextContentItem]:
    yield TextContentItem(_private(CONCEPTS["pixels"]), pixels_sha256, _CONTAINS)
    for warning in restoration.warnings:
        yield TextContentItem(codes.DCM.Comment, warning, _CONTAINS)


def _named(name: str) -> CodedConcept:
    plain = name.replace("_", " ")
    return _private(MEASURES.get(name, (name.upper().replace("_", "")[:_SH_LENGTH], plain)))


def _private(coded: tuple[str, str]) -> CodedConcept:
    return CodedConcept(coded[0], PRIVATE_SCHEME, coded[1])


def _unit(unit: str) -> CodedConcept:
    return CodedConcept(unit, "UCUM", _UNITS.get(unit) or unit.strip("{}"))
