"""Machine code of the kernels for the processor that is there, made once for each shape."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.binding as llvm
import torch
from torch import Tensor

from restoration.llvm.emit import Function, Module

Kernel = Callable[..., None]

_ENGINES: list[Any] = []  # own the code that kernels run


@functools.cache
def kernel(write: Callable[..., Function], *shape: Any) -> Kernel:
    """The kernel that `write(module, *shape)` writes, to be called with tensors, then numbers.

    A thread makes the machine code, which LLVM does beside Python: the first call waits for it,
    and raises what went wrong. Whoever calls sees to it that tensors are contiguous, of fp32
    (tables: int64), and large enough. The call lets other threads of Python go on.
    """
    module = Module()
    written = write(module, *shape)
    kinds = [ctypes.c_void_p] * len(written.arrays) + [ctypes.c_int64] * len(written.numbers)
    made = _compiler().submit(_compiled, str(module), written.name)

    @functools.cache
    def code() -> Any:
        return ctypes.CFUNCTYPE(None, *kinds)(made.result())

    def call(*given: Tensor | int) -> None:
        code()(*(each if isinstance(each, int) else each.data_ptr() for each in given))

    return call


def _compiled(text: str, name: str) -> int:
    """The address of a function of a module."""
    # No passes over it: loops, vectors and registers are as the kernel says.
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), _machine())
    engine.finalize_object()
    _ENGINES.append(engine)
    return int(engine.get_function_address(name))


@functools.lru_cache(maxsize=1)
def _compiler() -> ThreadPoolExecutor:
    # One: LLVM does one thing at a time for llvmlite.
    return ThreadPoolExecutor(1, "kernels")


def over(count: int, run: Callable[[int, int], None], whole: int = 1) -> None:
    """run(first, stop) over `count` rows, in as many parts as PyTorch has threads.

    Parts begin at multiples of `whole`.
    """
    units = -(-count // whole)
    threads = min(torch.get_num_threads(), units)
    if threads == 1:
        run(0, count)
        return
    ends = [min(units * i // threads * whole, count) for i in range(threads + 1)]
    list(_pool(threads).map(run, ends, ends[1:]))


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "rows")


@functools.lru_cache(maxsize=1)
def _processor() -> tuple[Any, str, str]:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple(), llvm.get_host_cpu_name(), features


def _machine() -> Any:
    # An engine takes its machine over: each has its own.
    target, name, features = _processor()
    return target.create_target_machine(cpu=name, features=features)
