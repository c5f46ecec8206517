"""The report for the reviewer: what it shows, what it must not, and that it needs nothing else."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from datetime import datetime
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from lxml import html
from PIL import Image
from pydicom.dataset import Dataset

from dicom_node.dicom.reports import Restoration
from dicom_node.gates import Judgement
from dicom_node.inference import ModelIdentity
from dicom_node.ledger.states import Verdict
from dicom_node.readings import GateReading, Level
from dicom_node.review import Sheet, is_wanted, pictures, rendered
from dicom_node.review.drawing import panels
from dicom_node.review.sheet import spread
from dicom_node.settings import ReviewSettings
from tests.factories import make_series

MODEL = ModelIdentity("gain", "1", "ab" * 32)
REASON = "gate gain failed: <script>alert(1)</script>"


def by_slice(gate: str, levels: Sequence[Level], worst: int | None = None) -> GateReading:
    values, slices = tuple(map(float, range(len(levels)))), tuple(range(len(levels)))
    bounds: tuple[None, float] = (None, 2.0)
    return GateReading(gate, "HU", values, slices, tuple(levels), bounds, bounds, worst)


def volume(slices: int, rows: int = 32) -> Any:
    rng = np.random.default_rng(3)
    return rng.normal(40.0, 30.0, (slices, rows, rows)).astype(np.float32)


def sheet(
    slices: int = 6,
    *,
    fail: int | None = 3,
    header: Dataset | None = None,
    finer: int = 1,
    verdict: Verdict = Verdict.HOLD,
) -> Sheet:
    levels = [Level.FAIL if index == fail else Level.PASS for index in range(slices)]
    readings = (by_slice("gain", levels, fail), by_slice("range", [Level.PASS] * slices, 1))
    before = volume(slices)
    after = np.kron(before, np.ones((1, finer, finer), np.float32)) + np.float32(5.0)
    return Sheet(
        Restoration("ct_denoise", MODEL, "cd" * 32, datetime(2026, 3, 4, 5, 6, 7)),
        "2.25.7",
        tuple(pictures(before, after, readings, first=0, further=3)),
        slices,
        readings,
        Judgement({"pacs": verdict}, (REASON,) if fail is not None else (), fail is not None),
        header or make_series("CT", slices=1, rows=16)[0],
    )


def page(made: Sheet, **settings: Any) -> str:
    return rendered(made, 12, ReviewSettings.model_validate(settings))["report.html"].decode()


def test_the_slice_that_fails_is_the_worst_and_comes_first() -> None:
    assert sheet().shown(2)[0].index == 3
    assert "Slice 4 of 6, the worst by the gates" in page(sheet())


def test_where_all_is_well_the_slice_that_most_gates_find_worst_is_shown() -> None:
    calm = [Level.PASS] * 5
    readings = [by_slice("gain", calm, 4), by_slice("range", calm, 4), by_slice("noise", calm, 0)]
    found = pictures(volume(5), volume(5), readings, first=10, further=0)
    assert [each.index for each in found] == [14]


def test_the_slice_with_most_failures_is_worse_than_one_with_one() -> None:
    ok, bad = Level.PASS, Level.FAIL
    readings = [by_slice("gain", [bad, bad, ok]), by_slice("range", [ok, bad, ok])]
    assert [p.index for p in pictures(volume(3), volume(3), readings, first=0, further=0)] == [1]


def test_of_slices_that_fail_alike_the_one_that_the_reason_names_is_shown() -> None:
    bad, calm = [Level.FAIL] * 4, [Level.PASS] * 4
    readings = [by_slice("gain", bad, 2), by_slice("range", calm, 0), by_slice("noise", calm, 0)]
    assert [p.index for p in pictures(volume(4), volume(4), readings, first=0, further=0)] == [2]


def test_slices_are_spread_and_never_more_than_there_are() -> None:
    assert spread(100, 4) == [12, 37, 62, 87]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(5, 0) == []


def test_the_page_needs_nothing_but_itself() -> None:
    text = page(sheet())
    root = html.fromstring(text)
    assert root.xpath("//script | //link | //iframe | //object | //base") == []
    sources = root.xpath("//@src | //@href | //@xlink:href", namespaces={"xlink": "x"})
    assert sources
    assert all(each.startswith("data:image/png;base64,") for each in sources)
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_what_a_gate_says_is_text_and_never_markup() -> None:
    assert "<script>" not in page(sheet())
    assert "&lt;script&gt;" in page(sheet())


def test_nobody_is_named_unless_the_site_allows_it() -> None:
    header = make_series("CT", slices=1, rows=16)[0]
    header.PatientName, header.PatientID = "Doe^Jane", "MRN-4711"
    header.AccessionNumber, header.StudyDate = "ACC-99", "20260101"
    header.SeriesDescription, header.InstitutionName = "Thorax Jane", "St. Elsewhere"
    # Base64 spells anything.
    plain = re.sub(r"base64,[^\"]+", "", page(sheet(header=header)))
    for secret in ("Doe", "MRN-4711", "ACC-99", "20260101", "Thorax", "Elsewhere"):
        assert secret not in plain
    for shown in (header.SeriesInstanceUID, header.StudyInstanceUID, "2.25.7", MODEL.sha256):
        assert shown in plain
    allowed = page(sheet(header=header), identifiers=["AccessionNumber"])
    assert "<dd>ACC-99</dd>" in allowed
    assert "MRN-4711" not in allowed


def test_every_gate_has_its_row_its_values_and_its_bars() -> None:
    root = html.fromstring(page(sheet()))
    rows = root.xpath("//tbody/tr")
    assert [row.xpath("string(td[1])") for row in rows] == ["gain", "range"]
    assert [cell.strip() for cell in rows[0].xpath("td//text()") if cell.strip()][:4] == [
        "gain",
        "past the limit",
        "3",
        "HU",
    ]
    titles = root.xpath("//*[local-name()='rect']/*[local-name()='title']/text()")
    assert titles == [
        "gain, slices 1 ... 3: inside",
        "gain, slice 4: past the limit",
        "gain, slices 5 ... 6: inside",
        "range, slices 1 ... 6: inside",
    ]


def test_the_difference_is_dark_where_nothing_changed_and_red_where_it_rose() -> None:
    before = np.zeros((1, 32, 32), np.float32)
    after = before.copy()
    after[0, 8, 8], after[0, 20, 20] = 50.0, -50.0
    (picture,) = pictures(before, after, [], first=0, further=0)
    header = make_series("CT", slices=1, rows=16)[0]
    drawn = panels(picture, "CT", header, large=True).difference
    times = drawn.width // 32
    calm, up, down = (drawn.getpixel((at * times, at * times)) for at in (2, 8, 20))
    assert max(calm) < 40
    assert up[0] > up[2]
    assert down[2] > down[0]


def test_a_result_on_a_finer_grid_is_shown_beside_its_input() -> None:
    made = sheet(finer=2)
    files = rendered(made, 1, ReviewSettings())
    (first, *_) = made.shown(0)
    assert first.restored.shape == (64, 64)
    assert Image.open(BytesIO(files["montage.png"])).format == "PNG"


def test_values_that_are_not_finite_can_be_shown() -> None:
    before, after = volume(1), volume(1)
    after[0, 0, :5] = np.nan
    (picture,) = pictures(before, after, [], first=0, further=0)
    drawn = panels(picture, "CT", make_series("CT", slices=1, rows=16)[0], large=False)
    assert drawn.limit > 0


def test_the_same_result_makes_the_same_bytes() -> None:
    assert rendered(sheet(), 1, ReviewSettings()) == rendered(sheet(), 1, ReviewSettings())


def test_the_pictures_in_the_page_are_the_slices() -> None:
    match = re.search(r"data:image/png;base64,([^\"]+)", page(sheet()))
    assert match is not None
    first = np.asarray(Image.open(BytesIO(base64.b64decode(match[1]))))
    source = sheet().shown(0)[0].source
    times = first.shape[0] // 32
    grey = first[::times, ::times, 0].astype(float)
    assert np.corrcoef(grey.ravel(), np.clip(source, -160, 240).ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("write", "wanted"),
    [("always", 4), ("warned", 3), ("held", 2), ("never", 0)],
)
def test_which_results_get_a_report_is_a_setting(write: str, wanted: int) -> None:
    settings = ReviewSettings.model_validate({"write": write})
    assert sum(is_wanted(verdict, settings) for verdict in Verdict) == wanted
