from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restoration.tiling import Window, pad_to_multiple, restore_tiled, windows


@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    tile=st.integers(1, 64),
    share=st.floats(0, 0.99),
)
@settings(max_examples=25, deadline=None)
def test_blend_weights_sum_to_one_everywhere(
    height: int, width: int, tile: int, share: float
) -> None:
    total = torch.zeros(height, width)
    for window in windows(height, width, tile, int(tile * share)):
        total[window.rows, window.columns] += window.weights
    torch.testing.assert_close(total, torch.ones(height, width), rtol=0, atol=1e-5)


def test_an_identity_returns_its_input() -> None:
    x = torch.rand(2, 3, 200, 137)
    torch.testing.assert_close(restore_tiled(lambda part, _: part, x, 64, 24), x)


def test_an_image_that_fits_is_one_tile_with_full_weight() -> None:
    (window,) = windows(40, 64, 64, 16)
    assert (window.rows, window.columns) == (slice(0, 40), slice(0, 64))
    assert torch.equal(window.weights, torch.ones(40, 64))


def test_tiles_overlap_and_keep_to_the_grid_of_eight() -> None:
    spans = sorted({(w.rows.start, w.rows.stop) for w in windows(520, 64, 256, 64)})
    assert spans == [(0, 256), (192, 448), (264, 520)]
    assert all(start % 8 == 0 for start, _ in spans)


def test_a_step_between_tiles_becomes_a_smooth_ramp() -> None:
    x = torch.zeros(1, 1, 8, 96)

    def left_is_zero_right_is_one(part: torch.Tensor, window: Window) -> torch.Tensor:
        return part + float(window.columns.start > 0)

    line = restore_tiled(left_is_zero_right_is_one, x, 64, 32)[0, 0, 0]
    steps = line.diff()
    assert line[0] == 0
    assert line[-1] == 1
    assert bool((steps >= 0).all())
    assert float(steps.max()) < 0.06


def test_the_channels_may_change() -> None:
    x = torch.rand(1, 1, 40, 40)
    doubled = restore_tiled(lambda part, _: torch.cat([part, 2 * part], 1), x, 16, 8)
    torch.testing.assert_close(doubled, torch.cat([x, 2 * x], 1))


@pytest.mark.parametrize("overlap", [-1, 16, 20])
def test_an_overlap_without_progress_is_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        windows(64, 64, 16, overlap)


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (100, 93), (3, 50), (1, 1), (5, 2)])
def test_padding_reaches_the_multiple_and_the_crop_undoes_it(size: tuple[int, int]) -> None:
    x = torch.rand(2, 1, *size)
    padded, crop = pad_to_multiple(x, 8)
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    assert torch.equal(padded[crop], x)


def test_padding_reflects_at_the_right_and_the_bottom() -> None:
    x = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 1, 6, 6)
    padded, _ = pad_to_multiple(x, 8)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]


def test_a_side_too_short_to_reflect_is_replicated() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 1, 3).expand(1, 1, 6, 3)
    padded, _ = pad_to_multiple(x, 8)
    assert padded[0, 0, 0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3]


def test_a_size_that_fits_is_not_copied() -> None:
    x = torch.rand(1, 1, 16, 24)
    assert pad_to_multiple(x, 8)[0] is x


def test_a_least_size_is_reached() -> None:
    assert pad_to_multiple(torch.rand(1, 1, 5, 20), 8, least=16)[0].shape == (1, 1, 16, 24)
