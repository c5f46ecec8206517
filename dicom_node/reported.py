"""What a restoration measured, as values of the report that goes with it: by slice, with units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from dicom_node.dicom import pixels, volume
from dicom_node.dicom.derived import RestoredVolume
from dicom_node.dicom.reports import GateValue
from dicom_node.inference import RestorationResult
from dicom_node.ledger.states import Verdict
from dicom_node.readings import GateReading, Level

__all__ = ["delivered_drift", "gate_values", "judged_values"]


def gate_values(
    result: RestorationResult, slices: int, first: int = 0, *, hounsfield: bool = False
) -> list[GateValue]:
    """What the engine measured, slice by slice, and whether its guards held over the volume.

    *first* is the place of the volume's first slice among the slices of the job; *hounsfield*: of
    CT, where the network's drift is in HU.
    """
    values: list[GateValue] = []
    for name, measured in sorted(result.diagnostics.items()):
        unit = _UCUM["HU"] if hounsfield and name == "mean_drift" else "1"
        if isinstance(measured, int | float):
            values.append(GateValue(name, float(measured), unit=unit))
        elif isinstance(measured, Sequence) and len(measured) == slices:
            values += [
                GateValue(name, float(v), slice=first + i, unit=unit)
                for i, v in enumerate(measured)
            ]
            values.append(GateValue(name, float(max(measured, key=abs)), unit=unit))
    return values


def delivered_drift(
    series: volume.SeriesVolume,
    restored: RestoredVolume,
    first: int = 0,
    *,
    release: Callable[[], None] = lambda: None,
) -> list[GateValue]:
    """The change of each slice's mean as a reader of the stored pixels finds it.

    In HU for CT, else relative to the slice's own mean; nothing of a slice whose mean is zero.
    Beside it, ``mean_drift`` is what the network did before the means were held.
    *first* as for `gate_values`; *release* lets what was read of a slice go.
    """
    hounsfield = series.scale.units == "HU"
    found: list[GateValue] = []
    for i, frame in enumerate(restored.frames):
        if frame.prepared is not None:
            if (known := frame.prepared.drift) is not None:
                unit = _UCUM["HU"] if hounsfield else "1"
                found.append(GateValue("delivered_drift", known, slice=first + i, unit=unit))
            continue
        release()
        native = pixels.to_physical(frame.stored, frame.rescale) * series.scale.per_native
        mean = float(series.array[i].mean(dtype=np.float64))
        change = float(native.mean()) - mean
        if hounsfield:
            found.append(GateValue("delivered_drift", change, slice=first + i, unit=_UCUM["HU"]))
        elif mean:
            found.append(GateValue("delivered_drift", change / abs(mean), slice=first + i))
    worst = max(found, key=lambda each: abs(each.value), default=None)
    return found if worst is None else [*found, replace(worst, slice=None)]


def judged_values(reading: GateReading, verdict: Verdict) -> list[GateValue]:
    """A reading for the report: its slices, and for the volume the worst with its *verdict*.

    A slice inside the limits passes; one outside has the verdict of the gate.
    """
    unit = _UCUM.get(reading.unit, f"{{{reading.unit.replace(' ', '_')}}}")
    by_level = {Level.PASS: "pass", Level.WARN: "warn", Level.FAIL: str(verdict)}
    values = [
        GateValue(reading.gate, value, by_level[level], index, unit)
        for value, level, index in zip(
            reading.values, reading.levels, reading.slices, strict=bool(reading.slices)
        )
        if value is not None and level in by_level
    ]
    if (value := reading.worst_value) is not None:
        values.append(GateValue(reading.gate, value, str(verdict), unit=unit))
    return values


# UCUM of the units that the gates name; of another, which counts something, an annotation of a
# plain number, as {pixels}.
_UCUM = {"1": "1", "%": "%", "HU": "[hnsf'U]", "SUV": "{SUVbw}g/ml", "a.u.": "[arb'U]"}
