"""Residual vector quantisation with one shared codebook per task (DiffCode Sec. 2.1, Eq. 1–3).

Each of the ``depths`` iterations takes the nearest code to what the iterations before left over.
Code 0 of every codebook is fixed at zero, so a residual norm can never grow with depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restoration import kernels

SEARCH_ROWS = 1024  # tokens per chunk of the search: bounds the live score matrix to rows × codes
ZERO_CODE = 0


class Quantised(NamedTuple):
    """Quantised features (B, d, h, w) and the code of each depth (B, D, h, w)."""

    values: Tensor
    codes: Tensor


def nearest_codes(tokens: Tensor, codebook: Tensor, rows: int = SEARCH_ROWS) -> Tensor:
    """Index of the nearest code of each token: (N, d), (K, d) → (N,).

    argmin over ½‖Z_m‖² − r·Z_m, which orders codes as the squared distance does; ties go to the
    lowest index. The score matrix is only ever held for ``rows`` tokens.
    """
    bias = 0.5 * codebook.square().sum(dim=1)  # (K,)
    transposed = codebook.t()
    chunks = [
        torch.addmm(bias, chunk, transposed, alpha=-1.0).argmin(dim=1)
        for chunk in torch.split(tokens, rows)
    ]
    return torch.cat(chunks) if chunks else tokens.new_empty(0, dtype=torch.long)


def residual_codes(tokens: Tensor, codebook: Tensor, depths: int) -> Tensor:
    """Codes of each depth: (N, d), (K, d) → (N, D), in fp32 whatever the caller's precision."""
    residual, codebook = tokens.detach().float(), codebook.detach().float()
    if kernels.available(tokens.device):
        from restoration.kernels import search

        return search.residual_codes(residual, codebook, depths)
    ids = []
    for _ in range(depths):
        index = nearest_codes(residual, codebook)
        residual = residual - codebook[index]
        ids.append(index)
    return torch.stack(ids, dim=1)


def sum_codes(ids: Tensor, codebook: Tensor) -> Tensor:
    """Sum of the codes over depth, differentiable in the codebook: (N, D), (K, d) → (N, d)."""
    # padding_idx gives the zero code no gradient, so no optimiser can move it.
    return F.embedding(ids, codebook, padding_idx=ZERO_CODE).sum(dim=1)


def straight_through(features: Tensor, quantised: Tensor) -> Tensor:
    """The quantised value with the gradient of the features (van den Oord et al., 2017)."""
    return features + (quantised - features).detach()


def code_usage(counts: Tensor) -> float:
    """Share of the codes that were used at least once; ``counts`` is (K,)."""
    return float((counts > 0).double().mean())


def perplexity(counts: Tensor) -> float:
    """Exponential of the entropy of the code distribution; ``counts`` is (K,)."""
    total = counts.double().sum()
    if total == 0:
        return 0.0
    p = counts.double() / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))


class CodebookBank(nn.Module):
    """The task-adaptive bank: one codebook (K, d) per task, each shared by all depths."""

    def __init__(self, tasks: int, codes: int, dim: int, depths: int) -> None:
        super().__init__()
        self.depths = depths
        weight = torch.randn(tasks, codes, dim) / codes
        weight[:, ZERO_CODE] = 0.0
        self.weight = nn.Parameter(weight)

    @property
    def codes(self) -> int:
        """Number of codes in each codebook."""
        return self.weight.shape[1]

    def encode(self, features: Tensor, task: Tensor | int) -> Tensor:
        """Codes (B, D, h, w) of features (B, d, h, w); each image uses its own task's codebook.

        A number stands for the task of all images, and needs no word from the device.
        """
        if isinstance(task, int):
            return self._encoded(features, task)
        b, _, h, w = features.shape
        codes = features.new_empty((b, self.depths, h, w), dtype=torch.long)
        for n, rows in rows_by_task(task):
            codes[rows] = self._encoded(features[rows], n)
        return codes

    def decode(self, codes: Tensor, task: Tensor | int) -> Tensor:
        """Sum of the codes: (B, D', h, w) → (B, d, h, w) with any number D' of leading depths."""
        if isinstance(task, int):
            return self._decoded(codes, task)
        b, _, h, w = codes.shape
        values = self.weight.new_empty((b, self.weight.shape[2], h, w))
        for n, rows in rows_by_task(task):
            values = values.index_copy(0, rows, self._decoded(codes[rows], n))
        return values

    def forward(self, features: Tensor, task: Tensor | int) -> Quantised:
        codes = self.encode(features, task)
        return Quantised(self.decode(codes, task), codes)

    def _encoded(self, features: Tensor, task: int) -> Tensor:
        """:meth:`encode` of images that all have one task."""
        b, dim, h, w = features.shape
        tokens = features.permute(0, 2, 3, 1).reshape(-1, dim)
        ids = residual_codes(tokens, self.weight[task], self.depths)
        return ids.view(b, h, w, self.depths).permute(0, 3, 1, 2)

    def _decoded(self, codes: Tensor, task: int) -> Tensor:
        """:meth:`decode` of images that all have one task."""
        b, depths, h, w = codes.shape
        ids = codes.permute(0, 2, 3, 1).reshape(-1, depths)
        return sum_codes(ids, self.weight[task]).view(b, h, w, -1).permute(0, 3, 1, 2)


def rows_by_task(task: Tensor) -> list[tuple[int, Tensor]]:
    """Group the images of a batch: ``[(task index, row indices), …]``."""
    return [(n, torch.nonzero(task == n).squeeze(1)) for n in sorted(set(task.tolist()))]
