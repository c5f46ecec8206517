"""Whether a source was compressed with loss, and that its result goes on saying so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSNearLossless,
)

from dicom_node.dicom import lossy, volume
from dicom_node.errors import RefusedError
from dicom_node.settings import PolicySettings
from tests.conformance.checks import read
from tests.factories import make_series, write_series
from tests.multiframe import make_enhanced
from tests.unit.dicom_node.dicom.conftest import derive

LOST = "the source was compressed with loss"
PERHAPS = "the source may have been compressed with loss: its header does not say"


@pytest.mark.parametrize(
    ("syntax", "stated", "reason"),
    [
        (ExplicitVRLittleEndian, None, None),
        (ExplicitVRLittleEndian, "00", None),
        (ExplicitVRLittleEndian, "01", LOST),
        (JPEG2000Lossless, None, None),
        (JPEG2000Lossless, "01", LOST),
        (JPEGBaseline8Bit, None, LOST),
        (JPEGLSNearLossless, "00", LOST),
        (JPEG2000, None, PERHAPS),
        (JPEG2000, "", PERHAPS),
        (JPEG2000, "00", None),
        (JPEG2000, "01", LOST),
        (HTJ2K, None, PERHAPS),
    ],
)
def test_header_and_transfer_syntax_tell_of_loss(
    syntax: str, stated: str | None, reason: str | None
) -> None:
    (header,) = make_series("CT", slices=1, LossyImageCompression=stated)
    header.file_meta.TransferSyntaxUID = syntax
    assert lossy.why_lossy(header) == reason


def near_lossless(image: Dataset) -> Dataset:
    """The image compressed with loss by a sender that says so nowhere else."""
    image.compress(JPEGLSNearLossless, jls_error=3, generate_instance_uid=False)
    for keyword in ("", "Ratio", "Method"):
        image.pop(f"LossyImageCompression{keyword}", None)
    return image


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_series("CT", slices=1, rows=64)[0],
        lambda: make_series("MR", slices=1, rows=64)[0],
        lambda: make_enhanced("CT", slices=2, rows=64),
    ],
    ids=["CT", "MR", "Enhanced CT"],
)
def test_a_result_tells_of_the_loss_that_only_the_transfer_syntax_of_its_source_told(
    tmp_path: Path, make: Any
) -> None:
    source = near_lossless(make())
    size = len(source.PixelData)
    (path,) = write_series([source], tmp_path)
    task = "mri_sr" if source.Modality == "MR" else "ct_denoise"
    with pytest.raises(RefusedError, match="with loss"):
        volume.load([path], task, PolicySettings())
    loaded = volume.load([path], task, PolicySettings(accept_lossy=True))
    made = read(derive(loaded)[0].data)
    assert made.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert made.LossyImageCompression == "01"
    assert made.LossyImageCompressionMethod == "ISO_14495_1"
    plain = 64 * 64 * 2 * int(source.get("NumberOfFrames", 1))
    assert float(made.LossyImageCompressionRatio) == pytest.approx(plain / size, rel=1e-3)


def test_what_a_header_tells_of_loss_is_carried_over_as_it_is(tmp_path: Path) -> None:
    history = {
        "LossyImageCompression": "01",
        "LossyImageCompressionRatio": ["7.5", "3"],
        "LossyImageCompressionMethod": ["ISO_10918_1", "ISO_15444_1"],
    }
    (path,) = write_series(make_series("CT", slices=1, **history), tmp_path)
    loaded = volume.load([path], "ct_denoise", PolicySettings(accept_lossy=True))
    made = read(derive(loaded)[0].data)
    assert made.LossyImageCompression == "01"
    assert list(made.LossyImageCompressionRatio) == [7.5, 3]
    assert list(made.LossyImageCompressionMethod) == ["ISO_10918_1", "ISO_15444_1"]
