from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from restoration.diffusion import Denoiser, LatentDiffusion, make_schedule

PAPER = make_schedule(8, (0.1, 0.99))


def expand(values: Tensor) -> list[float]:
    return [round(float(v), 4) for v in values]


def test_the_linear_schedule_is_the_papers() -> None:
    assert expand(PAPER.betas) == [0.1, 0.2271, 0.3543, 0.4814, 0.6086, 0.7357, 0.8629, 0.99]
    assert float(PAPER.alpha_bars[-1]) == pytest.approx(3.3044e-5, rel=1e-4)
    assert PAPER.steps == 8


def test_the_square_root_schedule_is_that_of_latent_diffusion_code() -> None:
    schedule = make_schedule(8, (0.1, 0.99), "sqrt")
    assert expand(schedule.betas) == [0.1, 0.1707, 0.2603, 0.3686, 0.4957, 0.6417, 0.8064, 0.99]
    assert float(schedule.alpha_bars[-1]) == pytest.approx(1.219e-4, rel=1e-3)


def test_the_posterior_mean_has_the_closed_form_coefficients() -> None:
    assert float(PAPER.posterior_z0[0]) == pytest.approx(1.0, abs=1e-15)
    assert float(PAPER.posterior_zt[0]) == 0.0
    assert float(PAPER.posterior_z0[7]) == pytest.approx(0.0569108, abs=5e-8)
    assert float(PAPER.posterior_zt[7]) == pytest.approx(0.0996729, abs=5e-8)
    assert expand(PAPER.posterior_z0) == [1, 0.7078, 0.5364, 0.4206, 0.3232, 0.2276, 0.1344, 0.0569]
    assert expand(PAPER.posterior_zt) == [0, 0.2888, 0.4441, 0.5171, 0.5281, 0.4788, 0.3626, 0.0997]


def test_the_posterior_mean_keeps_the_forward_process() -> None:
    # E[z_{t-1}] of the posterior at z_t = √ᾱ_t z_0 is √ᾱ_{t-1} z_0.
    previous = torch.cat([torch.ones(1, dtype=torch.float64), PAPER.alpha_bars[:-1]]).sqrt()
    mean = PAPER.posterior_z0 + PAPER.posterior_zt * PAPER.alpha_bars.sqrt()
    torch.testing.assert_close(mean, previous)


def test_the_start_of_the_chain_hides_its_target() -> None:
    # Training starts from q(z_T | z_0); that equals noise to -45 dB, so inference may start there.
    assert math.sqrt(float(PAPER.alpha_bars[-1])) < 0.02


def test_an_unknown_spacing_or_parameterisation_is_refused() -> None:
    with pytest.raises(ValueError, match="spacing"):
        make_schedule(8, (0.1, 0.99), "cosine")
    with pytest.raises(ValueError, match="parameterisation"):
        LatentDiffusion(4, parameterisation="v")


def test_the_denoiser_has_the_published_size() -> None:
    assert sum(p.numel() for p in LatentDiffusion(256).parameters()) == 394_752


def test_the_denoiser_is_five_layers_on_condition_time_and_latent() -> None:
    net = Denoiser(6)
    c, z, time = torch.randn(9, 6), torch.randn(9, 6), 0.0375
    x = net.first(torch.cat([c, torch.full((9, 1), time), z], dim=1))
    for layer in net.rest:
        x = layer(F.leaky_relu(x, 0.1))
    torch.testing.assert_close(net(net.condition(c), time, z), x)
    assert bool((x < 0).any())


def test_the_chain_is_the_posterior_mean_of_the_prediction_at_every_step() -> None:
    chain = LatentDiffusion(5)
    condition, start = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    c = condition.permute(0, 2, 3, 1).reshape(-1, 5)
    z = start.permute(0, 2, 3, 1).reshape(-1, 5)
    net = chain.denoiser
    for t in range(7, -1, -1):
        z0 = net(net.condition(c), t / 80, z)
        z = PAPER.posterior_z0[t].float() * z0 + PAPER.posterior_zt[t].float() * z
    expected = z.view(2, 3, 4, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(chain.sample(condition, start), expected)


def test_what_comes_out_is_the_last_output_of_the_network() -> None:
    chain = LatentDiffusion(4)
    with torch.no_grad():
        chain.denoiser.rest[-1].weight.zero_()
        chain.denoiser.rest[-1].bias.copy_(torch.tensor([1.0, -2.0, 3.0, -4.0]))
    out = chain.sample(torch.randn(1, 4, 2, 2), 1e3 * torch.randn(1, 4, 2, 2))
    expected = torch.tensor([1.0, -2.0, 3.0, -4.0]).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert torch.equal(out, expected)


def test_the_chain_draws_no_noise() -> None:
    chain = LatentDiffusion(4)
    condition, start = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    state = torch.random.get_rng_state()
    assert torch.equal(chain.sample(condition, start), chain.sample(condition, start))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_positions_do_not_mix() -> None:
    chain = LatentDiffusion(4)
    condition, start = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    other = condition.clone()
    other[..., 2, 2] += 1
    a, b = chain.sample(condition, start), chain.sample(other, start)
    assert torch.equal(a[..., :2, :], b[..., :2, :])
    assert not torch.equal(a[..., 2, 2], b[..., 2, 2])


def test_training_starts_from_the_diffused_target() -> None:
    chain = LatentDiffusion(4)
    latent, noise, condition = torch.randn(3, 1, 4, 2, 2).unbind()
    alpha_bar = float(PAPER.alpha_bars[-1])
    diffused = math.sqrt(alpha_bar) * latent + math.sqrt(1 - alpha_bar) * noise
    torch.testing.assert_close(chain.diffuse(latent, noise), diffused)
    torch.testing.assert_close(chain(condition, latent, noise), chain.sample(condition, diffused))


def test_the_gradient_goes_back_through_all_steps() -> None:
    chain = LatentDiffusion(4)
    start = torch.randn(1, 4, 2, 2, requires_grad=True)
    condition = torch.randn(1, 4, 2, 2, requires_grad=True)
    chain.sample(condition, start).abs().mean().backward()
    for tensor in (start, condition, *chain.parameters()):
        assert tensor.grad is not None
        assert bool(tensor.grad.any())
        assert bool(tensor.grad.isfinite().all())


def test_the_noise_parameterisation_is_equation_five() -> None:
    chain = LatentDiffusion(3, steps=1, beta=(0.3, 0.3), parameterisation="eps")
    condition, z = torch.randn(2, 1, 3, 1, 1).unbind()
    net = chain.denoiser
    eps = net(net.condition(condition.flatten()[None]), 0.0, z.flatten()[None])
    expected = (z.flatten() - 0.3 / math.sqrt(0.3) * eps[0]) / math.sqrt(0.7)
    torch.testing.assert_close(chain.sample(condition, z).flatten(), expected)


def test_the_chain_stays_in_single_precision_under_autocast() -> None:
    chain = LatentDiffusion(4)
    condition, start = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = chain.sample(condition, start)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, chain.sample(condition, start))
