"""The network on this machine by preset, size and precision, beside networks of two peers' size.

    python -m benchmarks.bench_restore [--quick] [--out FOLDER] [--write]

The same measurements as `diffcode bench`, over all that RESULTS.md shows. On a GPU the kernels are
checked against their oracles and timed one by one first, by `benchmarks.bench_kernels`. --out keeps
what was found as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from training import bench

_PAGE = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    """Run what the command line asks for and print it."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--quick", action="store_true", help="512² and the device's precision alone")
    words.add_argument("--device", default="auto")
    words.add_argument("--threads", type=int)
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--out", type=Path, help="folder for restore.json and restore.md")
    words.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    given = words.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    plan = bench.Plan(
        sizes=(512,) if given.quick else (256, 512),
        precisions=("auto",) if given.quick else ("auto", "fp32"),
        device=given.device,
        peers=True,
        repeats=given.repeats,
    )
    outcome = bench.run(plan, lambda row: print(row, file=sys.stderr, flush=True))
    command = " ".join(("python -m benchmarks.bench_restore", *sys.argv[1:]))
    text = bench.section(outcome, command)
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "restore.json").write_text(json.dumps(outcome.to_dict(), indent=1))
        (given.out / "restore.md").write_text(text)
    if given.write:
        bench.write(_PAGE, text)


if __name__ == "__main__":
    main()
