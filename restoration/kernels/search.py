"""Nearest codes of a residual quantiser on a GPU, without the tokens × codes matrix of scores.

The products run on the matrix units in half precision without losing single precision: each
operand is split into two halves, x = hi + lo with 22 bits together, and r·z is
hi·hi + hi·lo + lo·hi, accumulated in fp32. Powers of two bring both operands to where half
precision is widest, which moves no rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128  # tokens of one program
CODES = 128  # codes of one step
DEPTH = 64  # channels of one product
_PEAK = 10  # the largest magnitude of an operand becomes less than 2 to this
_PROGRAMS = 264  # to share a GPU's multiprocessors evenly, when tokens alone make fewer


class Halves(NamedTuple):
    """A codebook (K, d) ready for the search, both sides padded to whole tiles."""

    high: Tensor  #: (K', d') fp16
    low: Tensor  #: (K', d') fp16
    bias: Tensor  #: (K',) fp32, ½‖Z_m‖² at the scale of the halves


def halves(codebook: Tensor) -> Halves:
    """Split a codebook (K, d), fp32, into halves."""
    codes, width = codebook.shape
    largest = codebook.abs().amax().clamp(min=1e-20)
    scale = torch.exp2(_PEAK - torch.ceil(torch.log2(largest)))
    padded = codebook.new_zeros(_whole(codes, CODES), _width(width))
    padded[:codes, :width] = codebook * scale
    # Copies of the first code: at a tie the first one is taken, never its copy.
    padded[codes:] = padded[0]
    high = padded.half()
    bias = 0.5 * padded.square().sum(dim=1) / scale
    return Halves(high, (padded - high.float()).half(), bias)


def residual_codes(tokens: Tensor, codebook: Tensor, depths: int) -> Tensor:
    """Codes of each depth: fp32 (N, d), (K, d) → (N, depths), the lowest index at a tie."""
    count, width = tokens.shape
    ids = torch.empty(count, depths, dtype=torch.int64, device=tokens.device)
    if not count:
        return ids
    codes = halves(codebook)
    rows, wide = _whole(count, ROWS), codes.high.shape[1]
    splits = _splits(rows // ROWS, len(codes.high) // CODES)
    high = torch.empty(rows, wide, dtype=torch.float16, device=tokens.device)
    low = torch.empty_like(high)
    scale = torch.empty(rows, device=tokens.device)
    for padding in (high[count:], low[count:], scale[count:]):
        padding.zero_()
    values = torch.empty(splits, rows, device=tokens.device)
    found = torch.empty(splits, rows, dtype=torch.int32, device=tokens.device)
    residual = tokens.contiguous().clone()
    codebook = codebook.contiguous()
    for depth in range(depths + 1):
        # Takes the code that was found last away, and splits what is left for the next search.
        _take_and_split[(triton.cdiv(count, 8),)](
            residual, codebook, values, found, ids, high, low, scale,
            count, rows, width, depth, depths, _PEAK,
            SPLITS=splits, WIDE=wide, ROWS=8,
        )  # fmt: skip
        if depth < depths:
            _search[(rows // ROWS, splits)](
                high, low, scale, *codes, values, found,
                rows, TILES=len(codes.high) // CODES // splits,
                WIDE=wide, ROWS=ROWS, CODES=CODES, DEPTH=min(DEPTH, wide),
                num_warps=8, num_stages=3,
            )  # fmt: skip
    return ids


def _whole(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def _width(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _splits(programs: int, tiles: int) -> int:
    splits = 1
    while programs * splits * 2 <= _PROGRAMS and tiles % (splits * 2) == 0:
        splits *= 2
    return splits


@triton.jit
def _take_and_split(
    residual, codebook, values, found, ids, high, low, scale,
    count, rows, width, depth, depths, peak,
    SPLITS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    here = row < count
    inside = here[:, None] & (column < width)[None, :]
    left = tl.load(residual + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    if depth > 0:
        best = tl.load(values + row, mask=here, other=0.0)
        index = tl.load(found + row, mask=here, other=0)
        for split in tl.static_range(1, SPLITS):
            value = tl.load(values + split * rows + row, mask=here, other=0.0)
            other = tl.load(found + split * rows + row, mask=here, other=0)
            # Splits hold rising indices: an equal score leaves the lower one.
            index = tl.where(value < best, other, index)
            best = tl.minimum(best, value)
        tl.store(ids + row * depths + depth - 1, index.to(tl.int64), mask=here)
        code = tl.load(
            codebook + index[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0
        )
        left = left - code
        tl.store(residual + row[:, None] * width + column[None, :], left, mask=inside)
    largest = tl.maximum(tl.max(tl.abs(left), axis=1), 1e-20)
    # 2^(peak − exponent), made from its bits: exact.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    power = ((254 + peak - 1 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = left * power[:, None]
    upper = scaled.to(tl.float16)
    lower = (scaled - upper.to(tl.float32)).to(tl.float16)
    place = row[:, None] * WIDE + column[None, :]
    tl.store(high + place, upper, mask=here[:, None])
    tl.store(low + place, lower, mask=here[:, None])
    tl.store(scale + row, power, mask=here)


@triton.jit
def _search(
    high, low, scale, code_high, code_low, bias, values, found,
    rows, TILES: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    channel = tl.arange(0, DEPTH)
    power = tl.load(scale + row)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    where = tl.zeros((ROWS,), tl.int32)
    for tile in range(TILES):
        start = (split * TILES + tile) * CODES
        code = start + tl.arange(0, CODES)
        product = tl.zeros((ROWS, CODES), tl.float32)
        for first in range(0, WIDE, DEPTH):
            ours = row[:, None] * WIDE + first + channel[None, :]
            theirs = code[None, :] * WIDE + first + channel[:, None]
            a_high, a_low = tl.load(high + ours), tl.load(low + ours)
            b_high, b_low = tl.load(code_high + theirs), tl.load(code_low + theirs)
            product = tl.dot(a_low, b_high, product)
            product = tl.dot(a_high, b_low, product)
            product = tl.dot(a_high, b_high, product)
        score = tl.load(bias + code)[None, :] * power[:, None] - product
        value, index = tl.min(score, axis=1, return_indices=True)
        where = tl.where(value < best, start + index, where)
        best = tl.minimum(best, value)
    tl.store(values + split * rows + row, best)
    tl.store(found + split * rows + row, where)
