from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from restoration import execution
from restoration.bundle import RestorationError
from restoration.diffcode import DiffCode
from restoration.execution import (
    PRECISIONS,
    Execution,
    chosen_device,
    chosen_precision,
    cpu_has_bf16,
)
from restoration.precision import Form, lowered
from tests.unit.restoration.conftest import small_model

CPU = torch.device("cpu")


# Kernels know whole vectors of channels.
WIDTHS = {Form.COMPILED: (24, 48, 96, 96), Form.PRODUCTS: (20, 48, 96, 96)}


@pytest.fixture
def model() -> DiffCode:
    made = small_model()
    made.use_local_pooling(True)
    return made.requires_grad_(False)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 1, 32, 40, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def noise(model: DiffCode, image: Tensor) -> Tensor:
    return torch.randn(model.noise_shape(image), generator=torch.Generator().manual_seed(5))


def run(how: Execution, image: Tensor, noise: Tensor) -> execution.Pass:
    with torch.inference_mode():
        return how.run(image, noise, 1)


@pytest.mark.parametrize(
    ("form", "channels"), [(Form.COMPILED, (8, 8, 8, 16)), (Form.PRODUCTS, (4, 6, 8, 8))]
)
def test_single_precision_on_a_cpu_runs_by_its_own_form_and_gives_the_same(
    image: Tensor, form: Form, channels: tuple[int, ...]
) -> None:
    model = small_model(channels=channels).requires_grad_(False)
    model.use_local_pooling(True)
    noise = torch.randn(model.noise_shape(image), generator=torch.Generator().manual_seed(5))
    how = Execution(model, CPU, "fp32")
    assert (how.form, how.dtype, how.remark) == (form, torch.float32, None)
    with torch.inference_mode():
        expected = model(image, 1, noise)
        found = how.model(image, 1, noise)
    torch.testing.assert_close(found.restored, expected.restored, rtol=0, atol=2e-6)
    assert torch.equal(found.codes, expected.codes)


def test_a_network_of_another_kind_runs_as_it_is(
    model: DiffCode, image: Tensor, noise: Tensor
) -> None:
    class Other(DiffCode):
        pass

    other = Other(model.config)
    other.load_state_dict(model.state_dict())
    how = Execution(other, CPU, "fp32")
    assert how.model is other
    assert how.form is Form.PLAIN
    assert how.remark is None


@pytest.mark.parametrize(("precision", "within"), [("bf16", 0.03), ("fp16", 0.004)])
def test_a_lower_precision_gives_nearly_the_same_change(
    model: DiffCode, image: Tensor, noise: Tensor, precision: str, within: float
) -> None:
    how = Execution(model, CPU, precision)
    # By products where the processor has instructions for them, else by plain operators.
    assert how.dtype == chosen_precision(precision, CPU)
    expected = run(Execution(model, CPU, "fp32"), image, noise)
    found = run(how, image, noise)
    assert found.restored.dtype == torch.float32
    apart = (found.restored - expected.restored).norm()
    assert 0 < float(apart / (expected.restored - image).norm()) < within


def test_what_must_be_exact_stays_in_single_precision(model: DiffCode) -> None:
    low = lowered(model, torch.bfloat16)
    state = low.state_dict()
    single = {name for name, value in state.items() if value.dtype == torch.float32}
    for part in ("bank.", "prior.", "classifier.", "condition.embed", "condition.project"):
        assert any(name.startswith(part) for name in single), part
    for name, value in model.state_dict().items():
        if name.startswith(("bank.", "prior.", "classifier.")):
            assert torch.equal(state[name], value)
    assert torch.equal(
        state["backbone.embed.layer.weight"], model.state_dict()["backbone.embed.weight"]
    )
    assert state["backbone.encoder.0.0.conv1.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("form", [Form.PLAIN, Form.PRODUCTS])
def test_lowering_leaves_the_model_as_it_was(model: DiffCode, form: Form) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    lowered(model, torch.float16, form)
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_residual_keeps_every_bit_of_the_input(model: DiffCode, image: Tensor) -> None:
    """With a network that adds nothing, bf16 must not round the image that is restored."""
    nn.init.zeros_(model.backbone.emit.weight)
    assert model.backbone.emit.bias is not None
    nn.init.zeros_(model.backbone.emit.bias)
    with torch.inference_mode():
        noise = torch.zeros(model.noise_shape(image))
        assert torch.equal(lowered(model, torch.bfloat16)(image, 1, noise).restored, image)


def test_codes_do_not_depend_on_the_precision_of_what_follows(
    model: DiffCode, image: Tensor, noise: Tensor
) -> None:
    low = lowered(model, torch.bfloat16)
    with torch.inference_mode():
        latent = model.estimate(image, noise)
        assert latent is not None
        _, _, codes = model.lookup(latent, 1)
        _, _, found = low.lookup(latent, 1)
    assert codes is not None
    assert found is not None
    assert torch.equal(codes, found)


def test_a_form_that_gives_other_values_is_not_used(
    model: DiffCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(given: DiffCode, dtype: torch.dtype, form: Form = Form.PLAIN) -> DiffCode:
        made = lowered(given, dtype, form)
        with torch.no_grad():
            for parameter in made.backbone.emit.parameters():
                parameter.add_(1)
        return made

    monkeypatch.setattr(execution, "lowered", wrong)
    how = Execution(model, CPU, "bf16")
    assert how.dtype == torch.float32
    assert how.model is model
    assert how.remark == "fp32 by products gave other values on cpu than single precision"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_form_that_overflows_is_not_used(
    model: DiffCode, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def overflown(given: DiffCode, dtype: torch.dtype, form: Form = Form.PLAIN) -> DiffCode:
        made = lowered(given, dtype, form)
        with torch.no_grad():
            next(iter(made.backbone.emit.parameters())).fill_(value)
        return made

    monkeypatch.setattr(execution, "lowered", overflown)
    assert Execution(model, CPU, "fp16").dtype == torch.float32


def test_a_form_that_fails_is_not_used(model: DiffCode, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(given: DiffCode, dtype: torch.dtype, form: Form = Form.PLAIN) -> DiffCode:
        raise RuntimeError("PTX of another driver")

    monkeypatch.setattr(execution, "lowered", broken)
    how = Execution(model, CPU, "bf16")
    assert how.model is model
    assert how.remark == "fp32 by products failed on cpu: RuntimeError"


def test_auto_takes_bf16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(execution, "cpu_has_bf16", lambda has=has: has)
        assert chosen_precision("auto", CPU) == expected
    assert isinstance(cpu_has_bf16(), bool)


def test_an_unknown_precision_or_device_is_refused() -> None:
    with pytest.raises(ValueError, match="'precision' must be one of auto, fp32, bf16, fp16"):
        chosen_precision("fp8", CPU)
    assert PRECISIONS[0] == "auto"
    with pytest.raises(RestorationError, match="is not a device"):
        chosen_device("warp drive")
    with pytest.raises(RestorationError, match="not available"):
        chosen_device("cuda:63")


@pytest.mark.usefixtures("two_threads")
def test_a_cpu_takes_a_slice_for_each_thread_that_its_memory_has_room_for(
    model: DiffCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Execution(model, CPU, "fp32")
    free = {"octets": 1 << 40}
    monkeypatch.setattr(execution, "_free_memory", lambda: free["octets"])
    assert [how.slices(side, side) for side in (64, 512, 2048)] == [2, 2, 2]
    free["octets"] = 100 << 20
    assert [how.slices(side, side) for side in (64, 512, 2048)] == [2, 1, 1]
    torch.set_num_threads(1)
    assert how.slices(64, 64) == 1


def test_the_free_memory_is_less_than_the_machine_has() -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < execution._free_memory() <= whole


def test_a_gpu_takes_what_fits_into_its_free_memory(
    model: DiffCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = Execution(model, CPU, "fp32")
    how.device = torch.device("cuda")
    free = {"octets": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["octets"], 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 20)
    found = []
    for megabytes in (0, 64, 256, 512, 4096, 65536):
        free["octets"] = megabytes << 20
        found.append(how.slices(512, 512))
    assert found[0] == 1
    assert found[-1] == 8
    assert found == sorted(found)
    assert all(size & (size - 1) == 0 for size in found)


def test_results_do_not_depend_on_the_size_of_the_batch(
    model: DiffCode, image: Tensor, noise: Tensor
) -> None:
    how = Execution(model, CPU, "fp32")
    together = run(how, image, noise).restored
    alone = torch.cat(
        [run(how, image[i : i + 1], noise[i : i + 1]).restored for i in range(len(image))]
    )
    assert torch.equal(alone, together)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("variant", ["v2", "full"])
@pytest.mark.parametrize("form", [Form.COMPILED, Form.PRODUCTS])
@pytest.mark.parametrize("is_small", [False, True], ids=["by all", "by one of them"])
def test_a_slice_has_the_same_bits_by_one_thread_or_by_all(
    variant: str, form: Form, is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restoration.execution._SMALL", 72 * 64 if is_small else 72 * 64 - 1)
    model = small_model(variant=variant, channels=WIDTHS[form])
    model.use_local_pooling(True)
    image = torch.rand(3, 1, 72, 64, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(model.noise_shape(image), generator=torch.Generator().manual_seed(5))
    how = Execution(model.requires_grad_(False), CPU, "fp32")
    assert how.form is form
    together = run(how, image, noise)  # by a thread for each slice
    torch.set_num_threads(1)
    single = run(how, image, noise)  # one after the other
    torch.set_num_threads(2)
    for i in range(len(image)):
        alone = run(how, image[i : i + 1], noise[i : i + 1])  # by both threads, or by one
        for ours in (together, single):
            assert torch.equal(ours.restored[i : i + 1], alone.restored)
            assert ours.class_logits is not None
            assert alone.class_logits is not None
            assert torch.equal(ours.class_logits[i : i + 1], alone.class_logits)


@pytest.mark.usefixtures("two_threads")
def test_slices_at_once_leave_the_number_of_threads_as_it_was(
    model: DiffCode, image: Tensor, noise: Tensor
) -> None:
    run(Execution(model, CPU, "fp32"), image, noise)
    with ThreadPoolExecutor(1) as another:
        assert (torch.get_num_threads(), another.submit(torch.get_num_threads).result()) == (2, 2)


@pytest.mark.usefixtures("two_threads")
def test_what_fails_in_a_thread_is_told_to_who_waits(
    model: DiffCode, image: Tensor, noise: Tensor
) -> None:
    how = Execution(model, CPU, "fp32")
    wait = how.start(image, noise[:, :1], 1)
    with pytest.raises(RuntimeError, match="shape"):
        wait()


@pytest.mark.usefixtures("two_threads")
def test_a_batch_may_be_started_before_the_last_one_is_done(
    model: DiffCode, image: Tensor, noise: Tensor
) -> None:
    how = Execution(model, CPU, "fp32")
    images = [image * factor for factor in (0.2, 0.5, 0.9)]
    expected = [run(how, each, noise).restored for each in images]
    waiting = [how.start(each, noise, 1) for each in images]
    for wait, theirs in zip(reversed(waiting), reversed(expected), strict=True):
        assert torch.equal(wait().restored, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnGpu:
    """What only a GPU can show; the kernels alone are in test_kernels."""

    DEVICE = torch.device("cuda")

    def run_twice(self, how: Execution, image: Tensor, noise: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            return [how.start(image, noise, 1)().restored for _ in range(4)]

    def test_a_graph_gives_what_the_first_pass_gave(
        self, model: DiffCode, image: Tensor, noise: Tensor
    ) -> None:
        how = Execution(model.to(self.DEVICE), self.DEVICE, "bf16")
        assert how.remark is None
        first, *others = self.run_twice(how, image, noise)
        assert all(torch.equal(other, first) for other in others)

    def test_passes_in_flight_do_not_mix(
        self, model: DiffCode, image: Tensor, noise: Tensor
    ) -> None:
        how = Execution(model.to(self.DEVICE), self.DEVICE, "fp32")
        images = [image * factor for factor in (0.2, 0.5, 0.9)]
        with torch.inference_mode():
            expected = [how.start(each, noise, 1)().restored for each in images]
            waiting: list[Callable[[], Any]] = [how.start(each, noise, 1) for each in images]
            found = [wait().restored for wait in waiting]
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_the_gpu_gives_what_the_cpu_does(
        self, model: DiffCode, image: Tensor, noise: Tensor
    ) -> None:
        expected = run(Execution(model, CPU, "fp32"), image, noise).restored
        for precision, within in (("fp32", 1e-4), ("bf16", 0.03), ("fp16", 0.004)):
            how = Execution(model.to(self.DEVICE), self.DEVICE, precision)
            with torch.inference_mode():
                found = how.start(image, noise, 1)().restored
            apart = (found - expected).norm() / (expected - image).norm()
            assert float(apart) < within
