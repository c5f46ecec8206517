"""The report and the presentation state of a restored series: who, what, on which slices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime
from io import BytesIO
from typing import Any

import highdicom
import pydicom
import pytest
from highdicom.sr import EnhancedSR, srread
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedSRStorage, GrayscaleSoftcopyPresentationStateStorage

from dicom_node.dicom.derived import DerivedInstance
from dicom_node.dicom.header import is_own_output
from dicom_node.dicom.reports import GateValue, Restoration, with_reports
from dicom_node.dicom.volume import SeriesVolume
from dicom_node.errors import PermanentError
from dicom_node.settings import IdentitySettings, ReportSettings
from tests.factories import make_series
from tests.multiframe import legacy_converted, make_enhanced
from tests.unit.dicom_node.dicom.conftest import TASKS, Model, derive

Load = Callable[[list[Dataset]], SeriesVolume]
CREATED = datetime(2026, 3, 4, 5, 6, 7)
BOTH = ReportSettings(sr=True, gsps=True)


def objects(
    series: SeriesVolume,
    settings: ReportSettings = BOTH,
    gates: tuple[GateValue, ...] = (),
    warnings: tuple[str, ...] = (),
) -> tuple[list[DerivedInstance], list[DerivedInstance]]:
    """The restored images of a volume, and what goes with them."""
    images = derive(series, series.array * 0.98, created=CREATED)
    task = TASKS[series.headers[0].Modality]
    done = Restoration(task, Model(), "cd" * 32, CREATED, warnings=warnings)
    made = list(with_reports(images, gates, done, IdentitySettings(), settings))
    assert made[: len(images)] == images
    return images, made[len(images) :]


def read(instance: DerivedInstance) -> Dataset:
    return pydicom.dcmread(BytesIO(instance.data))


def states(made: list[DerivedInstance]) -> list[Dataset]:
    wanted = str(GrayscaleSoftcopyPresentationStateStorage)
    return [read(each) for each in made if each.sop_class_uid == wanted]


def report(made: list[DerivedInstance]) -> Dataset:
    (only,) = (read(each) for each in made if each.sop_class_uid == str(EnhancedSRStorage))
    return only


def items(root: Dataset, meaning: str) -> list[Dataset]:
    """Every content item below *root* whose concept is named so, depth first."""
    found = []
    for item in root.get("ContentSequence", ()):
        names = item.get("ConceptNameCodeSequence") or [Dataset()]
        if names[0].get("CodeMeaning") == meaning:
            found.append(item)
        found += items(item, meaning)
    return found


def referenced(group: Dataset) -> list[str]:
    return [
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for item in group.ContentSequence
        if item.ValueType == "IMAGE"
    ]


def values(group: Dataset, meaning: str) -> list[float]:
    return [
        float(item.MeasuredValueSequence[0].NumericValue)
        for item in items(group, meaning)
        if item.ValueType == "NUM"
    ]


def verdicts(group: Dataset, meaning: str) -> list[str]:
    return [
        item.ConceptCodeSequence[0].CodeMeaning
        for item in items(group, meaning)
        if item.ValueType == "CODE"
    ]


def test_both_are_off_by_default(load: Load) -> None:
    images, extra = objects(load(make_series("CT", slices=2)), ReportSettings())
    assert (len(images), extra) == (2, [])


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_the_report_names_model_digests_source_and_result(load: Load, modality: Any) -> None:
    series = load(make_series(modality, slices=3))
    images, made = objects(series, warnings=("guard mean_drift did not hold",))
    document = report(made)
    assert items(document, "Algorithm Name")[0].TextValue == "compact"
    parameters = [item.TextValue for item in items(document, "Algorithm Parameters")]
    assert f"weights sha256 {'ab' * 32}" in parameters
    assert f"parameters sha256 {'cd' * 32}" in parameters
    pixels = b"".join(read(image).PixelData for image in images)
    (digest,) = items(document, "SHA-256 of the restored pixel data")
    assert digest.TextValue == hashlib.sha256(pixels).hexdigest()
    comments = [item.TextValue for item in items(document, "Comment")]
    assert comments == ["guard mean_drift did not hold"]
    before, after = items(document, "Image Library Group")
    assert referenced(before) == [header.SOPInstanceUID for header in series.headers]
    assert referenced(after) == [image.sop_instance_uid for image in images]


def test_every_slice_has_its_values_and_verdicts_with_the_images_they_compare(load: Load) -> None:
    series = load(make_series("CT", slices=3))
    gates = (
        *(GateValue("mean_drift", 0.5 * i, slice=i, unit="[hnsf'U]") for i in range(3)),
        GateValue("residual_ratio", 0.25, "hold", slice=1),
        GateValue("intensity_scale", 1.0),
        GateValue("latent_distance", float("nan"), "warn", slice=2),
    )
    images, made = objects(series, gates=gates)
    groups = {
        items(group, "Tracking Identifier")[0].TextValue: group
        for group in items(report(made), "Measurement Group")
    }
    assert list(groups) == ["volume", "slice 1", "slice 2", "slice 3"]
    change = "Change of the slice mean by the network, before it is held"
    drift = [values(groups[f"slice {i}"], change) for i in (1, 2, 3)]
    assert drift == [[0.0], [0.5], [1.0]]
    spread = "Spread of the change over spread of the input"
    assert values(groups["slice 2"], spread) == [0.25]
    assert verdicts(groups["slice 2"], spread) == ["Past the limit, held for a person"]
    assert values(groups["volume"], "Factor from physical units to the model's window") == [1.0]
    # No number, and the verdict on it all the same.
    latent = "Distance of the latent from the codebook"
    assert values(groups["slice 3"], latent) == []
    assert verdicts(groups["slice 3"], latent) == ["Past the limit, a warning"]
    source = series.headers[1].SOPInstanceUID
    assert referenced(groups["slice 2"]) == [source, images[1].sop_instance_uid]


def test_a_measure_that_has_no_code_gets_one_from_its_name(load: Load) -> None:
    gates = (GateValue("a_gate_of_tomorrow", 2.0, slice=0),)
    _, made = objects(load(make_series("CT", slices=1)), gates=gates)
    (item,) = items(report(made), "a gate of tomorrow")
    assert item.ConceptNameCodeSequence[0].CodeValue == "AGATEOFTOMORROW"
    assert item.ConceptNameCodeSequence[0].CodingSchemeDesignator == "99DIFFCODE"


def test_the_report_reads_back_as_an_enhanced_sr(load: Load) -> None:
    _, made = objects(load(make_series("PT", slices=2)), ReportSettings(sr=True))
    document = srread(BytesIO(made[0].data))
    assert isinstance(document, EnhancedSR)
    assert document.CompletionFlag == "COMPLETE"


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_the_presentation_states_write_the_text_on_every_slice_once(
    load: Load, modality: Any
) -> None:
    images, made = objects(load(make_series(modality, slices=3)))
    found: list[str] = []
    for state in states(made):
        (annotation,) = state.GraphicAnnotationSequence
        words = [text.UnformattedTextValue for text in annotation.TextObjectSequence]
        assert words == ["AI restored, see original"]
        uids = [item.ReferencedSOPInstanceUID for item in annotation.ReferencedImageSequence]
        (series,) = state.ReferencedSeriesSequence
        assert [i.ReferencedSOPInstanceUID for i in series.ReferencedImageSequence] == uids
        found += uids
    assert sorted(found) == sorted(image.sop_instance_uid for image in images)


def test_a_presentation_state_has_the_rescale_of_its_images(load: Load) -> None:
    """PET has a slope for each slice, and the Modality LUT stands once in each object."""
    images, made = objects(load(make_series("PT", slices=3)))
    slopes = {image.sop_instance_uid: read(image).RescaleSlope for image in images}
    assert len(states(made)) == len(set(slopes.values())) == 3
    for state in states(made):
        for item in state.ReferencedSeriesSequence[0].ReferencedImageSequence:
            assert state.RescaleSlope == slopes[item.ReferencedSOPInstanceUID]


def test_slices_with_other_windows_share_a_presentation_state_and_keep_their_windows(
    load: Load,
) -> None:
    source = make_series("CT", slices=3)
    source[1].WindowCenter = "-600"
    images, made = objects(load(source))
    windows = {image.sop_instance_uid: read(image).WindowCenter for image in images}
    (state,) = states(made)
    assert len(state.SoftcopyVOILUTSequence) == 2
    for item in state.SoftcopyVOILUTSequence:
        for image in item.ReferencedImageSequence:
            assert item.WindowCenter == windows[image.ReferencedSOPInstanceUID]


def test_an_image_without_a_window_is_shown_from_its_lowest_to_its_highest_value(
    load: Load,
) -> None:
    """The presentation state replaces the image's own display: without a window it is black."""
    images, made = objects(load(make_series("PT", slices=2)))
    shown = [read(image) for image in images]
    values = [each.pixel_array * float(each.RescaleSlope) for each in shown]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    for state in states(made):
        (item,) = state.SoftcopyVOILUTSequence
        center, width = float(item.WindowCenter), float(item.WindowWidth)
        assert center - 0.5 - (width - 1) / 2 == pytest.approx(low, abs=0.01)
        assert center - 0.5 + (width - 1) / 2 == pytest.approx(high, abs=0.01)


def test_an_image_whose_lowest_value_is_white_stays_so(load: Load) -> None:
    source = make_series("MR", slices=1, PhotometricInterpretation="MONOCHROME1")
    _, made = objects(load(source))
    assert states(made)[0].PresentationLUTShape == "INVERSE"


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("make", [make_enhanced, legacy_converted])
def test_a_multi_frame_image_is_reported_on_frame_by_frame(
    load: Load, modality: Any, make: Any
) -> None:
    series = load([make(modality, slices=3, rows=16)])
    gates = tuple(GateValue("residual_ratio", 0.1 * i, slice=i) for i in range(3))
    images, made = objects(series, gates=gates)
    document = report(made)
    group = items(document, "Measurement Group")[2]
    numbers = [
        item.ReferencedSOPSequence[0].ReferencedFrameNumber
        for item in group.ContentSequence
        if item.ValueType == "IMAGE"
    ]
    assert numbers == [2, 2]
    found: list[int] = []
    for state in states(made):
        (image,) = state.ReferencedSeriesSequence[0].ReferencedImageSequence
        assert image.ReferencedSOPInstanceUID == images[0].sop_instance_uid
        stated = image.get("ReferencedFrameNumber", [1, 2, 3])
        found += [stated] if isinstance(stated, int) else list(stated)
    assert sorted(found) == [1, 2, 3]


@pytest.mark.parametrize("script", ["japanese", "korean", "greek", "cyrillic", "unicode"])
def test_names_come_back_in_their_script(load: Load, script: str) -> None:
    source = make_series("CT", slices=1, script=script)
    _, made = objects(load(source))
    assert [read(each).PatientName for each in made] == [source[0].PatientName] * 2


@pytest.mark.parametrize(
    "odd", [{"PatientSex": "U"}, {"PatientID": ""}, {"StudyDate": None}, {"PatientName": None}]
)
def test_a_header_that_the_library_would_refuse_is_reported_on_all_the_same(
    load: Load, odd: dict[str, Any]
) -> None:
    _, made = objects(load(make_series("CT", slices=1, **odd)))
    for keyword, value in odd.items():
        assert [read(each).get(keyword) or "" for each in made] == [value or ""] * 2


def test_the_same_restoration_makes_the_same_bytes(load: Load) -> None:
    series = load(make_series("PT", slices=2))
    assert objects(series) == objects(series)


def test_a_late_slice_gets_its_own_report_in_the_same_series(load: Load) -> None:
    source = make_series("CT", slices=3)
    _, early = objects(load(source[:2]))
    _, late = objects(load(source[2:]))
    for first, second in zip(early, late, strict=True):
        assert first.sop_instance_uid != second.sop_instance_uid
        assert read(first).SeriesInstanceUID == read(second).SeriesInstanceUID


def test_the_loop_guard_knows_both_for_our_own(load: Load) -> None:
    _, made = objects(load(make_series("MR", slices=1)))
    assert [is_own_output(read(each)) for each in made] == [True, True]


def test_series_numbers_and_descriptions_say_what_they_are(load: Load) -> None:
    _, made = objects(load(make_series("CT", slices=1)))
    document, state = report(made), states(made)[0]
    assert (document.SeriesNumber, state.SeriesNumber) == (9503, 9504)
    assert document.SeriesDescription == "Phantom [AI-DN]: restoration report"
    assert state.SeriesDescription == "Phantom [AI-DN]: presentation state"


def test_a_report_that_cannot_be_made_fails_without_quoting_the_header(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Phantom^Test")

    monkeypatch.setattr(highdicom.base.SOPClass, "copy_patient_and_study_information", refuse)
    with pytest.raises(PermanentError) as caught:
        objects(load(make_series("CT", slices=1)))
    assert "ValueError" in caught.value.message
    assert "Phantom^Test" not in caught.value.message
