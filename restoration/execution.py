"""Passes of the network on a device: in which precision, by which kernels, how many at once.

On a GPU the inner layers run in half precision by Triton kernels where those fit, a shape that
comes again becomes a CUDA graph, and transfers run beside the work through pinned memory. A CPU
computes in bf16 where it has instructions for that.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from restoration.bundle import RestorationError
from restoration.diffcode import DiffCode, DiffCodeOutput
from restoration.precision import Form, forms, lowered
from restoration.workers import workers

# Activations come and go by the 25 MB, which in pages of 2 MB costs a fiftieth of the faults.
# PyTorch asks for the setting at its first tensor; Linux gives such pages unless told "never".
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}

# More slices at once are no faster, and a shape has a graph of its own.
_MOST_PIXELS = 8 * 512 * 512
# Pixels of a slice that two threads are hardly faster over than one, and cost twice as much.
_SMALL = 192 * 192
_SHARE = 0.8  # of the free memory that a batch may take
_GRAPHS = 4
# The activations alive at once, in tensors of the first level's channels, as measured.
_ALIVE = 14
# How far from the plain network a form may be, of the change that this makes to an image.
_APART = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
_PROBE = 64  # pixels along a side of the image that tells


@dataclass(frozen=True)
class Pass:
    """One pass of the network: restored (B, 1, H, W) and per-slice values, None without a part."""

    restored: Tensor
    latent_distance: Tensor | None  #: (B,) ‖ẑ − ẑ_q‖ / ‖ẑ‖
    reference_distance: Tensor | None  #: (B,) ‖HP(y − I_ref)‖ / ‖HP(y)‖, HP = what 4 x 4 means lack
    class_logits: Tensor | None  #: (B, tasks)

    def each(self, change: Callable[[Tensor], Tensor]) -> Pass:
        """The pass with `change` done to each of its tensors."""
        values = (
            self.latent_distance,
            self.reference_distance,
            self.class_logits,
        )
        return Pass(
            change(self.restored), *(value if value is None else change(value) for value in values)
        )


def chosen_device(name: str) -> torch.device:
    """The device of a name: "auto" (CUDA when there is one), "cpu" or "cuda[:n]".

    Raises RestorationError for another name, or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RestorationError(f"{name!r} is not a device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RestorationError(f"device {name!r} is not available")
    return device


def chosen_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that the inner layers compute in; ValueError for an unknown name.

    "auto" is bf16 on a GPU and on a CPU with instructions for it, fp32 elsewhere.
    """
    if name not in PRECISIONS:
        raise ValueError(f"'precision' must be one of {', '.join(PRECISIONS)}, not {name!r}.")
    if name != "auto":
        return _TYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Execution:
    """A model that is on its device, and how it runs there. Not for several threads at once."""

    def __init__(self, model: DiffCode, device: torch.device, precision: str = "auto") -> None:
        self.device = device
        self.dtype = chosen_precision(precision, device)
        self.form = Form.PLAIN
        self.remark: str | None = None  #: why the network does not run as was asked for
        self.model = self._tried(model)
        self._graphs = _Graphs(self._forward) if device.type == "cuda" else None
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def _tried(self, model: DiffCode) -> DiffCode:
        """The fastest form of `model` that gives what the plain one gives, here and now."""
        for dtype, form in self._candidates(model):
            name = f"{_NAMES[dtype]}{'' if form is Form.PLAIN else f' by {form.value}'}"
            try:
                candidate = lowered(model, dtype, form)
                apart = _apart(model, candidate, self.device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # A compiler of kernels may raise anything.
                self.remark = f"{name} failed on {self.device}: {type(error).__name__}"
                continue
            if apart <= _APART[dtype]:
                self.dtype, self.form = dtype, form
                return candidate
            self.remark = f"{name} gave other values on {self.device} than single precision"
        self.dtype = torch.float32
        return model

    def _candidates(self, model: DiffCode) -> Iterator[tuple[torch.dtype, Form]]:
        # A network of another kind computes as it says.
        known = type(model) is DiffCode
        if self.dtype != torch.float32:
            usable = forms(model, self.device, self.dtype) if known else ()
            yield from ((self.dtype, form) for form in (*usable, Form.PLAIN))
        if self.device.type == "cpu" and known:
            usable = forms(model, self.device, torch.float32)
            yield from ((torch.float32, form) for form in usable)

    def tensors(self) -> Iterator[Tensor]:
        """The weights and tables that a pass reads."""
        return iter(self.model.state_dict().values())

    def slices(self, height: int, width: int) -> int:
        """How many slices of that size to take at once, by the free memory: a CPU's thread each."""
        each = height * width * self.model.config.channels[0] * self.dtype.itemsize * _ALIVE
        if self.device.type != "cuda":
            return max(1, min(torch.get_num_threads(), int(_SHARE * _free_memory() / each)))
        free, _ = torch.cuda.mem_get_info(self.device)
        # What the allocator holds for nobody is free too.
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        fitting = max(1, int(_SHARE * free / each))
        most = max(1, _MOST_PIXELS // (height * width))
        return int(min(most, 1 << (fitting.bit_length() - 1)))

    def forget(self) -> None:
        """Give the memory of graphs and of the allocator's cache back."""
        if self._graphs is not None:
            self._graphs.clear()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def run(self, x: Tensor, noise: Tensor | None, task: int) -> Pass:
        """(B, 1, H, W) and the noise of the chain, on the device → a pass, on the device."""
        if self._graphs is not None:
            return self._graphs.run(x, noise, task)
        return self._queued(x, noise, task)()

    def start(self, x: Tensor, noise: Tensor | None, task: int) -> Callable[[], Pass]:
        """Queue a pass over tensors of the CPU; calling what comes back waits for its result.

        While the GPU works, or a CPU's threads do on several slices, the caller may prepare the
        next batch and start it.
        """
        if self.device.type != "cuda":
            return self._queued(x, noise, task)
        if self._streams is None:
            self._streams = (torch.cuda.Stream(self.device), torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
        inwards, outwards = self._streams
        work = torch.cuda.current_stream(self.device)

        def brought(values: Tensor) -> Tensor:
            with torch.cuda.stream(inwards):
                there = values.pin_memory().to(self.device, non_blocking=True)
            there.record_stream(work)
            return there

        on_device = (brought(x), None if noise is None else brought(noise))
        work.wait_stream(inwards)
        result = self.run(*on_device, task)
        outwards.wait_stream(work)

        def fetched(values: Tensor) -> Tensor:
            with torch.cuda.stream(outwards):
                here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                here.copy_(values, non_blocking=True)
            values.record_stream(outwards)
            return here

        host = result.each(fetched)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(outwards)

        def wait() -> Pass:
            ready.synchronize()
            return host

        return wait

    def _queued(self, x: Tensor, noise: Tensor | None, task: int) -> Callable[[], Pass]:
        """Slices on the CPU: a large one by all threads, here and now, others by a thread each."""
        # Alone in the network, so that a slice has the same bits in any company.
        alone = [
            (x[i : i + 1], None if noise is None else noise[i : i + 1], task) for i in range(len(x))
        ]
        threads = torch.get_num_threads()
        small = x.shape[-2] * x.shape[-1] <= _SMALL
        if threads == 1 or (len(alone) == 1 and not small):
            done = _joined([self._forward(*each) for each in alone])
            return lambda: done
        waiting = [workers(threads).submit(partial(self._forward, *each)) for each in alone]
        return lambda: _joined([each.result() for each in waiting])

    def _forward(self, x: Tensor, noise: Tensor | None, task: int) -> Pass:
        out = self.model(x.contiguous(memory_format=torch.channels_last), task, noise)
        return Pass(out.restored, _latent_distance(out), _reference_distance(out), out.class_logits)


class _Graphs:
    """CUDA graphs of the shapes that came more than once, the least used given up first."""

    def __init__(self, forward: Callable[[Tensor, Tensor | None, int], Pass]) -> None:
        self._forward = forward
        self._seen: set[tuple[object, ...]] = set()
        self._kept: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()

    def clear(self) -> None:
        self._kept.clear()
        self._seen.clear()

    def run(self, x: Tensor, noise: Tensor | None, task: int) -> Pass:
        key = (tuple(x.shape), task)
        graph = self._kept.get(key)
        if graph is None:
            if key not in self._seen:
                # The first pass compiles kernels and warms up, and may be the only one.
                self._seen.add(key)
                return self._forward(x, noise, task)
            while len(self._kept) >= _GRAPHS:
                self._kept.popitem(last=False)
            graph = self._kept[key] = _Graph(self._forward, x, noise, task)
        self._kept.move_to_end(key)
        return graph.replay(x, noise)


class _Graph:
    def __init__(
        self,
        forward: Callable[[Tensor, Tensor | None, int], Pass],
        x: Tensor,
        noise: Tensor | None,
        task: int,
    ) -> None:
        self._x = x.clone()
        self._noise = None if noise is None else noise.clone()
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(x.device)
        # Other threads of the process may call the driver meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = forward(self._x, self._noise, task)

    def replay(self, x: Tensor, noise: Tensor | None) -> Pass:
        self._x.copy_(x)
        if self._noise is not None and noise is not None:
            self._noise.copy_(noise)
        self._graph.replay()
        # The next replay writes over what this one made.
        return self._result.each(torch.clone)


def _free_memory() -> int:
    """Octets that a process may still take, as Linux estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo has no MemAvailable")


def _joined(passes: list[Pass]) -> Pass:
    if len(passes) == 1:
        return passes[0]

    def cat(values: list[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return torch.cat(known) if known else None

    return Pass(
        torch.cat([each.restored for each in passes]),
        cat([each.latent_distance for each in passes]),
        cat([each.reference_distance for each in passes]),
        cat([each.class_logits for each in passes]),
    )


def _apart(plain: DiffCode, candidate: DiffCode, device: torch.device) -> float:
    """‖Δ‖ between the results of two forms of a network on one image, over ‖change‖ of it."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, _PROBE)
    image = 0.8 * (ramp[:, None] * ramp)[None, None]
    image = image + 0.02 * torch.randn(image.shape, generator=generator)
    noise = torch.randn(plain.noise_shape(image), generator=generator).to(device)
    image = image.to(device, memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = plain(image, 0, noise).restored
        found = candidate(image, 0, noise).restored
        change = (expected - image).norm().clamp(min=1e-3 * image.norm())
        # Not finite is more than any limit.
        apart = ((found - expected).norm() / change).nan_to_num(nan=torch.inf)
    return float(apart)


def _latent_distance(out: DiffCodeOutput) -> Tensor | None:
    if out.latent is None or out.quantised is None:
        return None
    apart = (out.latent - out.quantised).flatten(1).norm(dim=1)
    distance: Tensor = apart / out.latent.flatten(1).norm(dim=1).clamp(min=1e-12)
    return distance


def _reference_distance(out: DiffCodeOutput) -> Tensor | None:
    if out.reference is None:
        return None
    apart = _high_pass(out.restored - out.reference).flatten(1).norm(dim=1)
    detail = _high_pass(out.restored).flatten(1).norm(dim=1)
    distance: Tensor = apart / detail.clamp(min=1e-12)
    return distance


def _high_pass(image: Tensor) -> Tensor:
    means = F.avg_pool2d(image, 4)
    return image - F.interpolate(means, size=image.shape[-2:], mode="nearest")
