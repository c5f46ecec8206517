"""Numbers with units: what a header attribute is measured in, and what a rule may ask of a header.

A rule may name an attribute by its keyword, in the unit that the standard gives it, or one of the
`QUANTITIES`, which gather what several attributes say of one thing and always need a unit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from dicom_node.dicom.header import number, numbers, texts

__all__ = ["ATTRIBUTE_UNITS", "QUANTITIES", "REFERENCES", "Quantity", "convert", "measured"]

# What is measured → unit → how many of the first unit of that kind.
_KINDS: Mapping[str, Mapping[str, float]] = {
    "length": {"mm": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3, "µm": 1e-3},
    "time": {"ms": 1.0, "s": 1e3, "min": 6e4, "h": 3.6e6, "us": 1e-3, "µs": 1e-3},
    "voltage": {"kV": 1.0, "V": 1e-3},
    "charge": {"mAs": 1.0, "uAs": 1e-3, "µAs": 1e-3},
    "current": {"mA": 1.0, "uA": 1e-3, "µA": 1e-3},
    "dose": {"mGy": 1.0, "cGy": 10.0, "Gy": 1e3, "uGy": 1e-3, "µGy": 1e-3},
    "activity": {"MBq": 1.0, "Bq": 1e-6, "kBq": 1e-3, "GBq": 1e3, "mCi": 37.0},
    "activity per mass": {"MBq/kg": 1.0, "kBq/kg": 1e-3},
    "activity per mass times time": {"MBq*min/kg": 1.0},
    "field": {"T": 1.0, "mT": 1e-3},
    "mass": {"kg": 1.0, "g": 1e-3},
    "frequency": {"MHz": 1.0, "kHz": 1e-3, "Hz": 1e-6},
    "angle": {"deg": 1.0},
    "b-value": {"s/mm2": 1.0},
}
_UNITS: Mapping[str, tuple[str, float]] = {
    unit: (kind, factor) for kind, units in _KINDS.items() for unit, factor in units.items()
}
ATTRIBUTE_UNITS: Mapping[str, str] = {
    "KVP": "kV",
    "Exposure": "mAs",
    "ExposureInuAs": "µAs",
    "ExposureInmAs": "mAs",
    "ExposureTime": "ms",
    "ExposureTimeInms": "ms",
    "XRayTubeCurrent": "mA",
    "XRayTubeCurrentInmA": "mA",
    "CTDIvol": "mGy",
    "SliceThickness": "mm",
    "SpacingBetweenSlices": "mm",
    "PixelSpacing": "mm",
    "ReconstructionDiameter": "mm",
    "DataCollectionDiameter": "mm",
    "EchoTime": "ms",
    "EffectiveEchoTime": "ms",
    "RepetitionTime": "ms",
    "InversionTime": "ms",
    "FlipAngle": "deg",
    "MagneticFieldStrength": "T",
    "ImagingFrequency": "MHz",
    "PixelBandwidth": "Hz",
    "DiffusionBValue": "s/mm2",
    "RadionuclideTotalDose": "Bq",
    "RadionuclideHalfLife": "s",
    "ActualFrameDuration": "ms",
    "FrameReferenceTime": "ms",
    "TriggerTime": "ms",
    "PatientWeight": "kg",
    "PatientSize": "m",
}
"""The unit that the standard gives an attribute (PS3.3, at the attribute)."""

_MEASURED = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\d\s].*?)\s*")


def measured(text: str) -> tuple[float, str]:
    """Read '60 mAs' as (60.0, 'mAs'); ValueError in words for a person."""
    found = _MEASURED.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no number with a unit")
    unit = found[2].replace("·", "*").replace("s/mm²", "s/mm2")
    if unit not in _UNITS:
        raise ValueError(f"{found[2]!r} is no unit that is known ({', '.join(_UNITS)})")
    return float(found[1]), unit


def convert(value: float, unit: str, to: str) -> float:
    """A value in another unit of the same kind; ValueError where they measure different things."""
    kind, factor = _UNITS[unit]
    wanted, per = _UNITS[to]
    if kind != wanted:
        raise ValueError(f"is in {to}, a {wanted}; {unit} is a {kind}")
    # One rounding: 0.3 cm is 3 mm, not 3.0000000000000004.
    return float(f"{value * factor / per:.12g}")


@dataclass(frozen=True)
class Quantity:
    """What a rule may ask of a header under one name, in one unit; None: a plain number or text."""

    unit: str | None
    numeric: bool
    read: Callable[[Dataset], tuple[float | str, ...]]
    words: str


def _first(*readings: Callable[[Dataset], float | None]) -> Callable[[Dataset], tuple[float, ...]]:
    """The first reading that the header allows, as a one-element tuple."""

    def read(header: Dataset) -> tuple[float, ...]:
        found = (reading(header) for reading in readings)
        return tuple([value for value in found if value is not None][:1])

    return read


def _of(keyword: str, factor: float = 1.0) -> Callable[[Dataset], float | None]:
    def read(header: Dataset) -> float | None:
        value = number(header, keyword)
        return None if value is None else float(f"{value * factor:.12g}")

    return read


def _tube_charge(header: Dataset) -> float | None:
    """Tube current times exposure time: mA · ms = 10^-3 mAs."""
    current, duration = number(header, "XRayTubeCurrent"), number(header, "ExposureTime")
    return None if current is None or duration is None else current * duration / 1000.0


def _largest(keyword: str) -> Callable[[Dataset], float | None]:
    return lambda header: max(numbers(header, keyword) or (), default=None)


def _matrix(header: Dataset) -> float | None:
    rows, columns = number(header, "Rows"), number(header, "Columns")
    return None if rows is None or columns is None else max(rows, columns)


def _injections(header: Dataset) -> Iterator[Dataset]:
    items = header.get("RadiopharmaceuticalInformationSequence")
    yield from items if isinstance(items, DicomSequence) else ()


def _activity(header: Dataset) -> float | None:
    """Administered activity in MBq; several injections are added."""
    found = [number(item, "RadionuclideTotalDose") for item in _injections(header)]
    known = [value for value in found if value is not None]
    return float(f"{sum(known) / 1e6:.12g}") if known else None


def _activity_per_kg(header: Dataset) -> float | None:
    activity, weight = _activity(header), number(header, "PatientWeight")
    return None if activity is None or not weight or weight <= 0 else activity / weight


def _counts(header: Dataset) -> float | None:
    """What counts grow with: administered activity per mass times frame duration, MBq·min/kg."""
    activity, duration = _activity_per_kg(header), number(header, "ActualFrameDuration")
    return None if activity is None or duration is None else activity * duration / 6e4


_mas = _first(
    _of("Exposure"), _of("ExposureInmAs"), _of("ExposureInuAs", 1e-3), _tube_charge
)  # fmt: skip
_ctdi = _first(_of("CTDIvol"))

QUANTITIES: Mapping[str, Quantity] = {
    "kvp": Quantity("kV", True, _first(_of("KVP")), "peak tube voltage"),
    "mas": Quantity(
        "mAs", True, _mas, "exposure: Exposure, Exposure in µAs, or tube current × time"
    ),
    "ctdi_vol": Quantity("mGy", True, _ctdi, "CTDIvol"),
    "slice_thickness": Quantity("mm", True, _first(_of("SliceThickness")), "slice thickness"),
    "pixel_spacing": Quantity(
        "mm", True, _first(_largest("PixelSpacing")), "the coarser of row and column spacing"
    ),
    "kernel": Quantity(
        None, False, lambda header: texts(header, "ConvolutionKernel"), "convolution kernel"
    ),
    "activity": Quantity("MBq", True, _first(_activity), "administered activity"),
    "activity_per_kg": Quantity(
        "MBq/kg", True, _first(_activity_per_kg), "administered activity by patient weight"
    ),
    "frame_duration": Quantity(
        "s", True, _first(_of("ActualFrameDuration", 1e-3)), "frame duration of PET"
    ),
    "matrix": Quantity(None, True, _first(_matrix), "the larger of rows and columns"),
    "acquisition_matrix": Quantity(
        None, True, _first(_largest("AcquisitionMatrix")), "the largest of Acquisition Matrix"
    ),
    "echo_time": Quantity(
        "ms", True, _first(_of("EchoTime"), _of("EffectiveEchoTime")), "echo time"
    ),
    "repetition_time": Quantity("ms", True, _first(_of("RepetitionTime")), "repetition time"),
    "field_strength": Quantity("T", True, _first(_of("MagneticFieldStrength")), "field strength"),
    "dose_fraction": Quantity(
        None, True, lambda header: (), "the share of a reference that the rule names with `of`"
    ),
}

REFERENCES: Mapping[str, Callable[[Dataset], tuple[float, ...]]] = {
    "mGy": _ctdi,
    "mAs": _mas,
    "MBq": _first(_activity),
    "MBq/kg": _first(_activity_per_kg),
    "MBq*min/kg": _first(_counts),
}
"""What `dose_fraction` divides by its reference, by the reference's unit."""
