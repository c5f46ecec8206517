"""A presentation state that writes a word of warning over the restored images.

A Grayscale Softcopy Presentation State (PS3.3 A.33.1) leaves the pixels as they are: a viewer
shows the text and can take it away. It replaces the image's own display, so it carries the
rescale and the windows of the images it refers to; those of one rescale share one object, since
the Modality LUT stands once in each (PS3.3 C.11.1). Without a window it would show the whole range
of the rescaled values, most of it empty: an image that has none gets the range of its series.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from highdicom.content import (
    ModalityLUTTransformation,
    PresentationLUTTransformation,
    ReferencedImageSequence,
)
from highdicom.pr import (
    AnnotationUnitsValues,
    GraphicAnnotation,
    GraphicLayer,
    GrayscaleSoftcopyPresentationState,
    TextJustificationValues,
    TextObject,
)
from pydicom.dataset import Dataset
from pydicom.valuerep import DA, TM, format_number_as_ds

from dicom_node.dicom import documents, provenance
from dicom_node.dicom.documents import Restoration, RestoredImage
from dicom_node.dicom.header import text, texts
from dicom_node.settings import IdentitySettings, ReportSettings

__all__ = ["softcopy_states"]

_LABEL = "AI_RESTORED"
# A band along the lower edge, as fractions of the displayed area: left, top, right, bottom.
_BAND = (0.02, 0.92, 0.98, 0.98)
_RESCALE = ("RescaleSlope", "RescaleIntercept", "RescaleType")
_VOI = (
    "WindowCenter",
    "WindowWidth",
    "WindowCenterWidthExplanation",
    "VOILUTFunction",
    "VOILUTSequence",
)


@dataclass(frozen=True)
class _Slice:
    """One slice as it is displayed: where it is, and what turns its stored values into grey."""

    image: RestoredImage
    frame: int | None  # from 1; None for a classic image
    rescale: Mapping[str, Any]
    voi: Dataset

    @property
    def display(self) -> str:
        """What all slices of one presentation state have in common."""
        header = self.image.header
        grid = [text(header, word) for word in ("Rows", "Columns", "PhotometricInterpretation")]
        return repr((grid, sorted((key, str(value)) for key, value in self.rescale.items())))


def softcopy_states(
    images: Sequence[RestoredImage],
    restoration: Restoration,
    identity: IdentitySettings,
    settings: ReportSettings,
    *,
    series_uid: str,
) -> Iterator[GrayscaleSoftcopyPresentationState]:
    """The presentation states of one restored series; together they refer to every slice once.

    series_uid: of the series that they go into.
    """
    groups: dict[str, list[_Slice]] = {}
    slices = [each for image in images for each in _slices(image)]
    window = _range(slices)
    for each in slices:
        seen = each if len(each.voi) else replace(each, voi=window)
        groups.setdefault(seen.display, []).append(seen)
    for number, slices in enumerate(groups.values(), start=1):
        yield _state(slices, number, restoration, identity, settings, series_uid)


def _slices(image: RestoredImage) -> Iterator[_Slice]:
    header = image.header
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if not frames:
        yield _Slice(image, None, _taken(header, _RESCALE), _voi(header))
        return
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for number, frame in enumerate(frames, start=1):
        pixel_values = _item(frame, shared, "PixelValueTransformationSequence")
        windows = _item(frame, shared, "FrameVOILUTSequence")
        yield _Slice(image, number, _taken(pixel_values, _RESCALE), _voi(windows))


def _range(slices: Sequence[_Slice]) -> Dataset:
    """The window from the lowest to the highest value of all slices (PS3.3 C.11.2.1.2)."""
    values = [
        stored * float(each.rescale.get("RescaleSlope", 1))
        + float(each.rescale.get("RescaleIntercept", 0))
        for each in slices
        for stored in each.image.stored[(each.frame or 1) - 1]
    ]
    low, high = min(values), max(values)
    window = Dataset()
    window.WindowCenter = format_number_as_ds((low + high + 1) / 2)
    window.WindowWidth = format_number_as_ds(high - low + 1)
    return window


def _item(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """A functional group of one frame, which is its own or shared by all (PS3.3 C.7.6.16.1)."""
    found = frame.get(keyword) or shared.get(keyword) or [Dataset()]
    return found[0] if isinstance(found[0], Dataset) else Dataset()


def _taken(header: Dataset, keywords: Sequence[str]) -> dict[str, Any]:
    return {word: header[word].value for word in keywords if texts(header, word)}


def _voi(header: Dataset) -> Dataset:
    taken = Dataset()
    for keyword in _VOI:
        if keyword in header and header[keyword].value not in (None, ""):
            taken.add(deepcopy(header[keyword]))
    return taken


def _state(
    slices: Sequence[_Slice],
    number: int,
    restoration: Restoration,
    identity: IdentitySettings,
    settings: ReportSettings,
    series_uid: str,
) -> GrayscaleSoftcopyPresentationState:
    header = slices[0].image.header
    images = list({each.image.reference: each.image for each in slices}.values())
    stand_ins = [_stand_in(image) for image in images]
    layer = GraphicLayer(layer_name=_LABEL, order=1, description="Restored by a neural network")
    first = f"{slices[0].image.reference.sop_instance_uid}:{slices[0].frame}"
    state = GrayscaleSoftcopyPresentationState(
        referenced_images=stand_ins,
        series_instance_uid=series_uid,
        series_number=documents.series_number(header, settings.series_number_offset + 1),
        sop_instance_uid=provenance.derived_uid(
            identity.uid_root, "presentation", series_uid, first, str(len(slices)), settings.text
        ),
        instance_number=number,
        manufacturer=identity.equipment.manufacturer,
        manufacturer_model_name=identity.equipment.model_name,
        software_versions=provenance.software_versions(restoration.model)[0],
        device_serial_number=restoration.model.sha256,
        content_label=_LABEL,
        content_description=settings.text,
        graphic_layers=[layer],
        graphic_annotations=[_annotation(stand_ins, layer, settings.text)],
        modality_lut_transformation=_modality_lut(slices[0].rescale),
        presentation_lut_transformation=_presentation_lut(header),
    )
    _add_windows(state, slices)
    _name_frames(state, slices)
    documents.finish(state, header, restoration, identity, description="presentation state")
    at = provenance.times(restoration.created, header)
    # PS3.3 C.7.3.1: type 2C, of a body part that is paired. Which are is not ours to know: without
    # a body part (type 3, and stated by the images) it may always stand, empty if need be.
    state.Laterality = text(header, "Laterality")
    state.PresentationCreationDate, state.PresentationCreationTime = DA(at.date), TM(at.time)
    return state


def _stand_in(image: RestoredImage) -> Dataset:
    dataset = documents.stand_in(text(image.header, "StudyInstanceUID"), image.reference)
    for keyword in ("SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns"):
        setattr(dataset, keyword, image.header[keyword].value)
    if image.source_frames:
        # The library looks for windows and rescale there; ours are added by frame.
        dataset.NumberOfFrames = image.frames
        dataset.SharedFunctionalGroupsSequence = [Dataset()]
        dataset.PerFrameFunctionalGroupsSequence = [Dataset() for _ in image.source_frames]
    return dataset


def _annotation(images: Sequence[Dataset], layer: GraphicLayer, words: str) -> GraphicAnnotation:
    return GraphicAnnotation(
        referenced_images=images,
        graphic_layer=layer,
        text_objects=[
            TextObject(
                words,
                AnnotationUnitsValues.DISPLAY,
                bounding_box=_BAND,
                text_justification=TextJustificationValues.LEFT,
            )
        ],
    )


def _modality_lut(rescale: Mapping[str, Any]) -> ModalityLUTTransformation | None:
    if "RescaleSlope" not in rescale or "RescaleIntercept" not in rescale:
        return None
    return ModalityLUTTransformation(
        rescale_intercept=rescale["RescaleIntercept"],
        rescale_slope=rescale["RescaleSlope"],
        rescale_type=str(rescale.get("RescaleType", "US")),
    )


def _presentation_lut(header: Dataset) -> PresentationLUTTransformation:
    # PS3.3 C.11.6.1.2: of an image whose lowest value is white, the inverse is its own display.
    inverse = text(header, "PhotometricInterpretation") == "MONOCHROME1"
    return PresentationLUTTransformation("INVERSE" if inverse else "IDENTITY")


def _add_windows(state: Dataset, slices: Sequence[_Slice]) -> None:
    """One Softcopy VOI LUT item for the slices of each window (PS3.3 C.11.8)."""
    windows: dict[str, list[_Slice]] = {}
    for each in slices:
        if len(each.voi):
            windows.setdefault(each.voi.to_json(), []).append(each)
    items = []
    for alike in windows.values():
        item = deepcopy(alike[0].voi)
        item.ReferencedImageSequence = _references(alike)
        items.append(item)
    if items:
        state.SoftcopyVOILUTSequence = items


def _references(slices: Sequence[_Slice]) -> list[Dataset]:
    """Each image once, with its frames where not all of it is meant."""
    frames: dict[str, list[int]] = {}
    images = {each.image.reference.sop_instance_uid: each.image for each in slices}
    for each in slices:
        if each.frame is not None:
            frames.setdefault(each.image.reference.sop_instance_uid, []).append(each.frame)
    items: list[Dataset] = []
    for uid, image in images.items():
        (item,) = ReferencedImageSequence([_stand_in(image)])
        if uid in frames and len(frames[uid]) < image.frames:
            item.ReferencedFrameNumber = frames[uid]
        items.append(item)
    return items


def _name_frames(state: Dataset, slices: Sequence[_Slice]) -> None:
    """Say which frames are meant wherever the object refers to images as wholes."""
    references = _references(slices)
    if not any("ReferencedFrameNumber" in item for item in references):
        return
    (series,) = state.ReferencedSeriesSequence
    series.ReferencedImageSequence = references
    for annotation in state.GraphicAnnotationSequence:
        annotation.ReferencedImageSequence = deepcopy(references)
