"""Tables of samples in Markdown, and the page that holds them with machine and command."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol


class Measured(Protocol):
    """One receiver in one repetition."""

    rate: float
    megabytes: float
    cpu_ms: float
    latencies_ms: list[float]


def table(
    title: str,
    what: str,
    reference: str,
    samples: Mapping[str, Sequence[Measured]],
    peaks: Mapping[str, int],
) -> str:
    """Medians of each receiver, and the reference against it within each repetition."""
    lines = [
        f"### {title}",
        "",
        f"{what}.",
        "",
        f"| receiver | instances/s | MB/s | {reference} ÷ it | CPU ms/instance | p50 / p99 ms "
        "| peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measured in samples.items():
        pairs = zip(samples[reference], measured, strict=True)
        ratios = [ours.rate / theirs.rate for ours, theirs in pairs]
        ratio = "1" if name == reference else f"{statistics.median(ratios):.2f}"
        spread = "" if name == reference else f" ({min(ratios):.2f} – {max(ratios):.2f})"
        lines.append(
            f"| {name} | {_median(one.rate for one in measured):.0f} "
            f"| {_median(one.megabytes for one in measured):.0f} | {ratio}{spread} "
            f"| {_median(one.cpu_ms for one in measured):.2f} | {_latency(measured)} "
            f"| {peaks[name] / 1e6:.0f} |"
        )
    return "\n".join([*lines, ""])


def memory_table(rows: Sequence[tuple[str, int, int, float]]) -> str:
    """Idle and peak resident memory."""
    lines = [
        "### Memory of the receive process",
        "",
        "| while it receives | idle MB | peak MB | growth MB | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {idle / 1e6:.0f} | {peak / 1e6:.0f} | {(peak - idle) / 1e6:.0f} "
            f"| {seconds:.1f} |"
            for name, idle, peak, seconds in rows
        ),
    ]
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Block:
    """The part of the page that one benchmark writes, between two marks of its name."""

    name: str
    title: str


RECEIVE = Block("bench_receive", "C-STORE receivers")
LEDGER = Block("bench_ledger", "The ledger")
GATES = Block("bench_gates", "Gates beside the restoration they judge")
END_TO_END = Block("bench_end_to_end", "From the last slice to the last result")


def write(path: Path, tables: Sequence[str], command: str, load: float, block: Block) -> None:
    """Put the tables of one run into the page, between its marks; a new block goes last."""
    # Only here: PyTorch comes with it, which no receiver's benchmark waits for.
    from training import bench

    body = "\n".join([f"## {block.title}\n\n`{command}`\n\n{machine(load)}\n", *tables])
    bench.write(path, body, block.name)


def machine(load: float) -> str:
    """Machine class, versions, and how busy it was with other work when the run began."""
    flags = Path("/proc/cpuinfo").read_text()
    extensions = [name for name, flag in (("AVX2", "avx2"), ("SHA-NI", "sha_ni")) if flag in flags]
    return (
        f"{os.cpu_count()} shared cores ({', '.join(extensions)}), Linux {_kernel()}, "
        f"{_file_system()}; Python {platform.python_version()}, pynetdicom "
        f"{version('pynetdicom')}, SQLAlchemy {version('sqlalchemy')}; {_dcmtk()}. "
        f"Load average before the run: {load:.1f}."
    )


def _kernel() -> str:
    return ".".join(platform.release().split(".")[:2])


def _file_system() -> str:
    """As the kernel names it: stat says ext2/ext3 of an ext4."""
    found = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "-T", "."], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def _dcmtk() -> str:
    found = subprocess.run(
        ["/usr/bin/storescp", "--version"], capture_output=True, text=True, check=False
    )
    words = found.stdout.split()
    return f"DCMTK {words[words.index('storescp') + 1]}" if "storescp" in words else "DCMTK"


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _latency(measured: Sequence[Measured]) -> str:
    values = sorted(value for one in measured for value in one.latencies_ms)
    if not values:
        return "–"
    return f"{values[len(values) // 2]:.2f} / {values[int(len(values) * 0.99)]:.2f}"
