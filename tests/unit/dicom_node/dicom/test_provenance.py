"""Provenance items: who, what, from what, when; and UIDs that repeat."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicom_node.dicom import provenance
from dicom_node.dicom.header import valid_uid
from dicom_node.settings import Equipment
from tests.factories import make_series
from tests.unit.dicom_node.dicom.conftest import Model

AT = provenance.DerivationTimes("20260304", "050607.000000", "20260304050607.000000")


def equipment_of(header: Dataset, **changes: str) -> list[Dataset]:
    return provenance.contributing_equipment(
        header, model=Model(), equipment=Equipment(**changes), uid_root=None, at=AT
    )


def purpose(item: Dataset) -> str:
    return str(item.PurposeOfReferenceCodeSequence[0].CodeValue)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("0aé|.", max_size=9), min_size=1, max_size=4))
@pytest.mark.parametrize("root", [None, "1.2.3", "1.2.826.0.1.3680043.1234"])
def test_a_derived_uid_is_valid_and_repeats(root: str | None, parts: list[str]) -> None:
    uid = provenance.derived_uid(root, *parts)
    assert valid_uid(uid)
    assert uid == provenance.derived_uid(root, *parts)
    assert uid.startswith((root or "2.25") + ".")
    assert not any(len(part) > 1 and part.startswith("0") for part in uid.split("."))


def test_parts_do_not_run_into_each_other() -> None:
    assert provenance.derived_uid(None, "a", "bc") != provenance.derived_uid(None, "ab", "c")


def test_new_weights_are_a_new_device() -> None:
    devices = {provenance.device_uid(None, Model(sha256=digest * 32)) for digest in ("ab", "cd")}
    assert len(devices) == 2


def test_scanner_and_node_have_contributed() -> None:
    header = make_series("CT", slices=1, InstitutionName="Hospital", StationName="CT1")[0]
    scanner, ours = equipment_of(header)
    assert (purpose(scanner), purpose(ours)) == ("109101", "109102")
    assert (scanner.Manufacturer, scanner.InstitutionName) == ("Phantoms", "Hospital")
    assert str(scanner.ContributionDateTime) == "20260102100005"
    assert ours.DeviceUID == provenance.device_uid(None, Model())
    assert str(ours.ContributionDateTime) == AT.stamp
    assert any("abababababab" in version for version in ours.SoftwareVersions)


def test_the_node_goes_by_its_configured_name() -> None:
    header = make_series("CT", slices=1)[0]
    *_, ours = equipment_of(header, manufacturer="Site", model_name="Node", station_name="N1")
    assert (ours.Manufacturer, ours.ManufacturerModelName, ours.StationName) == (
        "Site",
        "Node",
        "N1",
    )


def test_earlier_contributors_are_kept_and_the_scanner_is_named_once() -> None:
    header = make_series("CT", slices=1)[0]
    header.ContributingEquipmentSequence = equipment_of(header)[:1]
    assert [purpose(item) for item in equipment_of(header)] == ["109101", "109102"]
    assert equipment_of(header)[0] is not header.ContributingEquipmentSequence[0]


def test_a_scanner_without_a_name_is_left_out() -> None:
    header = make_series("CT", slices=1, Manufacturer="")[0]
    assert [purpose(item) for item in equipment_of(header)] == ["109102"]


def test_names_that_break_a_length_limit_are_cut() -> None:
    header = make_series("CT", slices=1)[0]
    header.add_new("Manufacturer", "LT", "X" * 80)
    assert len(equipment_of(header)[0].Manufacturer) == 64


def test_the_description_says_what_was_done_and_fits() -> None:
    header = make_series("CT", slices=1)[0]
    text = provenance.derivation_description(
        header,
        task="ct_denoise",
        model=Model(),
        strength=0.5,
        parameters_hash="cd" * 32,
        remarks=["a gap"],
        earlier="filtered " * 110,
    )
    assert text.startswith("AI noise reduction by neural network compact 1 (sha256 abababababab)")
    assert f"original series {header.SeriesInstanceUID}; a gap; before: filtered" in text
    assert len(text) == 1024  # ST


@pytest.mark.parametrize("task", ["ct_denoise", "pet_synthesis", "mri_sr"])
def test_the_step_has_a_code_of_a_declared_scheme(task: str) -> None:
    header = make_series("CT", slices=1)[0]
    code = provenance.derivation_code(task)
    declared = {item.CodingSchemeDesignator for item in provenance.coding_schemes(header)}
    assert code.CodingSchemeDesignator in declared
    assert len(code.CodeValue) <= 16


def test_declared_schemes_of_the_source_are_kept_once() -> None:
    header = make_series("CT", slices=1)[0]
    theirs = Dataset()
    theirs.CodingSchemeDesignator = "99SITE"
    header.CodingSchemeIdentificationSequence = [theirs, *provenance.coding_schemes(header)]
    names = [item.CodingSchemeDesignator for item in provenance.coding_schemes(header)]
    assert names == ["99SITE", "99DIFFCODE"]


def test_the_source_is_referenced_by_instance_and_series() -> None:
    header = make_series("MR", slices=1)[0]
    item = provenance.source_image(header)
    assert item.ReferencedSOPInstanceUID == header.SOPInstanceUID
    assert item.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    assert item.SpatialLocationsPreserved == "YES"
    assert provenance.source_image(header, same_grid=False).SpatialLocationsPreserved == "NO"
    other = Dataset()
    other.SeriesInstanceUID = "1.2.3"
    header.ReferencedSeriesSequence = [other]
    ours, theirs = provenance.referenced_series(header)
    assert ours.SeriesInstanceUID == header.SeriesInstanceUID
    assert ours.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
    assert theirs.SeriesInstanceUID == "1.2.3"


@pytest.mark.parametrize(
    ("offset", "stamp"),
    [
        ("+0000", "20260304230000.000000"),
        ("+0530", "20260305043000.000000"),
        ("-0800", "20260304150000.000000"),
    ],
)
def test_times_are_told_in_the_time_zone_of_the_source(offset: str, stamp: str) -> None:
    header = make_series("CT", slices=1, TimezoneOffsetFromUTC=offset)[0]
    at = provenance.times(datetime(2026, 3, 4, 23, 0, 0, tzinfo=UTC), header)
    assert at.stamp == stamp
    assert at.date + at.time == stamp


def test_a_naive_time_is_taken_as_it_is() -> None:
    header = make_series("CT", slices=1, TimezoneOffsetFromUTC="odd")[0]
    assert provenance.times(datetime(2026, 3, 4, 5, 6, 7), header) == AT
