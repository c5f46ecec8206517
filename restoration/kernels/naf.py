"""The NAF block on a GPU in three passes over its activations instead of some thirty.

    norm_pointwise          x  → LayerNorm → 1×1
    depthwise_gate             → 3×3 depthwise → gate, and the means of each pooling cell
    attend_feed_forward        → × attention → 1×1 → + x → LayerNorm → 1×1 → gate → 1×1 → +

A block is bound by memory: these three read and write nine tensors of its channels where the plain
block moves about 33. Activations are pixels × channels (NHWC) in half precision; means, variances,
sums and products accumulate in fp32. The matrices come folded and padded by
:mod:`restoration.fused`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """How one kernel is cut into programs; `benchmarks.bench_kernels --tune` compares them."""

    rows: int  #: pixels of a program
    chunk: int  #: output or hidden channels of one step
    warps: int
    stages: int = 1  #: of the software pipeline over the chunks


# Products of fp32, which only tests ask for, in fp32 and not in tf32.
EXACT = tl.constexpr("ieee")

# By the padded width of the block.
NORM_POINTWISE = {
    64: Launch(128, 128, 8),
    128: Launch(128, 64, 8, 2),
    256: Launch(64, 64, 8, 2),
}
ATTEND_FEED_FORWARD = {
    64: Launch(64, 64, 4),
    128: Launch(64, 64, 8),
    256: Launch(64, 32, 8),
}
PIXEL_MLP = {
    64: Launch(64, 64, 4, 2),
    128: Launch(64, 64, 8, 2),
    256: Launch(64, 32, 8, 2),
}
# Rows and columns of the image in a program, and channels of each half.
DEPTHWISE_GATE = Launch(16, 64, 8)


def _launch(table: dict[int, Launch], wide: int) -> Launch:
    return table[min(max(64, wide), 256)]


def padded_width(channels: int) -> int:
    """What the kernels pad `channels` to: a power of two that the matrix units take."""
    return max(16, 1 << (channels - 1).bit_length())


def norm_pointwise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over channels, then a 1×1 convolution: (…, C) → (…, N).

    `weight` (N, C') and `bias` (N,) hold the norm's own scale and shift; C' is the padded width.
    """
    channels, wide, out_channels = x.shape[-1], weight.shape[1], weight.shape[0]
    pixels = x.numel() // channels
    out = x.new_empty(*x.shape[:-1], out_channels)
    launch = _launch(NORM_POINTWISE, wide)
    columns = min(launch.chunk, padded_width(out_channels))
    _norm_pointwise[(triton.cdiv(pixels, launch.rows),)](
        x, weight, bias, out, pixels, channels, out_channels, eps,
        WIDE=wide, CHUNKS=triton.cdiv(out_channels, columns), ROWS=launch.rows, COLUMNS=columns,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


def depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """3×3 depthwise convolution and gate: (B, H, W, 2C) → (B, H, W, C), (B, H/cell, W/cell, C).

    The second are the means of each cell, fp32; H and W are multiples of `cell`. `weight` is
    (9, 2C), row by row, `bias` (2C,), both fp32.
    """
    batch, height, width, double = x.shape
    channels = double // 2
    out = x.new_empty(batch, height, width, channels)
    cells = torch.empty(
        batch, height // cell, width // cell, channels, device=x.device, dtype=torch.float32
    )
    launch = DEPTHWISE_GATE
    block = min(launch.chunk, padded_width(channels))
    grid = (
        triton.cdiv(channels, block) * triton.cdiv(width, launch.rows),
        triton.cdiv(height, launch.rows),
        batch,
    )
    _depthwise_gate[grid](
        x, weight, bias, out, cells, height, width, channels,
        CELL=cell, STRIP=launch.rows, BLOCK=block, num_warps=launch.warps,
    )  # fmt: skip
    return out, cells


def attend_feed_forward(
    gated: Tensor, x: Tensor, attention: Tensor, matrices: tuple[Tensor, ...], eps: float, cell: int
) -> Tensor:
    """The second half of a block: (B, H, W, C) twice and (B, h, w, C) → (B, H, W, C).

    `attention` lies on a grid of one value for each `cell`×`cell` pixels, or on a single one for
    the image, and is spread bilinearly. `matrices` are, with C' the padded width:
    conv3·β (C', C') and (C',); the gate's halves of norm2 and conv4 (C', C'), (C',) twice;
    conv5·γ (C', C') and (C',).
    """
    batch, height, width, channels = x.shape
    out = torch.empty_like(x)
    wide = matrices[0].shape[1]
    launch = _launch(ATTEND_FEED_FORWARD, wide)
    pixels = batch * height * width
    _attend_feed_forward[(triton.cdiv(pixels, launch.rows),)](
        gated, x, attention, *matrices, out,
        pixels, height, width, channels, attention.shape[1], attention.shape[2], eps, 1.0 / cell,
        WIDE=wide, ROWS=launch.rows, HIDDEN=min(launch.chunk, wide),
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


def pixel_mlp(
    x: Tensor, inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor
) -> Tensor:
    """x + outer·GELU(inner·x) at each pixel: (…, C) → (…, C).

    `inner` is (M, C'), `outer` (C', M), with C' the padded width and M a multiple of 16.
    """
    channels, wide, middle = x.shape[-1], inner.shape[1], inner.shape[0]
    pixels = x.numel() // channels
    out = torch.empty_like(x)
    launch = _launch(PIXEL_MLP, wide)
    hidden = next(size for size in (64, 32, 16) if size <= launch.chunk and middle % size == 0)
    _pixel_mlp[(triton.cdiv(pixels, launch.rows),)](
        x, inner, inner_bias, outer, outer_bias, out, pixels, channels, middle,
        WIDE=wide, STEPS=middle // hidden, ROWS=launch.rows, HIDDEN=hidden,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


@triton.jit
def _normed(x, inside, channels, eps):
    mean = tl.sum(x, axis=1) / channels
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / channels
    return centred * tl.rsqrt(variance + eps)[:, None]


@triton.jit
def _norm_pointwise(
    x, weight, bias, out, pixels, channels, out_channels, eps,
    WIDE: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    values = tl.load(x + pixel[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    normed = _normed(values.to(tl.float32), inside, channels, eps).to(weight.dtype.element_ty)
    for chunk in range(CHUNKS):
        column = chunk * COLUMNS + tl.arange(0, COLUMNS)
        known = column < out_channels
        matrix = tl.load(
            weight + column[None, :] * WIDE + channel[:, None], mask=known[None, :], other=0.0
        )
        shift = tl.load(bias + column, mask=known, other=0.0)
        product = tl.dot(normed, matrix, input_precision=EXACT) + shift[None, :]
        tl.store(
            out + pixel[:, None] * out_channels + column[None, :],
            product.to(out.dtype.element_ty),
            mask=(pixel < pixels)[:, None] & known[None, :],
        )


@triton.jit
def _taps(x, row, column, channel, height, width, stride, inside):
    # The three neighbours along a row of the image, zero outside of it.
    line = x + (row * width) * stride + channel[None, :]
    within = inside & (row >= 0) & (row < height)
    before = tl.load(
        line + (column[:, None] - 1) * stride, mask=within & (column[:, None] > 0), other=0.0
    ).to(tl.float32)
    here = tl.load(line + column[:, None] * stride, mask=within, other=0.0).to(tl.float32)
    after = tl.load(
        line + (column[:, None] + 1) * stride,
        mask=within & (column[:, None] + 1 < width),
        other=0.0,
    ).to(tl.float32)
    return before, here, after


@triton.jit
def _weights(weight, row, channel, known, stride):
    line = weight + row * 3 * stride + channel
    left = tl.load(line, mask=known, other=0.0)[None, :]
    middle = tl.load(line + stride, mask=known, other=0.0)[None, :]
    right = tl.load(line + 2 * stride, mask=known, other=0.0)[None, :]
    return left, middle, right


@triton.jit
def _depthwise_gate(
    x, weight, bias, out, cells, height, width, channels,
    CELL: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    column = (tl.program_id(0) // blocks) * STRIP + tl.arange(0, STRIP)
    top = tl.program_id(1) * STRIP
    image = tl.program_id(2).to(tl.int64)
    known = channel < channels
    inside = (column < width)[:, None] & known[None, :]
    stride = 2 * channels
    source = x + image * height * width * stride
    target = out + image * height * width * channels
    # Each row that is read adds to three rows of the result: held until the last has come.
    a0, a1, a2 = _weights(weight, 0, channel, known, stride)
    a3, a4, a5 = _weights(weight, 1, channel, known, stride)
    a6, a7, a8 = _weights(weight, 2, channel, known, stride)
    b0, b1, b2 = _weights(weight, 0, channel + channels, known, stride)
    b3, b4, b5 = _weights(weight, 1, channel + channels, known, stride)
    b6, b7, b8 = _weights(weight, 2, channel + channels, known, stride)
    a_bias = tl.load(bias + channel, mask=known, other=0.0)[None, :]
    b_bias = tl.load(bias + channels + channel, mask=known, other=0.0)[None, :]
    a_held = tl.zeros((STRIP, BLOCK), tl.float32) + a_bias
    b_held = tl.zeros((STRIP, BLOCK), tl.float32) + b_bias
    left, here, right = _taps(source, top - 1, column, channel, height, width, stride, inside)
    a_held += left * a0 + here * a1 + right * a2
    left, here, right = _taps(
        source + channels, top - 1, column, channel, height, width, stride, inside
    )
    b_held += left * b0 + here * b1 + right * b2
    left, here, right = _taps(source, top, column, channel, height, width, stride, inside)
    a_held += left * a3 + here * a4 + right * a5
    a_next = left * a0 + here * a1 + right * a2 + a_bias
    left, here, right = _taps(
        source + channels, top, column, channel, height, width, stride, inside
    )
    b_held += left * b3 + here * b4 + right * b5
    b_next = left * b0 + here * b1 + right * b2 + b_bias
    total = tl.zeros((STRIP, BLOCK), tl.float32)
    for step in range(STRIP):
        row = top + step
        left, here, right = _taps(source, row + 1, column, channel, height, width, stride, inside)
        a_done = a_held + left * a6 + here * a7 + right * a8
        a_held = a_next + left * a3 + here * a4 + right * a5
        a_next = left * a0 + here * a1 + right * a2 + a_bias
        left, here, right = _taps(
            source + channels, row + 1, column, channel, height, width, stride, inside
        )
        b_done = b_held + left * b6 + here * b7 + right * b8
        b_held = b_next + left * b3 + here * b4 + right * b5
        b_next = left * b0 + here * b1 + right * b2 + b_bias
        gated = (a_done * b_done).to(out.dtype.element_ty)
        tl.store(
            target + (row * width + column[:, None]) * channels + channel[None, :],
            gated,
            mask=inside & (row < height),
        )
        # Sums of what was stored, so that they are those of the tensor that the next pass reads.
        total += gated.to(tl.float32)
        if (step + 1) % CELL == 0:
            sums = tl.sum(tl.reshape(total, (STRIP // CELL, CELL, BLOCK)), axis=1)
            total = tl.zeros((STRIP, BLOCK), tl.float32)
            place = (tl.program_id(0) // blocks) * (STRIP // CELL) + tl.arange(0, STRIP // CELL)
            wide = width // CELL
            line = (image * (height // CELL) + row // CELL) * wide
            tl.store(
                cells + (line + place[:, None]) * channels + channel[None, :],
                sums / (CELL * CELL),
                mask=(place < wide)[:, None] & known[None, :] & (row < height),
            )


@triton.jit
def _spread(attention, image, row, column, channel, inside, channels, tall, wide, step):
    # Bilinear, without corner alignment, as torch.nn.functional.interpolate.
    y = tl.maximum((row.to(tl.float32) + 0.5) * step - 0.5, 0.0)
    x = tl.maximum((column.to(tl.float32) + 0.5) * step - 0.5, 0.0)
    y0 = tl.minimum(y.to(tl.int32), tall - 1)
    x0 = tl.minimum(x.to(tl.int32), wide - 1)
    y1 = tl.minimum(y0 + 1, tall - 1)
    x1 = tl.minimum(x0 + 1, wide - 1)
    v = (y - y0.to(tl.float32))[:, None]
    u = (x - x0.to(tl.float32))[:, None]
    upper = (image * tall + y0) * wide
    lower = (image * tall + y1) * wide
    at = channel[None, :]
    a = tl.load(attention + (upper + x0)[:, None] * channels + at, mask=inside, other=0.0)
    b = tl.load(attention + (upper + x1)[:, None] * channels + at, mask=inside, other=0.0)
    c = tl.load(attention + (lower + x0)[:, None] * channels + at, mask=inside, other=0.0)
    d = tl.load(attention + (lower + x1)[:, None] * channels + at, mask=inside, other=0.0)
    top = a.to(tl.float32) * (1 - u) + b.to(tl.float32) * u
    bottom = c.to(tl.float32) * (1 - u) + d.to(tl.float32) * u
    return top * (1 - v) + bottom * v


@triton.jit
def _attend_feed_forward(
    gated, x, attention,
    project, project_bias, first, first_bias, second, second_bias, last, last_bias,
    out, pixels, height, width, channels, tall, wide, eps, step,
    WIDE: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    here = pixel < pixels
    inside = here[:, None] & (channel < channels)[None, :]
    place = pixel[:, None] * channels + channel[None, :]
    image, offset = pixel // (height * width), (pixel % (height * width)).to(tl.int32)
    row, column = offset // width, offset % width
    scale = _spread(attention, image, row, column, channel, inside, channels, tall, wide, step)
    kind = project.dtype.element_ty
    attended = (tl.load(gated + place, mask=inside, other=0.0).to(tl.float32) * scale).to(kind)
    matrix = tl.load(project + channel[None, :] * WIDE + channel[:, None])
    total = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(project_bias + channel)[None, :]
    total = tl.dot(attended, matrix, total, input_precision=EXACT)
    normed = _normed(total, inside, channels, eps).to(kind)
    total += tl.load(last_bias + channel)[None, :]
    for start in range(0, WIDE, HIDDEN):
        unit = start + tl.arange(0, HIDDEN)
        matrix = tl.load(first + unit[None, :] * WIDE + channel[:, None])
        left = tl.dot(normed, matrix, input_precision=EXACT)
        matrix = tl.load(second + unit[None, :] * WIDE + channel[:, None])
        right = tl.dot(normed, matrix, input_precision=EXACT)
        left += tl.load(first_bias + unit)[None, :]
        right += tl.load(second_bias + unit)[None, :]
        back = tl.load(last + channel[None, :] * WIDE + unit[:, None])
        total = tl.dot((left * right).to(kind), back, total, input_precision=EXACT)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pixel_mlp(
    x, inner, inner_bias, outer, outer_bias, out, pixels, channels, middle,
    WIDE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    place = pixel[:, None] * channels + channel[None, :]
    values = tl.load(x + place, mask=inside, other=0.0)
    total = values.to(tl.float32) + tl.load(outer_bias + channel)[None, :]
    for step in range(STEPS):
        unit = step * HIDDEN + tl.arange(0, HIDDEN)
        matrix = tl.load(inner + unit[None, :] * WIDE + channel[:, None])
        into = tl.dot(values, matrix, input_precision=EXACT)
        into += tl.load(inner_bias + unit)[None, :]
        active = 0.5 * into * (1.0 + tl.erf(into * 0.7071067811865476))
        back = tl.load(outer + channel[None, :] * middle + unit[:, None])
        total = tl.dot(active.to(values.dtype), back, total, input_precision=EXACT)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
