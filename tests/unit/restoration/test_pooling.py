from __future__ import annotations

import pytest
import torch

from restoration.blocks import local_mean
from restoration.pooling import window_means


@pytest.mark.parametrize(
    ("tall", "wide", "window"), [(9, 14, 4), (9, 14, 5), (5, 14, 7), (3, 4, 9)]
)
def test_window_means_are_those_of_running_sums(tall: int, wide: int, window: int) -> None:
    cells = torch.randn(2, tall, wide, 3, generator=torch.Generator().manual_seed(1))
    expected = local_mean(cells.double().permute(0, 3, 1, 2), window).permute(0, 2, 3, 1)
    torch.testing.assert_close(window_means(cells, window).double(), expected, rtol=0, atol=1e-6)


def test_means_of_half_precision_are_taken_in_single_precision() -> None:
    cells = torch.full((1, 32, 32, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
    means = window_means(cells, 20)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, cells.float(), rtol=0, atol=1e-6)
