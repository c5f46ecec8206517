"""A 2-D parallel-beam projector with its exact adjoint, filtered back-projection and OSEM.

Pixel (row i, column j) of an image centred on the rotation axis falls at
``s = x cos(theta) - y sin(theta)`` (x right, y down, in pixels) and is shared linearly by the two
nearest detector bins. The transpose of that rule is back-projection with linear interpolation,
so ``adjoint`` is exact by construction. Bins are one pixel wide; a sinogram holds line integrals
in units of value times pixel: multiply by the pixel size in mm for physical ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


class ParallelBeam:
    """Projector for images (B, rows, columns) to sinograms (B, views, bins).

    ``views`` angles are spread evenly over half a turn, or given in radians. ``bins`` defaults to
    the image diagonal, so nothing is cut off. ``matrix=True`` keeps the whole operator as a sparse
    matrix (two entries for each pixel and view) on the CPU: far faster for batches of small slices.
    Without it the projector works on the device of what it is given.
    """

    def __init__(
        self,
        shape: int | tuple[int, int],
        views: int | Sequence[float],
        *,
        bins: int | None = None,
        dtype: torch.dtype = torch.float32,
        matrix: bool = False,
    ) -> None:
        self.shape = (shape, shape) if isinstance(shape, int) else shape
        if isinstance(views, int):
            views = [math.pi * view / views for view in range(views)]
        if not views:
            raise ValueError("'views' must hold at least one angle.")
        self.angles = tuple(views)
        self.bins = bins if bins is not None else math.ceil(math.hypot(*self.shape)) | 1
        self.dtype = dtype
        self._transpose = self._backprojection_matrix() if matrix else None
        self._matrix = _transposed(self._transpose) if self._transpose is not None else None

    def forward(self, image: Tensor) -> Tensor:
        """Line integrals (B, views, bins) of images (B, rows, columns)."""
        pixels = image.reshape(len(image), -1)
        if self._matrix is not None:
            rows = (self._matrix @ pixels.T).T.reshape(len(image), -1, self.bins + 2)
            return rows[..., 1:-1]
        rows = pixels.new_zeros(len(image), len(self.angles), self.bins + 2)
        for view in range(len(self.angles)):
            left, weight = self._footprint(view, image.device)
            upper = pixels * weight
            rows[:, view].index_add_(1, left, pixels - upper)
            rows[:, view].index_add_(1, left + 1, upper)
        return rows[..., 1:-1]

    def adjoint(self, sinogram: Tensor) -> Tensor:
        """Unfiltered back-projection (B, rows, columns): the exact transpose of ``forward``."""
        rows = torch.nn.functional.pad(sinogram, (1, 1))
        if self._transpose is not None:
            image = (self._transpose @ rows.reshape(len(rows), -1).T).T
            return image.reshape(-1, *self.shape)
        image = rows.new_zeros(len(rows), math.prod(self.shape))
        for view in range(len(self.angles)):
            left, weight = self._footprint(view, rows.device)
            row = rows[:, view]
            image += torch.lerp(row.index_select(1, left), row.index_select(1, left + 1), weight)
        return image.reshape(-1, *self.shape)

    def _footprint(self, view: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Lower bin (in rows padded by one bin at each end) and upper bin's share, per pixel."""
        y, x = (torch.arange(n, dtype=self.dtype, device=device) - (n - 1) / 2 for n in self.shape)
        angle = self.angles[view]
        position = x[None, :] * math.cos(angle) - y[:, None] * math.sin(angle)
        # Pixels beyond the detector fall into the padding, which is dropped.
        position = (position.reshape(-1) + (self.bins + 1) / 2).clamp_(0, self.bins + 1)
        left = position.floor().clamp_(max=self.bins)
        return left.long(), position - left

    def _backprojection_matrix(self) -> Tensor:
        columns, values = [], []
        for view in range(len(self.angles)):
            left, weight = self._footprint(view, torch.device("cpu"))
            first = left + view * (self.bins + 2)
            columns += [first, first + 1]
            values += [1 - weight, weight]
        pixels, entries = math.prod(self.shape), 2 * len(self.angles)
        return _sparse_rows(
            torch.arange(0, pixels * entries + 1, entries),
            torch.stack(columns, 1).reshape(-1),
            torch.stack(values, 1).reshape(-1),
            (pixels, len(self.angles) * (self.bins + 2)),
        )


def fbp(
    beam: ParallelBeam, sinogram: Tensor, *, apodisation: str | None = None, cutoff: float = 1.0
) -> Tensor:
    """Filtered back-projection (B, rows, columns), in the image's own units.

    The ramp is sampled in space (Kak & Slaney, Eq. 61), which keeps its mean exact.
    ``apodisation`` may be "hann"; it reaches zero at ``cutoff`` times the bins' Nyquist frequency.
    Raises ValueError for another window or a cutoff outside (0, 1].
    """
    length = max(64, 1 << math.ceil(math.log2(2 * beam.bins)))
    response = _ramp(length, sinogram.dtype) * _window(length, sinogram.dtype, apodisation, cutoff)
    spectrum = torch.fft.rfft(sinogram, length) * response.to(sinogram.device)
    filtered = torch.fft.irfft(spectrum, length)
    return beam.adjoint(filtered[..., : beam.bins]) * (math.pi / len(beam.angles))


def osem(
    subsets: Sequence[ParallelBeam],
    counts: Sequence[Tensor],
    factors: Sequence[Tensor],
    background: Sequence[Tensor],
    *,
    iterations: int,
) -> Tensor:
    """Ordered-subsets expectation maximisation (Hudson & Larkin, IEEE TMI 13(4), 1994).

    The model of subset k is ``counts = factors * (A_k x) + background``; each list holds one
    tensor (B, views, bins) for each subset. Returns activity (B, rows, columns), never negative;
    pixels that no bin sees are zero.
    """
    sensitivity = [beam.adjoint(factor) for beam, factor in zip(subsets, factors, strict=True)]
    seen = torch.stack([part > 0 for part in sensitivity]).all(0)
    image = seen.to(counts[0].dtype)
    for _ in range(iterations):
        for beam, data, factor, extra, weight in zip(
            subsets, counts, factors, background, sensitivity, strict=True
        ):
            expected = factor * beam.forward(image) + extra
            ratio = torch.where(expected > 0, data / expected.clamp_min(1e-9), 0.0)
            image = torch.where(
                seen, image * beam.adjoint(factor * ratio) / weight.clamp_min(1e-12), 0.0
            )
    return image


def _sparse_rows(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        # Some releases warn of the format, some that nobody checks the matrix, which is ours.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def _transposed(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    lengths = matrix.crow_indices().diff()
    order = torch.argsort(matrix.col_indices(), stable=True)
    owners = torch.repeat_interleave(torch.arange(rows), lengths)
    counts = torch.bincount(matrix.col_indices(), minlength=columns)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _sparse_rows(starts, owners[order], matrix.values()[order], (columns, rows))


def _ramp(length: int, dtype: torch.dtype) -> Tensor:
    offset = torch.arange(length, dtype=torch.float64)
    offset = torch.minimum(offset, length - offset)
    kernel = torch.where(offset % 2 == 1, -1 / (math.pi * offset.clamp_min(1)) ** 2, 0.0)
    kernel[0] = 0.25
    response: Tensor = torch.fft.rfft(kernel).real
    return response.to(dtype)


def _window(length: int, dtype: torch.dtype, apodisation: str | None, cutoff: float) -> Tensor:
    if not 0 < cutoff <= 1:
        raise ValueError(f"'cutoff' must be in (0, 1], not {cutoff}.")
    frequency: Tensor = torch.fft.rfftfreq(length, dtype=torch.float64) * 2 / cutoff
    if apodisation is None:
        return (frequency <= 1).to(dtype)
    if apodisation != "hann":
        raise ValueError(f"'apodisation' must be 'hann' or None, not {apodisation!r}.")
    window: Tensor = 0.5 * (1 + torch.cos(math.pi * frequency.clamp(max=1)))
    return window.to(dtype)
