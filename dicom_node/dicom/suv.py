"""Body-weight SUV per stored PET unit, by the rule of the QIBA FDG-PET profile.

SUVbw = activity concentration [Bq/ml] · body weight [g] / injected activity decayed to the time
the image is corrected to [Bq]. What the header cannot prove is not guessed: the answer is then
a reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from dicom_node.dicom.header import number, text, texts

__all__ = [
    "GE_PET_CREATOR",
    "PHILIPS_PET_CREATOR",
    "SIEMENS_PET_CREATOR",
    "SuvFactor",
    "private_value",
    "suv_factor",
]

GE_PET_CREATOR = "GEMS_PETD_01"
PHILIPS_PET_CREATOR = "Philips PET Private Group"
SIEMENS_PET_CREATOR = "SIEMENS MED PT"
_GE_SCAN_DATETIME = (0x0009, 0x0D)
_PHILIPS_SUV_SCALE = (0x7053, 0x00)
_PHILIPS_ACTIVITY_SCALE = (0x7053, 0x09)
# "The date and time to which the image was decay corrected": conformance statement of the
# Siemens Biograph TruePoint 6.7.
_SIEMENS_DECAY_DATETIME = (0x0071, 0x22)
_DAY = timedelta(days=1)
# After ten half-lives less than a thousandth is left: the clock times do not belong together.
_MOST_HALF_LIVES = 10.0


@dataclass(frozen=True)
class SuvFactor:
    """SUVbw per rescaled stored unit (Bq/ml, counts or g/ml), or None and the reason."""

    value: float | None
    reason: str | None = None


def suv_factor(headers: Sequence[Dataset]) -> SuvFactor:
    """The factor that turns the rescaled values of a PET series into SUVbw.

    headers are those of one volume; units and injection are read from the first, the scan start
    from all.
    """
    first = headers[0]
    if any(text(header, "Units") != text(first, "Units") for header in headers):
        return SuvFactor(None, "Units differ between the slices")
    units = text(first, "Units")
    if units == "GML":
        return _of_grams_per_millilitre(first)
    if units == "CNTS":
        return _of_counts(first, headers)
    if units == "BQML":
        return _of_activity(headers)
    return SuvFactor(None, f"Units {units or 'absent'} have no SUV")


def _of_grams_per_millilitre(header: Dataset) -> SuvFactor:
    # PS3.3 C.8.9.1.1.3: SUV Type is BW where absent.
    kind = text(header, "SUVType") or "BW"
    if kind != "BW":
        return SuvFactor(None, f"SUV Type {kind} is not by body weight")
    return SuvFactor(1.0)


def _of_counts(first: Dataset, headers: Sequence[Dataset]) -> SuvFactor:
    direct = _private_number(first, PHILIPS_PET_CREATOR, _PHILIPS_SUV_SCALE)
    if direct:
        return SuvFactor(direct)
    per_count = _private_number(first, PHILIPS_PET_CREATOR, _PHILIPS_ACTIVITY_SCALE)
    if not per_count:
        return SuvFactor(None, "Units CNTS without the vendor's factor")
    by_activity = _of_activity(headers)
    if by_activity.value is None:
        return by_activity
    return SuvFactor(by_activity.value * per_count)


def _of_activity(headers: Sequence[Dataset]) -> SuvFactor:
    first = headers[0]
    corrections = texts(first, "CorrectedImage")
    if "ATTN" not in corrections or "DECY" not in corrections:
        return SuvFactor(None, "Corrected Image lacks ATTN or DECY")
    weight = number(first, "PatientWeight")
    if not weight or weight <= 0.0:
        return SuvFactor(None, "PatientWeight is absent")
    injection = _injection(first)
    if isinstance(injection, str):
        return SuvFactor(None, injection)
    left = _fraction_left(headers, injection)
    if isinstance(left, str):
        return SuvFactor(None, left)
    return SuvFactor(weight * 1000.0 / (injection.activity_bq * left))


@dataclass(frozen=True)
class _Injection:
    activity_bq: float
    half_life_s: float
    item: Dataset


def _injection(header: Dataset) -> _Injection | str:
    sequence = header.get("RadiopharmaceuticalInformationSequence")
    if not sequence:
        return "RadiopharmaceuticalInformationSequence is absent"
    item = sequence[0]
    activity = number(item, "RadionuclideTotalDose")
    half_life = number(item, "RadionuclideHalfLife")
    if not activity or activity <= 0.0:
        return "RadionuclideTotalDose is absent"
    if not half_life or half_life <= 0.0:
        return "RadionuclideHalfLife is absent"
    return _Injection(activity, half_life, item)


def _fraction_left(headers: Sequence[Dataset], injection: _Injection) -> float | str:
    """The share of the injected activity at the time to which the images are decay corrected."""
    first = headers[0]
    correction = text(first, "DecayCorrection")
    if correction == "ADMIN":
        return 1.0
    if correction != "START":
        return f"DecayCorrection {correction or 'absent'} gives no reference time"
    scan = _decay_reference(headers, injection.half_life_s)
    if scan is None:
        return "the time of the scan is absent, or the series was made after the acquisition"
    start = _injection_time(injection.item, scan)
    if start is None:
        return "the time of injection is absent"
    half_lives = (scan - start).total_seconds() / injection.half_life_s
    if not 0.0 <= half_lives <= _MOST_HALF_LIVES:
        return "the times of injection and scan do not belong together"
    return float(2.0**-half_lives)


def _decay_reference(headers: Sequence[Dataset], half_life_s: float) -> datetime | None:
    """The time that the images are decay corrected to: as stated, else the start of the scan."""
    first = headers[0]
    # Enhanced PET (PS3.3 C.8.22.5) and Siemens say it themselves.
    stated = text(first, "DecayCorrectionDateTime") or private_value(
        first, SIEMENS_PET_CREATOR, *_SIEMENS_DECAY_DATETIME
    )
    moment = _moment_of(str(stated)) if stated else None
    return moment or _scan_start(headers, half_life_s)


def _scan_start(headers: Sequence[Dataset], half_life_s: float) -> datetime | None:
    """The start of the scan by the QIBA pseudo-code, or None.

    Series time where no slice was acquired before it; else the series was made afterwards: GE's
    own scan time, or counted back from the middle of a frame.
    """
    first = headers[0]
    series = _moment(text(first, "SeriesDate"), text(first, "SeriesTime"))
    acquired = [
        moment
        for header in headers
        if (moment := _moment(text(header, "AcquisitionDate"), text(header, "AcquisitionTime")))
    ]
    if series is not None and (not acquired or series <= min(acquired)):
        return series
    private = private_value(first, GE_PET_CREATOR, *_GE_SCAN_DATETIME)
    stated = _moment_of(str(private)) if private else None
    return stated or _counted_back(first, half_life_s)


def _counted_back(header: Dataset, half_life_s: float) -> datetime | None:
    """Acquisition time - Frame Reference Time + the time of the mean count rate in the frame.

    PS3.3 C.8.9.4.1.4: Frame Reference Time is that of the mean count rate, from the scan start.
    """
    acquired = _moment(text(header, "AcquisitionDate"), text(header, "AcquisitionTime"))
    reference = number(header, "FrameReferenceTime")
    duration = number(header, "ActualFrameDuration")
    if acquired is None or not reference or reference <= 0.0 or not duration or duration <= 0.0:
        return None
    decay = math.log(2.0) / half_life_s
    during = decay * duration / 1000.0
    mean_rate_s = math.log(during / -math.expm1(-during)) / decay
    return acquired + timedelta(seconds=mean_rate_s - reference / 1000.0)


def _injection_time(item: Dataset, scan: datetime) -> datetime | None:
    stated = _moment_of(text(item, "RadiopharmaceuticalStartDateTime"))
    if stated is not None:
        return stated
    start = _moment(scan.strftime("%Y%m%d"), text(item, "RadiopharmaceuticalStartTime"))
    # Only a time of day is stated: an injection before midnight and a scan after it.
    return start - _DAY if start is not None and start > scan else start


def _moment(date: str, time: str) -> datetime | None:
    return _moment_of(date + time) if date and time else None


def _moment_of(stamp: str) -> datetime | None:
    """A DT or DA+TM value as local time; a UTC offset is dropped, since DA and TM have none."""
    whole, _, fraction = stamp.strip().split("+")[0].split("-")[0].partition(".")
    if not whole.isdigit() or not 10 <= len(whole) <= 14:
        return None
    micro = fraction[:6].ljust(6, "0")
    try:
        return datetime.strptime(  # noqa: DTZ007 - DICOM's DA and TM carry no zone
            f"{whole.ljust(14, '0')}.{micro if micro.isdigit() else '000000'}", "%Y%m%d%H%M%S.%f"
        )
    except ValueError:
        return None


def _private_number(header: Dataset, creator: str, place: tuple[int, int]) -> float | None:
    value = private_value(header, creator, *place)
    try:
        return float(str(value)) if value is not None else None
    except ValueError:
        return None


def private_value(header: Dataset, creator: str, group: int, offset: int) -> object:
    """A private attribute by creator, whatever block it was given (PS3.5 7.8.1); None if absent.

    From implicit VR a private value comes as bytes; those that are text are returned as text.
    """
    try:
        element: DataElement = header.private_block(group, creator)[offset]
    except KeyError:
        return None
    value: object = element.value
    if isinstance(value, bytes):
        return value.rstrip(b"\0 ").decode("ascii", "replace")
    return value or None
