"""Machine code of the kernels for the processor that is there, made once for each shape."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from restoration.llvm.emit import Function

Kernel = Callable[..., None]
Shape = TypeVar("Shape", bound=Hashable)

_LOCK = threading.Lock()
_ENGINES: list[Any] = []  # own the code that kernels run


@functools.cache
def kernel(write: Callable[..., Function], *shape: Any) -> Kernel:
    """The kernel that `write(module, *shape)` writes, to be called with tensors, then numbers.

    Whoever calls sees to it that tensors are contiguous, of fp32 (tables: int64), and large enough.
    The call lets other threads of Python go on.
    """
    with _LOCK:
        module = ir.Module()
        written = write(module, *shape)
        # No passes over it: loops, vectors and registers are as the kernel says.
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), _machine())
        engine.finalize_object()
        _ENGINES.append(engine)
        address = engine.get_function_address(written.ir.name)
    kinds = [
        ctypes.c_void_p if isinstance(each.type, ir.PointerType) else ctypes.c_int64
        for each in written.ir.args
    ]
    run = ctypes.CFUNCTYPE(None, *kinds)(address)

    def call(*given: Tensor | int) -> None:
        run(*(each if isinstance(each, int) else each.data_ptr() for each in given))

    return call


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
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def _machine() -> Any:
    name, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return _target().create_target_machine(cpu=name, features=features)
