"""What a derived instance is made from: the facts that every value of its header follows from."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from highdicom.sr.coding import CodedConcept
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import format_number_as_ds

from dicom_node.dicom import provenance
from dicom_node.dicom.geometry import SAME_GRID, Resampling
from dicom_node.dicom.header import number, text
from dicom_node.dicom.image_classes import CLASSES, ImageClass
from dicom_node.dicom.pixels import Rescale
from dicom_node.dicom.provenance import ModelIdentity
from dicom_node.settings import IdentitySettings

if TYPE_CHECKING:
    from dicom_node.dicom.prepared import Prepared

__all__ = ["Derivation", "Frame", "Making", "Value", "described", "slope_text", "steps"]


@dataclass(frozen=True)
class Derivation:
    """What all instances of one derived series share."""

    task: str
    model: ModelIdentity
    identity: IdentitySettings
    remarks: tuple[str, ...]
    strength: float
    created: datetime
    parameters_hash: str


@dataclass(frozen=True)
class Frame:
    """One restored slice: where it came from, and its stored values with their scale."""

    header: Dataset  # of the source slice; of a frame: `multiframe.frame_headers`
    number: int  # in the source image, from 1
    #: (rows, columns) as stored, or what reads them
    pixels: NDArray[Any] | Callable[[], NDArray[Any]]
    source_rescale: Rescale
    rescale: Rescale
    clamped: int = 0
    resampling: Resampling = SAME_GRID
    prepared: Prepared | None = None  # what of its image was made before

    @property
    def stored(self) -> NDArray[Any]:
        """The stored values (rows, columns)."""
        return self.pixels() if callable(self.pixels) else self.pixels


@dataclass(frozen=True)
class Making:
    """One derived instance on its way; frames in the order of the source's."""

    source: Dataset  # as received, without pixels
    frames: tuple[Frame, ...]
    derivation: Derivation
    series_uid: str
    sop_uid: str

    # Asked for every attribute of the table, so looked up once.
    @cached_property
    def image(self) -> ImageClass:
        """The storage class of source and result."""
        return CLASSES[text(self.source, "SOPClassUID")]

    @property
    def resampling(self) -> Resampling:
        """How the grid changed, alike for all frames of one instance."""
        return self.frames[0].resampling


Value = Callable[[Making, Frame], Any]
"""What makes the value of one attribute of an instance, or of one of its frames."""


def described(making: Making, earlier: Dataset) -> str:
    """What was done, in words; *earlier* holds what was done before."""
    derivation = making.derivation
    return provenance.derivation_description(
        making.source,
        task=derivation.task,
        model=derivation.model,
        strength=derivation.strength,
        parameters_hash=derivation.parameters_hash,
        remarks=derivation.remarks,
        earlier=text(earlier, "DerivationDescription"),
    )


def steps(making: Making, earlier: Dataset) -> list[Dataset]:
    """The codes of what was done, in order (PS3.3 C.12.4): *earlier*'s, the new grid, our step."""
    done = [deepcopy(item) for item in earlier.get("DerivationCodeSequence") or ()]
    if making.resampling.changes:
        done.append(CodedConcept.from_code(codes.DCM.SpatialResampling))
    return [*done, provenance.derivation_code(making.derivation.task)]


def slope_text(frame: Frame) -> str:
    """The slope of a frame as a DS that reads back as exactly the slope that was used."""
    if number(frame.header, "RescaleSlope") == frame.rescale.slope:
        return text(frame.header, "RescaleSlope")
    return format_number_as_ds(frame.rescale.slope)
