from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.transform import iradon

from training.projector import ParallelBeam, fbp, osem


def disc(size: int, radius: float, x: float = 0, y: float = 0) -> torch.Tensor:
    """A disc with edges averaged over 8 x 8 points of each pixel, (1, size, size)."""
    fine = (torch.arange(size * 8, dtype=torch.float64) - (size * 8 - 1) / 2) / 8
    inside = ((fine[None, :] - x) ** 2 + (fine[:, None] - y) ** 2 <= radius**2).double()
    return torch.nn.functional.avg_pool2d(inside[None, None], 8)[0]


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize(("shape", "bins"), [((13, 18), None), ((16, 16), 17), ((9, 31), 12)])
def test_the_adjoint_is_exact(shape: tuple[int, int], bins: int | None, matrix: bool) -> None:
    beam = ParallelBeam(shape, 7, bins=bins, dtype=torch.float64, matrix=matrix)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, *shape, dtype=torch.float64, generator=generator)
    sinogram = torch.rand(3, 7, beam.bins, dtype=torch.float64, generator=generator)
    forward = (beam.forward(image) * sinogram).sum()
    backward = (image * beam.adjoint(sinogram)).sum()
    assert float(forward - backward) == pytest.approx(0, abs=1e-10 * float(forward))


def test_the_adjoint_is_what_autograd_finds() -> None:
    beam = ParallelBeam((12, 10), 5, dtype=torch.float64)
    image = torch.rand(2, 12, 10, dtype=torch.float64, requires_grad=True)
    sinogram = torch.rand(2, 5, beam.bins, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((beam.forward(image) * sinogram).sum(), image)
    torch.testing.assert_close(gradient, beam.adjoint(sinogram), rtol=1e-12, atol=1e-12)


def test_the_matrix_and_the_loop_agree() -> None:
    loop, matrix = (
        ParallelBeam((14, 20), 9, dtype=torch.float64, matrix=kept) for kept in (False, True)
    )
    image = torch.rand(4, 14, 20, dtype=torch.float64)
    torch.testing.assert_close(loop.forward(image), matrix.forward(image))
    sinogram = torch.rand(4, 9, loop.bins, dtype=torch.float64)
    torch.testing.assert_close(loop.adjoint(sinogram), matrix.adjoint(sinogram))


def test_every_view_of_an_image_holds_all_of_it() -> None:
    image = torch.rand(2, 15, 22, dtype=torch.float64)
    sums = ParallelBeam((15, 22), 11, dtype=torch.float64).forward(image).sum(-1)
    torch.testing.assert_close(sums, image.sum((1, 2))[:, None].expand(2, 11))


def test_the_projection_of_a_disc_is_its_chord() -> None:
    size, radius, x, y = 129, 40.0, 12.0, -7.0
    angles = [0.1, 0.9, 1.7, 2.6]
    beam = ParallelBeam(size, angles, dtype=torch.float64)
    sinogram = beam.forward(disc(size, radius, x, y))[0]
    s = torch.arange(beam.bins, dtype=torch.float64) - (beam.bins - 1) / 2
    for view, angle in zip(sinogram, angles, strict=True):
        offset = s - (x * math.cos(angle) - y * math.sin(angle))
        chord = 2 * torch.sqrt((radius**2 - offset**2).clamp_min(0))
        inner = offset.abs() < radius - 3
        assert float((view - chord)[inner].abs().max()) < 1.5
        assert float((view - chord).abs().mean()) < 0.4


def test_fbp_is_scikit_images_iradon() -> None:
    size = 65
    beam = ParallelBeam(size, 60, bins=size, dtype=torch.float64)
    sinogram = beam.forward(disc(size, 20, 4, -6))
    ours = fbp(beam, sinogram)[0].numpy()
    theirs = iradon(sinogram[0].numpy().T, theta=np.degrees(beam.angles), circle=True)
    y, x = np.mgrid[:size, :size] - size // 2
    inside = np.hypot(y, x) < size // 2 - 1
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-10)


def test_fbp_returns_the_image_in_its_units() -> None:
    size = 96
    beam = ParallelBeam((size, size), 180)
    image = disc(size, 30, 5, 3).float() * 0.02
    restored = fbp(beam, beam.forward(image))
    core = disc(size, 24, 5, 3).bool()
    assert float(restored[core].mean()) == pytest.approx(0.02, rel=0.005)
    assert float((restored - image)[core].std()) < 0.0008


def test_apodisation_lowers_noise_and_keeps_the_mean() -> None:
    beam = ParallelBeam(64, 90)
    noisy = beam.forward(disc(64, 20).float()) + torch.randn(
        1, 90, beam.bins, generator=torch.Generator().manual_seed(1)
    )
    core = disc(64, 15).bool()
    sharp, smooth, smoother = (
        fbp(beam, noisy, apodisation=window, cutoff=cutoff)[core]
        for window, cutoff in ((None, 1.0), ("hann", 1.0), ("hann", 0.5))
    )
    assert smoother.std() < 0.7 * smooth.std() < 0.7 * sharp.std()
    assert float(smooth.mean()) == pytest.approx(float(sharp.mean()), abs=0.02)


def test_osem_finds_the_activity_behind_noiseless_counts() -> None:
    size, views, subsets = 32, 24, 4
    angles = [math.pi * k / views for k in range(views)]
    beams = [
        ParallelBeam(size, angles[k::subsets], bins=45, dtype=torch.float64, matrix=True)
        for k in range(subsets)
    ]
    truth = 2 * disc(size, 10) + disc(size, 4, 3, 2)
    factors = [torch.full((1, views // subsets, 45), 0.6, dtype=torch.float64)] * subsets
    background = [torch.full_like(factor, 0.3) for factor in factors]
    counts = [f * b.forward(truth) + r for f, b, r in zip(factors, beams, background, strict=True)]
    image = osem(beams, counts, factors, background, iterations=30)
    assert float(image.min()) >= 0
    assert float((image - truth).abs().mean()) < 0.02
    assert float(image.sum()) == pytest.approx(float(truth.sum()), rel=1e-3)


def test_osem_leaves_pixels_that_no_bin_sees_at_zero() -> None:
    beam = ParallelBeam(16, [0.0, math.pi / 2], bins=9, dtype=torch.float64, matrix=True)
    factor = torch.ones(1, 2, 9, dtype=torch.float64)
    counts = beam.forward(torch.ones(1, 16, 16, dtype=torch.float64))
    image = osem([beam], [counts], [factor], [torch.zeros_like(factor)], iterations=2)
    assert float(image[0, 0, 0]) == 0
    assert float(image[0, 8, 8]) > 0
    assert torch.isfinite(image).all()


@pytest.mark.parametrize("options", [{"apodisation": "hamming"}, {"cutoff": 0.0}, {"cutoff": 1.5}])
def test_fbp_refuses_a_window_it_does_not_have(options: dict[str, object]) -> None:
    beam = ParallelBeam(16, 4)
    with pytest.raises(ValueError, match="must be"):
        fbp(beam, torch.zeros(1, 4, beam.bins), **options)  # type: ignore[arg-type]


def test_a_projector_needs_a_view() -> None:
    with pytest.raises(ValueError, match="at least one angle"):
        ParallelBeam(16, [])
