"""Stored pixel values and what they mean: decode, rescale, padding, and the way back.

Forward: stored · slope + intercept (PS3.3 C.7.6.16.2.9 in one frame: C.8.2.1, C.8.9.4). Back: the
nearest stored step, half to even, inside the range that Bits Stored allows. What padding marks
is never changed, and nothing else may come out looking like padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.valuerep import format_number_as_ds

from dicom_node.dicom.geometry import Resampling
from dicom_node.dicom.header import number, quiet_pydicom, text, texts
from dicom_node.errors import RefusedError, UnreadableInstanceError

__all__ = [
    "PixelFormat",
    "Quantised",
    "Rescale",
    "decode",
    "on_grid",
    "padding_mask",
    "padding_range",
    "pixel_format",
    "quantise",
    "quantise_slice_scale",
    "rescale",
    "to_physical",
]

Stored = NDArray[Any]
Mask = NDArray[np.bool_]

# Below this no tissue, air or noise lies: scanners fill the corners outside the reconstruction
# circle with -2000 or -3024 HU and often declare no Pixel Padding Value.
_UNDECLARED_PADDING_HU = -1500.0

# Without them the values are in no unit that is known: they are type 1 there, and a slope of 1 or
# an intercept of 0 would be a guess that is off by 1024 HU on most scanners. The intercept of a PET
# image is 0 by definition.
_TYPE_1 = {
    "CT": ("RescaleSlope", "RescaleIntercept"),  # PS3.3 C.8.2.1, C.8.15.3.10
    "PT": ("RescaleSlope",),  # PS3.3 C.8.9.4
}

_MOST_BITS, _FLOAT32_STEPS = 16, 1 << 24
# With the factor of SUV on top, steps of this size are still far from float32's limits.
_SMALLEST = 1e-20

# What pyo3 raises where a decoder in Rust panics, which that of RLE does over a segment that is
# longer than its plane; it is no Exception, so that it would end the process, and has no module.
_PANIC = "PanicException"


@dataclass(frozen=True)
class Rescale:
    """The modality transformation of one slice: physical = stored · slope + intercept."""

    slope: float
    intercept: float


@dataclass(frozen=True)
class PixelFormat:
    """How one sample is stored (PS3.3 C.7.6.3)."""

    bits_allocated: int
    bits_stored: int
    signed: bool

    @property
    def minimum(self) -> int:
        """The lowest storable value."""
        return -(1 << (self.bits_stored - 1)) if self.signed else 0

    @property
    def maximum(self) -> int:
        """The highest storable value."""
        return (1 << (self.bits_stored - (1 if self.signed else 0))) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The little-endian type of one allocated sample."""
        return np.dtype(f"<{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


@dataclass(frozen=True)
class Quantised:
    """One slice on its way back: stored values, their scale, and how many had to be clamped."""

    stored: Stored  # (R, C)
    rescale: Rescale
    clamped: int


def pixel_format(header: Dataset) -> PixelFormat:
    """The sample format; RefusedError where it is not 8 to 16 bits in the low end of its word."""
    allocated = int(number(header, "BitsAllocated") or 0)
    stored = int(number(header, "BitsStored") or 0)
    high = int(number(header, "HighBit") or 0)
    if allocated not in (8, 16) or not 8 <= stored <= allocated:
        raise RefusedError(f"{stored} bits stored in {allocated}: only 8 to 16 are restored")
    if high != stored - 1:
        raise RefusedError(f"High Bit {high} with {stored} bits stored is a retired packing")
    return PixelFormat(allocated, stored, bool(number(header, "PixelRepresentation")))


def decode(dataset: Dataset, frame: int = 1) -> Stored:
    """The stored values of one frame (from 1), (rows, columns), whatever the transfer syntax.

    No other frame is decoded. Raises UnreadableInstanceError, which names the SOP Instance,
    where they do not decode.
    """
    wanted = pixel_format(dataset)
    try:
        with quiet_pydicom():
            pixels = np.asarray(pixel_array(dataset, index=frame - 1))
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        uid = text(dataset, "SOPInstanceUID")
        raise UnreadableInstanceError(
            f"the pixel data of SOP Instance {uid} do not decode ({type(error).__name__})",
            sop_instance_uid=uid,
        ) from None
    if pixels.ndim != 2:
        raise RefusedError(f"an image of shape {pixels.shape} is not one grey-scale slice")
    return pixels.astype(wanted.dtype, copy=False)


def rescale(header: Dataset) -> Rescale:
    """The slope and intercept of a slice; of an MR image 1 and 0 where it states none.

    Raises RefusedError where a CT image lacks either or a PET image the slope, for a slope of zero
    or one that is no number or several, for a lookup table, which is no straight line and cannot
    be inverted, and for values that float32 cannot tell apart.
    """
    if header.get("ModalityLUTSequence"):
        raise RefusedError("a Modality LUT in place of a rescale slope cannot be inverted")
    modality = text(header, "Modality")
    for keyword in _TYPE_1.get(modality, ()):
        if not any(texts(header, keyword)):
            raise RefusedError(f"{keyword} is absent from a {modality} image: its unit is unknown")
    slope = _stated(header, "RescaleSlope", 1.0)
    intercept = _stated(header, "RescaleIntercept", 0.0)
    if slope == 0.0:
        raise RefusedError("RescaleSlope is zero")
    # Volumes are float32, of 24 bits: where the intercept takes so many of them that less than a
    # quarter of a stored step is left, a step would be rounded to another.
    steps = abs(intercept / slope) + (1 << _MOST_BITS)
    if steps > _FLOAT32_STEPS / 4 or not _SMALLEST < abs(slope) < 1 / _SMALLEST:
        raise RefusedError("RescaleSlope and RescaleIntercept leave no room for single steps")
    return Rescale(slope, intercept)


def _stated(header: Dataset, keyword: str, default: float) -> float:
    stated = texts(header, keyword)
    if len(stated) > 1:
        # Readers differ in which of them they take, if they take any.
        raise RefusedError(f"{keyword} has {len(stated)} values in place of one")
    if not any(stated):
        return default
    value = number(header, keyword)
    if value is None:
        raise RefusedError(f"{keyword} is no number")
    return value


def to_physical(stored: Stored, by: Rescale) -> NDArray[np.float64]:
    """Stored values in the slice's physical units."""
    return stored.astype(np.float64) * by.slope + by.intercept


def padding_range(header: Dataset) -> tuple[int, int] | None:
    """The stored values that mark padding, lowest and highest (PS3.3 C.7.5.1.1.2); None: none."""
    value = number(header, "PixelPaddingValue")
    if value is None:
        return None
    limit = number(header, "PixelPaddingRangeLimit")
    other = value if limit is None else limit
    return int(min(value, other)), int(max(value, other))


def padding_mask(stored: Stored, header: Dataset, by: Rescale) -> Mask:
    """Which pixels are padding: the declared ones, and in CT what lies below any tissue."""
    declared = padding_range(header)
    mask = np.zeros(stored.shape, dtype=np.bool_)
    if declared is not None:
        mask |= (stored >= declared[0]) & (stored <= declared[1])
    # Few slices have such pixels: the lowest tells, and is found sooner than all are converted.
    ends = np.array([stored.min(), stored.max()]) if stored.size else stored
    if text(header, "Modality") == "CT" and (to_physical(ends, by) <= _UNDECLARED_PADDING_HU).any():
        mask |= to_physical(stored, by) <= _UNDECLARED_PADDING_HU
    return mask


def on_grid(values: NDArray[Any], by: Resampling) -> NDArray[Any]:
    """Each sample of a finer grid gets the nearest sample of the source, (R, C) → (R', C')."""
    if not by.changes:
        return values
    places = (
        np.rint(np.arange(size * by.factor) / by.factor + shift).clip(0, size - 1).astype(int)
        for size, shift in zip(values.shape, by.shift, strict=True)
    )
    nearest: NDArray[Any] = values[np.ix_(*places)]
    return nearest


def quantise(
    physical: NDArray[np.float64],
    by: Rescale,
    form: PixelFormat,
    *,
    source: Stored,
    mask: Mask,
    padding: tuple[int, int] | None,
) -> Quantised:
    """Physical values back to stored steps of a given scale.

    physical, source, mask: (R, C). Rounds half to even, clamps to the stored range and counts
    what it clamped, gives masked pixels their source value, and moves a pixel that would read
    as padding by one step.
    """
    steps = np.rint((physical - by.intercept) / by.slope)
    outside = ((steps < form.minimum) | (steps > form.maximum)) & ~mask
    stored = np.clip(steps, form.minimum, form.maximum).astype(form.dtype)
    if padding is not None:
        stored = _clear_of_padding(stored, padding, form)
    return Quantised(np.where(mask, source, stored).astype(form.dtype), by, int(outside.sum()))


def _clear_of_padding(stored: Stored, padding: tuple[int, int], form: PixelFormat) -> Stored:
    low, high = padding
    reads_as_padding = (stored >= low) & (stored <= high)
    if not reads_as_padding.any():
        return stored
    upward = high + 1 <= form.maximum
    downward = low - 1 >= form.minimum
    middle = (low + high) / 2.0
    up = (stored >= middle) if upward and downward else np.full(stored.shape, upward)
    return np.where(reads_as_padding, np.where(up, high + 1, low - 1), stored).astype(form.dtype)


def quantise_slice_scale(
    physical: NDArray[np.float64],
    by: Rescale,
    form: PixelFormat,
    *,
    source: Stored,
    mask: Mask,
    padding: tuple[int, int] | None,
) -> Quantised:
    """PET: stored steps on a new slope for this slice, intercept 0 (PS3.3 C.8.9.4.1.6).

    The slope spreads the slice's largest value over the 16 stored bits. A slice whose values are
    exactly the source's keeps the source's slope and pixels.
    """
    kept = quantise(physical, by, form, source=source, mask=mask, padding=padding)
    if kept.clamped == 0 and np.array_equal(kept.stored, source) and by.intercept == 0.0:
        error = np.abs(to_physical(kept.stored, by) - physical)[~mask]
        # float32 holds 24 bits; what is left of a stored step after the trip is that rounding.
        if not error.size or float(error.max()) <= 1e-2 * abs(by.slope):
            return kept
    wide = PixelFormat(16, 16, form.signed)
    slope = _slope_for(physical[~mask], wide.maximum)
    new = Rescale(slope, 0.0)
    return quantise(physical, new, wide, source=source, mask=mask, padding=padding)


def _slope_for(values: NDArray[np.float64], maximum: int) -> float:
    """The smallest slope that a DS of 16 characters can hold and that reaches every value."""
    peak = float(np.abs(values).max()) if values.size else 0.0
    if peak == 0.0:
        return 1.0
    slope = float(format_number_as_ds(peak / maximum))
    return slope if slope * maximum >= peak else float(f"{peak / maximum * (1 + 1e-8):.9g}")
