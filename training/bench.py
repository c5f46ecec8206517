"""Speed and memory of the network on this machine, against what the machine could do.

The limit ("roofline") is measured in the same run: one large matrix product and one large copy. Of
each stage of the network the operations and the fewest bytes are counted; its least time is the
larger of operations ÷ the product's rate and bytes ÷ the copy's rate, and that of the network the
sum over its stages. A stage is what can be done in one go over its activations: a NAF block (nine
tensors of its channels in and out, see :mod:`restoration.kernels.naf`), an expert, a convolution
between levels, the diffusion chain, the search of the codes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from restoration.blocks import Downsample, NAFBlock, Upsample
from restoration.bundle import RestorationError
from restoration.diffcode import DiffCode, DiffCodeConfig
from restoration.diffusion import LatentDiffusion
from restoration.execution import Execution, chosen_device, chosen_precision
from restoration.experts import GlobalRouter, TaskAdaptiveRouting
from restoration.quantizer import CodebookBank
from training.peers import amir_sized, restormer_sized

PRESETS = ("paper", "compact", "tiny")
PEERS: dict[str, Callable[[], nn.Module]] = {
    "Restormer-sized": restormer_sized,
    "AMIR-sized": amir_sized,
}
_BLOCK_TENSORS = 9  # of its channels, that a NAF block in three passes reads and writes
_EXPERT_TENSORS = 2
_TASK = 1
_COUNTED = 256  # large enough for the windows of local pooling to be windows
SHIPPED = ("compact", "v2")  # preset and variant of the bundle that comes with the package
LARGE = "paper"  # takes a CPU minutes, as do the peers
_LEAST_REPEATS = 3  # however long one takes


@dataclass(frozen=True)
class Machine:
    """What the device does at most, measured: operations/s of a product, bytes/s of a copy."""

    name: str
    precision: str
    operations: float
    octets: float


@dataclass(frozen=True)
class Work:
    """Of one slice: two operations for each multiply-add, and the fewest bytes that must move."""

    operations: float
    octets: float
    least_seconds: float


@dataclass(frozen=True)
class Row:
    """One network at one size and precision on one device."""

    network: str
    how: str  #: plain, as the node runs it, …
    precision: str
    size: int
    batch: int
    parameters: int
    gmac: float | None  #: of one slice; None where it depends on the data
    slices_per_second: float
    spread: tuple[float, float]  #: slowest and fastest repetition, slices/s
    peak_bytes: int  #: beyond what the weights take
    share: float | None  #: of the roofline


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    presets: tuple[str, ...] = PRESETS
    variant: str = "full"
    sizes: tuple[int, ...] = (512,)
    precisions: tuple[str, ...] = ("auto",)
    device: str = "auto"
    batch: int | None = None  #: None: as many slices as the node takes at once
    peers: bool = False
    shipped: bool = False  #: the network of the shipped bundle too, in form
    large_up_to: int | None = None  #: pixels of a side for `LARGE` and the peers; None: any
    repeats: int = 5
    seconds: float = 30.0  #: of a row; beyond that three repetitions do

    @property
    def networks(self) -> tuple[tuple[str, str], ...]:
        """Preset and variant of each network."""
        named = [(preset, self.variant) for preset in self.presets]
        return tuple(dict.fromkeys([*named, *([SHIPPED] if self.shipped else [])]))

    def takes(self, name: str, size: int) -> bool:
        """Whether a preset or a peer is measured at this size."""
        small = name not in (LARGE, *PEERS)
        return small or self.large_up_to is None or size <= self.large_up_to


@dataclass(frozen=True)
class Outcome:
    """What one run found."""

    machines: tuple[Machine, ...]  #: by precision
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "machines": [asdict(machine) for machine in self.machines],
            "rows": [asdict(row) for row in self.rows],
        }


def run(plan: Plan, tell: Callable[[str], None]) -> Outcome:
    """Measure what `plan` names, telling each row as it comes.

    Raises ValueError for an unknown preset or precision, or a size that is no multiple of 8;
    RestorationError for a device that is not there.
    """
    if any(size % 8 or size < 64 for size in plan.sizes):
        raise ValueError("sizes must be multiples of 8, and 64 at least")
    device = chosen_device(plan.device)
    names = dict.fromkeys(_name(chosen_precision(each, device)) for each in plan.precisions)
    machines, rows = [], []
    for precision in names:
        machine = measure_machine(device, chosen_precision(precision, device))
        machines.append(machine)
        for size in plan.sizes:
            for preset, variant in plan.networks:
                if not plan.takes(preset, size):
                    continue
                name = preset if variant == "full" else f"{preset}, {variant}"
                network = made(preset, variant)
                rows += _told(bench_network(name, network, size, machine, device, plan), tell)
            for name in (each for each in PEERS if plan.peers and plan.takes(each, size)):
                rows += _told(bench_peer(name, size, machine, device, plan), tell)
    return Outcome(tuple(machines), tuple(rows))


def _told(rows: list[Row], tell: Callable[[str], None]) -> list[Row]:
    for row in rows:
        tell(
            f"{row.network}, {row.how}, {row.precision}, {row.size}²: "
            f"{row.slices_per_second:.3g} slices/s"
        )
    return rows


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The two rates of the device: a product of matrices of that type, a copy of fp32."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    product = statistics.median(_times(lambda: a @ b, device, 5))
    source = torch.randn(1 << (28 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    copy = statistics.median(_times(lambda: target.copy_(source), device, 5))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return Machine(name, _name(dtype), 2 * side**3 / product, 2 * 4 * source.numel() / copy)


def made(preset: str, variant: str = "full") -> DiffCode:
    """An untrained network of a preset in which every path carries a signal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiffCode(DiffCodeConfig.preset(preset, variant=variant))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Times depend on no value, but a block at rest would hide a fault.
                parameter.add_(0.02 * torch.randn_like(parameter))
                if name == "bank.weight":
                    parameter[:, 0] = 0.0
    return model.eval().requires_grad_(False)


def count(model: DiffCode, size: int, machine: Machine, itemsize: int) -> Work:
    """Operations, least bytes and least time of one slice of `size`²: of a small image, scaled."""
    with torch.random.fork_rng(devices=[]):
        counted = DiffCode(model.config).eval().requires_grad_(False)
    counted.use_local_pooling(True)
    counter = FlopCounterMode(display=False)
    scale = (size / _COUNTED) ** 2
    before: dict[nn.Module, int] = {}
    operations, octets, seconds = 0.0, 0.0, 0.0

    def enter(stage: nn.Module, _: Any) -> None:
        before[stage] = counter.get_total_flops()

    def leave(stage: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        nonlocal operations, octets, seconds
        done = scale * (counter.get_total_flops() - before[stage])
        read = next(value.numel() for value in given if isinstance(value, Tensor))
        written = next((v.numel() for v in _flat(out) if isinstance(v, Tensor)), 0)
        moved = _octets(stage, scale * read, scale * written, itemsize)
        operations, octets = operations + done, octets + moved
        seconds += max(done / machine.operations, moved / machine.octets)

    for name, module in counted.named_modules():
        if _is_stage(name, module):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    x = torch.zeros(1, 1, _COUNTED, _COUNTED)
    with counter, torch.no_grad():
        counted(x, _TASK, torch.zeros(counted.noise_shape(x)))
    return Work(operations, octets, seconds)


def bench_network(
    name: str,
    model: DiffCode,
    size: int,
    machine: Machine,
    device: torch.device,
    plan: Plan,
) -> list[Row]:
    """The network as it stands (plain, eager) and as the node runs it, at one precision."""
    dtype = chosen_precision(machine.precision, device)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.use_local_pooling(True)
    execution = Execution(model, device, machine.precision)
    batch = plan.batch or execution.slices(size, size)
    x = torch.rand(batch, 1, size, size, device=device)
    noise = torch.randn(model.noise_shape(x), device=device) if model.prior is not None else None
    work = count(model, size, machine, dtype.itemsize)
    if execution.dtype != dtype:
        raise RestorationError(execution.remark or f"{name} does not run in {machine.precision}")

    def plain() -> Any:
        return model(x, _TASK, noise)

    ways: dict[str, Callable[[], Any]] = (
        {"plain": plain}
        if dtype == torch.float32
        else {"plain, autocast": _autocast(plain, device, dtype)}
    )
    ways[f"as the node runs it: {execution.form.value}"] = lambda: execution.run(x, noise, _TASK)
    return _rows(name, ways, _parameters(model), x, machine, device, plan, work)


def bench_peer(
    name: str, size: int, machine: Machine, device: torch.device, plan: Plan
) -> list[Row]:
    """A network of a peer's size, eager, in the same precision; compiled too on a GPU."""
    batch = plan.batch or (8 if device.type == "cuda" else 1)
    dtype = chosen_precision(machine.precision, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PEERS[name]().eval().requires_grad_(False)
    model = model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(batch, 1, size, size, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], Any]] = {"plain": lambda: model(x)}
    if device.type == "cuda":
        compiled = torch.compile(model)
        ways["compiled"] = lambda: compiled(x)  # type: ignore[no-untyped-call]
    return _rows(name, ways, _parameters(model), x, machine, device, plan)


def _rows(
    name: str,
    ways: Mapping[str, Callable[[], Any]],
    parameters: int,
    x: Tensor,
    machine: Machine,
    device: torch.device,
    plan: Plan,
    work: Work | None = None,
) -> list[Row]:
    """A network measured in each of its ways at the batch `x`; with its work, as a share."""
    rows = []
    with torch.inference_mode():
        for how, run in ways.items():
            times, peak = _measured(run, device, plan)
            speeds = sorted(len(x) / each for each in times)
            speed = statistics.median(speeds)
            gmac, share = (None, None)
            if work is not None:
                gmac, share = work.operations / 2e9, work.least_seconds * speed
            rows.append(
                Row(
                    name, how, machine.precision, x.shape[-1], len(x), parameters, gmac,
                    speed, (speeds[0], speeds[-1]), peak, share,
                )
            )  # fmt: skip
    return rows


def table(outcome: Outcome) -> str:
    """The rows in Markdown, below the rates of the machine."""
    machines = outcome.machines
    lines = [
        f"{machines[0].name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}.",
        "",
        "| precision | product, TFLOP/s | copy, GB/s |",
        "|---|---|---|",
        *(
            f"| {each.precision} | {each.operations / 1e12:.3g} | {each.octets / 1e9:.1f} |"
            for each in machines
        ),
        "",
        "| network | how | precision | size | batch | parameters | GMAC | slices/s "
        "| slowest – fastest | peak MB | of the roofline |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in outcome.rows:
        gmac = "–" if row.gmac is None else f"{row.gmac:.1f}"
        share = "–" if row.share is None else f"{100 * row.share:.0f} %"
        lines.append(
            f"| {row.network} | {row.how} | {row.precision} | {row.size} | {row.batch} "
            f"| {row.parameters / 1e6:.2f} M | {gmac} | {row.slices_per_second:.3g} "
            f"| {row.spread[0]:.3g} – {row.spread[1]:.3g} | {row.peak_bytes / 1e6:.0f} | {share} |"
        )
    return "\n".join([*lines, ""])


def section(outcome: Outcome, command: str, before: str = "") -> str:
    """The tables as a section of a page of results, with the command that made them."""
    return f"## The network\n\n`{command}`\n\n{before}{table(outcome)}"


def write(page: Path, section: str, mark: str = "bench_restore") -> None:
    """Put a section between the marks of a page of results; the rest of the page stays."""
    marked = f"<!-- {mark} -->"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    if marked not in text:
        text = f"{text.rstrip()}\n\n{marked}\n{marked}\n"
    before, _, rest = text.partition(marked)
    after = rest.partition(marked)[2]
    page.write_text(f"{before}{marked}\n{section.strip()}\n{marked}{after}", encoding="utf-8")


def _is_stage(name: str, module: nn.Module) -> bool:
    whole = (
        NAFBlock, TaskAdaptiveRouting, Downsample, Upsample,
        LatentDiffusion, CodebookBank, GlobalRouter,
    )  # fmt: skip
    # And the first and last convolutions of each network, which stand alone.
    edges = ("embed", "emit", "project", "expand")
    return isinstance(module, whole) or (
        type(module) is nn.Conv2d and name.rpartition(".")[2] in edges
    )


def _octets(stage: nn.Module, read: float, written: float, itemsize: int) -> float:
    if isinstance(stage, NAFBlock):
        return _BLOCK_TENSORS * read * itemsize
    if isinstance(stage, TaskAdaptiveRouting):
        return _EXPERT_TENSORS * read * itemsize
    if isinstance(stage, LatentDiffusion):
        return 3 * read * 4  # condition and noise in, latent out, fp32
    if isinstance(stage, CodebookBank):
        return 2 * read * 4 + stage.weight[0].numel() * 4
    return (read + written) * itemsize


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


def _autocast(
    run: Callable[[], Any], device: torch.device, dtype: torch.dtype
) -> Callable[[], Any]:
    def inside() -> Any:
        with torch.autocast(device.type, dtype):
            return run()

    return inside


def _measured(run: Callable[[], Any], device: torch.device, plan: Plan) -> tuple[list[float], int]:
    """Times of each repetition in seconds, and the peak of memory beyond what was taken before."""
    run()
    before = _memory(device, reset=True)
    times = _times(run, device, plan.repeats, plan.seconds)
    return times, max(0, _memory(device, reset=False) - before)


def _times(
    run: Callable[[], Any], device: torch.device, repeats: int, within: float = float("inf")
) -> list[float]:
    """Times of repetitions after one that does not count; fewer, but three, if they take longer."""
    run()
    times: list[float] = []
    while len(times) < repeats and (len(times) < _LEAST_REPEATS or sum(times) < within):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return times


def _memory(device: torch.device, *, reset: bool) -> int:
    """Octets in use (`reset`: now, and the peak starts from here) or at the peak."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        # Linux: the high-water mark of this process goes down to what it holds now.
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS" if reset else "VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def _cpu() -> str:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return f"CPU ({', '.join(flag for flag in known if flag in flags)})"


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
