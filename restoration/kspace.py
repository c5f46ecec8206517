"""The k-space view of a magnitude MR image: truncation, zero filling, data consistency.

All functions take real tensors (..., H, W) of any size, odd ones included, and work on the last
two axes. Frequencies are those of the centred DFT: for n samples -n//2 ... (n-1)//2.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLANE = (-2, -1)


def truncate(image: Tensor, factor: float) -> Tensor:
    """Keep the central 1/factor of k-space along both axes, on the same grid (..., H, W).

    This is the acquisition of a low-resolution MR image, zero filled by the scanner: the result
    is a magnitude, and a constant image stays as it is.
    Raises ValueError for a factor below 1.
    """
    if not factor >= 1:
        raise ValueError(f"'factor' must be at least 1, not {factor}.")
    spectrum = torch.fft.fftshift(torch.fft.fft2(image), dim=_PLANE)
    kept = torch.zeros_like(spectrum)
    rows, columns = (_central(size, max(1, round(size / factor))) for size in image.shape[-2:])
    kept[..., rows, columns] = spectrum[..., rows, columns]
    return torch.fft.ifft2(torch.fft.ifftshift(kept, dim=_PLANE)).abs()


def _central(size: int, kept: int) -> slice:
    # The zero frequency sits at size // 2 on both grids.
    start = size // 2 - kept // 2
    return slice(start, start + kept)
