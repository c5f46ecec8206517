"""Stored values to physical units and back, to the last step."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dicom_node.dicom import pixels
from dicom_node.dicom.geometry import SAME_GRID, Resampling
from dicom_node.dicom.header import read_dataset
from dicom_node.dicom.pixels import PixelFormat, Rescale
from dicom_node.errors import RefusedError, UnreadableInstanceError
from tests.factories import make_series, write_series
from tests.multiframe import make_enhanced

SIGNED, UNSIGNED = PixelFormat(16, 16, True), PixelFormat(16, 16, False)
TWELVE = PixelFormat(16, 12, False)
NOTHING = np.zeros((2, 2), dtype=bool)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
    ids=lambda syntax: syntax.name.split(",")[0],
)
def test_every_lossless_syntax_decodes_to_the_stored_values(
    tmp_path: Path, syntax: str, bits: int, signed: bool
) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    values = low + np.arange(40 * 36).reshape(1, 40, 36) % (2**bits)
    values[0, 0, :2] = low, low + 2**bits - 1
    datasets = make_series(
        "MR", physical=values, bits_stored=bits, signed=signed, transfer_syntax=syntax
    )
    read = read_dataset(write_series(datasets, tmp_path)[0])
    stored = pixels.decode(read)
    assert np.array_equal(stored, values[0])
    assert stored.dtype == pixels.pixel_format(read).dtype


def test_pixel_data_that_do_not_decode_name_the_instance() -> None:
    dataset = make_series("CT", slices=1, transfer_syntax=JPEG2000Lossless)[0]
    dataset.PixelData = dataset.PixelData[:60] + b"\0" * (len(dataset.PixelData) - 60)
    with pytest.raises(UnreadableInstanceError, match=str(dataset.SOPInstanceUID)) as raised:
        pixels.decode(dataset)
    assert raised.value.sop_instance_uid == dataset.SOPInstanceUID


def test_a_run_that_overshoots_its_plane_is_refused_and_ends_no_process() -> None:
    # The decoder is Rust, and panics: what Python gets is no Exception.
    dataset = make_series("MR", slices=1, rows=8, transfer_syntax=RLELossless)[0]
    header = struct.pack("<16L", 2, 64, 66, *[0] * 13)  # PS3.5 G.5: two segments
    too_long = bytes((0x81, 0x01))  # 128 times one octet, for the 64 of a plane
    dataset.PixelData = encapsulate([header + 2 * too_long])
    with pytest.raises(UnreadableInstanceError, match=r"do not decode \(PanicException\)"):
        pixels.decode(dataset)


def test_an_interrupt_while_pixels_decode_is_no_fault_of_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pixels, "pixel_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pixels.decode(make_series("CT", slices=1)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31},
        {"BitsStored": 7, "HighBit": 6},
        {"HighBit": 13, "BitsStored": 12},
    ],
)
def test_a_packing_that_cannot_be_kept_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(RefusedError):
        pixels.pixel_format(make_series("CT", slices=1, **changes)[0])


@pytest.mark.parametrize(
    ("form", "lowest", "highest"),
    [
        (PixelFormat(8, 8, False), 0, 255),
        (PixelFormat(16, 12, False), 0, 4095),
        (PixelFormat(16, 12, True), -2048, 2047),
        (SIGNED, -32768, 32767),
        (UNSIGNED, 0, 65535),
    ],
)
def test_bits_stored_bound_the_values(form: PixelFormat, lowest: int, highest: int) -> None:
    assert (form.minimum, form.maximum) == (lowest, highest)


def test_a_slice_of_mr_without_rescale_is_taken_as_it_is() -> None:
    assert pixels.rescale(make_series("MR", slices=1)[0]) == Rescale(1.0, 0.0)


@pytest.mark.parametrize("value", ["", None])
@pytest.mark.parametrize(
    ("modality", "keyword"),
    [("CT", "RescaleSlope"), ("CT", "RescaleIntercept"), ("PT", "RescaleSlope")],
)
def test_a_scale_that_the_unit_hangs_on_is_never_guessed(
    modality: Any, keyword: str, value: str | None
) -> None:
    (dataset,) = make_series(modality, slices=1)
    setattr(dataset, keyword, value)
    with pytest.raises(RefusedError, match=f"{keyword} is absent from a {modality} image"):
        pixels.rescale(dataset)


def test_the_intercept_of_pet_is_zero_whether_it_is_stated_or_not() -> None:
    (dataset,) = make_series("PT", slices=1)
    stated = pixels.rescale(dataset)
    del dataset.RescaleIntercept
    assert pixels.rescale(dataset) == stated


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize("values", [["1", "2"], ["1", "1"], ["", "1"]])
def test_a_scale_of_several_values_is_refused(
    modality: Any, keyword: str, values: list[str]
) -> None:
    (dataset,) = make_series(modality, slices=1)
    dataset.add_new(keyword, "LO", values)
    with pytest.raises(RefusedError, match=f"{keyword} has 2 values"):
        pixels.rescale(dataset)


@pytest.mark.parametrize("slope", ["0", "much"])
def test_a_slope_that_cannot_be_inverted_is_refused(slope: str) -> None:
    dataset = make_series("CT", slices=1)[0]
    dataset.add_new("RescaleSlope", "LO", slope)
    with pytest.raises(RefusedError, match="RescaleSlope"):
        pixels.rescale(dataset)


@pytest.mark.parametrize(
    ("slope", "intercept"),
    [("1", "999999999999"), ("1e-7", "-1024"), ("1e-30", "0"), ("1e30", "0")],
)
def test_a_scale_whose_steps_float32_cannot_tell_apart_is_refused(
    slope: str, intercept: str
) -> None:
    dataset = make_series("CT", slices=1)[0]
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    with pytest.raises(RefusedError, match="no room for single steps"):
        pixels.rescale(dataset)


@given(
    slope=st.floats(1e-18, 1e18),
    offset=st.floats(-4e6, 4e6),
    steps=st.lists(st.integers(-32768, 32767), min_size=4, max_size=4),
)
def test_whatever_scale_is_taken_every_stored_step_survives_float32(
    slope: float, offset: float, steps: list[int]
) -> None:
    dataset = make_series("CT", slices=1)[0]
    dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.9g}", f"{offset * slope:.9g}"
    by = pixels.rescale(dataset)
    stored = np.array(steps, dtype=np.int16).reshape(2, 2)
    carried = pixels.to_physical(stored, by).astype(np.float32).astype(np.float64)
    back = pixels.quantise(carried, by, SIGNED, source=stored, mask=NOTHING, padding=None)
    np.testing.assert_array_equal(back.stored, stored)


def quantise(
    physical: list[list[float]],
    by: Rescale,
    form: PixelFormat,
    padding: tuple[int, int] | None = None,
) -> pixels.Quantised:
    source = np.zeros((2, 2), dtype=form.dtype)
    values = np.asarray(physical)
    return pixels.quantise(values, by, form, source=source, mask=NOTHING, padding=padding)


def test_halves_round_to_even() -> None:
    made = quantise([[0.5, 1.5], [2.5, -0.5]], Rescale(1.0, 0.0), SIGNED)
    assert made.stored.tolist() == [[0, 2], [2, 0]]


def test_values_beyond_the_stored_range_are_clamped_and_counted() -> None:
    # 12 bits, slope 1, intercept -1024: -1024 to 3071 HU can be stored.
    made = quantise([[-1500.0, -1024.0], [3071.0, 4000.0]], Rescale(1.0, -1024.0), TWELVE)
    assert made.stored.tolist() == [[0, 0], [4095, 4095]]
    assert made.clamped == 2


@settings(max_examples=50, deadline=None)
@given(
    st.floats(1e-4, 1e3),
    st.floats(-5000, 5000),
    st.lists(st.integers(-32768, 32767), min_size=4, max_size=4),
)
def test_stored_values_come_back_unchanged(slope: float, base: float, steps: list[int]) -> None:
    by = Rescale(slope, base)
    source = np.asarray(steps, dtype=np.int16).reshape(2, 2)
    physical = pixels.to_physical(source, by)
    made = pixels.quantise(physical, by, SIGNED, source=source, mask=NOTHING, padding=None)
    assert np.array_equal(made.stored, source)
    assert made.clamped == 0


@pytest.mark.parametrize(
    ("padding", "wanted"),
    [
        ((-2000, -2000), [[-1999, -1999], [-1999, 7]]),
        ((-2001, -1998), [[-2002, -2002], [-1997, 7]]),  # to the nearer side of the range
        ((-32768, -1998), [[-1997, -1997], [-1997, 7]]),  # nothing lies below
    ],
)
def test_no_restored_pixel_reads_as_padding(
    padding: tuple[int, int], wanted: list[list[int]]
) -> None:
    made = quantise([[-1999.9, -2000.4], [-1999.0, 7.0]], Rescale(1.0, 0.0), SIGNED, padding)
    assert made.stored.tolist() == wanted


def test_padding_is_bit_exact_whatever_the_result_says() -> None:
    dataset = make_series("CT", slices=1, padding=-2000)[0]
    stored = pixels.decode(dataset)
    by = pixels.rescale(dataset)
    mask = pixels.padding_mask(stored, dataset, by)
    assert mask.mean() == pytest.approx(1 - np.pi / 4, abs=0.08)  # outside the inscribed circle
    made = pixels.quantise(
        np.full(stored.shape, 55.0), by, SIGNED, source=stored, mask=mask, padding=(-2000, -2000)
    )
    assert (made.stored[mask] == -2000).all()
    assert (made.stored[~mask] == 55 + 1024).all()


def test_a_padding_range_masks_all_of_it() -> None:
    dataset = make_series("CT", slices=1, padding=-2000, padding_limit=-1990)[0]
    assert pixels.padding_range(dataset) == (-2000, -1990)
    stored = np.array([[-2001, -2000], [-1990, -1989]], dtype=np.int16)
    mask = pixels.padding_mask(stored, dataset, Rescale(1.0, 0.0))
    # In CT, what lies below any tissue is padding too, declared or not.
    assert mask.all()
    dataset.Modality = "MR"
    mask = pixels.padding_mask(stored, dataset, Rescale(1.0, 0.0))
    assert mask.tolist() == [[False, True], [True, False]]


def test_air_is_not_padding() -> None:
    dataset = make_series("CT", slices=1)[0]
    stored = np.array([[0, 24], [-100, -3024]], dtype=np.int16)  # -1024, -1000, -1124, -4048 HU
    mask = pixels.padding_mask(stored, dataset, Rescale(1.0, -1024.0))
    assert mask.tolist() == [[False, False], [False, True]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6, width=32), min_size=4, max_size=4), st.booleans())
def test_a_new_pet_slope_keeps_every_value_within_half_a_step(
    values: list[float], signed: bool
) -> None:
    physical = np.asarray(values, dtype=np.float64).reshape(2, 2)
    form = PixelFormat(16, 16, signed)
    source = np.full((2, 2), 1, dtype=form.dtype)
    made = pixels.quantise_slice_scale(
        physical, Rescale(0.5, 0.0), form, source=source, mask=NOTHING, padding=None
    )
    back = pixels.to_physical(made.stored, made.rescale)
    assert np.abs(back - physical).max() <= made.rescale.slope / 2 * (1 + 1e-9)
    assert made.rescale.intercept == 0.0
    assert made.clamped == 0


def test_pet_values_that_did_not_change_keep_slope_and_pixels() -> None:
    source = np.array([[0, 100], [20000, 32000]], dtype=np.int16)
    by = Rescale(0.773247, 0.0)
    physical = pixels.to_physical(source, by).astype(np.float32).astype(np.float64)
    made = pixels.quantise_slice_scale(
        physical, by, SIGNED, source=source, mask=NOTHING, padding=None
    )
    assert made.rescale == by
    assert np.array_equal(made.stored, source)


def test_negative_pet_values_in_unsigned_pixels_are_clamped_and_counted() -> None:
    source = np.zeros((2, 2), dtype=np.uint16)
    made = pixels.quantise_slice_scale(
        np.array([[-5.0, 10.0], [0.0, 5.0]]),
        Rescale(1.0, 0.0),
        UNSIGNED,
        source=source,
        mask=NOTHING,
        padding=None,
    )
    assert made.clamped == 1
    assert made.stored[0, 0] == 0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL])
def test_high_throughput_jpeg_2000_decodes_to_the_same_values(
    bits: int, signed: bool, syntax: str
) -> None:
    """Encoded by OpenJPH, decoded by OpenJPEG."""
    imagecodecs = pytest.importorskip("imagecodecs")
    (dataset,) = make_series("MR", slices=1, rows=64, columns=48, bits_stored=bits, signed=signed)
    wanted = dataset.pixel_array
    dataset.PixelData = encapsulate([imagecodecs.htj2k_encode(wanted, reversible=True)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    assert np.array_equal(pixels.decode(dataset), wanted)


@pytest.mark.dcmtk
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("process", ["+e1", "+el"])
def test_jpeg_lossless_decodes_to_the_same_values(
    tmp_path: Path, bits: int, signed: bool, process: str
) -> None:
    """Process 14 and its selection value 1, encoded by DCMTK, decoded by GDCM."""
    program = shutil.which("/usr/bin/dcmcjpeg")
    if program is None:
        pytest.skip("missing peer: dcmcjpeg (DCMTK)")
    datasets = make_series("MR", slices=1, rows=64, columns=48, bits_stored=bits, signed=signed)
    (plain,) = write_series(datasets, tmp_path)
    packed = tmp_path / "packed.dcm"
    subprocess.run([program, process, plain, packed], check=True, timeout=60)
    dataset = read_dataset(packed)
    assert dataset.file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(pixels.decode(dataset), datasets[0].pixel_array)


def test_one_frame_of_several_is_decoded() -> None:
    image = make_enhanced("CT", slices=3, rows=8, transfer_syntax=RLELossless)
    frames = image.pixel_array
    for number in (1, 2, 3):
        assert np.array_equal(pixels.decode(image, number), frames[number - 1])
    with pytest.raises(UnreadableInstanceError):
        pixels.decode(image, 4)


def test_a_finer_grid_takes_the_nearest_sample() -> None:
    values = np.arange(6).reshape(2, 3)
    assert pixels.on_grid(values, SAME_GRID) is values
    fourier = pixels.on_grid(values, Resampling(2))  # samples at 0, 1/2, 1, 3/2 …
    assert np.array_equal(fourier[::2, ::2], values)
    box = pixels.on_grid(values, Resampling(2, (-0.25, -0.25)))
    assert np.array_equal(box, np.kron(values, np.ones((2, 2), dtype=int)))
