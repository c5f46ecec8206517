"""The k-space view of a magnitude MR image: truncation, zero filling, data consistency.

A scanner either fills the grid itself (`empty_band` sees it) or stores the acquired matrix, which
`zero_fill` brings onto the grid of the result as the scanner would have.

All functions take real tensors (..., H, W) of any size, odd ones included, and work on the last
two axes. Frequencies are those of the centred DFT: for n samples -n//2 ... (n-1)//2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PLANE = (-2, -1)

# A zero-filled axis shows a cliff of 7 dB or more over any five frequencies, also after the
# magnitude and the rounding to integers; measured MR series of six vendors stay below 3 dB.
_CLIFF_DB = 5.0
_STEP = 4  # frequencies averaged at the foot, at the top and before the top of a cliff
_LEAST_EMPTY = 8  # frequencies
_SLICES_READ = 32


@dataclass(frozen=True)
class Support:
    """The acquired rectangle of k-space: the highest |frequency| kept along rows and columns."""

    rows: int
    columns: int

    def mask(self, image: Tensor) -> Tensor:
        """True inside the rectangle, in the (uncentred) order of `torch.fft.fft2`: (H, W)."""
        height, width = image.shape[-2:]
        rows = _frequencies(height, image.device).abs() <= self.rows
        columns = _frequencies(width, image.device).abs() <= self.columns
        inside: Tensor = rows[:, None] & columns[None, :]
        return inside


@dataclass(frozen=True)
class GridChange:
    """A finer grid over the same field of view.

    ``factor`` samples stand for each of the source's along rows and columns; ``shift`` is where the
    first of them lies, in samples of the source from its first: down the rows, along the columns.
    """

    factor: int = 1
    shift: tuple[float, float] = (0.0, 0.0)


SAME_GRID = GridChange()


def zero_filled_grid(factor: int) -> GridChange:
    """What `zero_fill` does to the grid: sample 0 stays on sample 0, so the shift is 0.

    Rows and columns grow by ``factor``, the pixel spacing shrinks by it, and the position of the
    first sample (PS3.3 C.7.6.2.1.1) stays. Raises ValueError for a factor below 1.
    """
    if factor < 1:
        raise ValueError(f"'factor' must be at least 1, not {factor}.")
    return GridChange(factor)


def zero_filled_support(image: Tensor) -> Support:
    """What of the k-space of `zero_fill(image, factor)` was acquired, for any factor above 1.

    All of the source's frequencies but the Nyquist one of an even size, whose sample stands for
    two frequencies of the finer grid and is known for neither; less, where the source itself has
    an empty band.
    """
    height, width = image.shape[-2:]
    found = empty_band(image)
    rows, columns = (height - 1) // 2, (width - 1) // 2
    if found is None:
        return Support(rows, columns)
    return Support(min(rows, found.rows), min(columns, found.columns))


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
    magnitude: Tensor = torch.fft.ifft2(torch.fft.ifftshift(kept, dim=_PLANE)).abs()
    return magnitude


def zero_fill(image: Tensor, factor: int) -> Tensor:
    """Interpolate (..., h, w) to (..., h·factor, w·factor) by zero padding k-space.

    Sample 0 stays on sample 0: for a non-negative image `result[..., ::factor, ::factor]` is the
    input, intensities included. The result is a magnitude, as a scanner's is.
    Raises ValueError for a factor below 1.
    """
    if factor < 1:
        raise ValueError(f"'factor' must be at least 1, not {factor}.")
    height, width = image.shape[-2:]
    spectrum = torch.fft.fft2(image, norm="forward")
    spectrum = _pad_frequencies(spectrum, height * factor, -2)
    spectrum = _pad_frequencies(spectrum, width * factor, -1)
    magnitude: Tensor = torch.fft.ifft2(spectrum, norm="forward").abs()
    return magnitude


def empty_band(image: Tensor) -> Support | None:
    """Find the rectangle outside which k-space was never acquired; None when it is full.

    Rows and columns are judged separately; an axis without an empty band keeps all its
    frequencies. `image` may be a slice or a stack, whose spectra are then averaged.
    """
    height, width = image.shape[-2:]
    planes = _readable_planes(image)
    if planes.shape[0] == 0:
        return None
    power = torch.fft.fft2(planes.double()).abs().square()
    rows = _cliff(_decibels(power))
    columns = _cliff(_decibels(power.transpose(-2, -1)))
    if rows is None and columns is None:
        return None
    return Support(
        rows=height // 2 if rows is None else rows,
        columns=width // 2 if columns is None else columns,
    )


def data_consistency(x: Tensor, y: Tensor, support: Support, weight: float) -> Tensor:
    """Give `y` back the acquired frequencies of `x`: F⁻¹(M·(λX + (1−λ)Y) + (1−M)·Y).

    λ is `weight`, in 0 (y as it is) ... 1 (exactly the acquired data inside the support).
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"'weight' must lie in 0 ... 1, not {weight}.")
    acquired = torch.fft.fft2(x - y) * support.mask(x)
    # The mask is even in frequency, so the correction of a real image is real.
    correction: Tensor = torch.fft.ifft2(acquired).real
    return y + weight * correction


def _central(size: int, kept: int) -> slice:
    # The zero frequency sits at size // 2 on both grids.
    start = size // 2 - kept // 2
    return slice(start, start + kept)


def _frequencies(size: int, device: torch.device) -> Tensor:
    cycles: Tensor = torch.fft.fftfreq(size, d=1 / size, device=device)
    return cycles.round().long()


def _pad_frequencies(spectrum: Tensor, size: int, dim: int) -> Tensor:
    old = spectrum.shape[dim]
    if size == old:
        return spectrum
    positive, negative = (old + 1) // 2, old // 2
    first = spectrum.narrow(dim, 0, positive)
    last = spectrum.narrow(dim, old - negative, negative)
    if old % 2 == 0:
        # The Nyquist sample stands for +n/2 and -n/2: half of it at each keeps the result real.
        nyquist = last.narrow(dim, 0, 1) / 2
        first = torch.cat([first, nyquist], dim)
        last = torch.cat([nyquist, last.narrow(dim, 1, negative - 1)], dim)
    shape = list(spectrum.shape)
    shape[dim] = size - first.shape[dim] - last.shape[dim]
    return torch.cat([first, spectrum.new_zeros(shape), last], dim)


def _readable_planes(image: Tensor) -> Tensor:
    """At most _SLICES_READ slices, spread over the stack, none of them flat: (n, H, W)."""
    planes = image.reshape(-1, *image.shape[-2:])
    planes = planes[planes.amax(_PLANE) > planes.amin(_PLANE)]
    return planes[:: max(1, -(-planes.shape[0] // _SLICES_READ))]


def _decibels(power: Tensor) -> Tensor:
    """Log power along the row frequency 0 ... (H−1)//2 of the spectra (n, H, W).

    Only low column frequencies count, because the columns may have been truncated too; the
    zero one is left out, since it also holds the step between opposite borders.
    """
    size, width = power.shape[-2:]
    low = max(4, width // 16)
    floor = 1e-16 * power.amax(_PLANE, keepdim=True)
    central = torch.cat([power[..., 1 : low + 1], power[..., -low:]], -1)
    level = 10 * torch.log10(central + floor).mean(dim=(0, 2))
    half = (size - 1) // 2
    folded = (level[1 : half + 1] + level.flip(0)[:half]) / 2
    return torch.cat([level[:1], folded])


def _cliff(level: Tensor) -> int | None:
    """The last frequency before a lasting fall of the log power (dB), or None."""
    size = level.shape[0]
    first = max(2 * _STEP - 1, size // 6)
    scores = [_fall(level, k) for k in range(first, size - _LEAST_EMPTY)]
    for index, score in enumerate(scores):
        if score >= _CLIFF_DB and score == max(scores[index : index + _LEAST_EMPTY]):
            return _edge(level, first + index)
    return None


def _edge(level: Tensor, k: int) -> int:
    """The last frequency near the cliff at k that still stands on its top."""
    top = level[k - _STEP + 1 : k + 1].mean()
    # Of an even width the scanner keeps one Nyquist sample of two; the magnitude spreads it over
    # both at half the amplitude (-6 dB), which is no acquired value of either.
    standing = level[k - 2 : k + _STEP] > top - 5.0
    return k - 2 + int(torch.nonzero(standing).max())


def _fall(level: Tensor, k: int) -> float:
    """How far the level after frequency k lies below the decay before it, in dB."""
    top = level[k - _STEP + 1 : k + 1].mean()
    before = level[k - 2 * _STEP + 1 : k - _STEP + 1].mean()
    decay = ((before - top) / _STEP).clamp(min=0)
    expected = top - (_STEP + 1) * decay
    # k + 1 may be the Nyquist sample of the acquired width, neither top nor foot.
    foot = level[k + 2 : k + 2 + _STEP].mean()
    return float(expected - torch.maximum(foot, level[k + 2 :].max()))
