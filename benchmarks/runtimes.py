"""The shipped network's form in other runtimes beside the node's, in one run on a CPU.

Each restores as many slices as there are threads, a slice to a thread; PyTorch's own operators and
its compiler restore one after the other by all threads, as they come. ONNX Runtime and OpenVINO are
no dependencies of the project: one that is not installed is named and left out. So is one that does
not give what the plain network gives, or gives no first result in time.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restoration.diffcode import DiffCode
from restoration.execution import Execution
from training import bench

_TASK = 1
_SAME = 1e-4  # of the change: another result is another network
_PATIENCE = 180  # seconds until a first result
_CPU = torch.device("cpu")
Restore = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Runtime:
    """One way to run the network."""

    name: str
    restore: Restore  #: (B, 1, H, W) → the same
    prepared: float  #: seconds until a first result, from the network in memory
    apart: float  #: ‖Δ‖ from the plain result, over the change


@dataclass(frozen=True)
class Timing:
    """What one runtime took, by repetition: seconds of the clock and of the processor a slice."""

    runtime: Runtime
    wall: list[float]
    cpu: list[float]


class Restored(nn.Module):
    """The network with nothing but the restored slice as its result."""

    def __init__(self, model: DiffCode) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x, _TASK, None).restored
        return out


def compare(size: int, repeats: int, tell: Callable[[str], None]) -> str:
    """A table of all runtimes that are there, at `size`² and with PyTorch's number of threads."""
    model = bench.made("compact", "v2")
    model.use_local_pooling(True)
    slices = torch.get_num_threads()
    x = torch.rand(slices, 1, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(x, _TASK, None).restored
    left_out: list[str] = []

    def tell_and_keep(line: str) -> None:
        tell(line)
        if "left out" in line:
            left_out.append(line)

    timings = [Timing(each, [], []) for each in _prepared(model, x, expected, tell_and_keep)]
    for _ in range(repeats):
        for timing in timings:
            wall, cpu = time.perf_counter(), time.process_time()
            timing.runtime.restore(x)
            timing.wall.append((time.perf_counter() - wall) / slices)
            timing.cpu.append((time.process_time() - cpu) / slices)
    return _table(timings, size, slices, repeats) + "".join(f"\n{line}.\n" for line in left_out)


def _prepared(
    model: DiffCode, x: Tensor, expected: Tensor, tell: Callable[[str], None]
) -> Iterator[Runtime]:
    for name, prepare in _WAYS.items():
        begun = time.perf_counter()
        try:
            with _within(_PATIENCE):
                restore = prepare(model, x)
                found = restore(x)
        except ImportError as error:
            tell(f"{name}: left out, {error.name} is not installed")
            continue
        except Exception as error:
            # A compiler or a converter may raise anything, and wrap what ended it.
            if time.perf_counter() - begun >= _PATIENCE:
                tell(f"{name}: left out, no first result within {_PATIENCE} s")
                continue
            tell(f"{name}: left out, {type(error).__name__}: {str(error)[:200]}")
            continue
        seconds = time.perf_counter() - begun
        apart = float((found - expected).norm() / (expected - x).norm())
        if not apart <= _SAME:
            tell(f"{name}: left out, its result is {apart:.2g} of the change from the plain one")
            continue
        tell(f"{name}: first result after {seconds:.1f} s, {apart:.1g} apart")
        yield Runtime(name, restore, seconds, apart)


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    """TimeoutError in the body after so many seconds; in the main thread alone."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _plain(model: DiffCode, x: Tensor) -> Restore:
    return _by_torch(Restored(model))


def _channels_last(model: DiffCode, x: Tensor) -> Restore:
    last = copy.deepcopy(model)
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = _by_torch(Restored(last))
    return lambda given: run(given.contiguous(memory_format=torch.channels_last))


def _node(model: DiffCode, x: Tensor) -> Restore:
    how = Execution(model, _CPU, "fp32")

    def restore(given: Tensor) -> Tensor:
        with torch.inference_mode():
            return how.run(given, None, _TASK).restored

    return restore


def _compiled(model: DiffCode, x: Tensor) -> Restore:
    inductor: Any = importlib.import_module("torch._inductor.config")
    # A compiler in this process ends with the wait for it; one in a pool would go on beside the
    # other runtimes.
    inductor.compile_threads = 1
    return _by_torch(torch.compile(Restored(model)))


def _by_torch(module: Callable[[Tensor], Tensor]) -> Restore:
    def restore(given: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([module(given[i : i + 1]) for i in range(len(given))])

    return restore


def _onnxruntime(model: DiffCode, x: Tensor) -> Restore:
    onnxruntime = importlib.import_module("onnxruntime")
    importlib.import_module("onnxscript")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(Restored(model), (x[:1],), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    (given,) = (each.name for each in session.get_inputs())
    return _by_threads(len(x), lambda one: torch.from_numpy(session.run(None, {given: one})[0]))


def _openvino(model: DiffCode, x: Tensor) -> Restore:
    openvino = importlib.import_module("openvino")
    with torch.no_grad():
        converted = openvino.convert_model(
            Restored(model), example_input=x[:1], input=list(x[:1].shape)
        )
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": len(x),
            "NUM_STREAMS": len(x),
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    requests = [compiled.create_infer_request() for _ in range(len(x))]

    def restore(given: Tensor) -> Tensor:
        for request, one in zip(requests, given, strict=True):
            request.start_async([one[None].numpy()])
        for request in requests:
            request.wait()
        found = [torch.from_numpy(request.get_output_tensor(0).data) for request in requests]
        return torch.cat(found)

    return restore


def _by_threads(count: int, run: Callable[[Any], Tensor]) -> Restore:
    pool = ThreadPoolExecutor(count)
    return lambda given: torch.cat(list(pool.map(run, [one[None].numpy() for one in given])))


_WAYS: dict[str, Callable[[DiffCode, Tensor], Restore]] = {
    "plain": _plain,
    "plain, channels_last": _channels_last,
    "the node": _node,
    "torch.compile": _compiled,
    "ONNX Runtime": _onnxruntime,
    "OpenVINO": _openvino,
}
_VERSIONS = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def _table(timings: list[Timing], size: int, slices: int, repeats: int) -> str:
    plain = timings[0]
    lines = [
        f"compact, V2, {size}², fp32: {slices} slices on {slices} threads, {repeats} repetitions.",
        "",
        "| runtime | slices/s | × plain (smallest – largest) | CPU s/slice | first result after, s "
        "| apart |",
        "|---|---|---|---|---|---|",
    ]
    for timing in timings:
        ratios = sorted(a / b for a, b in zip(plain.wall, timing.wall, strict=True))
        name = timing.runtime.name
        if name in _VERSIONS:
            name += f" {importlib.import_module(_VERSIONS[name]).__version__.split('-')[0]}"
        lines.append(
            f"| {name} | {1 / statistics.median(timing.wall):.2f} "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f}) "
            f"| {statistics.median(timing.cpu):.2f} | {timing.runtime.prepared:.1f} "
            f"| {timing.runtime.apart:.0e} |"
        )
    return "\n".join([*lines, ""])
