"""Clean phantoms: derived objects without one error, in agreement with their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dicom_node.dicom import volume
from dicom_node.settings import PolicySettings
from tests.conformance.conftest import Validators
from tests.factories import NAMES, make_series, write_series
from tests.multiframe import make_enhanced
from tests.unit.dicom_node.dicom.conftest import TASKS, derive

Written = Callable[[Iterable[bytes]], list[Path]]
SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd sizes": {"rows": 33, "columns": 41, "spacing": (0.7, 1.3)},
    "one slice": {"slices": 1},
    "gap": {"missing": [2]},
    "padding": {"padding": 17, "padding_limit": 19},
    "no names": {"SeriesDescription": None, "Manufacturer": ""},
    "time zone": {"TimezoneOffsetFromUTC": "+0530"},
}


def check(
    source: list[Path],
    modality: str,
    validators: Validators,
    written: Written,
    *,
    beside: list[Path] | None = None,
) -> None:
    loaded = volume.load(source, TASKS[modality], PolicySettings())
    derived = written(instance.data for instance in derive(loaded, loaded.array * 0.97))
    for path in derived:
        assert not validators.errors(path)
    assert validators.contradictions([*(beside or source), *derived]) == []


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_clean_phantom_gives_an_object_without_errors(
    tmp_path: Path, validators: Validators, written: Written, modality: Any, variant: str
) -> None:
    shape = {"slices": 3, **VARIANTS[variant]}
    source = write_series(make_series(modality, **shape), tmp_path / "source")
    check(source, modality, validators, written)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name.split(",")[0])
def test_every_transfer_syntax_gives_an_object_without_errors(
    tmp_path: Path, validators: Validators, written: Written, modality: Any, syntax: str
) -> None:
    datasets = make_series(modality, slices=2, rows=64, transfer_syntax=syntax)
    # The validator inflates nothing: beside the derived objects it gets the plain source.
    plain = write_series(make_series(modality, slices=2, rows=64), tmp_path / "plain")
    source = write_series(datasets, tmp_path / "source")
    check(source, modality, validators, written, beside=plain)


@pytest.mark.parametrize("script", list(NAMES))
def test_every_script_gives_an_object_without_errors(
    tmp_path: Path, validators: Validators, written: Written, script: str
) -> None:
    source = write_series(make_series("CT", slices=1, script=script), tmp_path / "source")
    check(source, "CT", validators, written)


@pytest.mark.parametrize("plane", ["coronal", "sagittal", "oblique"])
def test_every_plane_of_mr_gives_an_object_without_errors(
    tmp_path: Path, validators: Validators, written: Written, plane: str
) -> None:
    source = write_series(make_series("MR", slices=2, plane=plane), tmp_path / "source")
    check(source, "MR", validators, written)


def test_the_validator_still_objects_to_a_pulse_sequence_in_a_derived_image(
    tmp_path: Path, validators: Validators
) -> None:
    """Why the policy drops the module, which PS3.3 C.8.13.4 allows: without this, it is copied."""
    image = make_enhanced("MR", slices=2, rows=16)
    image.ImageType[0] = "DERIVED"
    (path,) = write_series([image], tmp_path / "derived")
    objections = [line for line in validators.errors(path) if "MRPulseSequence" in line]
    assert objections
    assert all("may not be present otherwise" in line for line in objections)


def test_the_validators_see_a_fault(tmp_path: Path, validators: Validators) -> None:
    spoiled = write_series(make_series("CT", slices=1, RescaleSlope=None), tmp_path / "spoiled")
    assert any("RescaleSlope" in line for line in validators.errors(spoiled[0]))
    other = make_series("CT", slices=1, series="other", PatientName="Somebody^Else")
    both = [
        *write_series(make_series("CT", slices=1), tmp_path / "one"),
        *write_series(other, tmp_path / "other"),
    ]
    assert any("PatientName" in line for line in validators.contradictions(both))
