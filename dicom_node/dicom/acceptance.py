"""What may be restored, as far as headers can tell: the table of signals, as functions.

Every function looks at the headers of one volume and yields findings; a person reads the reasons.
Whether the volume lies in the training domain of a model is judged elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydicom.dataset import Dataset

from dicom_node.dicom import geometry, lossy, pixels
from dicom_node.dicom.geometry import SliceFrame
from dicom_node.dicom.header import RESTORABLE, number, text, texts, why_ignored
from dicom_node.dicom.suv import suv_factor
from dicom_node.errors import RefusedError
from dicom_node.settings import PolicySettings

__all__ = ["TASK_MODALITY", "Finding", "check", "gap_note"]

Level = Literal["ignore", "refuse", "warn"]

TASK_MODALITY: Mapping[str, str] = {
    "ct_denoise": "CT",
    "pet_synthesis": "PT",
    "mri_sr": "MR",
}
"""The Modality that each task restores."""

# Words of Image Type whose pixels are computed from others: no acquired slice, no physical noise.
_COMPUTED = frozenset(
    {
        *("MPR", "CSA MPR", "CSA_MPR", "CSAPARALLEL", "CSARADIAL", "REFORMATTED", "CURVED"),
        *("MIP", "MINIP", "MINIMUM", "MAXIMUM", "AVERAGE", "PROJECTION", "PROJECTION IMAGE"),
        *("VOLREN", "VOLUME_RENDERED", "RENDERING", "FUSED", "MOSAIC"),
        *("SUB", "SUBTRACT", "SUBTRACTION", "DIFFERENCE"),
        *("PERFUSION", "RCBF", "RCBV", "MTT", "TTP", "TMAX", "PARAMETRIC", "PARAMETRIC_MAP"),
        "PARAMETRIC MAP",
        # PS3.3 C.8.16.1.4: derived pixel contrast of a multi-frame image.
        *("ADDITION", "DIVISION", "MASKED", "MEAN", "MULTIPLICATION", "SUBTRACTION"),
        *("STD_DEVIATION", "T_TEST", "Z_SCORE", "QUANTITY"),
    }
)
# In MR alone: the quantity is not the magnitude that the model was trained on.
_NOT_MAGNITUDE = frozenset(
    {
        *("P", "PHASE", "R", "REAL", "I", "IMAGINARY", "VELOCITY", "B0"),
        *("ADC", "ADC MAP", "ADC_MAP", "FA", "TRACEW", "TENSOR", "PHASE MAP", "PHASE_MAP"),
        *("T1 MAP", "T1_MAP", "T2 MAP", "T2_MAP", "T2* MAP", "T2_STAR_MAP", "R2 MAP", "R2_MAP"),
    }
)

_HOUNSFIELD = frozenset({"", "HU", "US"})  # PS3.3 C.11.1.1.2; US: unspecified


@dataclass(frozen=True)
class Finding:
    """One signal: leave the volume alone, refuse it, or restore it with a warning."""

    level: Level
    reason: str


def check(headers: Sequence[Dataset], *, task: str, policy: PolicySettings) -> list[Finding]:
    """Everything that the headers of one volume say against restoring it; empty: nothing."""
    ignored = dict.fromkeys(reason for header in headers if (reason := why_ignored(header)))
    if ignored:
        return [Finding("ignore", reason) for reason in ignored]
    found = (finding for look in _LOOKS for finding in look(headers, task, policy))
    return list(dict.fromkeys(found))


Look = Callable[[Sequence[Dataset], str, PolicySettings], Iterator[Finding]]


def _modality(headers: Sequence[Dataset], task: str, _: PolicySettings) -> Iterator[Finding]:
    wanted = TASK_MODALITY[task]
    for header in headers:
        found = RESTORABLE[text(header, "SOPClassUID")]
        if found != wanted:
            yield Finding("refuse", f"task {task} restores {wanted}, not {found}")
        elif text(header, "Modality") != found:
            yield Finding("refuse", f"Modality does not agree with the storage class of {found}")


def _samples(headers: Sequence[Dataset], _: str, policy: PolicySettings) -> Iterator[Finding]:
    for header in headers:
        photometric = text(header, "PhotometricInterpretation")
        grey = photometric in ("MONOCHROME1", "MONOCHROME2")
        if not grey or number(header, "SamplesPerPixel") not in (None, 1.0):
            yield Finding("refuse", f"not grey-scale ({photometric or 'no interpretation'})")
        if text(header, "BurnedInAnnotation") == "YES":
            yield Finding("refuse", "annotation is burned into the pixels")
        reason = lossy.why_lossy(header)
        if reason is not None and not policy.accept_lossy:
            yield Finding("refuse", reason)
        try:
            pixels.pixel_format(header)
            pixels.rescale(header)
        except RefusedError as error:
            yield Finding("refuse", error.message)


def _image_type(headers: Sequence[Dataset], _: str, policy: PolicySettings) -> Iterator[Finding]:
    for header in headers:
        words = [word.upper() for word in texts(header, "ImageType")]
        unwanted = _COMPUTED | _NOT_MAGNITUDE if text(header, "Modality") == "MR" else _COMPUTED
        for word in words[2:]:
            if word in unwanted:
                yield Finding("refuse", f"ImageType {word}: computed, not acquired, pixels")
        yield from _frame_kind(header)
        if words[:1] == ["DERIVED"] and not policy.accept_derived:
            yield Finding("refuse", "ImageType DERIVED, and accept_derived is off")


def _frame_kind(header: Dataset) -> Iterator[Finding]:
    """What a multi-frame image says in attributes of its own (PS3.3 C.8.16.2, C.8.13.3.1.1)."""
    component = text(header, "ComplexImageComponent").upper()
    if component not in ("", "MAGNITUDE"):
        yield Finding("refuse", f"Complex Image Component {component}: not a magnitude image")
    technique = text(header, "VolumeBasedCalculationTechnique").upper()
    if technique not in ("", "NONE"):
        yield Finding("refuse", f"{technique}: computed, not acquired, pixels")
    if text(header, "PixelPresentation").upper() not in ("", "MONOCHROME"):
        yield Finding("refuse", "a colour image, or one with a colour map")


def _geometry(headers: Sequence[Dataset], _: str, policy: PolicySettings) -> Iterator[Finding]:
    try:
        frames = [geometry.slice_frame(header) for header in headers]
    except RefusedError as error:
        yield Finding("refuse", error.message)
        return
    if not geometry.one_orientation(frames):
        yield Finding("refuse", "slices of several orientations in one series, as in a localizer")
        return
    modality = text(headers[0], "Modality")
    plane = geometry.plane_name(frames[0])
    if policy.planes.get(modality) == "axial" and plane != "axial":  # type: ignore[call-overload]
        yield Finding("refuse", f"{plane} slices: reformatted {modality} is not restored")
    yield from _stack(headers, frames)


def _stack(headers: Sequence[Dataset], frames: Sequence[SliceFrame]) -> Iterator[Finding]:
    if len({(number(header, "Rows"), number(header, "Columns")) for header in headers}) > 1:
        yield Finding("refuse", "slices of several matrix sizes in one volume")
    along = np.sort(geometry.positions(frames))
    if geometry.has_duplicates(along):
        yield Finding("refuse", "several slices at one position in one volume")
    gap = gap_note([len(run) for run in geometry.contiguous_runs(along)])
    if gap is not None:
        yield Finding("warn", gap)


def gap_note(lengths: Sequence[int]) -> str | None:
    """What is to be said of a volume whose runs of equal spacing have these numbers of slices."""
    if len(lengths) < 2:
        return None
    return f"slices are missing or unevenly spaced: runs of {' + '.join(map(str, lengths))}"


def _quantity(headers: Sequence[Dataset], task: str, policy: PolicySettings) -> Iterator[Finding]:
    if task == "ct_denoise":
        for header in headers:
            unit = text(header, "RescaleType")
            if unit not in _HOUNSFIELD:
                yield Finding("refuse", f"Rescale Type {unit}: the values are not Hounsfield units")
    if task == "pet_synthesis":
        reason = suv_factor(headers).reason
        if reason is not None:
            level: Level = "warn" if policy.pet_units == "scale" else "refuse"
            yield Finding(level, f"no SUV: {reason}")


_EXPECTED = {
    "CT": ("ConvolutionKernel", "SliceThickness"),
    "MR": ("MagneticFieldStrength", "SliceThickness"),
    "PT": ("SliceThickness",),
}


def _missing(headers: Sequence[Dataset], task: str, policy: PolicySettings) -> Iterator[Finding]:
    level: Level = "warn" if policy.missing_metadata == "warn" else "refuse"
    for keyword in _EXPECTED[TASK_MODALITY[task]]:
        if any(not text(header, keyword) for header in headers):
            yield Finding(level, f"{keyword} is absent")


_LOOKS: tuple[Look, ...] = (_modality, _samples, _image_type, _geometry, _quantity, _missing)
