"""Kernels of the parts of the network that a CPU spends its time on, made by LLVM as needed.

llvmlite brings LLVM as a library: nothing is compiled when the package is installed, and no
compiler is needed where it runs. A kernel is written once for all processors, as vectors and
products in registers, and becomes machine code for the one that is there in some hundredths of a
second. Each has an oracle in plain PyTorch: the module of the network whose place it takes.
docs/decisions/0037-a-cpu-by-compiled-kernels.md
"""

from __future__ import annotations

import platform
from importlib.util import find_spec

import torch

from restoration.diffcode import DiffCodeConfig


def available(device: torch.device) -> bool:
    """Whether `device` is a CPU that multiplies and adds vectors at once, and LLVM is there."""
    if device.type != "cpu" or find_spec("llvmlite") is None:
        return False
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def fits(config: DiffCodeConfig) -> bool:
    """Whether the kernels know the widths of a network: whole vectors."""
    widths = (*config.channels, config.latent_dim, config.codes)
    return all(width % 8 == 0 for width in widths)
