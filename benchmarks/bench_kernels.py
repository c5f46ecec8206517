"""Triton kernels on a GPU: against their oracles, and timed at the shapes of the paper's network.

    python -m benchmarks.bench_kernels [--tune] [--out FOLDER]

A check that does not hold ends with exit code 1. --tune times every launch of a grid of launches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restoration.blocks import NAFBlock, set_local_pooling
from restoration.experts import TaskAdaptiveRouting
from restoration.fused import FusedNAFBlock, fused_routing
from restoration.kernels import naf, search
from restoration.kernels.naf import Launch
from restoration.quantizer import nearest_codes

BATCH = 8
# Channels, side at 512², pooling cell, image pixels of a pixel: the levels of the paper's network.
LEVELS = ((64, 512, 8, 1), (128, 256, 4, 2), (256, 128, 2, 4), (256, 64, 1, 8))
COMPACT = ((24, 512, 8, 1), (48, 256, 4, 2), (96, 128, 2, 4))
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
LAUNCHES = ((64, 128), (32, 64, 128), (4, 8), (1, 2))


class Level:
    """A block and an expert of one level of the network, plain and by kernels."""

    def __init__(self, channels: int, side: int, cell: int, scale: int) -> None:
        torch.manual_seed(channels)
        self.channels, self.side, self.cell = channels, side, cell
        self.block, self.routing = NAFBlock(channels, cell, scale), TaskAdaptiveRouting(channels, 3)
        for module in (self.block, self.routing):
            module.eval().requires_grad_(False)
            for parameter in module.parameters():
                # No branch may be at rest.
                parameter.add_(0.1 * torch.randn_like(parameter))
        set_local_pooling(self.block, 192)

    def check(self, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        """Relative errors of the kernels in `dtype`, from the plain modules in fp32 on the CPU."""
        x = torch.randn(2, self.channels, 40 * self.cell, 26 * self.cell)
        x = x.contiguous(memory_format=torch.channels_last)
        given = x.cuda().to(dtype)
        block = FusedNAFBlock(self.block, dtype).cuda()(given)
        routed = fused_routing(self.routing, dtype).cuda()(given, 1)
        for name, ours, theirs in (
            ("NAF block", block, self.block(x)),
            ("expert", routed, self.routing(x, 1)),
        ):
            yield {
                "kernel": name,
                "channels": self.channels,
                "dtype": str(dtype),
                "relative_error": _relative(ours, theirs),
                "holds": _relative(ours, theirs) < LIMITS[dtype],
            }

    def works(self) -> dict[str, Callable[[], Any]]:
        """The plain modules and each kernel, in bf16 on the GPU, ready to be called."""
        dtype, batch = torch.bfloat16, BATCH
        block = FusedNAFBlock(self.block, dtype).cuda()
        routed = fused_routing(self.routing, dtype).cuda()
        plain, routing = self.block.to("cuda", dtype), self.routing.to("cuda", dtype)
        pixels = torch.randn(batch, self.side, self.side, self.channels, device="cuda", dtype=dtype)
        x = pixels.permute(0, 3, 1, 2)
        wide = naf.norm_pointwise(pixels, block.into, block.into_bias, block.eps)
        gated, cells = naf.depthwise_gate(wide, block.taps, block.taps_bias, self.cell)
        factors = block.factors(cells)
        matrices = tuple(block.matrices)
        return {
            "plain block": lambda: plain(x),
            "fused block": lambda: block(x),
            "norm_pointwise": lambda: naf.norm_pointwise(
                pixels, block.into, block.into_bias, block.eps
            ),
            "depthwise_gate": lambda: naf.depthwise_gate(
                wide, block.taps, block.taps_bias, self.cell
            ),
            "pooling": lambda: block.factors(cells),
            "attend_feed_forward": lambda: naf.attend_feed_forward(
                gated, pixels, factors, matrices, block.eps, self.cell
            ),
            "plain expert": lambda: routing(x, 1),
            "pixel_mlp": lambda: routed(x, 1),
            "copy": lambda: pixels.clone(),
        }


def check_search(tokens: int, codes: int, width: int, depths: int) -> dict[str, Any]:
    """Share of the tokens whose codes of all depths are those of single precision on the CPU."""
    generator = torch.Generator().manual_seed(tokens)
    codebook = torch.randn(codes, width, generator=generator)
    codebook *= torch.rand(codes, 1, generator=generator)
    codebook[0] = 0
    values = torch.randn(tokens, width, generator=generator)
    residual, expected = values.clone(), []
    for _ in range(depths):
        expected.append(nearest_codes(residual, codebook))
        residual = residual - codebook[expected[-1]]
    ours = search.residual_codes(values.cuda(), codebook.cuda(), depths).cpu()
    equal = float((ours == torch.stack(expected, dim=1)).all(dim=1).float().mean())
    return {
        "kernel": "search",
        "tokens": tokens,
        "codes": codes,
        "codes_equal": equal,
        # Two codes may be nearer to each other than the rounding of either sum.
        "holds": equal > 0.9995,
    }


def check() -> list[dict[str, Any]]:
    """Every kernel against its oracle."""
    rows = [
        row
        for level in (*LEVELS, *COMPACT)
        for dtype in LIMITS
        for row in Level(*level).check(dtype)
    ]
    rows += [check_search(*shape) for shape in ((4096, 8192, 256, 8), (4096, 1024, 64, 4))]
    return rows


def time_parts() -> list[dict[str, Any]]:
    """Milliseconds of each kernel for a batch, beside the plain modules and one copy."""
    return [
        {"channels": level[0], "side": level[1]}
        | {name: _milliseconds(work) for name, work in Level(*level).works().items()}
        for level in LEVELS
    ]


def tune() -> list[dict[str, Any]]:
    """Milliseconds of each kernel under every launch of a grid, at each width."""
    tables = {
        "norm_pointwise": naf.NORM_POINTWISE,
        "attend_feed_forward": naf.ATTEND_FEED_FORWARD,
        "pixel_mlp": naf.PIXEL_MLP,
    }
    rows = []
    for level in LEVELS[:3]:
        works = Level(*level).works()
        for name, table in tables.items():
            kept = table[level[0]]
            for values in itertools.product(*LAUNCHES):
                table[level[0]] = Launch(*values)
                row = {"kernel": name, "channels": level[0], "launch": values}
                rows.append(row | _tried(works[name]))
            table[level[0]] = kept
    return rows


def _tried(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"ms": _milliseconds(work)}
    except Exception as error:
        # More shared memory or registers than there are.
        return {"failed": f"{type(error).__name__}: {str(error)[:80]}"}


def _milliseconds(work: Callable[[], Any], repeats: int = 10) -> float:
    times = []
    for turn in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if turn > 1:
            times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.cpu().double() - theirs.double()).norm() / theirs.double().norm())


def main() -> None:
    """Check, time and, when asked, tune."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--tune", action="store_true", help="compare launches too")
    words.add_argument("--out", type=Path, help="folder for kernels.json")
    given = words.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    with torch.inference_mode():
        found = {"check": check(), "parts": time_parts(), "tune": tune() if given.tune else []}
    for row in itertools.chain.from_iterable(found.values()):
        print(row)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "kernels.json").write_text(json.dumps(found, indent=1))
    if not all(row["holds"] for row in found["check"]):
        raise SystemExit("a check did not hold")


if __name__ == "__main__":
    main()
