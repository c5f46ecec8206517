"""Triton kernels of the parts of the network that a GPU spends its time on.

Triton comes with PyTorch for CUDA and is absent elsewhere, so nothing here is imported before
:func:`available` says so. Each kernel has an oracle in plain PyTorch: the module of the network
whose place it takes.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


def available(device: torch.device) -> bool:
    """Whether `device` runs kernels: an NVIDIA GPU where Triton is installed."""
    cuda = device.type == "cuda" and torch.version.hip is None
    return cuda and find_spec("triton") is not None
