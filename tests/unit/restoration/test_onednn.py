"""The norm of the parts for a CPU; `test_cpu_parts` holds the parts to the plain modules."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from restoration import onednn


def test_a_norm_keeps_its_digits_far_from_zero() -> None:
    """The variance is that of what the mean was taken from: no difference of two large numbers."""
    x = 1000 + torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    expected = F.layer_norm(x.double(), (24,), eps=1e-6).float()
    torch.testing.assert_close(onednn._normed(x, 1e-6), expected, rtol=0, atol=5e-4)


def test_a_norm_of_equal_values_is_zero() -> None:
    assert not onednn._normed(torch.full((3, 24), 7.0), 1e-6).any()
