"""Any combination of header values: a derived series with its source's pixels, or a refusal.

Hypothesis combines what scanners send with what they should not; a plain engine returns the
volume as it is. More examples: `make fuzz-derived`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicom_node.dicom.header import quiet_pydicom
from dicom_node.settings import NodeSettings
from tests.conformance.checks import frames_of, pixels_are_the_source_s, read, sources_by_uid
from tests.conformance.journey import go_through
from tests.factories import NAMES, PLANES, make_series, write_series
from tests.unit.dicom_node.bench import Gain

EXAMPLES = int(os.environ.get("DICOM_NODE_TEST_EXAMPLES", "30"))
WITH = {
    wanted: NodeSettings.model_validate({"report": {"sr": wanted, "gsps": wanted}})
    for wanted in (False, True)
}

texts = st.text(
    st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\\\x7f"), max_size=70
)
# Copied as they are, whatever they hold; None removes the attribute.
HEADER = st.fixed_dictionaries(
    {},
    optional={
        "PatientName": st.one_of(st.none(), texts),
        "PatientID": st.one_of(st.none(), st.just(""), texts),
        "PatientSex": st.sampled_from([None, "", "M", "F", "O", "U", "m"]),
        "PatientAge": st.sampled_from(["", "042Y", "42"]),
        "StudyDate": st.sampled_from([None, "", "20260102", "1997.01.01", "***"]),
        "StudyTime": st.sampled_from(["", "090000.123456", "9:00"]),
        "SeriesNumber": st.sampled_from([None, "0", "-3", "2147483647", ""]),
        "InstanceNumber": st.sampled_from([None, "0", "1", ""]),
        "SeriesDescription": st.one_of(st.none(), texts),
        "Manufacturer": st.sampled_from([None, "", "SIEMENS", "X" * 90]),
        "SoftwareVersions": st.sampled_from([None, "", ["a", "b"], "V" * 70]),
        "AccessionNumber": st.sampled_from([None, "", "A" * 20]),
        "ImageType": st.sampled_from(
            [None, ["ORIGINAL", "PRIMARY"], ["DERIVED", "SECONDARY"], ["ORIGINAL"], [""]]
        ),
        "TimezoneOffsetFromUTC": st.sampled_from(["+0530", "-1200", "x"]),
        "BodyPartExamined": st.sampled_from([None, "", "CHEST"]),
        "LossyImageCompression": st.sampled_from(["00", "01", ""]),
        "ContentQualification": st.sampled_from(["PRODUCT", "RESEARCH", ""]),
        "WindowCenter": st.sampled_from([None, "40", ["40", "-600"]]),
        "WindowWidth": st.sampled_from([None, "400", ["400", "1500"]]),
        "FrameOfReferenceUID": st.sampled_from([None, "", "1.2.3"]),
        "SliceThickness": st.sampled_from([None, "", "0", "3"]),
        "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "MONOCHROME2", "RGB", ""]),
        "Units": st.sampled_from([None, "BQML", "GML", "CNTS", "X"]),
        "PatientWeight": st.sampled_from([None, "", "0", "-1", "70"]),
        "BurnedInAnnotation": st.sampled_from(["NO", "YES"]),
    },
)
SHAPE = st.fixed_dictionaries(
    {
        "slices": st.integers(1, 4),
        "rows": st.integers(1, 20),
        "columns": st.integers(1, 20),
        "plane": st.sampled_from(sorted(PLANES)),
        "script": st.sampled_from([None, *NAMES]),
        "bits_stored": st.sampled_from([8, 10, 12, 16]),
        "signed": st.booleans(),
        "tilt": st.sampled_from([0.0, 12.0]),
        "spacing": st.sampled_from([(1.0, 1.0), (0.3, 2.5), (1e-3, 40.0)]),
        "slope": st.sampled_from([None, 1.0, 0.37, 1e-4]),
        "padding": st.sampled_from([None, 0, 5]),
        "seed": st.integers(0, 3),
    }
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 30,
    suppress_health_check=[HealthCheck.too_slow],
    # An example is a handful of values; making it smaller still takes longer than finding it.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    report_multiple_bugs=False,
)
@given(
    modality=st.sampled_from(["CT", "MR", "PT"]),
    shape=SHAPE,
    header=HEADER,
    reports=st.sampled_from([False, False, True]),
)
def test_any_header_is_derived_with_its_pixels_or_refused(
    modality: Any, shape: dict[str, Any], header: dict[str, Any], reports: bool
) -> None:
    script = shape.pop("script")
    names = {"SpecificCharacterSet": "ISO_IR 100"} if script is None else {"script": script}
    if script is not None:
        header = {key: value for key, value in header.items() if _ascii(value)}
        header.pop("PatientName", None)
    with tempfile.TemporaryDirectory() as folder:
        with quiet_pydicom():
            series = make_series(modality, **{**shape, **names, **header})
            paths = write_series(series, Path(folder))
        for outcome in go_through(paths, Gain(gain=0.0), WITH[reports]):
            assert outcome.state in ("derived", "refused", "ignored", "rejected", "held")
            assert outcome.said or outcome.state == "derived"
            sources = sources_by_uid(outcome)
            images = [each for each in outcome.made if "1.1.88" not in each.sop_class_uid]
            images = [each for each in images if "1.1.11" not in each.sop_class_uid]
            for made in images:
                source = sources[made.source_sop_instance_uid]
                pixels_are_the_source_s(made, source)
                placed_as(read(made.data), source)


def _ascii(value: object) -> bool:
    return not isinstance(value, str) or value.isascii()


def placed_as(derived: Dataset, source: Dataset) -> None:
    """The same place in space, the same patient, study and frame of reference."""
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        np.testing.assert_array_equal(derived.get(keyword), source.get(keyword))
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert (derived.get(keyword) or "") == (source.get(keyword) or ""), keyword
    assert derived.SOPInstanceUID != source.SOPInstanceUID
    assert frames_of(derived).shape == frames_of(source).shape
