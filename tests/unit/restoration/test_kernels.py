"""Each Triton kernel against the plain module whose place it takes.

On a machine without a GPU Triton's interpreter runs the kernels on the CPU.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from restoration import kernels, onednn
from restoration.blocks import NAFBlock, set_local_pooling
from restoration.diffcode import DiffCode
from restoration.experts import TaskAdaptiveRouting
from restoration.precision import Form, forms, lowered
from restoration.quantizer import nearest_codes
from tests.unit.restoration.conftest import images, small_model, stirred

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from restoration.fused import FusedNAFBlock, fused_routing
from restoration.kernels import search

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.cpu().double() - theirs.double()).norm() / theirs.double().norm())


# Channels, pooling cell, image pixels of a pixel, height, width, pooling window in image pixels.
BLOCKS = [
    pytest.param(24, 8, 1, 24, 24, 16, id="widths that are no power of two"),
    pytest.param(16, 8, 1, 16, 24, None, id="pooling over the image"),
    pytest.param(16, 4, 2, 12, 20, 16, id="strips that the image does not fill"),
    pytest.param(72, 2, 4, 6, 18, 24, id="two blocks of channels"),
    pytest.param(16, 1, 8, 5, 7, 24, id="cells of one pixel"),
]


@pytest.mark.parametrize(("channels", "cell", "scale", "height", "width", "window"), BLOCKS)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_a_fused_block_gives_what_the_plain_one_does(
    channels: int,
    cell: int,
    scale: int,
    height: int,
    width: int,
    window: int | None,
    dtype: torch.dtype,
    within: float,
) -> None:
    block = stirred(NAFBlock(channels, cell, scale))
    set_local_pooling(block, window)
    x = images(1, channels, height, width)
    ours = FusedNAFBlock(block, dtype).to(DEVICE)(x.to(DEVICE, dtype))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert relative(ours, block(x)) < within


@pytest.mark.parametrize("channels", [24, 64])
def test_a_fused_expert_gives_what_the_plain_one_does(channels: int) -> None:
    routing = stirred(TaskAdaptiveRouting(channels, 3))
    x = images(2, channels, 9, 13)
    weights = torch.eye(3)[[1, 1]]
    ours = fused_routing(routing, torch.float32).to(DEVICE)(x.to(DEVICE), 1)
    assert relative(ours, routing(x, weights)) < 2e-6


@pytest.mark.parametrize(
    ("count", "codes", "width", "depths", "scale"),
    [(300, 300, 64, 4, 1.0), (130, 200, 24, 3, 1e-4), (17, 50, 8, 8, 300.0)],
)
def test_the_search_on_matrix_units_finds_the_codes_of_single_precision(
    count: int, codes: int, width: int, depths: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(count)
    codebook = torch.randn(codes, width, generator=generator)
    codebook *= scale * torch.rand(codes, 1, generator=generator)
    codebook[0] = 0
    tokens = scale * torch.randn(count, width, generator=generator)
    tokens[3] = 0
    residual, expected = tokens.clone(), []
    for _ in range(depths):
        expected.append(nearest_codes(residual, codebook))
        residual = residual - codebook[expected[-1]]
    ours = search.residual_codes(tokens.to(DEVICE), codebook.to(DEVICE), depths)
    assert torch.equal(ours.cpu(), torch.stack(expected, dim=1))


def test_a_tie_of_the_search_goes_to_the_lowest_code() -> None:
    codebook = torch.zeros(300, 16)
    codebook[[7, 40, 200, 299]] = 1.0
    tokens = torch.full((5, 16), 1.1)
    assert search.residual_codes(tokens.to(DEVICE), codebook.to(DEVICE), 1).tolist() == [[7]] * 5


def test_no_tokens_have_no_codes() -> None:
    tokens, codebook = torch.empty(0, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    assert search.residual_codes(tokens, codebook, 2).shape == (0, 2)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on any device: the interpreter's."""
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(onednn, "available", lambda device: False)


@pytest.mark.usefixtures("everywhere")
def test_a_fused_network_gives_what_the_plain_one_does() -> None:
    model = small_model(variant="v2")
    model.use_local_pooling(True)
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    assert forms(model, DEVICE, torch.bfloat16) == (Form.KERNELS,)
    with torch.inference_mode():
        theirs = model(x, 1)
        ours = lowered(model, torch.float32, Form.KERNELS).to(DEVICE)(x.to(DEVICE), 1)
    assert relative(ours.restored, theirs.restored) < 1e-5


@pytest.mark.usefixtures("everywhere")
def test_networks_that_the_kernels_do_not_know_are_not_fused() -> None:
    def exact() -> DiffCode:
        model = small_model(tlc_exact=True)
        model.use_local_pooling(True)
        return model

    three_levels = small_model(channels=(4, 6, 8), blocks=(1, 1, 1))
    for model in (exact(), three_levels, small_model(gate="switch")):
        assert forms(model, DEVICE, torch.bfloat16) == ()


def test_kernels_are_for_gpus() -> None:
    assert not kernels.available(torch.device("cpu"))
    assert Form.KERNELS not in forms(small_model(), torch.device("cpu"), torch.float32)
