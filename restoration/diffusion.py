"""Latent diffusion over T steps that estimates high-quality features (DiffCode Sec. 2.2, Eq. 4–6).

As in DiffIR (Xia et al., ICCV 2023), whose chain the paper adopts, the reverse process draws no
noise and the loss falls on its last output. By default the network predicts z₀ rather than ε, as
DiffIR's code does: ``docs/decisions/0008-x0-chain.md`` says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.1  # of the denoiser's LeakyReLU


@dataclass(frozen=True)
class Schedule:
    """Noise schedule of T steps; every tensor is (T,), fp64, index 0 = step t = 1."""

    betas: Tensor
    alpha_bars: Tensor
    posterior_z0: Tensor  #: coefficient of ẑ₀ in the posterior mean of z_{t−1}
    posterior_zt: Tensor  #: coefficient of z_t in the posterior mean of z_{t−1}

    @property
    def steps(self) -> int:
        return len(self.betas)


def make_schedule(steps: int, beta: tuple[float, float], spacing: str = "linear") -> Schedule:
    """β from ``beta[0]`` to ``beta[1]``, linear in β (paper) or in √β ("sqrt", as LDM's code)."""
    if spacing not in ("linear", "sqrt"):
        raise ValueError(f"diffusion spacing must be 'linear' or 'sqrt', not {spacing!r}")
    power = 1.0 if spacing == "linear" else 0.5
    low, high = (torch.tensor(b, dtype=torch.float64) ** power for b in beta)
    betas = torch.linspace(float(low), float(high), steps, dtype=torch.float64) ** (1.0 / power)
    alpha_bars = torch.cumprod(1.0 - betas, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
    return Schedule(
        betas=betas,
        alpha_bars=alpha_bars,
        posterior_z0=previous.sqrt() * betas / (1.0 - alpha_bars),
        posterior_zt=(1.0 - betas).sqrt() * (1.0 - previous) / (1.0 - alpha_bars),
    )


class Denoiser(nn.Module):
    """Five linear layers on cat(condition, t/(10T), z_t) at each latent position (DiffIR).

    The last activation of DiffIR's network is left out: its target is non-negative, ours is signed.
    """

    def __init__(self, latent_dim: int, hidden_layers: int = 4) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.first = nn.Linear(2 * latent_dim + 1, latent_dim)
        self.rest = nn.ModuleList(nn.Linear(latent_dim, latent_dim) for _ in range(hidden_layers))

    def condition(self, c: Tensor) -> Tensor:
        """The part of the first layer that no step changes: (N, d) → (N, d)."""
        return F.linear(c, self.first.weight[:, : self.latent_dim], self.first.bias)

    def forward(self, conditioned: Tensor, time: float, z: Tensor) -> Tensor:
        weight = self.first.weight
        x = conditioned + time * weight[:, self.latent_dim]
        x = x + F.linear(z, weight[:, self.latent_dim + 1 :])  # (N, d)
        for layer in self.rest:
            x = layer(F.leaky_relu(x, SLOPE))
        return x


class LatentDiffusion(nn.Module):
    """The T-step chain; condition, latent and noise are (B, d, h, w); runs in fp32."""

    def __init__(
        self,
        latent_dim: int,
        steps: int = 8,
        beta: tuple[float, float] = (0.1, 0.99),
        spacing: str = "linear",
        parameterisation: str = "x0",
    ) -> None:
        super().__init__()
        if parameterisation not in ("x0", "eps"):
            raise ValueError(f"parameterisation must be 'x0' or 'eps', not {parameterisation!r}")
        self.schedule = make_schedule(steps, beta, spacing)
        self.parameterisation = parameterisation
        self.denoiser = Denoiser(latent_dim)

    def diffuse(self, latent: Tensor, noise: Tensor) -> Tensor:
        """z_T of the forward process, q(z_T | z₀): √ᾱ_T z + √(1−ᾱ_T) ε (Eq. 4)."""
        alpha_bar = float(self.schedule.alpha_bars[-1])
        return math.sqrt(alpha_bar) * latent + math.sqrt(1.0 - alpha_bar) * noise

    def sample(self, condition: Tensor, start: Tensor) -> Tensor:
        """Run the chain from z_T = ``start`` to ẑ₀; gradients flow through all steps."""
        with torch.autocast(condition.device.type, enabled=False):
            z = _tokens(start.float())
            conditioned = self.denoiser.condition(_tokens(condition.float()))
            for t in reversed(range(self.schedule.steps)):
                predicted = self.denoiser(conditioned, t / (10.0 * self.schedule.steps), z)
                z = self._step(t, predicted, z)
        return _image(z, condition)

    def forward(self, condition: Tensor, latent: Tensor, noise: Tensor) -> Tensor:
        """Training: the chain from the diffused target; the loss is ‖ẑ − z‖₁ (Eq. 6)."""
        return self.sample(condition, self.diffuse(latent, noise))

    def _step(self, t: int, predicted: Tensor, z: Tensor) -> Tensor:
        s = self.schedule
        if self.parameterisation == "x0":
            return float(s.posterior_z0[t]) * predicted + float(s.posterior_zt[t]) * z
        beta, alpha_bar = float(s.betas[t]), float(s.alpha_bars[t])
        drift = beta / math.sqrt(1.0 - alpha_bar) * predicted
        return (z - drift) / math.sqrt(1.0 - beta)  # Eq. 5


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # (B·h·w, d)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    b, d, h, w = like.shape
    return tokens.view(b, h, w, d).permute(0, 3, 1, 2)
