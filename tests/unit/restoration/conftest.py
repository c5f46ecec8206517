"""Small networks with all their parts, single parts, and bundles of networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from restoration.bundle import write_bundle
from restoration.diffcode import DiffCode, DiffCodeConfig
from restoration.tasks import RestorationTask

Module = TypeVar("Module", bound=nn.Module)

FIELDS: dict[str, Any] = {
    "name": "test",
    "version": "1.0",
    "licence": "Apache-2.0",
    "tasks": [task.value for task in RestorationTask],
}


def small_config(**changes: Any) -> DiffCodeConfig:
    values: dict[str, Any] = {
        "channels": (4, 6, 8, 8),
        "blocks": (1, 1, 1, 1),
        "latent_dim": 8,
        "codes": 16,
        "depths": 3,
        "tlc_train": 32,
    }
    return DiffCodeConfig(**values | changes)


def small_model(seed: int = 0, **changes: Any) -> DiffCode:
    """A network in which every path carries a signal: no parameter is left at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DiffCode(small_config(**changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
                if name == "bank.weight":
                    parameter[:, 0] = 0.0
    return model.eval()


@pytest.fixture
def make_model() -> Callable[..., DiffCode]:
    """A small random network; keywords change its configuration."""
    return small_model


def stirred(module: Module) -> Module:
    """A part of a network with no parameter at rest."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def images(*shape: int) -> Tensor:
    """White noise (B, C, H, W), channels_last."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    return values.contiguous(memory_format=torch.channels_last)


def quiet(model: DiffCode) -> DiffCode:
    """The network with its last convolution at zero, so that it returns its input."""
    with torch.no_grad():
        for parameter in model.backbone.emit.parameters():
            parameter.zero_()
    return model


@pytest.fixture
def manifest_fields() -> dict[str, Any]:
    """What a caller of `write_bundle` has to say."""
    return dict(FIELDS)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both bundles, which no test may change."""
    folder = tmp_path_factory.mktemp("bundles")
    write_bundle(folder / "random", small_model(), FIELDS, "# Card\n", half=False)
    write_bundle(folder / "idle", quiet(small_model()), FIELDS)
    return folder


@pytest.fixture
def bundle(tmp_path: Path, written: Path) -> Path:
    """A bundle of the small random network."""
    return shutil.copytree(written / "random", tmp_path / "bundle")


@pytest.fixture
def idle_bundle(tmp_path: Path, written: Path) -> Path:
    """A bundle of a network that returns its input."""
    return shutil.copytree(written / "idle", tmp_path / "idle")


@pytest.fixture(scope="session")
def heads() -> Tensor:
    """Head-like discs with 1/f texture and noise, magnitude: (4, 136, 136)."""
    slices, size = 4, 136
    generator = torch.Generator().manual_seed(1)
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = torch.linspace(0.6, 0.8, slices)[:, None, None]
    head = (x.square() + y.square() * 1.4 < radius.square()).float()
    white = torch.randn(slices, size, size, generator=generator)
    k = torch.fft.fftfreq(size, 1 / size)
    decay = 1 / (1 + (k[:, None].square() + k[None, :].square()).sqrt())
    texture = torch.fft.ifft2(torch.fft.fft2(white) * decay).real
    noise = 0.02 * torch.randn(slices, size, size, generator=generator)
    return 800 * (head * (1 + texture) + noise).abs()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
