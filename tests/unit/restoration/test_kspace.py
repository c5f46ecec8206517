from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from restoration.kspace import (
    GridChange,
    Support,
    data_consistency,
    empty_band,
    truncate,
    zero_fill,
    zero_filled_grid,
    zero_filled_support,
)

SIZES = [(16, 16), (15, 16), (17, 23), (8, 5), (1, 9)]


def series(name: str, folder: Path) -> Tensor:
    pydicom = pytest.importorskip("pydicom")
    files = sorted((folder / "dicom" / name).iterdir())
    slices = [pydicom.dcmread(path).pixel_array.astype(np.float32) for path in files]
    return torch.from_numpy(np.stack(slices))


@pytest.mark.parametrize("size", SIZES)
def test_a_constant_image_stays_constant_when_truncated(size: tuple[int, int]) -> None:
    image = torch.full((2, *size), 7.25)
    torch.testing.assert_close(truncate(image, 4), image)


@pytest.mark.parametrize("size", SIZES)
def test_a_factor_of_one_keeps_all_of_kspace(size: tuple[int, int]) -> None:
    image = torch.rand(3, 1, *size)
    torch.testing.assert_close(truncate(image, 1), image)


def test_only_the_central_quarter_of_each_axis_survives_truncation() -> None:
    columns = torch.arange(256, dtype=torch.float64)
    kept = 2 + torch.cos(2 * torch.pi * 31 * columns / 256)
    lost = torch.cos(2 * torch.pi * 33 * columns / 256)
    image = (kept + lost).expand(256, 256)
    torch.testing.assert_close(truncate(image, 4), kept.expand(256, 256))
    torch.testing.assert_close(truncate(image.T, 4), kept.expand(256, 256).T)


def test_truncation_never_adds_energy(heads: Tensor) -> None:
    image = heads
    assert truncate(image, 4).square().sum() < image.square().sum()
    assert truncate(image, 4).mean() == pytest.approx(float(image.mean()), rel=0.02)


@pytest.mark.parametrize("factor", [0.5, 0.0, -2.0, float("nan")])
def test_a_factor_below_one_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        truncate(torch.ones(8, 8), factor)


def test_zero_filling_by_less_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match="factor"):
        zero_fill(torch.ones(8, 8), 0)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_zero_filling_keeps_every_sample_where_it_was(size: tuple[int, int], factor: int) -> None:
    image = torch.rand(2, *size, dtype=torch.float64)
    filled = zero_fill(image, factor)
    assert filled.shape == (2, size[0] * factor, size[1] * factor)
    torch.testing.assert_close(filled[..., ::factor, ::factor], image)


def test_zero_filling_is_trigonometric_interpolation() -> None:
    coarse = torch.arange(12, dtype=torch.float64) / 12
    fine = torch.arange(48, dtype=torch.float64) / 48

    def wave(t: Tensor) -> Tensor:
        return 3 + torch.cos(2 * torch.pi * 2 * t + 0.3) + torch.sin(2 * torch.pi * 5 * t)

    filled = zero_fill(wave(coarse).expand(12, 12), 4)
    torch.testing.assert_close(filled, wave(fine).expand(48, 48))


@pytest.mark.parametrize("size", [(128, 128), (127, 128), (130, 101)])
@pytest.mark.parametrize("factor", [2, 4])
def test_the_empty_band_of_a_truncated_image_is_found(
    size: tuple[int, int], factor: int, heads: Tensor
) -> None:
    image = heads[..., : size[0], : size[1]]
    support = empty_band(truncate(image, factor).round())
    assert support is not None
    for found, n in ((support.rows, size[0]), (support.columns, size[1])):
        assert round(n / factor) // 2 - 2 <= found <= round(n / factor) // 2


def test_a_full_kspace_has_no_empty_band(heads: Tensor) -> None:
    assert empty_band(heads) is None


def test_an_axis_is_judged_without_the_other(heads: Tensor) -> None:
    image = heads
    spectrum = torch.fft.fftshift(torch.fft.fft2(image), dim=(-2, -1))
    spectrum[..., : 68 - 20, :] = 0
    spectrum[..., 68 + 21 :, :] = 0
    rows_only = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).abs()
    assert empty_band(rows_only) == Support(rows=20, columns=68)
    assert empty_band(rows_only.transpose(-2, -1)) == Support(rows=68, columns=20)


@pytest.mark.parametrize("image", [torch.zeros(3, 64, 64), torch.full((64, 64), 5.0)])
def test_a_flat_image_has_no_empty_band(image: Tensor) -> None:
    assert empty_band(image) is None


def test_a_tiny_image_has_no_empty_band() -> None:
    assert empty_band(torch.rand(2, 9, 9)) is None


def test_flat_slices_of_a_series_do_not_hide_its_empty_band(heads: Tensor) -> None:
    series = torch.cat([torch.zeros(5, 136, 136), truncate(heads, 4), torch.zeros(70, 136, 136)])
    assert empty_band(series) == empty_band(truncate(heads, 4))


REAL = ["mr_siemens_t2_tse", "mr_toshiba_t2_abdomen", "mr_siemens_haste_coronal", "mr_uih_t1"]


@pytest.mark.parametrize("name", REAL)
def test_a_real_series_is_full_band_until_it_is_truncated(name: str, shared_data: Path) -> None:
    image = series(name, shared_data)
    assert empty_band(image) is None
    support = empty_band(truncate(image, 4).round())
    assert support is not None
    height, width = image.shape[-2:]
    assert abs(support.rows - height // 8) <= 1
    assert abs(support.columns - width // 8) <= 1


def test_full_weight_gives_back_exactly_the_acquired_frequencies() -> None:
    x, y = torch.rand(2, 33, 40, dtype=torch.float64), torch.rand(2, 33, 40, dtype=torch.float64)
    support = Support(rows=5, columns=7)
    inside = support.mask(x)
    result = torch.fft.fft2(data_consistency(x, y, support, 1.0))
    torch.testing.assert_close(result * inside, torch.fft.fft2(x) * inside)
    torch.testing.assert_close(result * ~inside, torch.fft.fft2(y) * ~inside)


def test_the_weight_mixes_linearly() -> None:
    x, y = torch.rand(24, 24, dtype=torch.float64), torch.rand(24, 24, dtype=torch.float64)
    support = Support(rows=4, columns=12)
    full = data_consistency(x, y, support, 1.0)
    assert torch.equal(data_consistency(x, y, support, 0.0), y)
    torch.testing.assert_close(data_consistency(x, y, support, 0.25), y + 0.25 * (full - y))


def test_equal_images_are_left_alone() -> None:
    x = torch.rand(16, 17)
    assert torch.equal(data_consistency(x, x, Support(3, 3), 1.0), x)


def test_a_weight_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        data_consistency(torch.ones(8, 8), torch.ones(8, 8), Support(1, 1), 1.5)


def test_the_mask_is_even_in_frequency() -> None:
    for size in SIZES:
        mask = Support(rows=2, columns=3).mask(torch.zeros(size))
        mirrored = mask.flip(0, 1).roll((1, 1), (0, 1))
        assert torch.equal(mask, mirrored)


def band_limited(rows: int, columns: int, seed: int, share: float = 0.4) -> Tensor:
    """Amplitudes (2m+1, 2n+1) of a positive image with |frequencies| ≤ share · size / 2."""
    generator = torch.Generator().manual_seed(seed)
    m, n = int(share * rows / 2), int(share * columns / 2)
    shape = (2 * m + 1, 2 * n + 1)
    real, phase = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    waves = real * torch.exp(2j * torch.pi * phase)
    waves = (waves + waves.flip(0, 1).conj()) / 2  # a real image
    waves[m, n] = 2 * waves.abs().sum()  # that is nowhere negative
    return waves


def sampled(waves: Tensor, rows: int, columns: int) -> Tensor:
    """The image of those waves at rows × columns points of one field of view, summed directly."""
    m, n = (size // 2 for size in waves.shape)
    down = torch.outer(torch.arange(rows).double() / rows, torch.arange(-m, m + 1).double())
    along = torch.outer(torch.arange(-n, n + 1).double(), torch.arange(columns).double() / columns)
    turn = 2j * torch.pi
    image: Tensor = (torch.exp(turn * down) @ waves @ torch.exp(turn * along)).real
    return image


matrix = st.integers(16, 72)


@settings(max_examples=40, deadline=None)
@given(rows=matrix, columns=matrix, factor=st.sampled_from([2, 3, 4]), seed=st.integers(0, 99))
def test_a_band_limited_image_of_any_matrix_is_filled_to_what_a_finer_scan_would_give(
    rows: int, columns: int, factor: int, seed: int
) -> None:
    waves = band_limited(rows, columns, seed)
    filled = zero_fill(sampled(waves, rows, columns), factor)
    torch.testing.assert_close(filled, sampled(waves, rows * factor, columns * factor))


@settings(max_examples=40, deadline=None)
@given(rows=matrix, columns=matrix, factor=st.sampled_from([2, 4]), seed=st.integers(0, 99))
def test_consistency_with_a_low_matrix_leaves_its_own_samples_untouched_by_any_network(
    rows: int, columns: int, factor: int, seed: int
) -> None:
    waves = band_limited(rows, columns, seed)
    acquired = sampled(waves, rows, columns)
    x = zero_fill(acquired, factor)
    invented = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).double()
    support = zero_filled_support(acquired)
    result = data_consistency(x, x + invented * x.mean(), support, 1.0)
    inside = support.mask(x)
    torch.testing.assert_close(
        torch.fft.fft2(result) * inside, torch.fft.fft2(x) * inside, rtol=1e-9, atol=1e-6
    )
    m, n = (side // 2 for side in waves.shape)
    # A faint wave at the edge of the band may count as empty, and is then not held.
    assert m - support.rows <= 2
    assert n - support.columns <= 2
    assume(support.rows >= m and support.columns >= n)
    # Sampled at the old pixels after a low-pass, the image is the acquired one.
    low = torch.fft.ifft2(torch.fft.fft2(result) * inside).real[..., ::factor, ::factor]
    torch.testing.assert_close(low, acquired)


@pytest.mark.parametrize("size", [(64, 64), (65, 96), (255, 192)])
@pytest.mark.parametrize("factor", [2, 4])
def test_the_grid_change_says_where_the_finer_samples_lie(
    size: tuple[int, int], factor: int
) -> None:
    waves = band_limited(*size, seed=3)
    filled = zero_fill(sampled(waves, *size), factor)
    grid = zero_filled_grid(factor)
    assert grid == GridChange(factor, (0.0, 0.0))
    assert filled.shape == (size[0] * grid.factor, size[1] * grid.factor)
    # Sample (i, j) of the finer grid lies at shift + (i, j) / factor of the coarse one.
    for i, j in ((0, 0), (1, 0), (0, 3), (filled.shape[0] - 1, filled.shape[1] - 1)):
        place = [shift + k / factor for shift, k in zip(grid.shift, (i, j), strict=True)]
        m, n = (side // 2 for side in waves.shape)
        down = torch.exp(2j * torch.pi * torch.arange(-m, m + 1) * place[0] / size[0])
        along = torch.exp(2j * torch.pi * torch.arange(-n, n + 1) * place[1] / size[1])
        expected = (down.to(waves.dtype) @ waves @ along.to(waves.dtype)).real
        assert float(filled[i, j]) == pytest.approx(float(expected), rel=1e-6)


def test_a_grid_is_never_made_coarser() -> None:
    with pytest.raises(ValueError, match="factor"):
        zero_filled_grid(0)


@pytest.mark.parametrize(("size", "support"), [((64, 65), (31, 32)), ((7, 8), (3, 3))])
def test_the_frequency_at_the_limit_of_an_even_matrix_does_not_count_as_acquired(
    size: tuple[int, int], support: tuple[int, int]
) -> None:
    image = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    assert zero_filled_support(image) == Support(*support)


def test_a_low_matrix_that_was_itself_interpolated_counts_what_was_measured(heads: Tensor) -> None:
    interpolated = truncate(heads, 2)
    assert zero_filled_support(interpolated) == empty_band(interpolated)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_low_matrix_zero_filled_is_the_input_that_the_network_was_trained_on(
    factor: int, heads: Tensor
) -> None:
    # Sizes of which an odd number of frequencies is kept, and no value that the magnitude folds.
    fine = heads[..., : 33 * factor, : 25 * factor].double() + 2000
    trained_on = truncate(fine, factor)
    native = trained_on[..., ::factor, ::factor]
    torch.testing.assert_close(zero_fill(native, factor), trained_on)
