"""The files of a report: the page and the montage."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from dicom_node import __version__
from dicom_node.dicom.header import text
from dicom_node.ledger.states import Verdict
from dicom_node.readings import GateReading, Level
from dicom_node.review import timeline
from dicom_node.review.drawing import Panels, montage, panels, png
from dicom_node.review.sheet import Sheet
from dicom_node.settings import ReviewSettings

PAGE, MONTAGE = "report.html", "montage.png"
_VERDICTS = {
    Verdict.PASS: "Passed",
    Verdict.WARN: "Passed with a warning",
    Verdict.HOLD: "Held for review",
    Verdict.REFUSE: "Refused",
}
_TASKS = {
    "ct_denoise": "low-dose CT denoising",
    "pet_synthesis": "low-dose PET restoration",
    "mri_sr": "MR super-resolution",
}


def rendered(sheet: Sheet, job_id: int, settings: ReviewSettings) -> dict[str, bytes]:
    """The files of the report by name; the same arguments make the same bytes."""
    shown = [
        panels(each, sheet.modality, sheet.header, large=number == 0)
        for number, each in enumerate(sheet.shown(settings.slices))
    ]
    files = {PAGE: _page(sheet, job_id, settings, shown).encode()}
    if shown:
        chart = timeline.picture(sheet.readings, sheet.slices)
        title = f"job {job_id}, {sheet.restoration.task}: {_VERDICTS[sheet.judgement.worst]}"
        files[MONTAGE] = png(montage(shown, title, chart))
    return files


def _page(sheet: Sheet, job_id: int, settings: ReviewSettings, shown: Sequence[Panels]) -> str:
    table = timeline.rows(sheet.readings, sheet.slices)
    width, height = timeline.svg_size(len(table))
    return _template().render(
        job=job_id,
        verdict=sheet.judgement.worst,
        verdict_words=_VERDICTS[sheet.judgement.worst],
        by_destination=[
            (name or "no destination", _VERDICTS[verdict])
            for name, verdict in sheet.judgement.verdicts.items()
        ],
        reasons=sheet.judgement.reasons,
        facts=list(_facts(sheet, job_id, settings)),
        worst=None if not shown else _embedded(shown[0]),
        others=[_embedded(each) for each in shown[1:]],
        slices=sheet.slices,
        rows=table,
        width=width,
        height=height,
        colours=timeline.COLOURS,
        words=timeline.WORDS,
        gates=[_gate(each) for each in _gravest_first(sheet.readings)],
        version=__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("dicom_node.review"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _facts(sheet: Sheet, job_id: int, settings: ReviewSettings) -> Iterator[tuple[str, str]]:
    done, header = sheet.restoration, sheet.header
    yield "job", str(job_id)
    yield "task", f"{_TASKS.get(done.task, done.task)} ({done.task})"
    yield "slices", str(sheet.slices)
    yield "source series", text(header, "SeriesInstanceUID")
    yield "study", text(header, "StudyInstanceUID")
    yield "restored series", sheet.series_uid
    yield "model", f"{done.model.name} {done.model.version}, sha256 {done.model.sha256}"
    yield "parameters", f"sha256 {done.parameters_hash}, strength {done.strength:g}"
    yield "created", done.created.isoformat(timespec="seconds")
    for keyword in settings.identifiers:
        yield keyword, text(header, keyword)


def _embedded(each: Panels) -> dict[str, Any]:
    pictures: tuple[Image.Image, ...] = (each.source, each.restored, each.difference)
    return {
        "number": each.index + 1,
        "width": each.source.width,
        "height": each.source.height,
        "pictures": [
            ("data:image/png;base64," + base64.b64encode(png(picture)).decode(), words)
            for picture, words in zip(pictures, each.captions, strict=True)
        ],
    }


def _gravest_first(readings: Sequence[GateReading]) -> list[GateReading]:
    return sorted(readings, key=lambda each: -each.level.severity)


def _gate(reading: GateReading) -> dict[str, Any]:
    value, worst = reading.worst_value, reading.worst_slice
    return {
        "name": reading.gate,
        "level": reading.level,
        "value": "" if value is None else f"{value:.4g}",
        "unit": "" if reading.unit == "1" else reading.unit,
        "slice": "" if worst is None else str(worst + 1),
        "warn": _interval(reading.warn),
        "fail": _interval(reading.fail),
        "beyond": sum(level in (Level.WARN, Level.FAIL) for level in reading.levels),
        "measured": sum(level is not Level.NOT_APPLICABLE for level in reading.levels),
        "reason": reading.reason,
    }


def _interval(bounds: tuple[float | None, float | None]) -> str:
    low, high = bounds
    if low is None and high is None:
        return ""
    return f"{'' if low is None else f'{low:.4g}'} … {'' if high is None else f'{high:.4g}'}"
