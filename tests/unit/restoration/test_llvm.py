"""What the kernels are made of: products in blocks, and rows in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from restoration import llvm
from restoration.diffcode import DiffCodeConfig
from restoration.folding import Linear
from restoration.llvm.emit import LANES, Function, Module, Value
from restoration.llvm.machine import kernel, over
from restoration.llvm.product import Product


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("inputs", [9, 24, 96])
@pytest.mark.parametrize("outputs", [16, 24, 40, 64, 96, 192, 256])
@pytest.mark.parametrize("gated", [False, True])
def test_a_product_is_packed_without_loss(inputs: int, outputs: int, gated: bool) -> None:
    """Blocks hold each column once, and of gated products the two that are multiplied."""
    outputs *= 2 if gated else 1  # halves are whole vectors
    product = Product(inputs, outputs, gated)
    weight, bias = torch.randn(outputs, inputs), torch.arange(float(outputs))
    packed = product.packed(Linear(weight, bias))
    blocks = outputs // product.block
    assert packed.weight.shape == (blocks, inputs, product.block)
    order = packed.bias.flatten().long()
    assert sorted(order.tolist()) == list(range(outputs))
    assert torch.equal(packed.weight.transpose(1, 2).reshape(outputs, inputs), weight[order])
    if gated:
        first, second = packed.bias.view(blocks, 2, -1).unbind(1)
        assert torch.equal(second, first + outputs // 2)


@pytest.mark.parametrize("outputs", range(8, 520, 8))
def test_sums_of_a_tile_fit_into_the_registers(outputs: int) -> None:
    vectors, pixels = Product(8, outputs).tile
    assert 1 <= vectors * pixels <= 12
    assert outputs % (8 * vectors) == 0


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 7, 8, 50])
@pytest.mark.parametrize("whole", [1, 4, 8])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rows_in_parts_are_each_done_once(count: int, whole: int, parts: int) -> None:
    torch.set_num_threads(parts)
    done: list[range] = []
    over(count, lambda first, stop: done.append(range(first, stop)), whole)
    rows = sorted(row for part in done for row in part)
    assert rows == list(range(count))
    assert all(part.start % whole == 0 for part in done)
    assert len(done) == min(parts, -(-count // whole))


@pytest.mark.usefixtures("threads")
def test_what_fails_in_a_part_is_told() -> None:
    torch.set_num_threads(2)

    def fail(first: int, stop: int) -> None:
        raise ValueError(f"rows {first} to {stop}")

    with pytest.raises(ValueError, match="rows 0 to 4"):
        over(8, fail)


def test_kernels_run_on_a_cpu_with_fused_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(llvm, "find_spec", lambda name: object())
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for capability, runs in (("AVX2", True), ("AVX512", True), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda it=capability: it)
        assert llvm.available(cpu) is runs
    assert not llvm.available(torch.device("cuda"))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert llvm.available(cpu)
    monkeypatch.setattr(llvm, "find_spec", lambda name: None)
    assert not llvm.available(cpu)


def doubled(module: Module, factor: float) -> Function:
    """What is at `here` times a constant, for as many vectors as are asked for."""
    f = Function(module, "doubled", ("here", "there"), ("count",))
    with f.loop(0, f.mul(f["count"], LANES), LANES) as place:
        f.store(f.times(f.load(f["here"], place), f.splat(factor)), f["there"], place)
    f.end()
    return f


@pytest.mark.parametrize("factor", [2.0, -0.1, 1e-6, 3e38, float("inf")])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_constant_is_its_nearest_value_in_single_precision(factor: float, count: int) -> None:
    here, there = torch.full((32,), 0.75), torch.zeros(32)
    kernel(doubled, factor)(here, there, count)
    expected = torch.where(torch.arange(32) < 8 * count, 0.75 * torch.tensor(factor), 0.0)
    assert torch.equal(there, expected)


def test_machine_code_is_made_once_for_each_shape() -> None:
    assert kernel(doubled, 2.0) is kernel(doubled, 2.0)
    assert kernel(doubled, 2.0) is not kernel(doubled, 3.0)


def test_known_numbers_need_no_instruction() -> None:
    f = Function(Module(), "nothing", ("values",), ("count",))
    before = str(f)
    assert f.add(f.mul(3, 4), f.sub(7, 2)) == 17
    assert f.mul(f["count"], 1) == f.add(0, f["count"]) == f["count"]
    assert f.mul(0, f["count"]) == 0
    assert f.at(f["values"], 0) == f["values"]
    assert str(f) == before


def test_what_llvm_refuses_is_raised_by_the_first_call() -> None:
    def wrong(module: Module) -> Function:
        f = Function(module, "wrong", ("values",), ())
        f.store(Value("%nowhere", "float"), f["values"])
        f.end()
        return f

    made = kernel(wrong)
    with pytest.raises(RuntimeError, match="nowhere"):
        made(torch.zeros(8))


def test_kernels_know_whole_vectors_of_channels() -> None:
    for preset in ("paper", "compact", "tiny"):
        assert llvm.fits(DiffCodeConfig.preset(preset))
    compact = DiffCodeConfig.preset("compact")
    assert not llvm.fits(replace(compact, channels=(24, 48, 96, 100)))
    assert not llvm.fits(replace(compact, latent_dim=60))
    assert not llvm.fits(replace(compact, codes=1001))
