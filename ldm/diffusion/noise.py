"""Noise levels: the training distributions, the table of timesteps, and the grids that samplers walk.

Everywhere `x = x0 + sigma * n`. A variance-preserving schedule with cumulative product `alpha_bar` has
`sigma = sqrt((1 - alpha_bar) / alpha_bar)` (Karras et al. 2022, "Elucidating the design space", appendix C).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TIMESTEPS = 1000
BETA_START, BETA_END = {"linear": 1e-4, "scaled_linear": 0.00085}, {"linear": 0.02, "scaled_linear": 0.012}


@dataclass(frozen=True)
class NoiseLevels:
    """Training noise levels: `table` (T,) of sigmas, ascending, and how a level is drawn from it.

    `noise` is `linear` (Ho et al. 2020), `scaled_linear` (Rombach et al. 2022), `cosine` (Nichol & Dhariwal 2021):
    timesteps drawn uniformly; `lognormal` (Karras et al. 2022: ln sigma ~ N(-1.2, 1.2²)) or `uniform` (flow
    matching: sigma / (1 + sigma) uniform), both within [sigma_min, sigma_max].
    """

    noise: str
    table: Tensor

    @property
    def sigma_min(self) -> float:
        return float(self.table[0])

    @property
    def sigma_max(self) -> float:
        return float(self.table[-1])

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Sigmas for a training batch, float32 (count,)."""
        if self.noise == "lognormal":
            sigma = (1.2 * torch.randn(count, generator=generator) - 1.2).exp()
            return sigma.clamp(self.sigma_min, self.sigma_max)
        # Stratified over the batch: the same distribution with less spread between batches (Kingma et al. 2021, VDM).
        position = (torch.rand((), generator=generator) + torch.arange(count) / count) % 1
        if self.noise == "uniform":
            low, high = (s / (1 + s) for s in (self.sigma_min, self.sigma_max))
            t = low + position * (high - low)
            return t / (1 - t)
        return self.table[(position * len(self.table)).long()].float()

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Fractional training timesteps of noise levels, interpolated in ln sigma, like `sigma`."""
        logs = self.table.log().to(sigma)
        log_sigma = sigma.log()
        upper = torch.searchsorted(logs, log_sigma).clamp(1, len(logs) - 1)
        low, high = logs[upper - 1], logs[upper]
        return (upper - 1 + (log_sigma - low) / (high - low)).clamp(0, len(logs) - 1)


def noise_levels(noise: str, sigma_max: float) -> NoiseLevels:
    """The named training distribution, ending at `sigma_max` (the cosine table would go on to 2e4)."""
    if noise in ("lognormal", "uniform"):
        return NoiseLevels(noise, torch.logspace(math.log10(0.002), math.log10(sigma_max), TIMESTEPS, dtype=torch.float64))
    if noise == "cosine":
        t = torch.linspace(0, 1, TIMESTEPS + 1, dtype=torch.float64)
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif noise == "linear":
        betas = torch.linspace(BETA_START[noise], BETA_END[noise], TIMESTEPS, dtype=torch.float64)
    else:
        betas = torch.linspace(BETA_START[noise] ** 0.5, BETA_END[noise] ** 0.5, TIMESTEPS, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    table = ((1 - alpha_bar) / alpha_bar).sqrt()
    return NoiseLevels(noise, table[table <= sigma_max])


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels for `steps` sampler steps, descending and ending in 0, float64 (steps + 1,).

    Karras et al. 2022, equation 5.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])
